"""Norms whose gains learn in fp32, whatever the base's precision.

Near 1 the spacing of bf16 is 0.0078, so a bf16 gain cannot take an AdamW step of 1e-4: it never moves. A
`TunedNorm` holds gain and bias in fp32, computes in fp32, gives its output in the input's dtype, and keeps
for the backward pass only its input, as it came, and one or two statistics a row.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from normtune.anatomy import norm_kind, tried


def norm_eps(module: nn.Module) -> float | None:
    """The constant added to the variance; None where it is the dtype's own (`nn.RMSNorm`'s default)."""
    for name in ("eps", "variance_epsilon"):
        if hasattr(module, name):
            return getattr(module, name)
    raise AssertionError(f"{type(module).__name__} names its epsilon neither eps nor variance_epsilon")


def rounds_first(module: nn.Module) -> bool:
    """Whether an "rms" norm rounds x/rms to the input's dtype before its gain (LLaMA) or after it (Gemma 4).

    Both are tried on 64 bf16 numbers; where neither explains the norm to the bit, the nearer one is taken.
    """
    x = torch.linspace(-3.0, 5.0, 64, dtype=torch.bfloat16)[None]
    gain = torch.linspace(0.3, 2.1, 64, dtype=torch.bfloat16)
    got = tried(module, x, gain).float()
    wide = x.float()
    unit = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + (norm_eps(module) or 0.0))
    first, after = (unit.bfloat16() * gain).float(), (unit * gain.float()).bfloat16().float()
    return bool((got - first).abs().sum() <= (got - after).abs().sum())


class _LayerNorm(torch.autograd.Function):
    """Layer normalisation (Ba et al. 2016) that saves x, mean and 1/std and recomputes the rest."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
        out, mean, rstd = torch.native_layer_norm(x.float(), weight.shape, weight, bias, eps)
        ctx.save_for_backward(x, mean, rstd, weight, bias)
        return out.to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, mean, rstd, weight, bias = ctx.saved_tensors
        wanted = [ctx.needs_input_grad[0], ctx.needs_input_grad[1], ctx.needs_input_grad[2]]
        grad_x, grad_weight, grad_bias = torch.ops.aten.native_layer_norm_backward(
            grad.float(), x.float(), weight.shape, mean, rstd, weight, bias, wanted
        )
        return None if grad_x is None else grad_x.to(x.dtype), grad_weight, grad_bias, None


class _RMSNorm(torch.autograd.Function):
    """Root-mean-square normalisation (Zhang and Sennrich 2019) that saves x and 1/rms.

    With `offset` the gain is 1 + weight (Gemma). With `rounds` x/rms is rounded to the input's dtype before
    the gain, as LLaMA's norm does, so that an untouched gain gives the base's output to the bit.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, offset: bool, rounds: bool) -> Tensor:
        wide = x.float()
        rstd = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
        ctx.save_for_backward(x, rstd, weight)
        ctx.offset = offset
        unit = wide * rstd
        gain = 1.0 + weight if offset else weight
        if rounds and x.dtype != torch.float32:
            return (unit.to(x.dtype) * gain).to(x.dtype)
        return unit.mul_(gain).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, rstd, weight = ctx.saved_tensors
        gain = 1.0 + weight if ctx.offset else weight
        wide = grad.float()
        # With a mean of 0 layer norm's kernel gives the gain's gradient, and the input's less one term, which
        # layer norm has and this one has not: 1/rms times the mean of grad * gain.
        wanted = [ctx.needs_input_grad[0], ctx.needs_input_grad[1], False]
        grad_x, grad_weight, _ = torch.ops.aten.native_layer_norm_backward(
            wide, x.float(), weight.shape, torch.zeros_like(rstd), rstd, gain, None, wanted
        )
        if grad_x is not None:
            mean = (wide @ gain).unsqueeze(-1) / gain.numel()
            grad_x = grad_x.addcmul_(rstd, mean).to(x.dtype)
        return grad_x, grad_weight, None, None, None


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
        rounds: bool = False,
    ) -> None:
        super().__init__()
        self.kind = kind
        self.eps = eps
        self.groups = groups
        self.rounds = rounds
        self.weight = nn.Parameter(weight.detach().to(torch.float32, copy=True), weight.requires_grad)
        self.bias = None
        if bias is not None:
            self.bias = nn.Parameter(bias.detach().to(torch.float32, copy=True), bias.requires_grad)

    @classmethod
    def of(cls, module: nn.Module) -> TunedNorm:
        """The tuned counterpart of a norm, on the same device, with copies of its values."""
        weight = module.weight
        assert isinstance(weight, Tensor), "a norm without a gain has nothing to tune"
        bias = getattr(module, "bias", None)
        groups = module.num_groups if isinstance(module, nn.GroupNorm) else 1
        kind = norm_kind(module)
        rounds = kind == "rms" and rounds_first(module)
        tuned = cls(kind, weight, bias, norm_eps(module), groups, rounds)
        return tuned.train(module.training)

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., width] (group: [batch, width, ...]), any float dtype; returns the same shape and dtype."""
        eps = torch.finfo(torch.float32).eps if self.eps is None else self.eps
        if self.kind == "group":
            return F.group_norm(x.float(), self.groups, self.weight, self.bias, eps).to(x.dtype)
        if self.kind == "layer":
            return _LayerNorm.apply(x, self.weight, self.bias, eps)
        return _RMSNorm.apply(x, self.weight, eps, self.kind == "rms_offset", self.rounds)

    def extra_repr(self) -> str:
        return f"{self.weight.numel()}, kind={self.kind}, eps={self.eps}, bias={self.bias is not None}"


class MixedNorm(nn.Module):
    """Gains of several adapters in one norm; every row of a batch takes its own.

    Attributes:
        weight: [adapters, width] fp32.
        bias: [adapters, width] fp32, or None.
        rows: which adapter each row takes, [batch] (or [tokens] where the input has no batch axis); set it
            before each call of the model, or share one tensor among all norms and fill it in place.
    """

    weight: Tensor
    bias: Tensor | None
    rows: Tensor | None

    def __init__(
        self, kind: str, weight: Tensor, bias: Tensor | None, eps: float | None, rounds: bool = False
    ) -> None:
        super().__init__()
        assert kind in ("layer", "rms", "rms_offset"), f"no per-row gains for kind {kind}"
        self.kind = kind
        self.eps = eps
        self.rounds = rounds
        self.register_buffer("weight", weight)
        self.register_buffer("bias", bias)
        self.rows = None

    @classmethod
    def of(cls, norm: TunedNorm, weights: list[Tensor], biases: list[Tensor] | None = None) -> MixedNorm:
        """One norm with the given gains ([width] each), of the kind of `norm`."""
        weight = torch.stack([one.detach().float() for one in weights])
        bias = None if biases is None else torch.stack([one.detach().float() for one in biases])
        return cls(norm.kind, weight, bias, norm.eps, norm.rounds)

    def forward(self, x: Tensor) -> Tensor:
        """x: [batch, ..., width]; returns the same shape and dtype."""
        assert self.rows is not None, "MixedNorm.rows is not set"
        eps = torch.finfo(torch.float32).eps if self.eps is None else self.eps
        wide = x.float()
        if self.kind == "layer":
            unit = F.layer_norm(wide, x.shape[-1:], None, None, eps)
        else:
            unit = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
        gain = self._per_row(self.weight, x)
        if self.kind == "rms_offset":
            gain = 1.0 + gain
        elif self.rounds:
            unit = unit.to(x.dtype)
        out = unit * gain
        if self.bias is not None:
            out = out + self._per_row(self.bias, x)
        return out.to(x.dtype)

    def _per_row(self, bank: Tensor, x: Tensor) -> Tensor:
        """[adapters, width] -> [batch, 1, ..., 1, width], to be broadcast over x."""
        assert self.rows is not None
        chosen = bank[self.rows]
        return chosen.view(len(self.rows), *(1,) * (x.ndim - 2), bank.shape[-1])
