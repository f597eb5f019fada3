"""Fingerprints that distinguish one base model from another."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import torch
from torch import Tensor, nn

from normtune.models.parts import is_quantized

QUANTISED = "quantised"
Values = Callable[[str, range], Tensor]  # a parameter's values at places of its rows laid end to end
_SAMPLES = 64  # values of each tensor that the fingerprint reads


def fingerprint(model: nn.Module, values: Values | None = None) -> str:
    """What tells one base from another, whatever dtype it is loaded in; take it before `adapt`.

    Two digests of names, shapes and 64 sampled values a tensor, rounded to bf16: one of the linears' weights
    (the word "quantised" where they are), one of all else. A 7B model takes well under a second.

    `values` gives the values of a named parameter where they are not in memory: `model` may then be on the
    meta device.
    """
    linear, rest = hashlib.sha256(), hashlib.sha256()
    quantised = False
    for module_name, module in model.named_modules():
        for attribute, parameter in module.named_parameters(recurse=False):
            name = f"{module_name}.{attribute}"
            if isinstance(module, nn.Linear) and attribute == "weight":
                if is_quantized(parameter):
                    quantised = True
                    continue
                digest = linear
            else:
                digest = rest
            digest.update(f"{name} {tuple(parameter.shape)}\n".encode())
            places = _sampled(parameter.numel())
            if values is not None:
                digest.update(_bytes(values(name.removeprefix("."), places)))
            elif parameter.device.type != "meta":
                flat = parameter.detach().reshape(-1)
                digest.update(_bytes(flat[places.start : places.stop : places.step]))
    return f"{rest.hexdigest()[:32]}-{QUANTISED if quantised else linear.hexdigest()[:32]}"


def same_base(one: str, other: str) -> bool:
    """Whether two fingerprints are of one base; a quantised one is compared by what is not quantised."""
    (rest, linear), (other_rest, other_linear) = one.split("-"), other.split("-")
    return rest == other_rest and (linear == other_linear or QUANTISED in (linear, other_linear))


def _sampled(count: int) -> range:
    """Where the values that the fingerprint reads stand in a tensor of `count`."""
    step = max(1, count // _SAMPLES)
    return range(0, min(count, step * _SAMPLES), step)


def _bytes(values: Tensor) -> bytes:
    return values.to(torch.bfloat16).contiguous().view(torch.int16).cpu().numpy().tobytes()
