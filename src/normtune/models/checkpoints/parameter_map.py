"""Which tensors of a checkpoint hold which parameters of a model, by names and shapes; nothing is loaded.

Transformers renames tensors while it loads them, and makes some from others (its weight converters). A tensor
that is only renamed has the same values in the files as in the model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from normtune.models.checkpoints.reader import Checkpoint

ParameterMap = dict[str, list[str]]  # parameter of the model -> tensors of the checkpoint


def map_parameters(model: PreTrainedModel, checkpoint: Checkpoint) -> ParameterMap:
    """Map each parameter of a model to the checkpoint's tensors that hold its values.

    A tied parameter can have several tensors. A parameter has none if it is made from other tensors,
    quantised or absent.

    Args:
        model: may be on the meta device.
        checkpoint: the files that the model is loaded from.
    """
    rename = find_renaming(model, model.state_dict())
    keys: dict[str, list[str]] = {}
    converted: set[str] = set()
    for key in checkpoint.entries:
        name, converter = rename(key)
        if converter is None:
            keys.setdefault(name, []).append(key)
        else:  # its values are reshaped, split or joined: a new value could not be written back
            converted.add(name)
    # a tied parameter is one object with several names, and the files may use any of them
    parameters = dict(model.named_parameters(remove_duplicate=False))
    aliases: dict[int, list[str]] = {}
    for name, parameter in parameters.items():
        aliases.setdefault(id(parameter), []).append(name)
    return {
        name: [
            key
            for alias in aliases[id(parameter)]
            if alias not in converted
            for key in keys.get(alias, ())
            if checkpoint.entries[key].is_floating and checkpoint.entries[key].shape == tuple(parameter.shape)
        ]
        for name, parameter in parameters.items()
    }


def find_renaming(model: PreTrainedModel, names: Iterable[str]) -> Callable[[str], tuple[str, str | None]]:
    """Return a function from a tensor's name in a checkpoint to (its name in the model, its weight converter or None).

    Args:
        names: of the model's parameters and buffers, before modules were replaced.
    """
    state = dict.fromkeys(names, True)
    transforms = get_model_conversion_mapping(model)
    renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
    converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]

    def rename(key: str) -> tuple[str, str | None]:
        name, converter = rename_source_key(key, renamings, converters, model.base_model_prefix, state)
        if name not in state and key in state:  # as in transformers: it should not have been renamed
            name, converter = rename_source_key(key, [], [], model.base_model_prefix, state)
        return name, converter

    return rename


def has_every_parameter(parameter_map: ParameterMap, checkpoint: Checkpoint) -> bool:
    """Whether the value of every parameter can be read from the files.

    If several tensors hold one parameter, they must be equal: transformers does not tie tensors that differ.
    """
    if not all(parameter_map.values()):
        return False
    duplicates = {tuple(keys) for keys in parameter_map.values() if len(keys) > 1}
    return all(_are_equal(checkpoint, keys[0], other) for keys in duplicates for other in keys[1:])


def _are_equal(checkpoint: Checkpoint, first: str, second: str) -> bool:
    if checkpoint.entries[first].dtype != checkpoint.entries[second].dtype:
        return False
    return torch.equal(checkpoint.get_tensor(first), checkpoint.get_tensor(second))
