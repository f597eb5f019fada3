"""The linear layers of a model to which a method can add parameters."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from normtune.errors import InputError

QUERY = ("query", "q_proj")
KEY = ("key", "k_proj")
VALUE = ("value", "v_proj")
FUSED = ("qkv", "qkv_proj", "query_key_value")  # query, key and value in one linear
BERT_OUTPUT = "dense"  # the attention's output projection in models of BERT's layout
CROSS = ("crossattention", "cross_attn", "cross_attention", "encoder_attn")


@dataclass(frozen=True)
class TargetLinear:
    """A linear layer of the base where something may be added."""

    name: str  # the module's dotted name in the base
    role: str  # "attention" or "ffn"
    layer: int
    module: nn.Linear

    @property
    def leaf(self) -> str:
        return self.name.rpartition(".")[2]


class NoTarget(InputError):
    """A part has no place for the method."""


@dataclass
class AddedLayers:
    """What one method added to one part."""

    parameters: dict[str, nn.Parameter]
    remove: Callable[[], None]
    layers: dict[str, BaseTunerLayer] = field(default_factory=dict)  # PEFT's, by the base module's name


def ffn_outputs(sites: Sequence[TargetLinear]) -> list[TargetLinear]:
    """The last linear of each layer's feed-forward."""
    last = {site.layer: site for site in sites if site.role == "ffn" and hasattr(site.module, "in_features")}
    return list(last.values())
