"""The frozen layers of a causal language model below the lowest trained layer."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, Protocol

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn

from normtune.data.groups import Group, Segment
from normtune.models.causal.shared_prefix import PAD, PREFIX, Rows, SharedSequence
from normtune.models.frozen_trunk import (
    TRUNK_DEPTH,
    TRUNK_STATES,
    FrozenTrunk,
    TrunkStates,
    own_parameters,
    skip_layers,
)
from normtune.models.types import Batch, Pixels


class CausalModel(Protocol):
    """What this file needs of a causal family (`CausalFamily` provides it)."""

    model: Any

    @property
    def decoder(self) -> Any: ...
    @property
    def device(self) -> torch.device: ...
    def layout(
        self, groups: Sequence[Group], pixels: Sequence[Sequence[Pixels]], rows: Rows
    ) -> tuple[Batch, SharedSequence, Sequence[Group]]: ...
    def hidden_states(self, batch: Batch, **options: Any) -> Tensor: ...
    def without_features(self, pixels: Pixels) -> Pixels: ...
    def collate(self, groups: Sequence[Group], pixels: Sequence[Sequence[Pixels]]) -> Batch: ...


class CausalTrunk(FrozenTrunk):
    """The first `depth` layers of a causal language model, and all that comes before them."""

    def __init__(self, family: CausalModel, depth: int) -> None:
        self.family, self.depth = family, depth
        layers = len(family.decoder.layers)
        self.description = f"hidden states below layer {depth} of {layers}"
        names = {id(module): name for name, module in family.model.named_modules()}
        excluded_modules = [*family.decoder.layers[depth:], family.decoder.norm, family.model.lm_head]
        self.excluded_modules = tuple(names[id(module)] for module in excluded_modules)

    def tokens_of(self, segment: Segment) -> tuple[int, ...]:
        return segment.prompt + segment.answer

    @torch.no_grad()
    def states(self, group: Group, images: Sequence[Pixels]) -> TrunkStates:
        laid, _, _ = self.family.layout([group], [images], "pad")
        batch = send_to_device(laid, self.family.device)
        decoder = self.family.decoder
        with skip_layers(decoder, range(self.depth, len(decoder.layers)), norm=True):
            found = self.family.hidden_states(batch, use_cache=False)[0].cpu()
        number = laid["segment_of"][0]
        return TrunkStates(
            tuple(self.family.without_features(image) for image in images),
            found[number == PREFIX],
            tuple(found[number == PREFIX + 1 + i] for i in range(len(group.segments))),
        )

    def collate(self, groups: Sequence[Group], states: Sequence[TrunkStates]) -> Batch:
        batch = self.family.collate(groups, [one.images for one in states])
        tokens = torch.cat([rows for one in states for rows in (one.prefix, *one.segments)])
        group_of = batch["group_of"]
        entering = tokens.new_zeros(group_of.numel(), tokens.shape[1])
        entering[group_of.flatten() != PAD] = tokens  # rows hold groups, prefixes and segments in their order
        return batch | {
            "images": {},
            "feature_rows": None,
            TRUNK_DEPTH: self.depth,
            TRUNK_STATES: entering.view(*group_of.shape, -1),
        }


def causal_trunk(
    family: CausalModel, trained: Collection[nn.Parameter], *, image_layers: int = 0
) -> CausalTrunk | None:
    """The layers below all that is trained; None where there are none or something before them is trained.

    Image features enter up to layer `image_layers`.
    """
    wanted = {id(parameter) for parameter in trained}
    decoder = family.decoder
    by_layer = [own_parameters(layer) & wanted for layer in decoder.layers]
    depth = next((index for index, found in enumerate(by_layer) if found), len(by_layer))
    ends = own_parameters(decoder.norm) | own_parameters(family.model.lm_head)
    inside = set().union(*by_layer) | ends
    embedding = own_parameters(decoder.get_input_embeddings())
    if depth < max(1, image_layers) or wanted - inside or wanted & embedding:
        return None
    return CausalTrunk(family, depth)
