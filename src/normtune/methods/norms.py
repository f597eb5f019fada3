"""Norms whose gains learn in fp32, whatever the base's precision.

Near 1 the spacing of bf16 is 0.0078, so a bf16 gain cannot take an AdamW step of 1e-4: it never moves. A
`TunedNorm` holds gain and bias in fp32, computes in fp32, gives its output in the input's dtype, and keeps
for the backward pass only its input, as it came, and one or two statistics a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from normtune.models.parts import norm_kind, probe_norm
from normtune.runtime.tensors import clone_while_compiling


def norm_eps(module: nn.Module) -> float | None:
    """The constant added to the variance; None where it is the dtype's own (`nn.RMSNorm`'s default)."""
    for name in ("eps", "variance_epsilon"):
        if hasattr(module, name):
            return getattr(module, name)
    raise AssertionError(f"{type(module).__name__} names its epsilon neither eps nor variance_epsilon")


def rounds_before_gain(module: nn.Module) -> bool:
    """Whether an "rms" norm rounds x/rms to the input's dtype before its gain (LLaMA) or after it (Gemma 4).

    Both are tried on 64 bf16 numbers; where neither explains the norm to the bit, the nearer one is taken.
    """
    x = torch.linspace(-3.0, 5.0, 64, dtype=torch.bfloat16)[None]
    gain = torch.linspace(0.3, 2.1, 64, dtype=torch.bfloat16)
    got = probe_norm(module, x, gain).float()
    wide = x.float()
    unit = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + (norm_eps(module) or 0.0))
    first, after = (unit.bfloat16() * gain).float(), (unit * gain.float()).bfloat16().float()
    return bool((got - first).abs().sum() <= (got - after).abs().sum())


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Layer normalisation (Ba et al. 2016): (result, mean, 1/std)."""
    out, mean, rstd = torch.native_layer_norm(x.float(), weight.shape, weight, bias, eps)
    return out.to(x.dtype), mean, rstd


def layer_norm_backward(
    grad: Tensor, saved: Sequence[Tensor], weight: Tensor, bias: Tensor | None, wanted: list[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of input, gain and bias from what was saved: input, mean and 1/std."""
    x, mean, rstd = saved
    grad_x, grad_weight, grad_bias = torch.ops.aten.native_layer_norm_backward(
        grad.float(), x.float(), weight.shape, mean, rstd, weight, bias, wanted
    )
    return None if grad_x is None else grad_x.to(x.dtype), grad_weight, grad_bias


def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: bool, rounds: bool) -> tuple[Tensor, Tensor]:
    """Root-mean-square normalisation (Zhang and Sennrich 2019): (result, 1/rms).

    With `offset` the gain is 1 + weight (Gemma). With `rounds` x/rms is rounded to the input's dtype before
    the gain, as LLaMA's norm does, so that an untouched gain gives the base's output to the bit.
    """
    wide = x.float()
    rstd = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return scale_and_shift(wide * rstd, 1.0 + weight if offset else weight, None, x.dtype, rounds), rstd


def scale_and_shift(
    unit: Tensor, gain: Tensor, bias: Tensor | None, dtype: torch.dtype, rounds: bool
) -> Tensor:
    """Normalised rows (fp32, overwritten) times gain plus bias, in `dtype`; the two broadcast."""
    if rounds and dtype != torch.float32:
        return (unit.to(dtype) * gain).to(dtype)
    unit = unit.mul_(gain)
    return (unit if bias is None else unit.add_(bias)).to(dtype)


def rms_norm_backward(
    grad: Tensor, saved: Sequence[Tensor], weight: Tensor, offset: bool, wanted: list[bool]
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of input and gain from what was saved: input and 1/rms."""
    x, rstd = saved
    gain = 1.0 + weight if offset else weight
    wide = grad.float()
    # With a mean of 0 layer norm's kernel gives the gain's gradient, and the input's less one term, which
    # layer norm has and this one has not: 1/rms times the mean of grad * gain.
    grad_x, grad_weight, _ = torch.ops.aten.native_layer_norm_backward(
        wide, x.float(), weight.shape, torch.zeros_like(rstd), rstd, gain, None, [*wanted[:2], False]
    )
    if grad_x is not None:
        mean = (wide @ gain).unsqueeze(-1) / gain.numel()
        grad_x = grad_x.addcmul_(rstd, mean).to(x.dtype)
    return grad_x, grad_weight


class _LayerNorm(torch.autograd.Function):
    """Layer normalisation that saves x, mean and 1/std and recomputes the rest."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
        out, mean, rstd = layer_norm(x, weight, bias, eps)
        ctx.save_for_backward(x, mean, rstd, weight, bias)
        return clone_while_compiling(out)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        *saved, weight, bias = ctx.saved_tensors
        return *layer_norm_backward(grad, saved, weight, bias, [*ctx.needs_input_grad[:3]]), None


class _RMSNorm(torch.autograd.Function):
    """Root-mean-square normalisation that saves x and 1/rms."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, offset: bool, rounds: bool) -> Tensor:
        out, rstd = rms_norm(x, weight, eps, offset, rounds)
        ctx.save_for_backward(x, rstd, weight)
        ctx.offset = offset
        return clone_while_compiling(out)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        *saved, weight = ctx.saved_tensors
        found = rms_norm_backward(grad, saved, weight, ctx.offset, [*ctx.needs_input_grad[:2]])
        return *found, None, None, None


class TunedNorm(nn.Module):
    """A norm made from the base's own, with `weight` and `bias` (where it has one) in fp32.

    Attributes:
        kind: "layer", "rms", "rms_offset" (gain = 1 + weight) or "group".
        rounds: whether x/rms is rounded to the input's dtype before the gain.
        weight: [width] fp32; its `requires_grad`, and the bias's, are those of the norm it was made from.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(
        self,
        kind: str,
        weight: Tensor,
        bias: Tensor | None,
        eps: float | None,
        groups: int = 1,
        round_before_gain: bool = False,
    ) -> None:
        super().__init__()
        self.kind = kind
        self.eps = eps
        self.groups = groups
        self.round_before_gain = round_before_gain
        self.weight = nn.Parameter(weight.detach().to(torch.float32, copy=True), weight.requires_grad)
        self.bias = None
        if bias is not None:
            self.bias = nn.Parameter(bias.detach().to(torch.float32, copy=True), bias.requires_grad)

    @classmethod
    def from_norm(cls, module: nn.Module) -> TunedNorm:
        """The tuned counterpart of a norm, on the same device, with copies of its values."""
        weight = module.weight
        assert isinstance(weight, Tensor), "a norm without a gain has nothing to tune"
        bias = getattr(module, "bias", None)
        groups = module.num_groups if isinstance(module, nn.GroupNorm) else 1
        kind = norm_kind(module)
        rounds = kind == "rms" and rounds_before_gain(module)
        tuned = cls(kind, weight, bias, norm_eps(module), groups, rounds)
        return tuned.train(module.training)

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., width] (group: [batch, width, ...]), any float dtype; returns the same shape and dtype."""
        eps = torch.finfo(torch.float32).eps if self.eps is None else self.eps
        if self.kind == "group":
            return F.group_norm(x.float(), self.groups, self.weight, self.bias, eps).to(x.dtype)
        if self.kind == "layer":
            return _LayerNorm.apply(x, self.weight, self.bias, eps)
        return _RMSNorm.apply(x, self.weight, eps, self.kind == "rms_offset", self.round_before_gain)

    def extra_repr(self) -> str:
        return f"{self.weight.numel()}, kind={self.kind}, eps={self.eps}, bias={self.bias is not None}"
