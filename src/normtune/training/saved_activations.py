"""The same computation, with less kept for the backward pass.

A frozen matmul needs no input to pass a gradient on, so that norms, activations and attention decide what a
layer keeps. For a LLaMA block of width d, feed-forward width f, key/value width k and H heads that is, in
bf16, 4f + 8d + 4k + 4H + 8 bytes a token; transformers' own modules keep 6f + 16d + 4k + 4H + 8.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from normtune.methods.norms import TunedNorm
from normtune.models.parts import norm_kind, norms
from normtune.training.layer_wrapping import Forward, replace_forwards

aten = torch.ops.aten
GATED = {"gate_proj", "up_proj", "down_proj", "act_fn"}  # children of a gated feed-forward (Shazeer 2020)
QUICK = 1.702  # quick GELU: x * sigmoid(1.702 x) (Hendrycks and Gimpel 2016)


def _quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(QUICK * x)


def _quick_gelu_backward(grad: Tensor, x: Tensor) -> Tensor:
    sigmoid = torch.sigmoid(QUICK * x)
    return grad * sigmoid * (1 + QUICK * x * (1 - sigmoid))


Activation = tuple[Callable[[Tensor], Tensor], Callable[[Tensor, Tensor], Tensor]]  # value, gradient
ACTIVATIONS: dict[str, Activation] = {
    "silu": (F.silu, lambda grad, x: aten.silu_backward(grad, x)),
    "gelu": (F.gelu, lambda grad, x: aten.gelu_backward(grad, x)),
    "gelu_tanh": (
        partial(F.gelu, approximate="tanh"),
        lambda grad, x: aten.gelu_backward(grad, x, approximate="tanh"),
    ),
    "quick_gelu": (_quick_gelu, _quick_gelu_backward),
}


def activation(function: Callable[[Tensor], Tensor]) -> str | None:
    """Which of `ACTIVATIONS` a module or function is, by what it makes of 64 numbers; None: none of them."""
    x = torch.linspace(-6.0, 6.0, 64)
    try:
        with torch.no_grad(), torch.device("cpu"):
            got = function(x)
    except Exception:  # whatever a foreign module raises on a row of numbers, it is none of these
        return None
    same = [name for name, (value, _) in ACTIVATIONS.items() if torch.equal(got, value(x))]
    return same[0] if same else None


class _QuickGelu(torch.autograd.Function):
    """Quick GELU that keeps its input alone; torch's own GELU and SiLU do so already."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return _quick_gelu(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return _quick_gelu_backward(grad, x)


class _Gated(torch.autograd.Function):
    """act(gate) * up, which keeps gate and up and makes act(gate) again."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, name: str) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.name = name
        return ACTIVATIONS[name][0](gate) * up

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        gate, up = ctx.saved_tensors
        value, gradient = ACTIVATIONS[ctx.name]
        return gradient(grad * up, gate), grad * value(gate), None


def _gated_forward(module: Any, name: str, x: Tensor) -> Tensor:
    """A gated feed-forward (LLaMA's, Qwen's, Gemma's): x [..., width] -> [..., width]."""
    return module.down_proj(_Gated.apply(module.gate_proj(x), module.up_proj(x), name))


def _gated_activation(module: Any) -> str | None:
    """The activation of a gated feed-forward; None where it computes something else."""
    kind = activation(module.act_fn)
    if kind is None:
        return None
    weight = next(module.parameters())
    if weight.is_meta:
        module = _with_weights(module)
        weight = next(module.parameters())
    row = torch.linspace(-1.0, 1.0, module.gate_proj.in_features, device=weight.device)[None]
    dtype = weight.dtype if weight.is_floating_point() else torch.float32
    with torch.no_grad(), torch.random.fork_rng([weight.device] if weight.is_cuda else []):
        torch.manual_seed(0)  # the same dropout in both, where LoRA has one
        wanted = module(row.to(dtype))
        torch.manual_seed(0)
        got = _gated_forward(module, kind, row.to(dtype))
    return kind if torch.equal(got, wanted) else None


def _with_weights(module: Any) -> Any:
    """A gated feed-forward of the same class and small, where the module's own weights have no values."""
    probe = copy.copy(module)
    with torch.random.fork_rng([]), torch.device("cpu"):
        torch.manual_seed(0)
        small = {"gate_proj": nn.Linear(4, 6), "up_proj": nn.Linear(4, 6), "down_proj": nn.Linear(6, 4)}
    probe._modules = {**module._modules, **small}
    return probe


@contextmanager
def save_fewer_activations(model: nn.Module) -> Iterator[list[str]]:
    """Inside, the model's modules keep less for the backward pass; after, they are the model's own again.

    What changes: RMS norms that no recipe replaced keep their input and 1/rms; gated feed-forwards keep gate
    and up; quick GELU keeps its input. Each kind of module is tried on numbers first, and left alone where it
    computes something else. Yields the names of what was changed.
    """
    own = {
        name: norm
        for name, norm in norms(model).items()
        if not isinstance(norm, TunedNorm) and norm_kind(norm).startswith("rms")
    }
    leaner = _reduced_forwards(model)
    try:
        for name, norm in own.items():
            model.set_submodule(name, TunedNorm.from_norm(norm))
        with replace_forwards(model, leaner):
            yield [*own, *leaner]
    finally:
        for name, norm in own.items():
            model.set_submodule(name, norm)


def _reduced_forwards(model: nn.Module) -> dict[str, Forward]:
    """What gated feed-forwards and quick GELUs are to compute by, by module name."""
    found: dict[str, Forward] = {}
    gated: dict[type, str | None] = {}
    for name, module in model.named_modules():
        if set(module._modules) >= GATED:
            if type(module) not in gated:
                gated[type(module)] = _gated_activation(module)
            if (kind := gated[type(module)]) is not None:
                found[name] = partial(_gated_forward, module, kind)
        elif not module._modules and not module._parameters and activation(module) == "quick_gelu":
            found[name] = _QuickGelu.apply
    return found
