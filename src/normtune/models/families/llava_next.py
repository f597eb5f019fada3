"""LLaVA 1.6 (LLaVA-NeXT): the whole image and tiles of it (Liu et al. 2024).

An image is encoded twice: as a whole at the encoder's size, and in tiles of that size. The features of the
tiles are arranged like the image. Features of padding are left out, and a learned `image_newline` ends each row. The
number of image tokens therefore depends on the image's size.
"""

from __future__ import annotations

from typing import Any

from normtune.models.families.llava import LlavaFamily

_MISSPELT_END = r"'<\s> '"  # the template of llava-v1.6-mistral writes this instead of the end token


class LlavaNextFamily(LlavaFamily):
    """LLaVA 1.6 and LLaVA-NeXT, in transformers' layout."""

    # of an image: [tiles, 3, size, size], and [2], its height and width in pixels
    image_keys = ("pixel_values", "image_sizes")
    concatenated_keys = ("pixel_values",)

    def __init__(self, model: Any, processor: Any) -> None:
        # without this, the model would be trained to end its answers with these letters
        if isinstance(processor.chat_template, str):
            processor.chat_template = processor.chat_template.replace(_MISSPELT_END, "eos_token")
        super().__init__(model, processor)
