"""InternVL in transformers' layout: an image is cut into square patches of one size (arXiv 2404.16821)."""

from __future__ import annotations

import torch
from PIL import Image
from transformers import InternVLProcessor

from normtune.models.causal.family import CausalFamily
from normtune.models.types import Pixels


class InternVLFamily(CausalFamily):
    """InternVL 2.5, 3 and 3.5."""

    processor_class = InternVLProcessor
    image_end_token = "end_image_token"
    concatenated_keys, unbatched_keys = ("pixel_values",), ("patches",)

    def preprocess_image(self, image: Image.Image) -> Pixels:
        """Cut one image into square patches: pixel_values [patches, 3, size, size]; patches, their number."""
        prepared = self.processor.image_processor([image], return_tensors="pt", crop_to_patches=True)
        patches = prepared["pixel_values"]
        return {"pixel_values": patches, "patches": torch.tensor(len(patches))}

    def image_text(self, pixels: Pixels) -> str:
        return self.processor.replace_image_token({"num_patches": [int(pixels["patches"])]}, 0)
