"""A tuned model as a checkpoint of its own that costs a few MB: the base's shards, linked, and one new shard.

The base is not loaded: one of its tensors is in memory at a time, and only of those that change.

Any engine that reads safetensors by their index loads it. Those that read whole shards in the order of their
names get the new tensors too: the new shard's name sorts behind the linked ones. The links share their bytes
with the base, so nothing may write into them in place.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from normtune.adapters.fingerprint import fingerprint, same_base
from normtune.adapters.merged_weights import changed_by, quantised_site, refuse_unmergeable, with_addition
from normtune.adapters.storage import attach_adapter, read_adapter_info, read_tensors
from normtune.errors import InputError
from normtune.methods.adapt import TunedModel
from normtune.methods.registry import INTRINSIC
from normtune.models.checkpoints.parameter_map import placement, stored_as_is
from normtune.models.checkpoints.reader import INDEX_FILE, SINGLE_FILE, Checkpoint, read_header
from normtune.models.checkpoints.writer import Planned, write_safetensors
from normtune.models.loading import meta_model, quiet_loading
from normtune.runtime.files import atomic_directory, write_json

NEW_SHARD = "model-normtune.safetensors"
ORIGIN_FILE = "normtune.json"  # what was merged, for people and for later runs

_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx", ".gguf")
_FICLONE = 0x40049409  # Linux's ioctl that lets two files share their blocks until one is written
_PIECE = 1 << 20  # values compared at a time


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

    The base is not loaded: its structure comes from its config; of its files the values that the fingerprint
    samples are read and, one by one, the tensors that change. Trained tensors are fp32 in the new file,
    whatever the base's precision; what LoRA or IA3 rewrites has the base's.

    Raises:
        InputError: `out` is in use, the delta is of another base, its method can't be merged, the base has no
            safetensors, or a tensor has no place of its own in them.
    """
    info = read_adapter_info(adapter)
    refuse_unmergeable(one.method for one in info.tensors.values())
    with atomic_directory(out) as building:
        body: Any = meta_model(model)
        directory = _directory(model, body.config.name_or_path)
        base = _Base(body, Checkpoint(directory))
        tuned = attach_adapter(base.body, adapter, info, base.has)
        loss = _RoundingLoss()
        planned = _planned(tuned, read_tensors(adapter, info), base, loss)
        write_safetensors(building / NEW_SHARD, planned)
        linked = _link_shards(base.checkpoint, building)
        _copy_others(directory, building)
        origin = {name: value for name, value in info.to_json().items() if name not in ("tensors", "metrics")}
        write_json(building / ORIGIN_FILE, {"merged": origin})
        new_bytes = (building / NEW_SHARD).stat().st_size
    return Merged(
        out=str(out),
        model=model,
        recipe=info.recipe,
        tensors=len(planned),
        values=sum(one.values for one in planned),
        new_bytes=new_bytes,
        linked=linked,
        linked_bytes=sum(path.stat().st_size for path in base.checkpoint.files),
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


class _Base:
    """A base as its files have it: `body` is its structure, on the meta device wherever that will do.

    Raises:
        InputError: the base has to be loaded and can't be.
    """

    def __init__(self, body: PreTrainedModel, checkpoint: Checkpoint) -> None:
        self.body, self.checkpoint = body, checkpoint
        self.placed = placement(body, checkpoint)
        self.quantised = getattr(body.config, "quantization_config", None) is not None
        self.loaded: dict[str, nn.Parameter] = {}
        if self.quantised or not stored_as_is(self.placed, checkpoint):
            # a parameter that is no tensor of the files (unpacked, converted, made anew where it is missing,
            # or one of two that should be tied and differ) has its value only once the base is loaded
            self.body = _load(type(body), checkpoint.directory, checkpoint.dtype)
            self.placed = placement(self.body, checkpoint)
            self.loaded = dict(self.body.named_parameters(remove_duplicate=False))

    def has(self, mark: str) -> bool:
        """Whether a fingerprint is the base's as it is loaded in fp32, or in its own precision."""
        if self.loaded:
            return same_base(mark, fingerprint(self.body))
        for dtype in dict.fromkeys((torch.float32, self.checkpoint.dtype)):
            if same_base(mark, fingerprint(self.body, partial(self._values, dtype))):
                return True
        return False

    def keys(self, name: str) -> list[str]:
        """The checkpoint's tensors that are the base's parameter `name`.

        Raises:
            InputError: there are none.
        """
        found = [key for key in self.placed.get(name, ()) if not self.loaded or self._same(key, name)]
        if not found and self.quantised:
            raise quantised_site(name.rpartition(".")[0])
        if not found:
            raise InputError(
                f"{name} has no tensor of its own in the checkpoint {self.checkpoint.directory} (it is made "
                "from others in loading). Save the base anew by save_pretrained, or use the delta with "
                "--adapter."
            )
        return found

    def _same(self, key: str, name: str) -> bool:
        parameter = self.loaded[name].detach()
        return torch.equal(self.checkpoint.tensor(key).to(parameter.dtype), parameter.cpu())

    def _values(self, dtype: torch.dtype, name: str, places: range) -> Tensor:
        return self.checkpoint.values(self.placed[name][0], places).to(dtype)


def _planned(
    tuned: TunedModel, trained: Mapping[str, Tensor], base: _Base, loss: _RoundingLoss
) -> list[Planned]:
    """The tensors of the new shard, by the checkpoint's names, in safetensors' order; none is made yet."""
    values: dict[str, Callable[[], Tensor]] = {}
    for name, method in tuned.methods.items():
        if method in INTRINSIC:
            values[name] = partial(trained.__getitem__, name)
    own = set(values)  # fp32 in the file; what is only rewritten keeps the base's dtype
    for addition in tuned.additions:
        for site, layer in addition.layers.items():
            for key in changed_by(layer):
                name = f"{site}.{key}"
                old = values.get(name) or partial(base.checkpoint.tensor, base.keys(name)[0])
                values[name] = partial(_added, site, layer, key, old, trained)

    def make(key: str, value: Callable[[], Tensor], dtype: torch.dtype) -> Tensor:
        new = value()
        loss.add(base.checkpoint.tensor(key), new)
        return new.to(dtype)

    planned = []
    for name, value in values.items():
        for key in base.keys(name):
            entry = base.checkpoint.entries[key]
            dtype = torch.float32 if name in own else entry.dtype
            planned.append(Planned(key, dtype, entry.shape, "", partial(make, key, value, dtype)))
    return sorted(planned, key=lambda one: (-one.dtype.itemsize, one.name))


def _added(
    site: str, layer: Any, key: str, old: Callable[[], Tensor], trained: Mapping[str, Tensor]
) -> Tensor:
    return with_addition(site, layer, key, old(), trained)


class _RoundingLoss:
    """Counts the changed values, and those that bf16 rounds back to the old ones."""

    def __init__(self) -> None:
        self.changed = 0
        self.lost = 0

    def add(self, old: Tensor, new: Tensor) -> None:
        """Both in pieces, so that no more than a few MB are made of them at once."""
        for before, after in zip(old.flatten().split(_PIECE), new.flatten().split(_PIECE), strict=True):
            changed = after != before.float()
            self.changed += int(changed.count_nonzero())
            self.lost += int((changed & (after.bfloat16() == before.bfloat16())).count_nonzero())

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
    entries = checkpoint.entries | read_header(building / NEW_SHARD)
    size = sum(entry.bytes for entry in entries.values())
    places = {key: name_of.get(entry.file, NEW_SHARD) for key, entry in entries.items()}
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
