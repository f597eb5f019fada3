"""Llama 3.2 Vision: layers of cross-attention read the image, which is no part of the row of tokens.

An image is cut into up to four tiles and encoded once (arXiv 2407.21783). Keys and values of cross-attention depend on
the image alone, so that all questions of a group read the same ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import MllamaProcessor
from transformers.models.mllama.image_processing_pil_mllama import MllamaImageProcessorPil

from normtune.data.groups import Group
from normtune.models.causal.attention import ONE_KIND, additive_masks
from normtune.models.causal.decoding import ColumnCache
from normtune.models.causal.family import CausalFamily
from normtune.models.causal.image_features import FEATURES
from normtune.models.causal.shared_prefix import PAD
from normtune.models.frozen_trunk import TRUNK_STATES
from normtune.models.types import Batch, Pixels

# Example: a row with two groups, one image each (the token m; T tiles, P patches a tile), and a prefix that begins
# with a token before the image. Slots are the images of a row: slot 0 holds image 0, slot 1 image 1.
#
#     token       b  m  q  a  b  m  r  c        b    before the image: sees all patches of its group's images, and skips
#     group_of    0  0  0  0  1  1  1  1             the feed-forward, as in transformers
#     slots seen  0* 0  0  0  1* 1  1  1        else all patches of the tiles that the images have
#
# Cross-attention has K * T * P keys, with K slots in each row.

TILES = f"{FEATURES}_tiles"  # key of an encoded image's tiles: [images, T] bool, true for those that it has
KEYS = "image_keys"  # key of the patches that answers see, in a cache: [B, K * T * P] bool


class MllamaFamily(CausalFamily):
    """Llama 3.2 Vision 11B and 90B. A feature of an image token is the whole image: [T * P, width]."""

    image_keys = ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask")
    processor_class, image_processor_class = MllamaProcessor, MllamaImageProcessorPil

    @property
    def image_layers(self) -> int:  # type: ignore[override]
        """Images are read up to the last cross-attention."""
        return 1 + max(self.fixed_layers)

    @property
    def fixed_layers(self) -> Sequence[int]:  # type: ignore[override]
        layers: Sequence[int] = self.config.get_text_config().cross_attention_layers
        return layers

    def image_text(self, pixels: Pixels) -> str:
        return self.processor.image_token

    def features(self, images: dict[str, Tensor]) -> dict[str, Tensor]:
        """The projected patches of all images [images, T * P, width], and the tiles that they have [images, T]."""
        body = self.model.model
        states = body.vision_model(**images).last_hidden_state  # [images, 1, T, P, vision width]
        features = body.multi_modal_projector(states).flatten(1, 3)
        return {FEATURES: features, TILES: images["aspect_ratio_mask"][:, 0].bool()}

    def layout(
        self, groups: Sequence[Group], pixels: Sequence[Sequence[Pixels]], rows: Any, **options: Any
    ) -> tuple[Batch, Any, Sequence[Group]]:
        """See `CausalFamily.layout`; also image_slots [images] long, the slot of each image, and slots int, K."""
        batch, sequence, groups = super().layout(groups, pixels, rows, **options)
        row = batch["image_places"][:, 0].contiguous()  # ascending
        slots = torch.arange(len(row)) - torch.searchsorted(row, row)
        return batch | {"image_slots": slots, "slots": int(slots.max()) + 1}, sequence, groups

    def hidden_states(self, batch: Batch, **options: Any) -> Tensor:
        """See `CausalFamily.hidden_states`; a cache gets the patches that all answers of a row see."""
        cache = options.get("cache", options.get("past_key_values"))
        if TRUNK_STATES not in batch:
            batch = batch | {"images": self._image_features(batch), "feature_rows": None}
            if cache is not None:
                cache.row_values[KEYS] = self._patches(self._in_slots(batch, batch["images"][TILES]))
        return super().hidden_states(batch, **options)

    def input_embeddings(self, batch: Batch, features: dict[str, Tensor]) -> dict[str, Any]:
        """The tokens, image tokens like others, and what cross-attention reads and sees."""
        embeds = self.decoder.get_input_embeddings()(batch["input_ids"])
        row, column = batch["image_places"].unbind(1)
        # of each slot: the group [B, K], the column of its image token [B, K] and the tiles that it has [B, K, T]
        group = self._in_slots(batch, batch["group_of"][row, column] - PAD) + PAD
        tiles = self._in_slots(batch, features[TILES])
        columns = torch.arange(embeds.shape[1], device=embeds.device)
        related = batch["group_of"][..., None] == group[:, None]  # [B, S, K]
        sees = related & (batch["group_of"] != PAD)[..., None]
        sees = sees & (columns[:, None] >= self._in_slots(batch, column)[:, None])
        before = ~sees.any(-1, keepdim=True)
        # padding sees everything, since a softmax over no keys is NaN
        whole = before & (related | (batch["group_of"] == PAD)[..., None])
        visible = self._patches((sees[..., None] & tiles[:, None]) | whole[..., None])
        return {
            "inputs_embeds": embeds,
            "cross_attention_states": self._in_slots(batch, features[FEATURES].to(embeds.dtype)).flatten(1, 2),
            "cross_attention_mask": additive_masks({ONE_KIND: visible[:, None]}, self.decoder, embeds.dtype)[ONE_KIND],
            "full_text_row_masked_out_mask": (~before).to(embeds.dtype)[:, None],  # [B, 1, S, 1]
        }

    def token_arguments(self, input_ids: Tensor, cache: ColumnCache | None = None) -> dict[str, Any]:
        """See `CausalFamily.token_arguments`; answers see all images of their group."""
        arguments = super().token_arguments(input_ids, cache)
        if cache is not None:
            visible = cache.row_values[KEYS][:, None, None].expand(-1, -1, input_ids.shape[1], -1)
            dtype = arguments["inputs_embeds"].dtype
            arguments["cross_attention_mask"] = additive_masks({ONE_KIND: visible}, self.decoder, dtype)[ONE_KIND]
        return arguments

    def _in_slots(self, batch: Batch, values: Tensor) -> Tensor:
        """Values of each image [images, ...] -> values of each slot [B, K, ...], 0 in slots without an image."""
        places = batch["image_places"][:, 0], batch["image_slots"]
        slots = values.new_zeros(len(batch["input_ids"]), batch["slots"], *values.shape[1:])
        return slots.index_put(places, values)

    def _patches(self, tiles: Tensor) -> Tensor:
        """What is visible of each tile [..., K, T] -> of each patch [..., K * T * P]."""
        patches: int = self.model.model.vision_model.num_patches
        return tiles[..., None].expand(*tiles.shape, patches).flatten(-3)
