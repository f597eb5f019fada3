"""Idefics3 and SmolVLM: an image is cut into tiles, each a block of tokens (arXiv 2408.12637, 2504.05299)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from transformers import Idefics3Processor
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

from normtune.models.causal.family import CausalFamily
from normtune.models.processors import load_processor
from normtune.models.types import Pixels

# Imported from their modules, since transformers 5.17 finds them by name only if torchvision is installed.
_IMAGE_PROCESSORS: dict[str, Any] = {"idefics3": Idefics3ImageProcessorPil, "smolvlm": SmolVLMImageProcessorPil}


class Idefics3Family(CausalFamily):
    """Idefics3 and SmolVLM; the prompt contains each tile with its row and column, then the whole image."""

    image_end_token = "fake_image_token"

    @classmethod
    def load_processor(cls, source: str, model_type: str) -> Any:
        """Load Idefics3's processor for both types.

        SmolVLM's own needs packages for videos, and writes the same for images.
        """
        return load_processor(source, Idefics3Processor, _IMAGE_PROCESSORS[model_type])

    @property
    def decoder(self) -> Any:
        return self.model.model.text_model

    def preprocess_image(self, image: Image.Image) -> Pixels:
        """Cut one image into tiles.

        Returns:
            pixel_values [tiles, 3, height, width], pixel_attention_mask [tiles, height, width], and the
            scalars rows and cols: the grid of the tiles without the whole image, 0 if there is no grid.
        """
        prepared = self.processor.image_processor([image], return_tensors="pt", return_row_col_info=True)
        return {
            "pixel_values": prepared["pixel_values"][0],
            "pixel_attention_mask": prepared["pixel_attention_mask"][0],
            "rows": torch.tensor(int(prepared["rows"][0][0])),
            "cols": torch.tensor(int(prepared["cols"][0][0])),
        }

    def image_text(self, pixels: Pixels) -> str:
        grid = {name: [[int(pixels[name])]] for name in ("rows", "cols")}
        return self.processor.replace_image_token(grid, 0)

    def image_inputs(self, images: Sequence[Pixels]) -> dict[str, Tensor]:
        """Batch every tile as a sample of one image, padded to the largest: [tiles, 1, 3, height, width]."""
        sizes = [image["pixel_values"].shape[-2:] for image in images]
        height, width = (max(size[axis] for size in sizes) for axis in (0, 1))

        def pad_and_join(name: str) -> Tensor:
            # padded on the right and at the bottom; a mask is padded with 0, so padding is not attended
            padded = [
                F.pad(image[name], (0, width - size[1], 0, height - size[0]))
                for image, size in zip(images, sizes, strict=True)
            ]
            return torch.cat(padded)[:, None]

        return {name: pad_and_join(name) for name in ("pixel_values", "pixel_attention_mask")}
