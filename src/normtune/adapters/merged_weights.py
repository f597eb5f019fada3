"""Which methods can be merged into the base's weights, and the weight that a LoRA or an IA3 results in."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from peft.tuners.ia3 import IA3Layer
from torch import Tensor

from normtune.errors import InputError
from normtune.methods.lora import MAGNITUDE
from normtune.methods.registry import OUTPUT_VECTORS, PEFT_VECTORS, TEXT_ONLY

UNMERGEABLE = {  # method -> why it cannot be merged
    **dict.fromkeys(TEXT_ONLY, "it adds keys and values in front of those of the tokens, which no weight can do"),
    "adapter": "it has a nonlinearity, which no weight can replace",
    **dict.fromkeys((*PEFT_VECTORS, *OUTPUT_VECTORS), "the merge supports LoRA, IA3 and trained values of the base"),
}


def check_mergeable(methods: Iterable[str]) -> None:
    """Raise an `InputError` if one of these methods cannot be merged into weights of the base."""
    for method in methods:
        if method in UNMERGEABLE:
            raise InputError(f"{method} cannot be merged: {UNMERGEABLE[method]}. Load it with --adapter instead.")


def changed_tensors(layer: Any) -> list[str]:
    """The tensors of a linear that its LoRA or IA3 (`layer`, PEFT's) changes: ["weight"] or also "bias".

    An IA3 that scales the output scales the bias with it.
    """
    scaled = isinstance(layer, IA3Layer) and not layer.is_feedforward
    return ["weight", "bias"] if scaled and layer.get_base_layer().bias is not None else ["weight"]


def merged_tensor(linear: str, layer: Any, key: str, old: Tensor, trained: Mapping[str, Tensor]) -> Tensor:
    """Merge a LoRA or an IA3 into one tensor of its linear.

    LoRA: W + (alpha / r) B A (Hu et al. 2021, section 4.1). IA3: the rows of W (and the bias), or its
    columns, times a vector (Liu et al. 2022, section 3.3). DoRA: the rows of LoRA's weight, scaled to the norms m
    (Liu et al. 2024, arXiv 2402.09353, section 4.1).

    Args:
        layer: PEFT's layer around the linear; it provides the method and alpha / r.
        old: the tensor before merging: [out, in] or [out].
        trained: the adapter's tensors, by name; they are used in place of the layer's.

    Returns:
        A new fp32 tensor of `old`'s shape, the only one of that size that is created.
    """
    if isinstance(layer, IA3Layer):
        scale = trained[f"{linear}.ia3"].detach()  # [out, 1], or [1, in] if the input is scaled
        return old * (scale if key == "weight" else scale.flatten())
    (name,) = layer.active_adapters
    new = trained[f"{linear}.lora_B"].detach() @ trained[f"{linear}.lora_A"].detach()  # [out, r] @ [r, in]
    new.mul_(layer.scaling[name]).add_(old)
    if layer.use_dora[name]:
        new.mul_((trained[f"{linear}.{MAGNITUDE}"].detach() / new.norm(dim=1))[:, None])
    return new
