"""FSDP2 by accelerate: layers dealt out to the processes, and tensors made whole again."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch import Tensor, nn
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy
from torch.distributed.tensor import DTensor, distribute_tensor

from normtune.errors import InputError
from normtune.models.parts import is_quantized, layers


def shard_by_layers(accelerator: Accelerator, model: nn.Module) -> None:
    """Have accelerate deal out each layer of `model` by itself, whatever --fsdp_auto_wrap_policy says.

    A layer is one unit with its frozen weights and its trained ones, which all are fp32. What stands outside
    the layers (embeddings, head) is a unit of its own, gathered for a whole step.

    Raises:
        InputError: the base is quantised, or runs layers of its own again in the backward pass.
    """
    if any(is_quantized(parameter) for parameter in model.parameters()):
        raise InputError("a quantised base cannot be dealt out by FSDP. Leave --quantize or --use_fsdp out.")
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    if plugin is None:  # accelerate knows FSDP on accelerators alone; torch has it on the CPU too
        plugin = FullyShardedDataParallelPlugin(fsdp_version=2)
        accelerator.state.distributed_type = DistributedType.FSDP
        accelerator.state.fsdp_plugin = plugin
    if plugin.activation_checkpointing:
        raise InputError("--fsdp_activation_checkpointing: choose --memory balanced or tight instead.")
    plugin.cpu_ram_efficient_loading = False
    plugin.auto_wrap_policy = transformer_auto_wrap_policy
    kinds = {type(model.get_submodule(name)).__name__ for name in layers(model)}
    plugin.transformer_cls_names_to_wrap = sorted(kinds)


def gather_full(tensor: Tensor) -> Tensor:
    """All of a tensor that may be dealt out; all processes call it, for one tensor after the other."""
    found = tensor.detach()
    return found.full_tensor() if isinstance(found, DTensor) else found


def copy_into(parameter: nn.Parameter, value: Tensor) -> None:
    """Give a parameter, dealt out or not, the values of a whole tensor."""
    with torch.no_grad():
        parameter.copy_(_shard_like(value, parameter))


def _shard_like(value: Tensor, like: Tensor) -> Tensor:
    if not isinstance(like, DTensor):
        return value
    on_device = value.to(like.device)
    return distribute_tensor(on_device, like.device_mesh, like.placements, src_data_rank=None)


def full_state(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The optimizer's state as that of a run of one process; all processes call it."""
    stored = optimizer.state_dict()
    state = {
        index: {key: gather_full(value) if isinstance(value, Tensor) else value for key, value in one.items()}
        for index, one in sorted(stored["state"].items())
    }
    return {"state": state, "param_groups": stored["param_groups"]}


def load_state(optimizer: torch.optim.Optimizer, stored: dict[str, Any]) -> None:
    """Put a whole state into the optimizer of a run of any number of processes."""
    parameters = _parameters(optimizer.param_groups)
    state = {
        index: {
            key: _shard_like(value, parameters[index]) if _follows(value, parameters[index]) else value
            for key, value in one.items()
        }
        for index, one in stored["state"].items()
    }
    optimizer.load_state_dict({"state": state, "param_groups": stored["param_groups"]})


def _follows(value: Any, parameter: Tensor) -> bool:
    """Whether a value of the state has one number for each of the parameter's (a count of steps has not)."""
    return isinstance(value, Tensor) and value.shape == parameter.shape


def _parameters(groups: Iterable[dict[str, Any]]) -> list[Tensor]:
    return [parameter for group in groups for parameter in group["params"]]
