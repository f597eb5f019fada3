"""LLaVA-OneVision: SigLIP's features of the whole image and of tiles, and Qwen2 (arXiv 2408.03326).

Every image is read in tiles, also the views of a study. Transformers reads the images of a conversation with several
images without tiles.
"""

from __future__ import annotations

from transformers import LlavaOnevisionProcessor

from normtune.models.causal.image_features import FEATURES
from normtune.models.families.llava_next import LlavaNextFamily
from normtune.models.types import Pixels


class LlavaOnevisionFamily(LlavaNextFamily):
    """LLaVA-OneVision in transformers' layout."""

    processor_class = LlavaOnevisionProcessor

    def image_text(self, pixels: Pixels) -> str:
        if FEATURES in pixels:
            return super().image_text(pixels)
        values = {"batch_num_images": [1], "image_sizes": pixels["image_sizes"][None]}
        return self.processor.replace_image_token(values | {"pixel_values": pixels["pixel_values"][None]}, 0)
