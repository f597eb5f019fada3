"""Merge an adapter into a checkpoint of a few MB: links to the base's shards, and one new shard.

The base is not loaded. Only tensors that change are read, and one of them is in memory at a time.

Any engine that reads safetensors through their index loads the result. Engines that read whole shards in the
order of their names also get the new tensors, because the new shard's name sorts after the linked ones. The
links share their bytes with the base, so nothing may write into them in place.
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
from torch import Tensor

from normtune.adapters.base_files import WEIGHT_ENDINGS, BaseFiles, open_base
from normtune.adapters.merged_weights import changed_tensors, check_mergeable, merged_tensor
from normtune.adapters.storage import attach_adapter, fit_names, read_adapter_info, read_tensors
from normtune.methods.adapt import TunedModel
from normtune.methods.registry import INTRINSIC
from normtune.models.checkpoints.reader import INDEX_FILE, SINGLE_FILE, Checkpoint, read_header
from normtune.models.checkpoints.writer import PlannedTensor, write_safetensors
from normtune.runtime.files import atomic_directory, write_json
from normtune.runtime.notebook import Result

NEW_SHARD = "model-normtune.safetensors"
ORIGIN_FILE = "normtune.json"  # what was merged, for readers and for later runs

_FICLONE = 0x40049409  # Linux's ioctl that lets two files share their blocks until one is written
_PIECE = 1 << 20  # number of values compared at a time


@dataclass(frozen=True)
class Merged(Result):
    """What merging wrote."""

    out: str
    model: str
    recipe: str
    tensors: int  # number of tensors in the new shard
    values: int  # number of their values
    new_bytes: int
    linked: str  # how the base's shards were linked: "hard link", "reflink" (shared blocks) or "copy"
    linked_bytes: int
    # share of the changed values that a bf16 load rounds back to the base's; None if nothing changed
    rounded_away: float | None

    def __str__(self) -> str:
        lines = [
            f"merged '{self.recipe}' into {self.model}: {self.out}",
            f"{self.tensors:,} tensors ({self.values:,} values, {self.new_bytes / 1e6:.1f} MB) are new, "
            f"{self.linked_bytes / 1e6:,.1f} MB are the base's own ({self.linked})",
        ]
        if self.linked == "hard link":
            lines.append("the linked files share their bytes with the base: never write into them in place")
        if self.rounded_away is not None:
            lines.append(f"{self.rounded_away:.1%} of the changes are lost where the model is loaded in bfloat16")
        return "\n".join(lines)


def merge_to_disk(model: str, adapter: Path, out: Path) -> Merged:
    """Write a base and an adapter as one checkpoint that plain transformers loads.

    The base is not loaded. Its structure comes from its config. From its files the values that the
    fingerprint samples are read, and the tensors that change, one at a time. In the new file trained tensors
    are always fp32, so that small changes of a gain survive; weights that a LoRA or IA3 changes have the base's
    dtype.

    Args:
        model: directory or hub name of the base.
        out: directory to write; it must be new or empty.

    Raises:
        InputError: `out` is in use, the adapter belongs to another base, its method cannot be merged, the base
            has no safetensors files, or a tensor that changes is not stored in them as it is.
    """
    info = read_adapter_info(adapter)
    check_mergeable(tensor.method for tensor in info.tensors.values())
    with atomic_directory(out) as building:
        base = open_base(model)
        info = fit_names(info, base.model)
        tuned = attach_adapter(base.model, adapter, info, base.matches)
        loss = _RoundingLoss()
        planned = _plan_tensors(tuned, read_tensors(adapter, info), base, loss)
        write_safetensors(building / NEW_SHARD, planned)  # computes each tensor when it is written
        linked = _link_shards(base.checkpoint, building)
        _copy_others(base.checkpoint.directory, building)
        origin = {name: value for name, value in info.to_json().items() if name not in ("tensors", "metrics")}
        write_json(building / ORIGIN_FILE, {"merged": origin})
        new_bytes = (building / NEW_SHARD).stat().st_size
    return Merged(
        out=str(out),
        model=model,
        recipe=info.recipe,
        tensors=len(planned),
        values=sum(tensor.numel for tensor in planned),
        new_bytes=new_bytes,
        linked=linked,
        linked_bytes=sum(path.stat().st_size for path in base.checkpoint.files),
        rounded_away=loss.share,
    )


def _plan_tensors(
    tuned: TunedModel, trained: Mapping[str, Tensor], base: BaseFiles, loss: _RoundingLoss
) -> list[PlannedTensor]:
    """The tensors of the new shard, under the checkpoint's names and in safetensors' order.

    Nothing is read or computed yet: each planned tensor has a function that makes it.

    Args:
        loss: counts the changes that bf16 cannot represent, while the tensors are written.
    """

    def merge(linear: str, layer: Any, key: str, make_old: Callable[[], Tensor]) -> Tensor:
        return merged_tensor(linear, layer, key, make_old(), trained)

    values: dict[str, Callable[[], Tensor]] = {}  # parameter of the base -> makes its new value
    for name, method in tuned.methods.items():
        if method in INTRINSIC:
            values[name] = partial(trained.__getitem__, name)
    fp32_names = set(values)  # trained tensors are fp32 in the file; others keep the base's dtype
    for addition in tuned.additions:
        for linear, layer in addition.layers.items():
            for key in changed_tensors(layer):
                # a LoRA on a weight that was also trained (attention+lora) changes the trained value
                name = f"{linear}.{key}"
                old = values.get(name) or partial(base.checkpoint.get_tensor, base.keys(name)[0])
                values[name] = partial(merge, linear, layer, key, old)

    def make(key: str, make_value: Callable[[], Tensor], dtype: torch.dtype) -> Tensor:
        new = make_value()
        loss.add(base.checkpoint.get_tensor(key), new)
        return new.to(dtype)

    planned = []
    for name, make_value in values.items():
        for key in base.keys(name):  # several for a tied parameter
            entry = base.checkpoint.entries[key]
            dtype = torch.float32 if name in fp32_names else entry.dtype
            planned.append(PlannedTensor(key, dtype, entry.shape, "", partial(make, key, make_value, dtype)))
    return sorted(planned, key=lambda tensor: (-tensor.dtype.itemsize, tensor.name))


class _RoundingLoss:
    """Counts the values that change, and how many of these changes bf16 rounds away."""

    def __init__(self) -> None:
        self.changed = 0
        self.lost = 0

    def add(self, old: Tensor, new: Tensor) -> None:
        """Count one tensor, in pieces, so that the intermediate results take a few MB only."""
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
    if SINGLE_FILE in names or max(names) >= NEW_SHARD:
        # Rename the links: transformers would prefer the single file to the index, and an engine that loads
        # shards in the order of their names would overwrite the new tensors by old ones.
        names = [f"model-base-{i + 1:05d}-of-{len(names):05d}.safetensors" for i in range(len(names))]
    name_of = dict(zip(checkpoint.files, names, strict=True))
    link_kinds = {_link(path, building / name) for path, name in name_of.items()}
    entries = checkpoint.entries | read_header(building / NEW_SHARD)
    size = sum(entry.bytes for entry in entries.values())
    weight_map = {key: name_of.get(entry.file, NEW_SHARD) for key, entry in entries.items()}
    write_json(building / INDEX_FILE, {"metadata": {"total_size": size}, "weight_map": weight_map})
    return next(kind for kind in ("copy", "reflink", "hard link") if kind in link_kinds)  # the costliest


def _link(source: Path, target: Path) -> str:
    """Hard-link a file; if the file system cannot, share its blocks, else copy it. Returns which it was."""
    source = source.resolve()  # the hub's cache is made of symbolic links
    try:
        os.link(source, target)
        return "hard link"
    except OSError:
        pass
    try:
        import fcntl

        with open(source, "rb") as source_file, open(target, "wb") as target_file:
            fcntl.ioctl(target_file.fileno(), _FICLONE, source_file.fileno())
        return "reflink"
    except (OSError, ImportError):
        shutil.copyfile(source, target)
        return "copy"


def _copy_others(source: Path, target: Path) -> None:
    """Copy the files that are not weights: config, tokenizer, processor, chat templates, licence."""
    for path in sorted(source.iterdir()):
        if path.name.startswith(".") or path.name.endswith((*WEIGHT_ENDINGS, ".index.json")):
            continue
        if path.is_dir():
            (target / path.name).mkdir()
            _copy_others(path, target / path.name)
        elif path.is_file():
            shutil.copyfile(path, target / path.name)
