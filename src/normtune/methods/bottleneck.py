"""Bottleneck adapters behind the feed-forward layers (the recipe word is `adapter`)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from normtune.methods.sites import AddedLayers, NoTarget, TargetLinear, add_behind, ffn_outputs


class Bottleneck(nn.Module):
    """x + up(relu(down(x))) (Houlsby et al. 2019), one after each feed-forward layer (Pfeiffer et al. 2021).

    `up` starts at zero, so that an untrained bottleneck is the identity. Weights are fp32 and are cast to the
    input's dtype at use.

    Args:
        width: size of the layer's output.
        bottleneck: size of the hidden layer between `down` and `up`.
    """

    def __init__(self, width: int, bottleneck: int, device: torch.device) -> None:
        super().__init__()
        self.down = nn.Linear(width, bottleneck, device=device, dtype=torch.float32)
        self.up = nn.Linear(bottleneck, width, device=device, dtype=torch.float32)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., width]; returns the same shape and dtype."""
        inner = F.relu(F.linear(x, self.down.weight.to(x.dtype), self.down.bias.to(x.dtype)))
        return x + F.linear(inner, self.up.weight.to(x.dtype), self.up.bias.to(x.dtype))


def add_bottleneck(part: str, width: int, linears: Sequence[TargetLinear]) -> AddedLayers:
    """Add a bottleneck of `width` hidden units behind each feed-forward of a part.

    Raises:
        NoTarget: the part has no feed-forward.
    """
    targets = ffn_outputs(linears)
    if not targets:
        raise NoTarget(f"adapter finds no feed-forward in part '{part}'. Choose another method.")
    return add_behind(targets, "adapter", lambda linear: Bottleneck(linear.out_features, width, linear.weight.device))
