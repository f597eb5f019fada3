"""The interface of a frozen trunk: the part of a model before everything that a recipe trains.

Its output states are computed once, not once a step. The states of an image's tokens depend on the image only. The
states of a question depend on the image and the question, never on the group's other questions. So states can be
computed in any group and used in any batch.
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


# keys of a batch: how many layers the trunk has computed, and the states after them
TRUNK_DEPTH, TRUNK_STATES = "depth", "entering"


class TrunkStates(NamedTuple):
    """The trunk's output for one group; tensors on the CPU."""

    # the values of each image that a batch still needs, such as its size or number of tokens
    images: tuple[Pixels, ...]
    prefix: Tensor  # states of the tokens that the segments share, [tokens, width]; no rows if they share none
    segments: tuple[Tensor, ...]  # states of each segment, [tokens, width]


class FrozenTrunk(ABC):
    """The part of a family's model before everything that is trained.

    Attributes:
        description: its output, in words.
        excluded_modules: names of the modules that its output does not depend on.
    """

    description: str
    excluded_modules: tuple[str, ...]

    def depends_on(self, name: str) -> bool:
        """Whether the output depends on the parameter or buffer of this name."""
        return not any(name.startswith(f"{module}.") for module in self.excluded_modules)

    @abstractmethod
    def tokens_of(self, segment: Segment) -> tuple[int, ...]:
        """The tokens of a segment that have states."""

    @abstractmethod
    def states(self, group: Group, images: Sequence[Pixels]) -> TrunkStates:
        """Compute the states of one group, without gradients.

        Args:
            group: the images' questions, with their answers.
            images: the results of `Family.encode_image`.
        """

    @abstractmethod
    def collate(self, groups: Sequence[Group], states: Sequence[TrunkStates]) -> Batch:
        """Make a batch like `Family.collate`, from states in place of images."""


def parameter_ids(module: nn.Module) -> set[int]:
    """The ids (`id()`) of a module's parameters, and of the learned prefixes that its attentions read."""
    ids = {id(parameter) for parameter in module.parameters()}
    for submodule in module.modules():
        # such as the prefix that all layers of a part share: it is registered elsewhere in the model
        shared = getattr(submodule, "shared_parameters", None)
        if shared is not None:
            ids |= {id(parameter) for parameter in shared()}
    return ids


def last_norm_name(decoder: Any) -> str:
    """The name of the norm after a language model's layers."""
    return "norm" if hasattr(decoder, "norm") else "embedding_norm"  # the latter in LFM2


class SkippedLayer(nn.Module):
    """Replaces a layer: its output is its input."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return hidden_states


@contextmanager
def skip_layers(decoder: Any, layers: range, *, norm: bool = False) -> Iterator[None]:
    """Within the context, states pass unchanged through these layers, and with `norm` through the last norm.

    The list of layers keeps its length, so that the other layers keep their numbers.
    """
    skipped = {index: decoder.layers[index] for index in layers}
    norm_name = last_norm_name(decoder)
    last_norm = getattr(decoder, norm_name) if norm else None  # not every model's last norm has a known name
    try:
        for index in skipped:
            decoder.layers[index] = SkippedLayer()
        if norm:
            setattr(decoder, norm_name, SkippedLayer())
        yield
    finally:
        for index, layer in skipped.items():
            decoder.layers[index] = layer
        if norm:
            setattr(decoder, norm_name, last_norm)
