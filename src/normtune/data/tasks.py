"""The prompt of reports, and the token limits of the two tasks: answering questions and writing reports.

A reference is the text that a model is trained on. The other limits apply to text that a model generates.
"""

from __future__ import annotations

REPORT_PROMPT = "Describe the findings of this image."  # for reports without a question in the data
MAX_ANSWER_TOKENS = 16  # default limit for a generated answer
MAX_REPORT_TOKENS = 128  # default limit for a generated report
MAX_ANSWER_REFERENCE_TOKENS = 256  # limit for an answer in training, with the end token
MAX_REPORT_REFERENCE_TOKENS = 512  # for a report; less where the model has fewer positions
