"""LLaVA 1.6 (LLaVA-NeXT): the whole image and tiles of it, padding cut off, rows ended (Liu et al. 2024).

An image is seen whole at the encoder's size, and again in tiles of that size, whose features are laid out as
the image is, without what padding made of them, each row ended by a learned `image_newline`. So the number of
its tokens follows from its size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from normtune.models.families.llava import LlavaFamily
from normtune.models.types import Pixels

_MISSPELT_END = r"'<\s> '"  # what the template of llava-v1.6-mistral has for the end of an answer


class LlavaNextFamily(LlavaFamily):
    """LLaVA 1.6 and LLaVA-NeXT, in transformers' layout."""

    model_types = ("llava_next",)
    image_keys = ("pixel_values", "image_sizes")

    def __init__(self, model: Any, processor: Any) -> None:
        if isinstance(processor.chat_template, str):  # trained as it is, answers would end with those letters
            processor.chat_template = processor.chat_template.replace(_MISSPELT_END, "eos_token")
        super().__init__(model, processor)

    def image_inputs(self, images: Sequence[Pixels]) -> dict[str, Tensor]:
        """pixel_values [tiles of all images, 3, size, size]; image_sizes [images, 2], height and width."""
        return {
            "pixel_values": torch.cat([image["pixel_values"] for image in images]),
            "image_sizes": torch.stack([image["image_sizes"] for image in images]),
        }
