"""FSDP2 through accelerate: shards a model's layers over the processes, and gathers tensors for files.

| what                             | where                                    | gathered                     |
|----------------------------------|------------------------------------------|------------------------------|
| a layer, frozen and trained      | 1/n of each tensor on each process       | for its forward and backward |
| embeddings, head, other modules  | 1/n of each tensor on each process       | for a whole step             |
| gradients, AdamW's states        | 1/n on each process, of trained tensors  | -                            |
| trained tensors, AdamW's states  | unsharded in the host's memory           | for a checkpoint, one by one |

A sharded tensor is a `DTensor`. Checkpoints hold unsharded tensors, so that any number of processes can read
them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch import Tensor, nn

from normtune.errors import InputError
from normtune.models.parts import is_quantized, layers

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch.distributed.tensor import DTensor


def shard_by_layers(accelerator: Accelerator, model: nn.Module) -> None:
    """Configure accelerate to shard `model` layer by layer; it overrides --fsdp_auto_wrap_policy.

    Each layer is one FSDP unit with its frozen weights and its trained ones, which are all fp32. The modules
    outside the layers (embeddings, head) form one more unit, which stays gathered for a whole step.

    Raises:
        InputError: the base is quantised, or accelerate was asked to checkpoint activations.
    """
    from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
    from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy

    if any(is_quantized(parameter) for parameter in model.parameters()):
        raise InputError("FSDP cannot shard a quantised base. Leave out --quantize or --use_fsdp.")
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    if plugin is None:  # accelerate sets it up on GPUs only, but torch can shard on CPUs too
        plugin = FullyShardedDataParallelPlugin(fsdp_version=2)
        accelerator.state.distributed_type = DistributedType.FSDP
        accelerator.state.fsdp_plugin = plugin
    if plugin.activation_checkpointing:
        raise InputError("--fsdp_activation_checkpointing: use --memory balanced or --memory tight instead.")
    plugin.cpu_ram_efficient_loading = False  # every process has read the base already
    # wrap by class name: the classes of the layers that `find_parts` finds, in place of transformers' defaults
    plugin.auto_wrap_policy = transformer_auto_wrap_policy
    class_names = {type(model.get_submodule(name)).__name__ for name in layers(model)}
    plugin.transformer_cls_names_to_wrap = sorted(class_names)


def _is_sharded(tensor: Tensor) -> TypeGuard[DTensor]:
    """Whether the tensor is a DTensor; a run of one process does not import the class, which takes a second."""
    return hasattr(tensor, "device_mesh")


def gather_full(tensor: Tensor) -> Tensor:
    """Return the unsharded tensor.

    All processes must call this function, with the same tensors in the same order.
    """
    detached = tensor.detach()
    return detached.full_tensor() if _is_sharded(detached) else detached


def copy_into(parameter: nn.Parameter, value: Tensor) -> None:
    """Copy an unsharded tensor into a parameter, which may be sharded."""
    with torch.no_grad():  # in place: the optimiser refers to this parameter
        parameter.copy_(_shard_like(value, parameter))


def _shard_like(value: Tensor, like: Tensor) -> Tensor:
    """Shard `value` as `like` is sharded; every process has all of `value` and keeps its own shard."""
    if not _is_sharded(like):
        return value
    from torch.distributed.tensor import distribute_tensor

    on_device = value.to(like.device)
    # None: nothing is sent between the processes, each cuts its shard from its own copy
    return distribute_tensor(on_device, like.device_mesh, like.placements, src_data_rank=None)


def full_state(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Return the optimiser's state unsharded, as a run of one process has it; all processes must call it."""
    stored = optimizer.state_dict()  # {"state": {index: {"exp_avg": ..., ...}}, "param_groups": [...]}
    state = {
        index: {key: gather_full(value) if isinstance(value, Tensor) else value for key, value in entry.items()}
        for index, entry in sorted(stored["state"].items())  # sorted: the same order in all processes
    }
    return {"state": state, "param_groups": stored["param_groups"]}


def load_state(optimizer: torch.optim.Optimizer, stored: dict[str, Any]) -> None:
    """Load an unsharded state into the optimiser of a run with any number of processes."""
    # a state's key is the index of its parameter, counted over all parameter groups
    parameters: list[Tensor] = [parameter for group in optimizer.param_groups for parameter in group["params"]]

    def shard(value: Any, parameter: Tensor) -> Any:
        # AdamW's means are elementwise, its count of steps is not
        is_elementwise = isinstance(value, Tensor) and value.shape == parameter.shape
        return _shard_like(value, parameter) if is_elementwise else value

    state = {
        index: {key: shard(value, parameters[index]) for key, value in entry.items()}
        for index, entry in stored["state"].items()
    }
    # the kernel is this run's: a fused one needs all parameters on a GPU
    groups = [
        stored_group | {"fused": group.get("fused")}
        for stored_group, group in zip(stored["param_groups"], optimizer.param_groups, strict=True)
    ]
    optimizer.load_state_dict({"state": state, "param_groups": groups})
