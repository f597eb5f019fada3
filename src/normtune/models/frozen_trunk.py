"""What lies below everything that a recipe trains, so that its states are computed once, not once a step.

The states of an image's tokens depend on the image alone, those of a question on the image and itself, never
on the other questions of a group: they may be computed in any company and laid out in any batch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor, nn

from normtune.data.groups import Group, Segment

if TYPE_CHECKING:
    from normtune.models.types import Batch, Pixels


TRUNK_DEPTH, TRUNK_STATES = (
    "depth",
    "entering",
)  # keys of a batch: layers that are done, and the states after them


class TrunkStates(NamedTuple):
    """A group where it enters what is trained; tensors on the CPU.

    Attributes:
        images: what of each image's pixels tells how it is written.
        prefix: states of the tokens that the segments share, [tokens, width]; none where they share none.
        segments: those of each segment, [tokens, width].
    """

    images: tuple[Pixels, ...]
    prefix: Tensor
    segments: tuple[Tensor, ...]


class FrozenTrunk(ABC):
    """The part of a family's model that no training reaches.

    Attributes:
        told: its output, for people.
        above: names of the modules that its output does not depend on.
    """

    description: str
    excluded_modules: tuple[str, ...]

    def depends_on(self, name: str) -> bool:
        """Whether the output depends on the parameter or buffer of that name."""
        return not any(name.startswith(f"{module}.") for module in self.excluded_modules)

    @abstractmethod
    def tokens_of(self, segment: Segment) -> tuple[int, ...]:
        """The tokens of a segment that its states are of."""

    @abstractmethod
    def states(self, group: Group, images: Sequence[Pixels]) -> TrunkStates:
        """Compute a group, without gradients; `images` as `Family.seen` gives them."""

    @abstractmethod
    def collate(self, groups: Sequence[Group], states: Sequence[TrunkStates]) -> Batch:
        """As `Family.collate`, from states in place of images."""


def own_parameters(module: nn.Module) -> set[int]:
    """The ids of a module's parameters, those of the prefixes of its attentions included."""
    found = {id(parameter) for parameter in module.parameters()}
    for one in module.modules():
        shared = getattr(one, "shared_parameters", None)  # such as the prefix that all layers of a part share
        if shared is not None:
            found |= {id(parameter) for parameter in shared()}
    return found


class SkippedLayer(nn.Module):
    """In the place of a layer: its output is its input."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return hidden_states


@contextmanager
def skip_layers(decoder: Any, layers: range, *, norm: bool = False) -> Iterator[None]:
    """Inside, states pass these layers (and the last norm) as they are; layers keep their numbers."""
    held = {index: decoder.layers[index] for index in layers}
    last = decoder.norm
    try:
        for index in held:
            decoder.layers[index] = SkippedLayer()
        if norm:
            decoder.norm = SkippedLayer()
        yield
    finally:
        for index, layer in held.items():
            decoder.layers[index] = layer
        decoder.norm = last
