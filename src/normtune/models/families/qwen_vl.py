"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL: images of any size, and rotary positions on three axes (M-RoPE).

Sources: Wang et al. 2024 (arXiv 2409.12191), Bai et al. 2025 (arXiv 2502.13923).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import Qwen2_5_VLProcessor, Qwen2VLProcessor, Qwen3VLProcessor

from normtune.models.causal.family import FEATURES, CausalFamily, joined
from normtune.models.causal.prompts import TokenIds
from normtune.models.causal.shared_prefix import PREFIX, SharedSequence
from normtune.models.processors import image_only
from normtune.models.types import Batch, Pixels

_PROCESSORS = {
    "qwen2_vl": Qwen2VLProcessor,
    "qwen2_5_vl": Qwen2_5_VLProcessor,
    "qwen3_vl": Qwen3VLProcessor,
}
TEXT, IMAGE = 0, 1  # what transformers' `get_rope_index` calls the kinds of tokens


class QwenVLFamily(CausalFamily):
    """An image's tokens stand at rows and columns; a question goes on after the greater of both."""

    model_types = tuple(_PROCESSORS)

    @classmethod
    def load_processor(cls, source: str, model_type: str) -> Any:
        return image_only(_PROCESSORS[model_type], source)

    @property
    def image_layers(self) -> int:  # type: ignore[override]
        """Qwen3-VL adds image features to the states of as many of the first layers."""
        return len(getattr(self.config.vision_config, "deepstack_visual_indexes", ()))

    def image_inputs(self, images: Sequence[Pixels]) -> dict[str, Tensor]:
        """pixel_values [patches of all images, patch width]; image_grid_thw [images, 3]."""
        return {
            "pixel_values": torch.cat([image["pixel_values"] for image in images]),
            "image_grid_thw": torch.stack([image["image_grid_thw"] for image in images]),
        }

    def preprocess_image(self, image: Any) -> Pixels:
        """pixel_values [patches, patch width]; image_grid_thw [3], the patches in time, height and width."""
        prepared = self.processor.image_processor([image], return_tensors="pt")
        return {
            "pixel_values": prepared["pixel_values"],
            "image_grid_thw": prepared["image_grid_thw"][0],
        }

    def image_text(self, pixels: Pixels) -> str:
        patches = int(pixels["image_grid_thw"].prod())
        return self.processor.image_token * (patches // self.processor.image_processor.merge_size**2)

    def positions(
        self, sequence: SharedSequence, prefixes: Sequence[TokenIds], pixels: Sequence[Sequence[Pixels]]
    ) -> Tensor:
        """[3, B, S]: time, height and width. Segments go on where their own conversation would."""
        positions = sequence.position_ids.expand(3, -1, -1).clone()
        for group, (prefix, images) in enumerate(zip(prefixes, pixels, strict=True)):
            ids = torch.tensor([prefix])
            grids = torch.stack([image["image_grid_thw"] for image in images])
            kinds = torch.where(ids == self.image_token_id, IMAGE, TEXT).int()
            axes, ahead = self.model.model.get_rope_index(ids, mm_token_type_ids=kinds, image_grid_thw=grids)
            own = sequence.group_of == group
            positions[:, own & (sequence.segment_of == PREFIX)] = axes[:, 0]
            positions[:, own & (sequence.segment_of > PREFIX)] += int(ahead)
        return positions

    def step_positions(self, positions: Tensor) -> Tensor:
        return positions.expand(3, -1, -1)

    def features(self, images: dict[str, Tensor]) -> dict[str, Tensor]:
        """With Qwen3-VL also those of several depths, for the first layers (DeepStack, arXiv 2406.04334)."""
        found = self.model.model.get_image_features(**images, return_dict=True)
        levels = getattr(found, "deepstack_features", None) or ()
        every = {FEATURES: found.pooler_output}
        every |= {f"{FEATURES}_{level}": of_level for level, of_level in enumerate(levels)}
        return {name: joined(one) for name, one in every.items()}

    def input_embeddings(self, batch: Batch, features: dict[str, Tensor]) -> dict[str, Any]:
        arguments = super().input_embeddings(batch, features)
        levels = [features[f"{FEATURES}_{level}"] for level in range(len(features) - 1)]
        if levels:
            arguments["visual_pos_masks"] = batch["input_ids"] == self.image_token_id
            arguments["deepstack_visual_embeds"] = levels
        return arguments
