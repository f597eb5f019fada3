"""Norms that hold the gains and biases of several adapters.

Everything between the norms is the base and the same for all adapters, so that one pass over the base serves
rows of many adapters: only the gain (and bias) of a row depends on its adapter.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from normtune.adapters.multi.rows import MAX_RUNS, ActiveRows, RowAdapters
from normtune.methods.norms import TunedNorm, layer_norm, rms_norm, scale_and_shift


class MultiAdapterNorm(nn.Module):
    """A `TunedNorm` for several adapters: each row has the gain and bias of its adapter.

    The result of a row is what the `TunedNorm` of its adapter would compute. It computes no gradients.

    Args:
        norm: a norm of the same kind.

    Attributes:
        weight: [adapters, width] fp32.
        bias: [adapters, width] fp32, or None.
        active_rows: the adapter of each row; one object for all norms with the same units in their inputs.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(self, norm: TunedNorm, weight: Tensor, bias: Tensor | None, active_rows: ActiveRows) -> None:
        super().__init__()
        self.kind, self.eps, self.group_count = norm.kind, norm.eps, norm.groups
        self.round_before_gain = norm.round_before_gain
        self.active_rows = active_rows
        # parameters around the tensors they are given, which may be views of a bank: no copies
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self.train(norm.training)

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
        bias = [None] * len(self.weight) if self.bias is None else self.bias
        if self.kind == "group":
            # rare (they normalise images): torch's kernel for each run of the batch
            outputs = [
                F.group_norm(x[start:stop].float(), self.group_count, self.weight[adapter], bias[adapter], eps)
                for adapter, start, stop in row_adapters.runs(len(x))
            ]
            return torch.cat(outputs).to(x.dtype)
        flat = x.reshape(-1, x.shape[-1])  # [rows, width]
        runs = row_adapters.runs(len(flat))
        if len(runs) > MAX_RUNS:
            # Many runs, as when every row of a batch has another adapter: one kernel for all rows.
            return self._forward_rows(flat, eps, row_adapters).view(x.shape)
        # Few runs: the kernel of a single adapter for each run. With one adapter in the batch this is
        # exactly what its TunedNorm computes, to the bit.
        outputs = [self._forward_run(flat[start:stop], self.weight[a], bias[a], eps) for a, start, stop in runs]
        return (outputs[0] if len(outputs) == 1 else torch.cat(outputs)).view(x.shape)

    def _forward_run(self, x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
        """Normalise rows [rows, width] of one adapter."""
        if self.kind == "layer":
            return layer_norm(x, weight, bias, eps)[0]
        return rms_norm(x, weight, eps, self.kind == "rms_offset", self.round_before_gain)[0]

    def _forward_rows(self, x: Tensor, eps: float, row_adapters: RowAdapters) -> Tensor:
        """Normalise rows [rows, width] of many adapters at once; gains and biases are gathered by row."""
        rounds = self.round_before_gain and x.dtype != torch.float32
        wide = x if rounds else x.float()
        # the kernels of a single adapter, without gain and bias
        if self.kind == "layer":
            unit = torch.native_layer_norm(x.float(), x.shape[-1:], None, None, eps)[0]
        elif rounds or x.is_cuda:
            unit = torch.ops.aten._fused_rms_norm(wide, x.shape[-1:], None, eps)[0]
        else:
            unit = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
        gain = row_adapters.gather(self.weight)  # [units, 1, width]
        gain = 1.0 + gain if self.kind == "rms_offset" else gain
        shift = None if self.bias is None else row_adapters.gather(self.bias)
        unit = unit.view(len(gain), -1, x.shape[-1])  # [units, rows per unit, width]
        return scale_and_shift(unit, gain, shift, x.dtype, self.round_before_gain).view(x.shape)

    def extra_repr(self) -> str:
        adapters, width = self.weight.shape
        return f"{width}, adapters={adapters}, kind={self.kind}, eps={self.eps}, bias={self.bias is not None}"
