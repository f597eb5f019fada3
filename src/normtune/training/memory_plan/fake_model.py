"""Models without values: every operation makes results of the right shapes, and computes nothing.

Weights are torch's fake tensors; whatever meets one becomes one. Token ids, positions and masks are real,
since code asks them for their values.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
WEIGHTS = (
    "packed",
)  # buffers of whole numbers that are weights, of `normtune.training.memory_plan.quantized.StandIn`


def use_fake_tensors(model: nn.Module, device: torch.device) -> dict[int, nn.Parameter]:
    """Put fake tensors on `device` in the place of a meta model's parameters and buffers.

    Buffers of whole numbers become real zeros. Returns the new parameters by the old ones' ids; tied ones
    stay tied.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    made: dict[int, nn.Parameter] = {}

    def empty(old: Tensor) -> Tensor:
        with mode:
            return torch.empty(old.shape, dtype=old.dtype, device=device)

    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is None:
                continue
            if id(parameter) not in made:
                made[id(parameter)] = nn.Parameter(empty(parameter), parameter.requires_grad)
            module._parameters[name] = made[id(parameter)]
        for name, buffer in module._buffers.items():
            if buffer is None:
                continue
            whole = not buffer.is_floating_point() and name not in WEIGHTS
            zeros = torch.zeros(buffer.shape, dtype=buffer.dtype, device=device) if whole else empty(buffer)
            module._buffers[name] = zeros
    return made


class BooleanIndexing(TorchDispatchMode):
    """Inside, fake tensors are indexed by real masks as by the places that are true, which are known."""

    _INDEXING = (aten.index.Tensor, aten.index_put.default, aten.index_put_.default)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in self._INDEXING:
            indices: list[Tensor | None] = []
            for one in args[1]:
                if type(one) is Tensor and one.dtype == torch.bool:
                    indices += one.nonzero().unbind(1)
                else:
                    indices.append(one)
            args = (args[0], indices, *args[2:])
        return function(*args, **(kwargs or {}))


def bytes_of(model: nn.Module) -> int:
    """Bytes of the parameters and buffers, each once."""
    held = {id(one): one for one in (*model.parameters(), *model.buffers())}
    return sum(one.numel() * one.element_size() for one in held.values())
