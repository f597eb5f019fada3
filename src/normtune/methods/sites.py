"""The linear layers of a model to which a method can add parameters, found by the names of their modules."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torch import nn

from normtune.errors import InputError
from normtune.methods.registry import ALL_LINEAR

if TYPE_CHECKING:
    from peft.tuners.tuners_utils import BaseTunerLayer

# names of projections: BERT's and MISS's (query, key, value), then LLaMA's (q_proj, k_proj, v_proj)
QUERY = ("query", "q_proj")
KEY = ("key", "k_proj")
VALUE = ("value", "v_proj")
FUSED = ("qkv", "qkv_proj", "query_key_value")  # query, key and value in one linear
BERT_OUTPUT = "dense"  # the attention's output projection in models of BERT's layout
# names of the modules that hold a cross-attention
CROSS = ("crossattention", "cross_attn", "cross_attention", "encoder_attn")


@dataclass(frozen=True)
class TargetLinear:
    """A linear layer of the base to which a method may add parameters."""

    name: str  # the module's dotted name in the base
    role: str  # as in `ParameterInfo`: "attention", "ffn" or, outside the layers, another
    layer: int | None  # index in its part; None outside the layers
    module: nn.Linear

    @property
    def leaf(self) -> str:
        """Last component of the name: `q_proj`."""
        return self.name.rpartition(".")[2]


class NoTarget(InputError):
    """A part has no layer to which the method applies."""


@dataclass
class AddedLayers:
    """What one method added to one part."""

    parameters: dict[str, nn.Parameter]
    remove: Callable[[], None]  # takes the layers off the model again
    layers: dict[str, BaseTunerLayer] = field(default_factory=dict)  # PEFT's, by the base module's name


def linears_of_names(linears: Sequence[TargetLinear], targets: str) -> list[TargetLinear]:
    """The linears that the option `targets` names, such as `q_proj+mlp.down_proj`, or all of them.

    As in PEFT, a name may be the module's whole dotted name or its end: `down_proj`, `mlp.down_proj`.
    """
    if targets == ALL_LINEAR:
        return list(linears)
    ends = tuple(f".{name}" for name in targets.split("+"))
    return [linear for linear in linears if f".{linear.name}".endswith(ends)]


def layer_linears(linears: Sequence[TargetLinear]) -> list[TargetLinear]:
    """The linears of attentions and feed-forwards."""
    return [linear for linear in linears if linear.role in ("attention", "ffn")]


def ffn_outputs(linears: Sequence[TargetLinear]) -> list[TargetLinear]:
    """The last linear of each layer's feed-forward."""
    # `linears` are in the model's order: a later linear of the same layer replaces an earlier one
    last = {linear.layer: linear for linear in linears if linear.role == "ffn"}
    return list(last.values())
