"""The two tasks, answering questions and writing reports: the prompt and the limits in tokens.

A reference is the text that a model is trained on; the other limits bound the text that a model generates.
"""

from __future__ import annotations

REPORT_PROMPT = "Describe the findings of this image."  # for a report that has no question of its own
MAX_ANSWER_TOKENS = 16  # default limit of a generated answer
MAX_REPORT_TOKENS = 128  # default limit of a generated report
MAX_ANSWER_REFERENCE_TOKENS = 256  # of an answer in training, end token included
MAX_REPORT_REFERENCE_TOKENS = 512  # of a report in training, end token included, where the model has room
