"""The parameters of a base, read from its files one at a time; the base is loaded only where its files lack them."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from normtune.adapters.fingerprint import fingerprint, same_base
from normtune.errors import InputError
from normtune.models.checkpoints.parameter_map import has_every_parameter, map_parameters
from normtune.models.checkpoints.reader import Checkpoint
from normtune.models.loading import meta_model, quiet_loading

# endings of weight files, in safetensors and other formats
WEIGHT_ENDINGS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx", ".gguf")


def open_base(model: str) -> BaseFiles:
    """Open the files of a base.

    Args:
        model: directory or hub name of the base.

    Raises:
        InputError: there is no such model, it has no safetensors files, or it has to be loaded and loading fails.
    """
    structure: Any = meta_model(model)
    return BaseFiles(structure, Checkpoint(_directory(model, structure.config.name_or_path)))


class BaseFiles:
    """The structure of a base and its files.

    Attributes:
        model: the base, on the meta device unless it has to be loaded.
        keys_of: parameter -> the checkpoint's tensors that hold it.
        loaded: the base's parameters, if it had to be loaded; empty otherwise.

    Raises:
        InputError: the base has to be loaded and loading fails.
    """

    def __init__(self, model: PreTrainedModel, checkpoint: Checkpoint) -> None:
        self.model, self.checkpoint = model, checkpoint
        self.keys_of = map_parameters(model, checkpoint)
        self.quantised = getattr(model.config, "quantization_config", None) is not None
        self.loaded: dict[str, nn.Parameter] = {}
        if self.quantised or not has_every_parameter(self.keys_of, checkpoint):
            # Some parameters are not tensors of the files: they are unpacked, converted, initialised because
            # they are missing, or one of two that should be tied but differ. Their values exist only after
            # loading.
            self.model = _load(type(model), checkpoint.directory, checkpoint.dtype)
            self.keys_of = map_parameters(self.model, checkpoint)
            self.loaded = dict(self.model.named_parameters(remove_duplicate=False))

    def matches(self, base_fingerprint: str) -> bool:
        """Whether this base, loaded in fp32 or in its own precision, has the fingerprint."""
        if self.loaded:
            return same_base(base_fingerprint, fingerprint(self.model))
        # Both must be tried: fp32 -> bf16 rounds once, fp32 -> fp16 -> bf16 twice, and the adapter may have
        # been trained on either.
        dtypes = dict.fromkeys((torch.float32, self.checkpoint.dtype))
        fingerprints = (fingerprint(self.model, partial(self._values, dtype)) for dtype in dtypes)
        return any(same_base(base_fingerprint, of_dtype) for of_dtype in fingerprints)

    def keys(self, name: str) -> list[str]:
        """The checkpoint's tensors that hold the base's parameter `name`; an `InputError` if there are none."""
        keys = [key for key in self.keys_of.get(name, ()) if not self.loaded or self._is_equal(key, name)]
        if not keys and self.quantised:
            linear = name.rpartition(".")[0]
            raise InputError(
                f"{linear} is quantised: nothing can be merged into it. Load the base without quantisation."
            )
        if not keys:
            raise InputError(
                f"{name} has no tensor of its own in the checkpoint {self.checkpoint.directory} (loading "
                "makes it from others). Save the base again with save_pretrained, or use the adapter with "
                "--adapter."
            )
        return keys

    def value(self, name: str) -> Tensor:
        """The value of the base's parameter `name`, fp32."""
        stored = self.loaded[name].detach() if self.loaded else self.checkpoint.get_tensor(self.keys(name)[0])
        return stored.float()

    def _is_equal(self, key: str, name: str) -> bool:
        """Whether a tensor of the files has the values of the loaded parameter."""
        parameter = self.loaded[name].detach()
        return torch.equal(self.checkpoint.get_tensor(key).to(parameter.dtype), parameter.cpu())

    def _values(self, dtype: torch.dtype, name: str, indices: range) -> Tensor:
        return self.checkpoint.read_values(self.keys_of[name][0], indices).to(dtype)


def _directory(model: str, source: str) -> Path:
    """The directory with the files of a base; for a hub name, its directory in the hub's cache."""
    if not source:
        raise InputError(f"model {model} is a shape without weights. Give a model's directory or hub name.")
    if Path(source).is_dir():
        return Path(source)
    from huggingface_hub import snapshot_download

    other_formats = [f"*{end}" for end in WEIGHT_ENDINGS if end != ".safetensors"]
    try:
        return Path(snapshot_download(source, ignore_patterns=other_formats))
    except (OSError, ValueError) as error:
        raise InputError(f"cannot load model {model}: {error}. Check the name.") from error


def _load(model_class: Any, directory: Path, dtype: torch.dtype) -> PreTrainedModel:
    """Load the base in its own precision, as plain transformers does."""
    try:
        with quiet_loading(str(directory)):
            model: PreTrainedModel = model_class.from_pretrained(directory, dtype=dtype)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(f"cannot load the weights in {directory}: {reason} Copy them again.") from error
    return model.eval()
