"""Normalisation layers that hold the gains and biases of several adapters."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from normtune.adapters.multi.rows import MAX_RUNS, ActiveRows, RowAdapters
from normtune.methods.norms import (
    TunedNorm,
    layer_norm,
    layer_norm_backward,
    rms_norm,
    rms_norm_backward,
    scale_and_shift,
)
from normtune.runtime.tensors import clone_while_compiling


class _MultiAdapterNormFunction(torch.autograd.Function):
    """Layer or RMS normalisation with each row's own gain; saves what the function of one adapter saves."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        eps: float,
        norm: MultiAdapterNorm,
        owners: RowAdapters,
    ) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        runs = owners.runs(len(flat))
        if len(runs) <= MAX_RUNS:
            found = [
                norm.forward_run(flat[start:stop], weight[one], None if bias is None else bias[one], eps)
                for one, start, stop in runs
            ]
            out, *statistics = found[0] if len(found) == 1 else map(torch.cat, zip(*found, strict=True))
        else:
            out, *statistics = norm.forward_rows(flat, weight, bias, eps, owners)
        ctx.save_for_backward(x, weight, bias, *statistics)
        ctx.norm, ctx.runs = norm, runs
        return clone_while_compiling(out.view(x.shape))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, *statistics = ctx.saved_tensors
        wanted = [*ctx.needs_input_grad[:3]]
        flat, grad = x.reshape(-1, x.shape[-1]), grad.reshape(-1, x.shape[-1])
        grad_x = torch.empty_like(flat) if wanted[0] else None
        banks = [
            torch.zeros_like(bank) if want else None
            for bank, want in zip((weight, bias), wanted[1:], strict=True)
        ]
        for one, start, stop in ctx.runs:
            saved = [tensor[start:stop] for tensor in (flat, *statistics)]
            own_bias = None if bias is None else bias[one]
            if ctx.norm.kind == "layer":
                found = layer_norm_backward(grad[start:stop], saved, weight[one], own_bias, wanted)
            else:
                offset = ctx.norm.kind == "rms_offset"
                found = *rms_norm_backward(grad[start:stop], saved, weight[one], offset, wanted), None
            if grad_x is not None and found[0] is not None:
                grad_x[start:stop] = found[0]
            for bank, own in zip(banks, found[1:], strict=True):
                if bank is not None and own is not None:
                    bank[one] += own
        return None if grad_x is None else grad_x.view(x.shape), *banks, None, None, None


class MultiAdapterNorm(nn.Module):
    """A `TunedNorm` of several adapters: each row of a batch takes the gain and bias of its own.

    Rows are normalised once, and what one adapter's rows come to is what its `TunedNorm` makes of them.

    Attributes:
        weight: [adapters, width] fp32.
        bias: [adapters, width] fp32, or None.
        rows: whose the rows are; one object for all norms whose inputs hold the same units.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(
        self,
        kind: str,
        weight: Tensor,
        bias: Tensor | None,
        eps: float | None,
        rows: ActiveRows,
        group_count: int = 1,
        round_before_gain: bool = False,
    ) -> None:
        super().__init__()
        self.kind = kind
        self.eps = eps
        self.rounds = round_before_gain
        self.group_count = group_count
        self.rows = rows
        self.weight = nn.Parameter(weight)
        self.bias = None if bias is None else nn.Parameter(bias)

    @classmethod
    def from_norm(
        cls, norm: TunedNorm, weight: Tensor, bias: Tensor | None, rows: ActiveRows
    ) -> MultiAdapterNorm:
        """A norm of the kind of `norm` around banks [adapters, width] in fp32, which are not copied."""
        mixed = cls(norm.kind, weight, bias, norm.eps, rows, norm.groups, norm.round_before_gain)
        return mixed.train(norm.training)

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., width] (group: [batch, width, ...]), any float dtype; returns the same shape and dtype."""
        owners = self.rows.adapters
        assert owners is not None, "nobody has said whose these rows are: see Rows.taken_by"
        units = len(owners.adapters)
        if x.ndim == 4 and len(x) == 1 < units and x.shape[1] != units == x.shape[2]:
            return self(x.transpose(1, 2)).transpose(1, 2)  # the heads of one row's tokens stand before them
        eps = torch.finfo(torch.float32).eps if self.eps is None else self.eps
        if self.kind != "group":
            return _MultiAdapterNormFunction.apply(x, self.weight, self.bias, eps, self, owners)
        bias = [None] * len(self.weight) if self.bias is None else self.bias
        found = [
            F.group_norm(x[start:stop].float(), self.group_count, self.weight[one], bias[one], eps)
            for one, start, stop in owners.runs(len(x))
        ]
        return torch.cat(found).to(x.dtype)

    def forward_run(self, x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> tuple[Tensor, ...]:
        """Rows [R, width] of one adapter: (result, statistics ...)."""
        if self.kind == "layer":
            return layer_norm(x, weight, bias, eps)
        return rms_norm(x, weight, eps, self.kind == "rms_offset", self.rounds)

    def forward_rows(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, owners: RowAdapters
    ) -> tuple[Tensor, ...]:
        """The same of rows of many adapters: gains are gathered."""
        wide = x.float()
        if self.kind == "layer":
            unit, *statistics = torch.native_layer_norm(wide, x.shape[-1:], None, None, eps)
        else:
            statistics = [torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)]
            unit = wide * statistics[0]
        gain = owners.gather(weight, len(x))
        gain = 1.0 + gain if self.kind == "rms_offset" else gain
        shift = None if bias is None else owners.gather(bias, len(x))
        unit = unit.view(len(gain), -1, x.shape[-1])
        return scale_and_shift(unit, gain, shift, x.dtype, self.rounds).view(x.shape), *statistics

    def extra_repr(self) -> str:
        adapters, width = self.weight.shape
        return f"{width}, adapters={adapters}, kind={self.kind}, eps={self.eps}, bias={self.bias is not None}"
