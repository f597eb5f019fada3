"""The frozen layers of a causal language model: computed once, reused in every epoch.

If a recipe trains nothing before layer `depth`, then the image encoder, the connector, the embeddings and the
layers 0 to depth - 1 compute the same states in every step. `CausalTrunk.states` computes them once a group;
`CausalTrunk.collate` puts them into batches, and training starts at layer `depth`.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

import torch
from accelerate.utils import send_to_device
from torch import nn

from normtune.data.groups import Group, Segment
from normtune.models.frozen_trunk import (
    TRUNK_DEPTH,
    TRUNK_STATES,
    FrozenTrunk,
    TrunkStates,
    last_norm_name,
    parameter_ids,
    skip_layers,
)
from normtune.models.types import Batch, Pixels

if TYPE_CHECKING:
    from normtune.models.causal.family import CausalFamily

# Example: a model of 32 layers and the recipe `language=ln[28:]`, which trains the norms of layers 28 to 31:
# depth is 28.
#
#     once a group     pixels -> vision tower -> connector -> embeddings -> layers 0 .. 27
#                      saved: states [prefix tokens, width] and, for each segment, [its tokens, width]
#     every step       saved states -> [B, S, width] -> layers 28 .. 31 -> norm -> head -> loss
#
# Saved states fit any batch: a prefix token depends on the image only, and a segment's token on the image and
# its own segment, never on the other segments of its group.


class CausalTrunk(FrozenTrunk):
    """The first `depth` layers of a causal language model, and everything before them."""

    def __init__(self, family: CausalFamily, depth: int) -> None:
        self.family, self.depth = family, depth
        layers = len(family.decoder.layers)
        # part of the key of cached states on disk: a change of this text would make users' caches useless
        self.description = f"hidden states below layer {depth} of {layers}"
        names = {id(module): name for name, module in family.model.named_modules()}
        # what is computed after the trunk, so that a change of these modules keeps cached states valid
        last_norm = getattr(family.decoder, last_norm_name(family.decoder))
        excluded_modules = [*family.decoder.layers[depth:], last_norm, family.model.lm_head]
        self.excluded_modules = tuple(names[id(module)] for module in excluded_modules)

    def tokens_of(self, segment: Segment) -> tuple[int, ...]:
        """Prompt and answer: answers pass through the language model as well."""
        return segment.prompt + segment.answer

    @torch.no_grad()
    def states(self, group: Group, images: Sequence[Pixels]) -> TrunkStates:
        """See `FrozenTrunk.states`: the usual forward pass over one group, as far as layer `depth`."""
        layout, sequence, _ = self.family.layout([group], [images], "pad")
        batch = send_to_device(layout, self.family.device)
        decoder = self.family.decoder
        # the last norm is skipped too: layer `depth` expects states without it
        with skip_layers(decoder, range(self.depth, len(decoder.layers)), norm=True):
            states = self.family.hidden_states(batch, use_cache=False)[0].cpu()  # [S, width]
        return TrunkStates(
            tuple(self.family.without_features(image) for image in images),
            states[torch.tensor(sequence.runs[0].rows)],
            tuple(states[torch.tensor(sequence.rows_of(i)[1], dtype=torch.long)] for i in range(len(group.segments))),
        )

    def collate(self, groups: Sequence[Group], states: Sequence[TrunkStates]) -> Batch:
        """See `FrozenTrunk.collate`: the family's batch, with states in place of images."""
        family = self.family
        layout, sequence, _ = family.layout(groups, [group_states.images for group_states in states], family.rows)
        batch = layout | sequence.targets()
        # [tokens, width]; tokens that segments share occur several times, with the same values
        tokens = torch.cat([*(of.prefix for of in states), *(rows for of in states for rows in of.segments)])
        rows = [row for run in sequence.runs if run.parent < 0 for row in run.rows]
        rows += [row for segment in range(sequence.segment_count) for row in sequence.rows_of(segment)[1]]
        group_of = batch["group_of"]  # [B, S]
        trunk_states = tokens.new_zeros(group_of.numel(), tokens.shape[1])  # padding stays zero
        trunk_states[torch.tensor(rows)] = tokens
        return batch | {
            "images": {},
            "feature_rows": None,
            TRUNK_DEPTH: self.depth,
            TRUNK_STATES: trunk_states.view(*group_of.shape, -1),  # [B, S, width]
        }


def causal_trunk(family: CausalFamily, trained: Collection[nn.Parameter]) -> CausalTrunk | None:
    """The layers of a model before the first trained one; None if that is layer 0, or something before the layers."""
    trained_ids = {id(parameter) for parameter in trained}
    decoder = family.decoder
    by_layer = [parameter_ids(layer) & trained_ids for layer in decoder.layers]
    depth = next((index for index, layer_ids in enumerate(by_layer) if layer_ids), len(by_layer))
    after_layers = parameter_ids(getattr(decoder, last_norm_name(decoder))) | parameter_ids(family.model.lm_head)
    allowed = set().union(*by_layer) | after_layers
    # a head that shares its weight with the embedding is allowed, but its training changes the embedding
    embedding = parameter_ids(decoder.get_input_embeddings())
    # layers that take image features must run: saved states do not include the features
    if depth < max(1, family.image_layers) or trained_ids - allowed or trained_ids & embedding:
        return None
    return CausalTrunk(family, depth)
