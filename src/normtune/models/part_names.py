"""Names of the parts and roles of a model. Imports nothing, so that the command line can use it."""

from __future__ import annotations

PARTS = ("vision", "connector", "encoder", "decoder", "language")
ROLES = ("embedding", "norm", "attention", "ffn", "head", "other")
IMAGE_PARTS = ("vision", "connector")  # their norms are given images, those of the other parts text
