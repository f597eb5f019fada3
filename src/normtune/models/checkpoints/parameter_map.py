"""Which tensors of a checkpoint are which parameters of a model, told by names and shapes: nothing is loaded.

Transformers renames tensors while it loads them, and makes some from others (its weight converters). What is
only renamed stands in the files as it is in the model.
"""

from __future__ import annotations

import torch
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from normtune.models.checkpoints.reader import Checkpoint

Placement = dict[str, list[str]]


def placement(model: PreTrainedModel, checkpoint: Checkpoint) -> Placement:
    """The model's parameter -> the checkpoint's tensors that hold its values, more than one where it is tied.

    There are none where it is made from others, quantised or absent. `model` may be on the meta device.
    """
    state = model.state_dict()
    transforms = get_model_conversion_mapping(model)
    renamings = [one for one in transforms if isinstance(one, WeightRenaming)]
    converters = [one for one in transforms if isinstance(one, WeightConverter)]
    keys: dict[str, list[str]] = {}
    made: set[str] = set()
    for key in checkpoint.entries:
        name, converter = rename_source_key(key, renamings, converters, model.base_model_prefix, state)
        if name not in state and key in state:  # as in transformers: it should not have been renamed
            name, converter = rename_source_key(key, [], [], model.base_model_prefix, state)
        if converter is None:
            keys.setdefault(name, []).append(key)
        else:  # its values are reshaped, split or joined: a new value could not be written back
            made.add(name)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    aliases: dict[int, list[str]] = {}
    for name, parameter in parameters.items():
        aliases.setdefault(id(parameter), []).append(name)
    return {
        name: [
            key
            for alias in aliases[id(parameter)]
            if alias not in made
            for key in keys.get(alias, ())
            if checkpoint.entries[key].floating and checkpoint.entries[key].shape == tuple(parameter.shape)
        ]
        for name, parameter in parameters.items()
    }


def stored_as_is(placed: Placement, checkpoint: Checkpoint) -> bool:
    """Whether the files tell the value of every parameter.

    Where several tensors are one parameter they must be equal: transformers does not tie those that differ.
    """
    if not all(placed.values()):
        return False
    several = {tuple(keys) for keys in placed.values() if len(keys) > 1}
    return all(_equal(checkpoint, keys[0], other) for keys in several for other in keys[1:])


def _equal(checkpoint: Checkpoint, one: str, other: str) -> bool:
    if checkpoint.entries[one].dtype != checkpoint.entries[other].dtype:
        return False
    return torch.equal(checkpoint.tensor(one), checkpoint.tensor(other))
