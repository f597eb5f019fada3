"""Placeholders that take the memory of quantised linear layers, without torchao or bitsandbytes.

Bytes of a weight [out, in], by kind (per value, plus fp32 scales):

    int8    1 per value      + 4 per row
    nf4     1/2 per value    + 4 per block of 64 values
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from normtune.models.quantization import NF4_BLOCK, int8_linear


class _TemporaryWeightLinear(torch.autograd.Function):
    """x @ weight.T, where the weight is dequantised in each pass and freed after it.

    nn.functional.linear would save the dequantised weight of every layer for the backward pass.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, dequantise: Callable[[], Tensor], bias: Tensor | None) -> Tensor:
        ctx.dequantise = dequantise
        return nn.functional.linear(x, dequantise(), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad @ ctx.dequantise(), None, None  # only the input has a gradient


class QuantizedPlaceholder(nn.Linear):
    """Takes the memory of a quantised linear layer, for plans; its outputs are meaningless.

    Attributes:
        packed: int8 [out, in], or uint8 [out * in / 2].
        scales: fp32, one per row (int8) or per block of 64 values (nf4).
    """

    packed: Tensor
    scales: Tensor

    def forward(self, input: Tensor) -> Tensor:
        """input: [..., in]; returns [..., out]."""
        if self.packed.dtype == torch.int8:
            # the function with which a quantised base computes, too
            return int8_linear(input, self.packed, self.scales, self.bias)
        # nf4: memory of the weight's full size, [out, in], for the time of the product
        dequantise = partial(self.packed.new_empty, (self.out_features, self.in_features), dtype=input.dtype)
        return _TemporaryWeightLinear.apply(input, dequantise, self.bias)


def insert_placeholders(linears: Iterable[nn.Linear], kind: str) -> None:
    """Turn linear layers into placeholders in place, on their own device, as quantisation to `kind` would."""
    for linear in linears:
        device = linear.weight.device
        # buffers, not parameters: they are never trained and have no gradients
        shape, scales = _packed(linear.out_features, linear.in_features, kind)
        linear.__class__ = QuantizedPlaceholder  # in place: the model and its hooks keep the same object
        linear.register_buffer("packed", torch.empty(shape, device=device, dtype=_PACKED_DTYPE[kind]))
        linear.register_buffer("scales", torch.empty(scales, device=device))
        linear.weight = nn.Parameter(torch.empty(0, device=device), requires_grad=False)  # frees its bytes


def linear_bytes(sizes: Iterable[tuple[int, int]], kind: str | None, itemsize: int) -> int:
    """The bytes of linears with these sizes (out, in), quantised to a kind; None: with `itemsize` bytes per value."""
    total = 0
    for rows, columns in sizes:
        values = rows * columns
        if kind is None:
            total += values * itemsize
        else:
            packed, scales = _packed(rows, columns, kind)
            total += math.prod(packed) + 4 * scales  # one byte per element of `packed`, fp32 scales
    return total


def _packed(rows: int, columns: int, kind: str) -> tuple[tuple[int, ...], int]:
    """Return the shape of a quantised weight [rows, columns] in bytes, and the number of its fp32 scales."""
    values = rows * columns
    # -(-a // b) rounds up: an odd number of 4-bit values, or a last block that is not full
    return ((rows, columns), rows) if kind == "int8" else ((-(-values // 2),), -(-values // NF4_BLOCK))


_PACKED_DTYPE = {"int8": torch.int8, "nf4": torch.uint8}
