"""Recognises norms and their kinds: LayerNorm, RMSNorm and GroupNorm of torch, and modules that compute the same.

The kind of a module of another class follows from its output for two test numbers, not from its name.
"""

from __future__ import annotations

import copy
import inspect
from typing import Any

import torch
from torch import Tensor, nn

from normtune.errors import InputError


def norms(model: nn.Module) -> dict[str, nn.Module]:
    """Name -> module of every norm of a known kind that has a gain, in the model's order."""
    return {name: module for name, module in model.named_modules() if _norm_kind_or_none(module) is not None}


def norm_kind(module: nn.Module) -> str:
    """The kind of a norm: "layer", "rms", "rms_offset" (the gain is 1 + weight, as in Gemma) or "group".

    Raises:
        InputError: the module is not a norm of these kinds.
    """
    kind = _norm_kind_or_none(module)
    if kind is None:
        raise InputError(f"{type(module).__name__} is not a norm that normtune supports. Choose full for its part.")
    return kind


def _norm_kind_or_none(module: nn.Module) -> str | None:
    """The kind of a norm with a gain; None for any other module.

    Torch's classes are recognised by type. Any other module that has nothing but a gain [width] (and a bias)
    is called with two numbers: this also recognises classes of new families, and distinguishes Gemma's
    1 + weight from LLaMA's weight.
    """
    if isinstance(getattr(module, "kind", None), str) and hasattr(module, "groups"):
        return module.kind  # type: ignore[return-value]  # a TunedNorm
    weight = module._parameters.get("weight")
    if weight is None or not weight.is_floating_point():
        return None
    for known, kind in ((nn.LayerNorm, "layer"), (nn.RMSNorm, "rms"), (nn.GroupNorm, "group")):
        if isinstance(module, known):  # a subclass may norm another axis (SAM's, channels first)
            return kind if weight.ndim == 1 and type(module).forward is known.forward else None
    names = {name for name, parameter in module._parameters.items() if parameter is not None}
    if names - {"weight", "bias"} or module._modules or weight.ndim != 1:
        return None
    if not (hasattr(module, "eps") or hasattr(module, "variance_epsilon")):
        return None
    if len(inspect.signature(type(module).forward).parameters) != 2:  # a gated norm also takes a gate
        return None
    return _probe_norm_kind(module, "bias" in names)


def probe_norm(module: nn.Module, x: Tensor, gain: Tensor, shift: Tensor | None = None) -> Tensor:
    """Call a copy of a norm with this gain and bias [width]: x [rows, width] -> [rows, width].

    The norm itself is not changed.
    """
    probe: Any = copy.copy(module)
    values = {"weight": gain} if shift is None else {"weight": gain, "bias": shift}
    parameters = {name: nn.Parameter(value, requires_grad=False) for name, value in values.items()}
    probe._parameters = {**module._parameters, **parameters}
    if hasattr(probe, "normalized_shape"):
        probe.normalized_shape = tuple(gain.shape)
    # calling `forward` of the class skips hooks; the device context is for norms that make tensors themselves
    with torch.no_grad(), torch.device("cpu"):
        return type(module).forward(probe, x)


def _probe_norm_kind(module: nn.Module, has_bias: bool) -> str | None:
    """The kind of norm that gives the module's output for two numbers; parameters and hooks are not touched.

    For x = [3, 5] with gain [0.5, 4] and no bias the outputs are, up to eps: "layer" [-0.5, 4], as x is
    normalised to [-1, 1]; "rms" [0.36, 4.85], as x / sqrt(17) is [0.73, 1.21]; "rms_offset" [1.09, 6.06].
    """
    x, gain, shift = torch.tensor([[3.0, 5.0]]), torch.tensor([0.5, 4.0]), torch.tensor([0.25, -1.0])
    try:
        output = probe_norm(module, x, gain, shift if has_bias else None)
    except Exception:  # a module that raises any error here is not a norm of these kinds
        return None
    if not isinstance(output, Tensor) or output.shape != x.shape:
        return None
    bias = shift if has_bias else torch.zeros(2)
    rms = x * x.square().mean(-1, keepdim=True).rsqrt()
    layer = torch.tensor([[-1.0, 1.0]])  # (x - mean) / standard deviation
    expected = {"rms": rms * gain + bias, "rms_offset": rms * (1 + gain) + bias, "layer": layer * gain + bias}
    if has_bias:  # `TunedNorm` supports a bias for the layer kind only
        expected = {"layer": expected["layer"]}
    for kind, values in expected.items():
        if torch.allclose(output.float(), values, rtol=1e-3, atol=1e-3):
            return kind
    return None


def is_norm(module: nn.Module) -> bool:
    """Whether the module is a norm: of a known kind, or with "Norm" in the name of its class."""
    if not any(parameter is not None for parameter in module._parameters.values()):
        return False
    return ("Norm" in type(module).__name__ and not module._modules) or _norm_kind_or_none(module) is not None
