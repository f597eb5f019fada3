"""A tuned model as a checkpoint of its own that costs a few MB: the base's shards, linked, and one new shard.

Any engine that reads safetensors by their index loads it. Those that read whole shards in the order of their
names get the new tensors too: the new shard's name sorts behind the linked ones. The links share their bytes
with the base, so nothing may write into them in place.
"""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from normtune.card import DeltaInfo
from normtune.delta import load_delta, merged_tensors, read_delta, write_tensors
from normtune.errors import InputError
from normtune.files import new_directory, read_json, write_json
from normtune.models import quiet_loading, skeleton
from normtune.recipe import INTRINSIC

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
NEW_SHARD = "model-normtune.safetensors"
ORIGIN_FILE = "normtune.json"  # what was merged, for people and for later runs

_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx", ".gguf")
_FICLONE = 0x40049409  # Linux's ioctl that lets two files share their blocks until one is written
_FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class Merged:
    """What merging wrote.

    Attributes:
        tensors: tensors in the new shard; `values` is their number of values.
        linked: how the base's shards came: "hard link", "reflink" (shared blocks) or "copy".
        rounded_away: share of the changed values that a bf16 load rounds back to the base's (None where
            nothing changed).
    """

    out: str
    model: str
    recipe: str
    tensors: int
    values: int
    new_bytes: int
    linked: str
    linked_bytes: int
    rounded_away: float | None


def merge_to_disk(model: str, adapter: Path, out: Path) -> Merged:
    """Write base and delta as one checkpoint that plain transformers loads.

    Trained tensors are fp32 in the file, whatever the base's precision; what LoRA or IA3 rewrites has the
    base's.

    Raises:
        InputError: `out` is in use, the delta is of another base, its method can't be merged, the base has no
            safetensors, or a tensor has no place of its own in them.
    """
    info = read_delta(adapter)
    with new_directory(out) as building:
        body: Any = skeleton(model)
        directory = _directory(model, body.config.name_or_path)
        checkpoint = Checkpoint(directory)
        base = _load(type(body), directory, checkpoint.dtype)
        placed = _placed(base, checkpoint, _touched(base, info))
        changed = merged_tensors(load_delta(base, adapter))
        new: dict[str, Tensor] = {}
        loss = _RoundingLoss()
        for name, tensor in changed.items():
            trained = name in info.tensors and info.tensors[name].method in INTRINSIC
            for key in placed[name]:
                old = checkpoint.tensor(key)
                loss.add(old, tensor)
                new[key] = tensor.to("cpu", torch.float32 if trained else old.dtype, copy=True).contiguous()
        write_tensors(building / NEW_SHARD, new)
        linked = _link_shards(checkpoint, building)
        _copy_others(directory, building)
        origin = {name: value for name, value in info.to_json().items() if name not in ("tensors", "metrics")}
        write_json(building / ORIGIN_FILE, {"merged": origin})
        new_bytes = (building / NEW_SHARD).stat().st_size
    return Merged(
        out=str(out),
        model=model,
        recipe=info.recipe,
        tensors=len(new),
        values=sum(tensor.numel() for tensor in new.values()),
        new_bytes=new_bytes,
        linked=linked,
        linked_bytes=sum(path.stat().st_size for path in checkpoint.files),
        rounded_away=loss.share,
    )


def merge_text(merged: Merged) -> str:
    """The result for people."""
    lines = [
        f"merged '{merged.recipe}' into {merged.model}: {merged.out}",
        f"{merged.tensors:,} tensors ({merged.values:,} values, {merged.new_bytes / 1e6:.1f} MB) are new, "
        f"{merged.linked_bytes / 1e6:,.1f} MB are the base's own ({merged.linked})",
    ]
    if merged.linked == "hard link":
        lines.append("the linked files share their bytes with the base: never write into them in place")
    if merged.rounded_away is not None:
        lines.append(
            f"{merged.rounded_away:.1%} of the changes are lost where the model is loaded in bfloat16"
        )
    return "\n".join(lines)


class Checkpoint:
    """The safetensors of a base, by tensor name.

    Raises:
        InputError: there are none, or they can't be read.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        if (directory / SINGLE_FILE).is_file():
            names = [SINGLE_FILE]
        elif (directory / INDEX_FILE).is_file():
            names = sorted(set(read_json(directory / INDEX_FILE)["weight_map"].values()))
        else:
            raise InputError(
                f"{directory} holds no {SINGLE_FILE}: only safetensors can be merged. Convert it first."
            )
        self.files = [directory / name for name in names]
        self.file_of: dict[str, Path] = {}
        self.entries: dict[str, dict[str, Any]] = {}  # name -> dtype, shape, data_offsets
        for path in self.files:  # a later shard's tensor of the same name counts, as in transformers
            for name, entry in _header(path).items():
                self.file_of[name], self.entries[name] = path, entry

    def tensor(self, name: str) -> Tensor:
        """One tensor, read from its file."""
        with safe_open(self.file_of[name], "pt") as handle:
            return handle.get_tensor(name)

    @property
    def dtype(self) -> torch.dtype:
        """The floating dtype of most of the bytes."""
        sizes: Counter[str] = Counter()
        for entry in self.entries.values():
            if entry["dtype"] in _FLOATS:
                sizes[entry["dtype"]] += _size(entry)
        return _FLOATS[sizes.most_common(1)[0][0]] if sizes else torch.float32


def _header(path: Path) -> dict[str, dict[str, Any]]:
    """The JSON at the head of a safetensors file: 8 bytes of its length, then itself."""
    try:
        with open(path, "rb") as handle:
            found = json.loads(handle.read(int.from_bytes(handle.read(8), "little")))
    except (OSError, ValueError, OverflowError, MemoryError) as error:
        raise InputError(f"cannot read {path}: no safetensors file ({type(error).__name__}).") from error
    return {name: entry for name, entry in found.items() if name != "__metadata__"}


def _size(entry: Mapping[str, Any]) -> int:
    start, end = entry["data_offsets"]
    return end - start


def _directory(model: str, source: str) -> Path:
    """Where the files of a base lie; a hub name's in the hub's cache."""
    if not source:
        raise InputError(f"model {model} is a shape without weights. Give a model's directory or hub name.")
    if Path(source).is_dir():
        return Path(source)
    from huggingface_hub import snapshot_download

    others = [f"*{end}" for end in _WEIGHTS if end != ".safetensors"]
    try:
        return Path(snapshot_download(source, ignore_patterns=others))
    except (OSError, ValueError) as error:
        raise InputError(f"cannot load model {model}: {error}. Check the name.") from error


def _load(kind: Any, directory: Path, dtype: torch.dtype) -> PreTrainedModel:
    """The base in its own precision, as plain transformers loads it."""
    try:
        with quiet_loading(str(directory)):
            model: PreTrainedModel = kind.from_pretrained(directory, dtype=dtype)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(f"cannot load the weights in {directory}: {reason} Copy them anew.") from error
    return model.eval()


def _touched(base: nn.Module, info: DeltaInfo) -> list[str]:
    """The base's tensors that merging the delta may change, by name."""
    own = {name for name, _ in base.named_parameters(remove_duplicate=False)}
    names: list[str] = []
    for name, one in info.tensors.items():
        if one.method in INTRINSIC:
            names.append(name)
        elif one.method in ("lora", "ia3"):
            site = name.rpartition(".")[0]
            names += [found for key in ("weight", "bias") if (found := f"{site}.{key}") in own]
    return [name for name in dict.fromkeys(names) if name in own]


def _placed(base: PreTrainedModel, checkpoint: Checkpoint, names: Sequence[str]) -> dict[str, list[str]]:
    """The base's tensor -> its name or, where it is tied, names in the checkpoint, checked by value.

    Raises:
        InputError: a tensor that the checkpoint doesn't hold as such (it is made from several, or changed in
            loading).
    """
    state = base.state_dict()
    transforms = get_model_conversion_mapping(base)
    renamings = [one for one in transforms if isinstance(one, WeightRenaming)]
    converters = [one for one in transforms if isinstance(one, WeightConverter)]
    keys: dict[str, list[str]] = {}
    for key in checkpoint.entries:
        name, converter = rename_source_key(key, renamings, converters, base.base_model_prefix, state)
        if name not in state and key in state:
            name = key
        if converter is None:
            keys.setdefault(name, []).append(key)
    parameters = dict(base.named_parameters(remove_duplicate=False))
    aliases: dict[int, list[str]] = {}
    for name, parameter in parameters.items():
        aliases.setdefault(id(parameter), []).append(name)
    placed: dict[str, list[str]] = {}
    for name in names:
        found = [key for alias in aliases[id(parameters[name])] for key in keys.get(alias, ())]
        if not any(_same(checkpoint, key, parameters[name].detach()) for key in found):
            raise InputError(
                f"{name} has no tensor of its own in the checkpoint {checkpoint.directory} (it is made from "
                "others in loading). Save the base anew by save_pretrained, or use the delta with --adapter."
            )
        placed[name] = found
    return placed


def _same(checkpoint: Checkpoint, key: str, parameter: Tensor) -> bool:
    if list(parameter.shape) != checkpoint.entries[key]["shape"]:
        return False
    return torch.equal(checkpoint.tensor(key).to(parameter.dtype), parameter.cpu())


class _RoundingLoss:
    """Counts the changed values, and those that bf16 rounds back to the old ones."""

    def __init__(self) -> None:
        self.changed = 0
        self.lost = 0

    def add(self, old: Tensor, new: Tensor) -> None:
        new = new.cpu()
        changed = new != old.float()
        self.changed += int(changed.sum())
        self.lost += int((changed & (new.bfloat16() == old.bfloat16())).sum())

    @property
    def share(self) -> float | None:
        return self.lost / self.changed if self.changed else None


def _link_shards(checkpoint: Checkpoint, building: Path) -> str:
    """Link the base's shards and write the index; returns how they were linked."""
    names = [path.name for path in checkpoint.files]
    if SINGLE_FILE in names or max(names) >= NEW_SHARD:  # a name that would win over the new shard
        names = [f"model-base-{i + 1:05d}-of-{len(names):05d}.safetensors" for i in range(len(names))]
    name_of = dict(zip(checkpoint.files, names, strict=True))
    ways = {_link(path, building / name) for path, name in name_of.items()}
    new = _header(building / NEW_SHARD)
    places = {key: NEW_SHARD if key in new else name_of[path] for key, path in checkpoint.file_of.items()}
    size = sum(_size(new.get(key, entry)) for key, entry in checkpoint.entries.items())
    write_json(building / INDEX_FILE, {"metadata": {"total_size": size}, "weight_map": places})
    return next(way for way in ("copy", "reflink", "hard link") if way in ways)


def _link(source: Path, target: Path) -> str:
    """Give a file a second name; where the file system can't, share its blocks or copy it."""
    source = source.resolve()  # the hub's cache is made of symbolic links
    try:
        os.link(source, target)
        return "hard link"
    except OSError:
        pass
    try:
        import fcntl

        with open(source, "rb") as one, open(target, "wb") as other:
            fcntl.ioctl(other.fileno(), _FICLONE, one.fileno())
        return "reflink"
    except (OSError, ImportError):
        shutil.copyfile(source, target)
        return "copy"


def _copy_others(source: Path, target: Path) -> None:
    """Copy what is not weights: config, tokenizer, processor, chat templates, licence."""
    for path in sorted(source.iterdir()):
        if path.name.startswith(".") or path.name.endswith((*_WEIGHTS, ".index.json")):
            continue
        if path.is_dir():
            (target / path.name).mkdir()
            _copy_others(path, target / path.name)
        elif path.is_file():
            shutil.copyfile(path, target / path.name)
