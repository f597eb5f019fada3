"""Norms that hold the gains and biases of several adapters.

Everything between the norms is the base and the same for all adapters, so that one pass over the base serves
rows of many adapters: only the gain (and bias) of a row depends on its adapter.
"""

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
    """Layer or RMS normalisation in which each row has the gain of its adapter.

    It saves for the backward pass what the function of a single adapter saves: the input and its statistics.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        eps: float,
        norm: MultiAdapterNorm,
        row_adapters: RowAdapters,
    ) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])  # [rows, width]
        runs = row_adapters.runs(len(flat))
        if len(runs) <= MAX_RUNS:
            # Few runs: the kernel of a single adapter for each run. With one adapter in the batch this is
            # exactly what its TunedNorm computes, to the bit.
            results = [
                norm.forward_run(flat[start:stop], weight[adapter], None if bias is None else bias[adapter], eps)
                for adapter, start, stop in runs
            ]
            out, *statistics = results[0] if len(results) == 1 else map(torch.cat, zip(*results, strict=True))
        else:
            # Many runs, as when every row of a batch has another adapter: one kernel for all rows.
            out, *statistics = norm.forward_rows(flat, weight, bias, eps, row_adapters)
        # statistics: [rows, 1] each, in the order of the rows in either case
        ctx.save_for_backward(x, weight, bias, *statistics)
        ctx.norm, ctx.runs = norm, runs
        return clone_while_compiling(out.view(x.shape))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, *statistics = ctx.saved_tensors
        needs_grad = [*ctx.needs_input_grad[:3]]  # of x, weight and bias
        flat, grad = x.reshape(-1, x.shape[-1]), grad.reshape(-1, x.shape[-1])  # [rows, width] each
        grad_x = torch.empty_like(flat) if needs_grad[0] else None
        # [adapters, width] each; adapters without rows in this batch keep a gradient of zero
        grad_banks = [
            torch.zeros_like(bank) if needed else None
            for bank, needed in zip((weight, bias), needs_grad[1:], strict=True)
        ]
        # Run by run, even if the forward pass gathered gains: the gradient of a gain sums over the rows of
        # one adapter only, and the kernels do that sum for the rows they are given.
        for adapter, start, stop in ctx.runs:
            saved = [tensor[start:stop] for tensor in (flat, *statistics)]
            if ctx.norm.kind == "layer":
                run_bias = None if bias is None else bias[adapter]
                grads = layer_norm_backward(grad[start:stop], saved, weight[adapter], run_bias, needs_grad)
            else:
                offset = ctx.norm.kind == "rms_offset"
                grads = *rms_norm_backward(grad[start:stop], saved, weight[adapter], offset, needs_grad), None
            if grad_x is not None and grads[0] is not None:
                grad_x[start:stop] = grads[0]
            for grad_bank, run_grad in zip(grad_banks, grads[1:], strict=True):
                if grad_bank is not None and run_grad is not None:
                    grad_bank[adapter] += run_grad  # added: an adapter may have several runs
        return None if grad_x is None else grad_x.view(x.shape), *grad_banks, None, None, None


class MultiAdapterNorm(nn.Module):
    """A `TunedNorm` for several adapters: each row has the gain and bias of its adapter.

    The result of a row is what the `TunedNorm` of its adapter would compute.

    Attributes:
        weight: [adapters, width] fp32.
        bias: [adapters, width] fp32, or None.
        active_rows: the adapter of each row; one object for all norms with the same units in their inputs.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(
        self,
        kind: str,
        weight: Tensor,
        bias: Tensor | None,
        eps: float | None,
        active_rows: ActiveRows,
        group_count: int = 1,
        round_before_gain: bool = False,
    ) -> None:
        super().__init__()
        self.kind = kind
        self.eps = eps
        self.round_before_gain = round_before_gain
        self.group_count = group_count
        self.active_rows = active_rows
        # parameters around the tensors they are given, which may be views of a bank: no copies
        self.weight = nn.Parameter(weight)
        self.bias = None if bias is None else nn.Parameter(bias)

    @classmethod
    def from_norm(
        cls, norm: TunedNorm, weight: Tensor, bias: Tensor | None, active_rows: ActiveRows
    ) -> MultiAdapterNorm:
        """A norm of the same kind as `norm` over banks [adapters, width] in fp32, which are not copied."""
        multi = cls(norm.kind, weight, bias, norm.eps, active_rows, norm.groups, norm.round_before_gain)
        return multi.train(norm.training)

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., width] (group: [batch, width, ...]), any float dtype; returns the same shape and dtype."""
        row_adapters = self.active_rows.adapters
        assert row_adapters is not None, "the adapters of these rows are not set: see ActiveRows.use"
        units = len(row_adapters.adapters)
        if x.ndim == 4 and len(x) == 1 < units and x.shape[1] != units == x.shape[2]:
            # A query or key norm on one packed row: x is [1, heads, tokens, head_dim], and its units are the
            # tokens. Flattened, units must come one after the other: put tokens before heads.
            return self(x.transpose(1, 2)).transpose(1, 2)
        eps = torch.finfo(torch.float32).eps if self.eps is None else self.eps
        if self.kind != "group":
            return _MultiAdapterNormFunction.apply(x, self.weight, self.bias, eps, self, row_adapters)
        # Group norms are rare (they normalise images): torch's kernel and autograd, run by run over the
        # batch.
        bias = [None] * len(self.weight) if self.bias is None else self.bias
        outputs = [
            F.group_norm(x[start:stop].float(), self.group_count, self.weight[adapter], bias[adapter], eps)
            for adapter, start, stop in row_adapters.runs(len(x))
        ]
        return torch.cat(outputs).to(x.dtype)

    def forward_run(self, x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> tuple[Tensor, ...]:
        """Normalise rows [rows, width] of one adapter: (result, mean and rstd) or (result, rstd)."""
        if self.kind == "layer":
            return layer_norm(x, weight, bias, eps)
        return rms_norm(x, weight, eps, self.kind == "rms_offset", self.round_before_gain)

    def forward_rows(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, row_adapters: RowAdapters
    ) -> tuple[Tensor, ...]:
        """Normalise rows [rows, width] of many adapters at once; gains and biases are gathered by row."""
        wide = x.float()
        if self.kind == "layer":
            # without weight and bias: unit = (x - mean) * rstd
            unit, *statistics = torch.native_layer_norm(wide, x.shape[-1:], None, None, eps)
        else:
            statistics = [torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)]  # [rows, 1]
            unit = wide * statistics[0]
        gain = row_adapters.gather(weight, len(x))  # [units or rows, 1, width]
        gain = 1.0 + gain if self.kind == "rms_offset" else gain
        shift = None if bias is None else row_adapters.gather(bias, len(x))
        unit = unit.view(len(gain), -1, x.shape[-1])  # [units, rows per unit, width] or [rows, 1, width]
        out = scale_and_shift(unit, gain, shift, x.dtype, self.round_before_gain)
        return out.view(x.shape), *statistics

    def extra_repr(self) -> str:
        adapters, width = self.weight.shape
        return f"{width}, adapters={adapters}, kind={self.kind}, eps={self.eps}, bias={self.bias is not None}"
