"""Gemma 3 and MedGemma (arXiv 2503.19786).

Tokens of an image attend to each other in both directions, and most layers attend within a window.
"""

from __future__ import annotations

from torch import Tensor

from normtune.models.causal.family import CausalFamily
from normtune.models.causal.shared_prefix import image_blocks
from normtune.models.types import Batch, Pixels


class Gemma3Family(CausalFamily):
    """Gemma 3 with one view an image (no pan-and-scan), the default of its processor."""

    image_options = {"do_pan_and_scan": False}  # noqa: RUF012

    @property
    def image_end(self) -> tuple[str, str]:
        return self.processor.tokenizer.eoi_token, "\n\n"

    def image_text(self, pixels: Pixels) -> str:
        return self.processor.full_image_sequence

    def bidirectional_blocks(self, batch: Batch) -> Tensor:
        return image_blocks(batch["input_ids"], self.image_token_id)
