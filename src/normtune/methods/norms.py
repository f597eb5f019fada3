"""Norms with fp32 gains, on a base of any precision.

Why fp32: bf16 has 8 significant bits, so its values are 2^-7 = 0.0078 apart just above 1 and 2^-8 = 0.0039
just below. A gain starts near 1, and an AdamW step changes it by about the learning rate. With a rate of 1e-4
the step is less than half the spacing, rounding returns the old value, and a bf16 gain never moves.

A `TunedNorm` therefore stores gain and bias in fp32, computes in fp32 and returns its output in the input's
dtype. For the backward pass it saves its input in the dtype in which it arrived, and one or two statistics a
row: no fp32 copy of the activations.

In the formulas below x is one row of width d, g the gain, b the bias, dy the gradient of the result and
avg(v) = sum(v) / d.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from normtune.models.norm_kinds import norm_kind, probe_norm
from normtune.runtime.tensors import clone_while_compiling


def norm_eps(module: nn.Module) -> float | None:
    """The constant added to the variance; None for the machine epsilon (the default of `nn.RMSNorm`)."""
    for name in ("eps", "variance_epsilon"):
        if hasattr(module, name):
            return getattr(module, name)
    raise AssertionError(f"{type(module).__name__} names its epsilon neither eps nor variance_epsilon")


def rounds_before_gain(module: nn.Module) -> bool:
    """Whether an "rms" norm rounds x/rms to the input's dtype before its gain (LLaMA) or after it (Gemma 4).

    The order matters: in bf16 the two results differ in the last bit of many values, and a tuned norm must
    give the base's output to the bit as long as its gain is untouched. The norm is run on 64 bf16 numbers and
    compared with both orders. If neither matches exactly, the nearer one is used.
    """
    x = torch.linspace(-3.0, 5.0, 64, dtype=torch.bfloat16)[None]  # [1, 64]
    gain = torch.linspace(0.3, 2.1, 64, dtype=torch.bfloat16)  # [64]
    output = probe_norm(module, x, gain).float()
    wide = x.float()
    unit = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + (norm_eps(module) or 0.0))  # x / rms
    before = (unit.bfloat16() * gain).float()  # LLaMA: gain * bf16(x / rms)
    after = (unit * gain.float()).bfloat16().float()  # Gemma 4: bf16(gain * x / rms)
    return bool((output - before).abs().sum() <= (output - after).abs().sum())


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Layer normalisation in fp32 (Ba et al. 2016, arXiv 1607.06450).

    Args:
        x: [..., width], any float dtype.
        weight, bias: [width] fp32.

    Returns:
        (result [..., width] in x's dtype, mean [..., 1] fp32, rstd = 1/std [..., 1] fp32).
    """
    # mean = avg(x)
    # rstd = 1 / sqrt(avg((x - mean)^2) + eps)
    # unit = (x - mean) * rstd
    # y    = unit * g + b
    out, mean, rstd = torch.native_layer_norm(x.float(), weight.shape, weight, bias, eps)
    return out.to(x.dtype), mean, rstd


def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: bool, round_before_gain: bool) -> tuple[Tensor, Tensor]:
    """Root-mean-square normalisation in fp32 (Zhang and Sennrich 2019, arXiv 1910.07467).

    Args:
        x: [..., width], any float dtype.
        weight: [width] fp32.
        offset: the gain is 1 + weight (Gemma) instead of weight.
        round_before_gain: round x/rms to x's dtype before the gain, as LLaMA's norm does, so that an
            untouched gain gives the base's output: on a CPU to the bit, on CUDA up to the rounding of 1/rms.

    Returns:
        (result [..., width] in x's dtype, rstd = 1/rms [..., 1] fp32).
    """
    # rstd = 1 / sqrt(avg(x^2) + eps)
    # unit = x * rstd
    # y    = unit * g; no mean is subtracted and there is no bias
    gain = 1.0 + weight if offset else weight
    # torch's fused operation is one kernel on CUDA, which rounds to x's dtype at its end
    if round_before_gain and x.dtype != torch.float32:
        unit, rstd = torch.ops.aten._fused_rms_norm(x, weight.shape, None, eps)
        return (unit * gain).to(x.dtype), rstd  # see `scale_and_shift`
    wide = x.float()
    if x.is_cuda:
        out, rstd = torch.ops.aten._fused_rms_norm(wide, weight.shape, gain, eps)
        return out.to(x.dtype), rstd
    rstd = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)  # [..., 1]; fewer copies than the fused one here
    return scale_and_shift(wide * rstd, gain, None, x.dtype, False), rstd


def scale_and_shift(
    unit: Tensor, gain: Tensor, bias: Tensor | None, dtype: torch.dtype, round_before_gain: bool
) -> Tensor:
    """unit * gain + bias in `dtype`.

    Args:
        unit: normalised rows, fp32; this tensor is overwritten, which saves an fp32 copy.
        gain, bias: fp32, of a shape that broadcasts to unit's.
    """
    if round_before_gain and dtype != torch.float32:
        # LLaMA's order: round, multiply, round. The product of two bf16 values is exact in fp32, so that an
        # fp32 gain with a bf16 value gives the same bits as the base's bf16 multiplication.
        return (unit.to(dtype) * gain).to(dtype)
    unit = unit.mul_(gain)
    return (unit if bias is None else unit.add_(bias)).to(dtype)


class _LayerNorm(torch.autograd.Function):
    """Layer normalisation that saves x, mean and 1/std for its backward pass, and recomputes the rest."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
        out, mean, rstd = layer_norm(x, weight, bias, eps)
        # x as it arrived (bf16): its fp32 copy is made again in the backward pass
        ctx.save_for_backward(x, mean, rstd, weight, bias)
        return clone_while_compiling(out)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        # du = dy * g
        # dx = rstd * (du - avg(du) - unit * avg(du * unit))
        # dg = sum over all rows of dy * unit
        # db = sum over all rows of dy
        x, mean, rstd, weight, bias = ctx.saved_tensors
        grad_x, grad_weight, grad_bias = torch.ops.aten.native_layer_norm_backward(
            grad.float(), x.float(), weight.shape, mean, rstd, weight, bias, [*ctx.needs_input_grad[:3]]
        )
        # one gradient for each argument of forward: x (in its dtype), weight and bias (fp32), eps (none)
        return None if grad_x is None else grad_x.to(x.dtype), grad_weight, grad_bias, None


class _RMSNorm(torch.autograd.Function):
    """Root-mean-square normalisation that saves x and 1/rms for its backward pass, and recomputes the rest."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, offset: bool, round_before_gain: bool) -> Tensor:
        out, rstd = rms_norm(x, weight, eps, offset, round_before_gain)
        ctx.save_for_backward(x, rstd, weight)
        ctx.offset = offset
        return clone_while_compiling(out)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        # du = dy * g
        # dx = rstd * (du - unit * avg(du * unit))
        # dg = sum over all rows of dy * unit; it is the gradient of the weight, also where g is 1 + weight
        # Rounding x/rms before the gain passes gradients unchanged, as autograd does through .to(bf16).
        x, rstd, weight = ctx.saved_tensors
        gain = 1.0 + weight if ctx.offset else weight
        wide, output_mask = grad.float(), [*ctx.needs_input_grad[:2]]
        if x.is_cuda:
            grad_x, grad_weight = torch.ops.aten._fused_rms_norm_backward(
                wide.contiguous(), x.float(), weight.shape, rstd, gain, output_mask
            )
        else:
            # A CPU has no such kernel. Layer norm's kernel with a mean of 0 has the same unit, x * rstd, and so the
            # same dg. Its dx has one more term, -rstd * avg(du), which is added back.
            grad_x, grad_weight, _ = torch.ops.aten.native_layer_norm_backward(
                wide, x.float(), weight.shape, torch.zeros_like(rstd), rstd, gain, None, [*output_mask, False]
            )
            if grad_x is not None:
                mean = (wide @ gain).unsqueeze(-1) / gain.numel()  # avg(du), [..., 1]
                grad_x = grad_x.addcmul_(rstd, mean)
        return None if grad_x is None else grad_x.to(x.dtype), grad_weight, None, None, None


class TunedNorm(nn.Module):
    """A norm made from a norm of the base, with `weight` and `bias` (if the base's has one) in fp32.

    Attributes:
        kind: "layer", "rms", "rms_offset" (gain = 1 + weight) or "group".
        round_before_gain: whether x/rms is rounded to the input's dtype before the gain.
        weight: [width] fp32. It requires a gradient if the base's weight did; the same holds for the bias.
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
        # copies: the base's norm must keep its values, so that `restore_base` can put it back
        self.weight = nn.Parameter(weight.detach().to(torch.float32, copy=True), weight.requires_grad)
        self.bias = None
        if bias is not None:
            self.bias = nn.Parameter(bias.detach().to(torch.float32, copy=True), bias.requires_grad)

    @classmethod
    def from_norm(cls, module: nn.Module) -> TunedNorm:
        """Make the tuned counterpart of a norm, on the same device, with copies of its values."""
        weight = module.weight
        assert isinstance(weight, Tensor), "a norm without a gain has nothing to tune"
        bias = getattr(module, "bias", None)
        groups = module.num_groups if isinstance(module, nn.GroupNorm) else 1
        kind = norm_kind(module)
        # Only LLaMA's kind rounds first: Gemma's (rms_offset) and torch's layer norm apply the gain in fp32.
        round_before_gain = kind == "rms" and rounds_before_gain(module)
        tuned = cls(kind, weight, bias, norm_eps(module), groups, round_before_gain)
        return tuned.train(module.training)

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., width] (group: [batch, width, ...]), any float dtype; returns the same shape and dtype."""
        eps = torch.finfo(torch.float32).eps if self.eps is None else self.eps
        # A group norm is torch's own with fp32 parameters: autograd saves an fp32 copy of its input.
        if self.kind == "group":
            return F.group_norm(x.float(), self.groups, self.weight, self.bias, eps).to(x.dtype)
        if self.kind == "layer":
            return _LayerNorm.apply(x, self.weight, self.bias, eps)
        return _RMSNorm.apply(x, self.weight, eps, self.kind == "rms_offset", self.round_before_gain)

    def extra_repr(self) -> str:
        return f"{self.weight.numel()}, kind={self.kind}, eps={self.eps}, bias={self.bias is not None}"
