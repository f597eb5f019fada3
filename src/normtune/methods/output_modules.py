"""Modules behind linears, which change their outputs: bottleneck adapters (recipe word `adapter`), SSF and DiffFit.

    x -> linear -> added module -> rest of the layer

The linear keeps its class and its name in the model: a forward hook calls the added module. At the start every added
module is the identity, so that an untrained model computes what the base computes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from normtune.methods.registry import Method
from normtune.methods.sites import (
    FUSED,
    KEY,
    QUERY,
    VALUE,
    AddedLayers,
    NoTarget,
    TargetLinear,
    ffn_outputs,
    layer_linears,
)


class Bottleneck(nn.Module):
    """x + up(relu(down(x))) (Houlsby et al. 2019), one after each feed-forward layer (Pfeiffer et al. 2021).

    `up` starts at zero. Weights are fp32 and are cast to the input's dtype at use.

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


class OutputVectors(nn.Module):
    """y * scale + shift (Lian et al. 2022, arXiv 2210.08823, equation 3); scale starts at 1 and shift at 0.

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


def add_bottleneck(model: nn.Module, part: str, method: Method, linears: Sequence[TargetLinear]) -> AddedLayers:
    """Add a bottleneck behind each feed-forward of a part (`adapter`); arguments as for `methods.registry.ADDED`.

    Raises:
        NoTarget: the part has no feed-forward.
    """
    targets, size = ffn_outputs(linears), int(method.option("width"))
    if not targets:
        raise NoTarget(f"adapter finds no feed-forward in part '{part}'. Choose another method.")
    return _add_behind(targets, "adapter", lambda linear: Bottleneck(linear.out_features, size, linear.weight.device))


def add_output_vectors(model: nn.Module, part: str, method: Method, linears: Sequence[TargetLinear]) -> AddedLayers:
    """Add a scale and a shift behind every linear of a part (`ssf`), or a scale behind each block (`gamma`).

    `gamma` is the scale of DiffFit (Xie et al. 2023, arXiv 2304.06648, section 3.2), which also trains biases and
    norms: the preset `difffit` is `ln+bias+gamma`.

    Raises:
        NoTarget: the part has no such linear.
    """
    has_shift = method.name == "ssf"
    targets = layer_linears(linears) if has_shift else _block_outputs(linears)
    if not targets:
        raise NoTarget(f"{method.name} finds no linear in part '{part}'. Choose another method there.")
    return _add_behind(
        targets, method.name, lambda linear: OutputVectors(linear.out_features, has_shift, linear.weight.device)
    )


def _block_outputs(linears: Sequence[TargetLinear]) -> list[TargetLinear]:
    """The last linear of each attention and of each feed-forward: its output is added to the residual stream."""
    projections = (*QUERY, *KEY, *VALUE, *FUSED)
    attentions = [linear for linear in linears if linear.role == "attention" and linear.leaf not in projections]
    return [*attentions, *ffn_outputs(linears)]


def _add_behind(targets: Sequence[TargetLinear], name: str, make: Callable[[nn.Linear], nn.Module]) -> AddedLayers:
    """Pass the output of each linear through a new module, its submodule `name`.

    Args:
        make: makes the module for a linear.
    """
    parameters: dict[str, nn.Parameter] = {}
    hooks = []
    for target in targets:
        module = make(target.module)
        setattr(target.module, name, module)
        hooks.append(target.module.register_forward_hook(partial(_call_submodule, name=name)))
        parameters |= {f"{target.name}.{name}.{key}": parameter for key, parameter in module.named_parameters()}

    def remove() -> None:
        for hook, target in zip(hooks, targets, strict=True):
            hook.remove()
            delattr(target.module, name)

    return AddedLayers(parameters, remove)


def _call_submodule(linear: nn.Module, args: tuple[Tensor, ...], output: Tensor, *, name: str) -> Any:
    """Forward hook of a linear: pass its output through its submodule.

    The hook looks the submodule up in the linear that is called, so that a deep copy of the model uses its copies.
    """
    return getattr(linear, name)(output)
