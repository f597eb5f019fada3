"""What weights of the base can stand for: which methods, and the weight that a LoRA or an IA3 makes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from peft.tuners.ia3 import IA3Layer
from torch import Tensor

from normtune.errors import InputError

UNMERGEABLE = {  # method -> why no weights of the base can stand for it
    "prefix": "its keys and values stand before those of the tokens, and no weight makes them",
    "ptuning": "its keys and values stand before those of the tokens, and no weight makes them",
    "adapter": "it has a nonlinearity of its own, and no weight makes it",
}


def refuse_unmergeable(methods: Iterable[str]) -> None:
    """Check that weights of the base can stand for what was trained.

    Raises:
        InputError: a method that no weight of the base can stand for.
    """
    for method in methods:
        if method in UNMERGEABLE:
            raise InputError(
                f"{method} cannot be merged: {UNMERGEABLE[method]}. Load it with --adapter instead."
            )


def quantised_site(site: str) -> InputError:
    """The refusal of a linear whose values are not plain numbers."""
    return InputError(f"{site} is quantised: nothing can be merged into it. Load the base as it was.")


def changed_by(layer: Any) -> list[str]:
    """The tensors of the linear that the layer's LoRA or IA3 changes: its weight, or also its bias."""
    scaled = isinstance(layer, IA3Layer) and not layer.is_feedforward
    return ["weight", "bias"] if scaled and layer.get_base_layer().bias is not None else ["weight"]


def with_addition(site: str, layer: Any, key: str, old: Tensor, trained: Mapping[str, Tensor]) -> Tensor:
    """A tensor `old` of a linear as its LoRA or IA3 changes it, in fp32.

    A LoRA gives W + (alpha / r) B A (Hu et al. 2021, section 4.1), an IA3 scales rows (and bias) or columns
    of W (Liu et al. 2022, section 3.3). The layer's own tensors are taken from `trained`, by name; one fp32
    tensor of the size of `old` is made.
    """
    if isinstance(layer, IA3Layer):
        scale = trained[f"{site}.ia3"].detach()  # [out, 1], or [1, in] where the input is scaled
        return old * (scale if key == "weight" else scale.flatten())
    (name,) = layer.active_adapters
    new = trained[f"{site}.lora_B"].detach() @ trained[f"{site}.lora_A"].detach()
    return new.mul_(layer.scaling[name]).add_(old)
