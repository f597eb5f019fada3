"""Placeholders with the size of quantised linear layers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from normtune.models.quantization import NF4_BLOCK, int8_linear


class _Through(torch.autograd.Function):
    """x @ weight.T where the weight is made anew in either pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, make: Callable[[], Tensor], bias: Tensor | None) -> Tensor:
        ctx.make = make
        return nn.functional.linear(x, make(), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad @ ctx.make(), None, None


class QuantizedPlaceholder(nn.Linear):
    """Takes the bytes of a quantised linear, for plans: its values mean nothing.

    Attributes:
        packed: int8 [out, in], or uint8 [out * in / 2].
        scales: fp32, one a row or one a block of 64 values.
    """

    packed: Tensor
    scales: Tensor

    def forward(self, input: Tensor) -> Tensor:
        """input: [..., in]; returns [..., out]."""
        if self.packed.dtype == torch.int8:
            return int8_linear(input, self.packed, self.scales, self.bias)
        make = partial(self.packed.new_empty, (self.out_features, self.in_features), dtype=input.dtype)
        return _Through.apply(input, make, self.bias)


def insert_placeholders(linears: Iterable[nn.Linear], kind: str) -> None:
    """Make stand-ins of linears that `kind` would quantise, on their own device."""
    for linear in linears:
        device = linear.weight.device
        shape, scales = _packed(linear.out_features, linear.in_features, kind)
        linear.__class__ = QuantizedPlaceholder
        linear.register_buffer("packed", torch.empty(shape, device=device, dtype=_STORED[kind]))
        linear.register_buffer("scales", torch.empty(scales, device=device))
        linear.weight = nn.Parameter(torch.empty(0, device=device), requires_grad=False)


def linear_bytes(sizes: Iterable[tuple[int, int]], kind: str | None, itemsize: int) -> int:
    """Bytes of linears of these [out, in] as `kind` holds them; None: in values of `itemsize` bytes."""
    total = 0
    for rows, columns in sizes:
        values = rows * columns
        if kind is None:
            total += values * itemsize
        else:
            packed, scales = _packed(rows, columns, kind)
            total += math.prod(packed) + 4 * scales
    return total


def _packed(rows: int, columns: int, kind: str) -> tuple[tuple[int, ...], int]:
    """Shape of the bytes of a quantised [rows, columns], and the number of its fp32 scales."""
    values = rows * columns
    return ((rows, columns), rows) if kind == "int8" else ((-(-values // 2),), -(-values // NF4_BLOCK))


_STORED = {"int8": torch.int8, "nf4": torch.uint8}
