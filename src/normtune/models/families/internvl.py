"""InternVL in transformers' layout: an image is cut into square patches of one size (arXiv 2404.16821)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import InternVLProcessor

from normtune.models.causal.family import CausalFamily
from normtune.models.processors import image_only
from normtune.models.types import Pixels


class InternVLFamily(CausalFamily):
    """InternVL 2.5, 3 and 3.5."""

    @classmethod
    def load_processor(cls, source: str, model_type: str) -> Any:
        return image_only(InternVLProcessor, source)

    @property
    def image_end(self) -> tuple[str, str]:
        return self.processor.end_image_token, ""

    def preprocess_image(self, image: Image.Image) -> Pixels:
        """Cut one image into square patches: pixel_values [patches, 3, size, size]; patches, their number."""
        prepared = self.processor.image_processor([image], return_tensors="pt", crop_to_patches=True)
        patches = prepared["pixel_values"]
        return {"pixel_values": patches, "patches": torch.tensor(len(patches))}

    def image_text(self, pixels: Pixels) -> str:
        return self.processor.replace_image_token({"num_patches": [int(pixels["patches"])]}, 0)

    def image_inputs(self, images: Sequence[Pixels]) -> dict[str, Tensor]:
        return {"pixel_values": torch.cat([image["pixel_values"] for image in images])}
