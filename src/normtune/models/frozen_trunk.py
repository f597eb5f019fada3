"""What lies below everything that a recipe trains, so that its states are computed once, not once a step.

The states of an image's tokens depend on the image alone, those of a question on the image and itself, never
on the other questions of a group: they may be computed in any company and laid out in any batch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn

from normtune.added import LayerPrefix
from normtune.packing import Group, Segment
from normtune.sequences import PAD, PREFIX

if TYPE_CHECKING:
    from normtune.models.causal import CausalFamily
    from normtune.models.family import Batch, Pixels

DEPTH, ENTERING = "depth", "entering"  # keys of a batch: layers that are done, and the states after them


class GroupStates(NamedTuple):
    """A group where it enters what is trained; tensors on the CPU.

    Attributes:
        images: what of each image's pixels tells how it is written.
        prefix: states of the tokens that the segments share, [tokens, width]; none where they share none.
        segments: those of each segment, [tokens, width].
    """

    images: tuple[Pixels, ...]
    prefix: Tensor
    segments: tuple[Tensor, ...]


class Below(ABC):
    """The part of a family's model that no training reaches.

    Attributes:
        told: its output, for people.
        above: names of the modules that its output does not depend on.
    """

    told: str
    above: tuple[str, ...]

    def holds(self, name: str) -> bool:
        """Whether the output depends on the parameter or buffer of that name."""
        return not any(name.startswith(f"{module}.") for module in self.above)

    @abstractmethod
    def reads(self, segment: Segment) -> tuple[int, ...]:
        """The tokens of a segment that its states are of."""

    @abstractmethod
    def states(self, group: Group, images: Sequence[Pixels]) -> GroupStates:
        """Compute a group, without gradients; `images` as `Family.seen` gives them."""

    @abstractmethod
    def collate(self, groups: Sequence[Group], states: Sequence[GroupStates]) -> Batch:
        """As `Family.collate`, from states in place of images."""


class CausalBelow(Below):
    """The first `depth` layers of a causal language model, and all that comes before them."""

    def __init__(self, family: CausalFamily, depth: int) -> None:
        self.family, self.depth = family, depth
        layers = len(family.decoder.layers)
        self.told = f"hidden states below layer {depth} of {layers}"
        names = {id(module): name for name, module in family.model.named_modules()}
        above = [*family.decoder.layers[depth:], family.decoder.norm, family.model.lm_head]
        self.above = tuple(names[id(module)] for module in above)

    def reads(self, segment: Segment) -> tuple[int, ...]:
        return segment.prompt + segment.answer

    @torch.no_grad()
    def states(self, group: Group, images: Sequence[Pixels]) -> GroupStates:
        laid, _, _ = self.family._layout([group], [images], "pad")
        batch = send_to_device(laid, self.family.device)
        decoder = self.family.decoder
        with passing(decoder, range(self.depth, len(decoder.layers)), norm=True):
            found = self.family._states(batch, use_cache=False)[0].cpu()
        number = laid["segment_of"][0]
        return GroupStates(
            tuple(self.family.without_features(image) for image in images),
            found[number == PREFIX],
            tuple(found[number == PREFIX + 1 + i] for i in range(len(group.segments))),
        )

    def collate(self, groups: Sequence[Group], states: Sequence[GroupStates]) -> Batch:
        batch = self.family.collate(groups, [one.images for one in states])
        tokens = torch.cat([rows for one in states for rows in (one.prefix, *one.segments)])
        group_of = batch["group_of"]
        entering = tokens.new_zeros(group_of.numel(), tokens.shape[1])
        entering[group_of.flatten() != PAD] = tokens  # rows hold groups, prefixes and segments in their order
        return batch | {
            "images": {},
            "feature_rows": None,
            DEPTH: self.depth,
            ENTERING: entering.view(*group_of.shape, -1),
        }


def causal_below(
    family: CausalFamily, trained: Collection[nn.Parameter], *, image_layers: int = 0
) -> CausalBelow | None:
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
    return CausalBelow(family, depth)


def own_parameters(module: nn.Module) -> set[int]:
    """The ids of a module's parameters, those of the prefixes of its attentions included."""
    found = {id(parameter) for parameter in module.parameters()}
    for one in module.modules():
        if isinstance(one, LayerPrefix):
            found |= {id(parameter) for parameter in one.bank.parameters()}
    return found


class PassThrough(nn.Module):
    """In the place of a layer: its output is its input."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return hidden_states


@contextmanager
def passing(decoder: Any, layers: range, *, norm: bool = False) -> Iterator[None]:
    """Inside, states pass these layers (and the last norm) as they are; layers keep their numbers."""
    held = {index: decoder.layers[index] for index in layers}
    last = decoder.norm
    try:
        for index in held:
            decoder.layers[index] = PassThrough()
        if norm:
            decoder.norm = PassThrough()
        yield
    finally:
        for index, layer in held.items():
            decoder.layers[index] = layer
        decoder.norm = last
