"""Models without values: an operation returns a tensor with the right shape, and computes nothing.

Weights are torch's fake tensors, and the result of any operation with a fake tensor is fake too. Token ids,
positions and masks stay real tensors, since code reads their values: lengths, places of images, indices.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
# integer buffers that are weights, not positions or masks: the packed weight of `QuantizedPlaceholder`
INTEGER_WEIGHTS = ("packed",)


def use_fake_tensors(model: nn.Module, device: torch.device) -> dict[int, nn.Parameter]:
    """Replace a meta model's parameters and buffers by fake tensors on `device`.

    Integer and boolean buffers (positions, masks) become real zeros instead. Tied parameters stay tied.

    Returns:
        The new parameters by the ids of the old ones.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)  # real ids and masks may be mixed with fake weights
    replaced: dict[int, nn.Parameter] = {}

    # only the weights are made in fake mode: the rest of the run is ordinary code
    def empty(old: Tensor) -> Tensor:
        with mode:
            return torch.empty(old.shape, dtype=old.dtype, device=device)

    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is None:  # a registered name without a value, such as a missing bias
                continue
            if id(parameter) not in replaced:
                replaced[id(parameter)] = nn.Parameter(empty(parameter), parameter.requires_grad)
            module._parameters[name] = replaced[id(parameter)]
        for name, buffer in module._buffers.items():
            if buffer is None:
                continue
            is_real = not buffer.is_floating_point() and name not in INTEGER_WEIGHTS
            zeros = torch.zeros(buffer.shape, dtype=buffer.dtype, device=device) if is_real else empty(buffer)
            module._buffers[name] = zeros
    return replaced


class BooleanIndexing(TorchDispatchMode):
    """Replaces boolean masks that index fake tensors inside the block by the indices of their true entries.

    The shape of `x[mask]` depends on the mask's values. A fake tensor cannot know it from a mask, but the
    mask is real: its indices give the shape.
    """

    _INDEXING = (aten.index.Tensor, aten.index_put.default, aten.index_put_.default)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # x[mask] and x[mask] = values both arrive as (x, [index or None for each dimension], ...)
        if function in self._INDEXING:
            indices: list[Tensor | None] = []
            for index in args[1]:
                if type(index) is Tensor and index.dtype == torch.bool:  # the exact type: a fake one is a subclass
                    indices += index.nonzero().unbind(1)  # [true entries], one for each dimension of the mask
                else:
                    indices.append(index)
            args = (args[0], indices, *args[2:])
        return function(*args, **(kwargs or {}))


def model_bytes(model: nn.Module) -> int:
    """Return the bytes of a model's parameters and buffers; tied ones count once."""
    tensors = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
