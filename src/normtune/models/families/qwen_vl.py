"""Qwen2-VL to Qwen3.5, and GLM-4.1V: images of any size, and rotary positions on three axes (M-RoPE).

Three of four layers of Qwen3.5 are gated DeltaNets (arXiv 2412.06464), which carry a state from token to token.

Sources: Wang et al. 2024 (arXiv 2409.12191), Bai et al. 2025 (arXiv 2502.13923).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import Glm4vProcessor, Qwen2_5_VLProcessor, Qwen2VLProcessor, Qwen3VLProcessor

from normtune.models.causal.family import CausalFamily
from normtune.models.causal.image_features import FEATURES, flatten_features
from normtune.models.causal.prompts import TokenIds
from normtune.models.causal.shared_prefix import PREFIX, SharedSequence
from normtune.models.processors import load_processor
from normtune.models.types import Batch, Pixels

_PROCESSORS = {
    "qwen2_vl": Qwen2VLProcessor,
    "qwen2_5_vl": Qwen2_5_VLProcessor,
    "qwen3_vl": Qwen3VLProcessor,
    "qwen3_vl_moe": Qwen3VLProcessor,
    "qwen3_5": Qwen3VLProcessor,
    "qwen3_5_moe": Qwen3VLProcessor,
    "glm4v": Glm4vProcessor,
}
TEXT, IMAGE = 0, 1  # types of tokens in transformers' `get_rope_index`


class QwenVLFamily(CausalFamily):
    """Qwen-VL and GLM-4.1V. Image tokens have row and column as positions; text continues after the larger one."""

    concatenated_keys = ("pixel_values",)

    @classmethod
    def load_processor(cls, source: str, model_type: str) -> Any:
        return load_processor(source, _PROCESSORS[model_type], None)

    @property
    def image_layers(self) -> int:  # type: ignore[override]
        """How many of the first layers add image features to their states (Qwen3-VL)."""
        return len(getattr(self.config.vision_config, "deepstack_visual_indexes", ()))

    def preprocess_image(self, image: Any) -> Pixels:
        """Cut one image into patches: pixel_values [patches, patch width], and their grid.

        image_grid_thw [3] is the number of patches in time, height and width.
        """
        prepared = self.processor.image_processor([image], return_tensors="pt")
        return {"pixel_values": prepared["pixel_values"], "image_grid_thw": prepared["image_grid_thw"][0]}

    def image_text(self, pixels: Pixels) -> str:
        patches = int(pixels["image_grid_thw"].prod())
        # the connector merges merge_size x merge_size patches into one token
        return self.processor.image_token * (patches // self.processor.image_processor.merge_size**2)

    def positions(
        self, sequence: SharedSequence, prefixes: Sequence[TokenIds], pixels: Sequence[Sequence[Pixels]]
    ) -> Tensor:
        """Positions in time, height and width: [3, B, S]; a segment has the positions of a separate conversation."""
        # text has the same position on all axes; only image tokens, which are in prefixes, differ
        positions = sequence.position_ids.expand(3, -1, -1).clone()
        for group, (prefix, images) in enumerate(zip(prefixes, pixels, strict=True)):
            ids = torch.tensor([prefix])
            grids = torch.stack([image["image_grid_thw"] for image in images])
            kinds = torch.where(ids == self.image_token_id, IMAGE, TEXT).int()
            axes, offset = self.model.model.get_rope_index(ids, mm_token_type_ids=kinds, image_grid_thw=grids)
            in_group = sequence.group_of == group
            positions[:, in_group & (sequence.segment_of == PREFIX)] = axes[:, 0]
            # an image of n tokens advances the position by less than n, so `offset` is usually negative
            positions[:, in_group & (sequence.segment_of > PREFIX)] += int(offset)
        return positions

    def step_positions(self, positions: Tensor) -> Tensor:
        return positions.expand(3, -1, -1)

    def features(self, images: dict[str, Tensor]) -> dict[str, Tensor]:
        """Run encoder and connector; Qwen3-VL has further features for its first layers, one set a layer.

        These are from several depths of the encoder (DeepStack, arXiv 2406.04334).
        """
        output = self.model.model.get_image_features(**images, return_dict=True)
        levels = getattr(output, "deepstack_features", None) or ()
        features = {FEATURES: output.pooler_output}
        features |= {f"{FEATURES}_{level}": values for level, values in enumerate(levels)}
        return {name: flatten_features(values) for name, values in features.items()}

    def input_embeddings(self, batch: Batch, features: dict[str, Tensor]) -> dict[str, Any]:
        arguments = super().input_embeddings(batch, features)
        levels = [features[f"{FEATURES}_{level}"] for level in range(len(features) - 1)]
        if levels:
            arguments["visual_pos_masks"] = batch["input_ids"] == self.image_token_id
            arguments["deepstack_visual_embeds"] = levels
        return arguments
