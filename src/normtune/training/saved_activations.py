"""Replaces modules by equivalents that compute the same and save less for the backward pass.

A frozen linear layer y = x @ W.T needs W for the gradient of its input, but not x: x is needed only for the
gradient of W. If only norms are trained, a layer therefore saves what its norms, its activation function and
its attention need. For a LLaMA block with width d, feed-forward width f, key/value width k and H heads, in
bf16 (2 bytes per value), per token:

| saved by                        | transformers' modules  | here                  | why                     |
|---------------------------------|------------------------|-----------------------|-------------------------|
| 2 RMS norms: input              | 2 * 4d (fp32 copy)     | 2 * 2d (bf16)         | fp32 copy is recomputed |
| 2 RMS norms: input / rms, bf16  | 2 * 2d                 | -                     | recomputed              |
| 2 RMS norms: 1 / rms, fp32      | 2 * 4                  | 2 * 4                 | one number per token    |
| attention: query, key, value    | 2d + 2k + 2k           | 2d + 2k + 2k          | gradients of the scores |
| attention: output               | 2d                     | 2d                    | gradient of the softmax |
| attention: log-sum-exp, fp32    | 4H                     | 4H                    | one number per head     |
| MLP: gate, up                   | 2f + 2f                | 2f + 2f               | inputs of act(gate)*up  |
| MLP: act(gate)                  | 2f                     | -                     | recomputed from gate    |
| sum                             | 6f + 16d + 4k + 4H + 8 | 4f + 8d + 4k + 4H + 8 |                         |

The tests measure both sums to the byte. For d = 512 and f = 1376: 18,536 and 11,688 bytes.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from normtune.methods.norms import TunedNorm
from normtune.models.norm_kinds import norm_kind, norms
from normtune.training.layer_wrapping import Forward, replace_forwards

aten = torch.ops.aten
# submodules of a gated MLP, down(act(gate(x)) * up(x)) (Shazeer 2020, "GLU Variants Improve Transformer")
GATED_MLP = {"gate_proj", "up_proj", "down_proj", "act_fn"}
QUICK_GELU_SCALE = 1.702  # quick GELU: x * sigmoid(1.702 x) (Hendrycks and Gimpel 2016)


def _quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(QUICK_GELU_SCALE * x)


def _quick_gelu_backward(grad: Tensor, x: Tensor) -> Tensor:
    # with s = sigmoid(c x): d/dx (x s) = s + x c s (1 - s) = s (1 + c x (1 - s))
    sigmoid = torch.sigmoid(QUICK_GELU_SCALE * x)
    return grad * sigmoid * (1 + QUICK_GELU_SCALE * x * (1 - sigmoid))


# (f, backward of f): f(x), and grad * f'(x) for the gradient of the output and x
Activation = tuple[Callable[[Tensor], Tensor], Callable[[Tensor, Tensor], Tensor]]
ACTIVATIONS: dict[str, Activation] = {
    "silu": (F.silu, lambda grad, x: aten.silu_backward(grad, x)),
    "gelu": (F.gelu, lambda grad, x: aten.gelu_backward(grad, x)),
    "gelu_tanh": (partial(F.gelu, approximate="tanh"), lambda grad, x: aten.gelu_backward(grad, x, approximate="tanh")),
    "quick_gelu": (_quick_gelu, _quick_gelu_backward),
}


def identify_activation(function: Callable[[Tensor], Tensor]) -> str | None:
    """Return the name in `ACTIVATIONS` of a module or function, or None if it is another one.

    Values are compared, not classes: transformers has several classes for one function. The results
    must be equal bit for bit.
    """
    x = torch.linspace(-6.0, 6.0, 64)  # both tails and the middle
    try:
        with torch.no_grad(), torch.device("cpu"):
            values = function(x)
    except Exception:  # a module that cannot be applied to a vector of numbers is no activation
        return None
    names = [name for name, (value, _) in ACTIVATIONS.items() if torch.equal(values, value(x))]
    return names[0] if names else None


class _QuickGelu(torch.autograd.Function):
    """Quick GELU that saves only its input, as torch's own GELU and SiLU do.

    Autograd would save x, 1.702 x and the sigmoid: one tensor for each operation.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return _quick_gelu(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return _quick_gelu_backward(grad, x)


class _GatedActivation(torch.autograd.Function):
    """act(gate) * up, saving gate and up; act(gate) is recomputed in the backward pass.

    With h = act(gate) * up and g the gradient of h:

        grad_gate = g * up * act'(gate)
        grad_up   = g * act(gate)
    """

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, name: str) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.name = name
        return ACTIVATIONS[name][0](gate) * up

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        gate, up = ctx.saved_tensors  # [..., feed-forward width] each
        value, gradient = ACTIVATIONS[ctx.name]
        return gradient(grad * up, gate), grad * value(gate), None  # None: the name has no gradient


@cache
def _gated_forward(kind: str) -> Forward:
    """Return the `forward` of a gated MLP (LLaMA's, Qwen's, Gemma's) with one activation of `ACTIVATIONS`.

    One function for all layers: torch.compile then uses the graph of one layer for the others.
    """

    def forward(module: Any, x: Tensor) -> Tensor:
        # [..., width] -> [..., feed-forward width] -> [..., width]
        return module.down_proj(_GatedActivation.apply(module.gate_proj(x), module.up_proj(x), kind))

    return forward


def _gated_activation(module: Any) -> str | None:
    """Return the activation of a module that looks like a gated MLP, or None if it computes something else.

    The module's output for one row is compared bit for bit with the output of `_gated_forward(kind)`.
    """
    kind = identify_activation(module.act_fn)
    # not every projection is a linear: Gemma 4's image encoder limits the values before and after it
    if kind is None or not hasattr(module.gate_proj, "in_features"):
        return None
    weight = next(module.parameters())
    if weight.is_meta:  # a memory plan: there are no values to compute with
        module = _with_weights(module)
        weight = next(module.parameters())
    # one row, [1, width], in the dtype of the weights; quantised weights take fp32
    row = torch.linspace(-1.0, 1.0, module.gate_proj.in_features, device=weight.device)[None]
    dtype = weight.dtype if weight.is_floating_point() else torch.float32
    with torch.no_grad(), torch.random.fork_rng([weight.device] if weight.is_cuda else []):
        torch.manual_seed(0)  # LoRA may have dropout: the same mask in both
        expected = module(row.to(dtype))
        torch.manual_seed(0)
        computed = _gated_forward(kind)(module, row.to(dtype))
    return kind if torch.equal(computed, expected) else None


def _with_weights(module: Any) -> Any:
    """Return a copy of a gated MLP without values that has small linear layers with values."""
    probe = copy.copy(module)  # shallow: it shares the class's `forward` and the activation
    with torch.random.fork_rng([]), torch.device("cpu"):
        torch.manual_seed(0)
        # width 4, feed-forward width 6: the class's `forward` does not depend on sizes
        small = {"gate_proj": nn.Linear(4, 6), "up_proj": nn.Linear(4, 6), "down_proj": nn.Linear(6, 4)}
    probe._modules = {**module._modules, **small}
    return probe


@contextmanager
def save_fewer_activations(model: nn.Module) -> Iterator[list[str]]:
    """Make the model's modules save less for the backward pass inside the block, and restore them afterwards.

    RMS norms that no recipe replaced save their input and 1/rms, gated MLPs save gate and up, and quick GELUs
    save their input. Each class of MLP and each activation is first compared on sample values, and left
    unchanged if it computes something else.

    Yields:
        The names of the changed modules.
    """
    # frozen norms become `TunedNorm`s too, without training: their backward pass needs x and 1/rms only
    frozen_norms = {
        name: norm
        for name, norm in norms(model).items()
        if not isinstance(norm, TunedNorm) and norm_kind(norm).startswith("rms")
    }
    forwards = _reduced_forwards(model)
    try:
        for name, norm in frozen_norms.items():
            model.set_submodule(name, TunedNorm.from_norm(norm))
        with replace_forwards(model, forwards):
            yield [*frozen_norms, *forwards]
    finally:
        for name, norm in frozen_norms.items():
            model.set_submodule(name, norm)


def _reduced_forwards(model: nn.Module) -> dict[str, Forward]:
    """Return the new `forward` of each gated MLP and quick GELU, by module name."""
    forwards: dict[str, Forward] = {}
    activations: dict[type, str | None] = {}  # of each class: one comparison serves all layers
    for name, module in model.named_modules():
        # the submodules suggest a gated MLP, in a class of any name; a comparison of outputs then confirms it
        if set(module._modules) >= GATED_MLP:
            if type(module) not in activations:
                activations[type(module)] = _gated_activation(module)
            if (kind := activations[type(module)]) is not None:
                forwards[name] = MethodType(_gated_forward(kind), module)
        # an activation has neither submodules nor parameters
        elif not module._modules and not module._parameters and identify_activation(module) == "quick_gelu":
            forwards[name] = _QuickGelu.apply
    return forwards
