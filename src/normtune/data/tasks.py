"""The report task, for every family: what is asked of a study, and how many tokens a report may have."""

from __future__ import annotations

PROMPT = "Describe the findings of this image."  # where a report has no question of its own
REFERENCE_TOKENS = 512  # of a reference in training, end token included, where the model has room for them
WRITTEN_TOKENS = 128  # the longest report that is written, where nothing else is said
