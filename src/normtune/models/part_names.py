"""Names of the parts and roles of a model.

This module imports nothing, so that the command line can use it without loading torch.
"""

from __future__ import annotations

# A model has a "language" part, or an "encoder" and a "decoder" if it has two text parts (such as MISS).
PARTS = ("vision", "connector", "encoder", "decoder", "language")
ROLES = ("embedding", "norm", "attention", "ffn", "head", "other")  # what a parameter does within its part
IMAGE_PARTS = ("vision", "connector")  # the norms of these parts normalise image states, all others text states
