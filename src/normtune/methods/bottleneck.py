"""Bottleneck adapters behind the feed-forward layers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from normtune.methods.sites import AddedLayers, NoTarget, TargetLinear, ffn_outputs


class Bottleneck(nn.Module):
    """x + up(relu(down(x))), the identity at first (Houlsby et al. 2019), one a layer (Pfeiffer et al. 2021).

    Weights are fp32 and cast to the input's dtype at use.
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


def _adapt_output(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
    adapter = module.adapter
    assert isinstance(adapter, Bottleneck)
    return adapter(output)


def add_bottleneck(part: str, width: int, sites: Sequence[TargetLinear]) -> AddedLayers:
    targets = ffn_outputs(sites)
    if not targets:
        raise NoTarget(f"adapter finds no feed-forward in part '{part}'. Choose another method.")
    parameters: dict[str, nn.Parameter] = {}
    hooks = []
    for site in targets:
        adapter = Bottleneck(site.module.out_features, width, site.module.weight.device)
        site.module.adapter = adapter
        hooks.append(site.module.register_forward_hook(_adapt_output))
        parameters |= {f"{site.name}.adapter.{name}": p for name, p in adapter.named_parameters()}

    def remove() -> None:
        for hook, site in zip(hooks, targets, strict=True):
            hook.remove()
            del site.module.adapter

    return AddedLayers(parameters, remove)
