"""Mistral Small 3 and Ministral 3: Pixtral's image encoder, for images of any size (arXiv 2410.07073).

Every row of an image ends with the token [IMG_BREAK], and the last row with [IMG_END].
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import ProcessorMixin
from transformers.models.pixtral.image_processing_pil_pixtral import PixtralImageProcessorPil

from normtune.models.causal.family import CausalFamily
from normtune.models.types import Pixels


class PixtralProcessor(ProcessorMixin):
    """In place of transformers' processor of this name: its module cannot be imported without torchvision."""

    def __init__(
        self,
        image_processor: Any,
        tokenizer: Any,
        patch_size: int = 16,
        spatial_merge_size: int = 1,
        chat_template: str | None = None,
        image_token: str = "[IMG]",
        image_break_token: str = "[IMG_BREAK]",
        image_end_token: str = "[IMG_END]",
    ) -> None:
        super().__init__(image_processor, tokenizer, chat_template=chat_template)
        self.patch_size, self.spatial_merge_size = patch_size, spatial_merge_size
        self.image_token, self.image_break_token, self.image_end_token = image_token, image_break_token, image_end_token
        self.image_token_id = tokenizer.convert_tokens_to_ids(image_token)

    @property
    def token_edge(self) -> int:
        """The height and width in pixels of the square that becomes one token."""
        return self.patch_size * self.spatial_merge_size

    def _process_images(self, images: Any, **options: Any) -> Any:
        return super()._process_images(images, **options | {"patch_size": self.token_edge})

    def replace_image_token(self, image_inputs: dict[str, Any], image_idx: int, **_: Any) -> str:
        """The tokens of one image, row by row."""
        height, width = (int(edge) // self.token_edge for edge in image_inputs["image_sizes"][image_idx])
        rows = self.image_break_token.join([self.image_token * width] * height)
        return rows + self.image_end_token


class Mistral3Family(CausalFamily):
    """Mistral Small 3.1 and 3.2, and Ministral 3, in transformers' layout."""

    image_keys = ("pixel_values", "image_sizes")
    processor_class, image_processor_class = PixtralProcessor, PixtralImageProcessorPil
    image_end_token = "image_end_token"

    @property
    def image_options(self) -> dict[str, Any]:  # type: ignore[override]
        return {"patch_size": self.processor.token_edge}

    def image_inputs(self, images: Sequence[Pixels]) -> dict[str, Tensor]:
        """Batch images: pixel_values [images, 3, height, width] of the largest, image_sizes [images, 2].

        The encoder cuts the padding on the right and at the bottom off again.
        """
        sizes = torch.stack([image["image_sizes"] for image in images])
        height, width = sizes.amax(0).tolist()
        pixels = [image["pixel_values"] for image in images]
        padded = [F.pad(values, (0, width - values.shape[2], 0, height - values.shape[1])) for values in pixels]
        return {"pixel_values": torch.stack(padded), "image_sizes": sizes}
