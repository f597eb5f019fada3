"""Vectors that scale and shift the outputs of a part's linears: SSF, and DiffFit's scales."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from normtune.methods.registry import Method
from normtune.methods.sites import (
    FUSED,
    KEY,
    QUERY,
    VALUE,
    AddedLayers,
    NoTarget,
    TargetLinear,
    add_behind,
    ffn_outputs,
    layer_linears,
)


class OutputVectors(nn.Module):
    """y * scale + shift (Lian et al. 2022, arXiv 2210.08823, equation 3); starts as the identity.

    The vectors are fp32 and are cast to the input's dtype at use.

    Args:
        width: size of the linear's output.
        has_shift: False for DiffFit's scale alone.
    """

    def __init__(self, width: int, has_shift: bool, device: torch.device) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(width, device=device, dtype=torch.float32))
        self.shift = nn.Parameter(torch.zeros(width, device=device, dtype=torch.float32)) if has_shift else None

    def forward(self, y: Tensor) -> Tensor:
        """y: [..., width]; returns the same shape and dtype."""
        scaled = y * self.scale.to(y.dtype)
        return scaled if self.shift is None else scaled + self.shift.to(y.dtype)


def block_outputs(linears: Sequence[TargetLinear]) -> list[TargetLinear]:
    """The last linear of each attention and of each feed-forward: what a layer adds to its residual stream."""
    projections = (*QUERY, *KEY, *VALUE, *FUSED)
    attentions = [linear for linear in linears if linear.role == "attention" and linear.leaf not in projections]
    return [*attentions, *ffn_outputs(linears)]


def add_output_vectors(part: str, method: Method, linears: Sequence[TargetLinear]) -> AddedLayers:
    """Add vectors behind every linear of a part (`ssf`), or a scale behind each block (`gamma`).

    `gamma` is the scale of DiffFit (Xie et al. 2023, arXiv 2304.06648, section 3.2), which also trains biases and
    norms: the preset `difffit` is `ln+bias+gamma`.

    Raises:
        NoTarget: the part has no such linear.
    """
    has_shift = method.name == "ssf"
    targets = layer_linears(linears) if has_shift else block_outputs(linears)
    if not targets:
        raise NoTarget(f"{method.name} finds no linear in part '{part}'. Choose another method there.")
    return add_behind(
        targets, method.name, lambda linear: OutputVectors(linear.out_features, has_shift, linear.weight.device)
    )
