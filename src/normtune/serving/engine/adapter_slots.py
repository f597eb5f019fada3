"""Which adapters a server knows, and which of them stand in the bank that the layers of the base read.

Thousands may be registered: of each only `adapter.json` is read, and little of it kept. The bank has a
bounded number of slots; an adapter enters one when it is first asked for, and gives it up to another when it
has been idle for the longest time. A pinned adapter stays.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections import OrderedDict
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from torch import Tensor, nn

from normtune.adapters.fingerprint import fingerprint, same_base
from normtune.adapters.info import AdapterInfo, parse_info
from normtune.adapters.multi.bank import AdapterBank, build_bank
from normtune.adapters.multi.lora import LoRABank, add_lora_bank, targets
from normtune.adapters.multi.rows import RowAdapters
from normtune.adapters.storage import INFO_FILE, TENSORS_FILE, read_adapter_info, read_tensors
from normtune.errors import InputError
from normtune.methods.adapt import adapt, restore_base
from normtune.models.part_names import IMAGE_PARTS
from normtune.runtime.files import read_json
from normtune.serving.engine.requests import ServedAdapter, UnknownAdapter

BASE = 0  # the slot of the base's own gains; nobody else gets it
BANK_BYTES = 256 << 20  # where nothing else is said, and no more slots than
SLOTS = 1024

_log = logging.getLogger(__name__)


@dataclass(eq=False)
class AdapterSlot:
    """One registered adapter, or the base.

    Attributes:
        told: what is known of it without its tensors.
        sha256: of the tensors that were registered.
        slot: its place in the bank while it is loaded.
        pins: how many running requests need it there.
        images: "" where it sees images as the base does, else a digest of its values in the image parts.
        removed: no longer registered; requests that were accepted are answered all the same.
    """

    told: ServedAdapter
    sha256: str
    slot: int | None = None
    pins: int = 0
    images: str = ""
    removed: bool = False

    def info(self) -> ServedAdapter:
        return replace(self.told, loaded=self.slot is not None, running=self.pins)


class Adapters:
    """The adapters of one base. Pinning is for one thread; all else may be called by any.

    Args:
        model: the base without an adapter; its norms (and projections) are replaced until `close`.
        memory: bytes of the bank.
        lora_rank: the largest rank of LoRA that there is room for; 0: adapters have norms alone.

    Raises:
        InputError: the bank holds no adapter besides the base, or a norm cannot hold several.
    """

    def __init__(self, model: nn.Module, memory: int | None = None, lora_rank: int = 0) -> None:
        self.fingerprint = fingerprint(model)
        matrices = targets(model, lora_rank) if lora_rank else {}
        tuned = adapt(model, "ln")
        values = tuned.trainable + sum(one.shape[0] * one.shape[1] for one in matrices.values())
        self.entry_bytes = values * torch.float32.itemsize
        slots = min(SLOTS, BANK_BYTES // self.entry_bytes) if memory is None else memory // self.entry_bytes
        try:
            if slots < 2:
                raise InputError(
                    f"adapters of this base take {self.entry_bytes:,} bytes each and the base itself as "
                    "many, which the memory for adapters does not hold. Allow more of it."
                )
            mixed = build_bank(tuned, slots)
        except InputError:
            restore_base(tuned)
            raise
        self.bank: AdapterBank = replace(mixed, grads=mixed.grads.new_zeros(0))  # nothing is trained
        for one in self.bank.banks:
            one.requires_grad_(False)
        self.lora: LoRABank | None = None
        if matrices:
            self.lora = add_lora_bank(model, matrices, slots, mixed.images, mixed.texts)
        self.base = AdapterSlot(_base_info(self.entry_bytes), "", BASE)
        self.loads = self.evictions = 0
        self.seconds_loading = 0.0
        self._base_row = self.bank.values[BASE].cpu()
        self._of_images = torch.zeros(len(self._base_row), dtype=torch.bool)
        for name, place in self.bank.slices.items():
            self._of_images[place] = tuned.part_and_role[name][0] in IMAGE_PARTS
        self._registered: dict[str, AdapterSlot] = {}
        self._loaded: OrderedDict[AdapterSlot, int] = OrderedDict()  # entry -> slot, the longest idle first
        self._free = [*range(slots - 1, BASE, -1)]
        self._lock = Lock()

    @property
    def room(self) -> int:
        """How many adapters the bank holds at once, the base not counted."""
        return len(self.bank.values) - 1

    # --- the register ---------------------------------------------------------------------------------------

    def register(self, name: str, folder: Path) -> ServedAdapter:
        """Make an adapter known by its folder; its tensors are not read yet.

        Raises:
            InputError: no delta there, one of another base, one that trains more than norms (and LoRA, where
                there is room), or a name that is taken.
        """
        if not name.strip():
            raise InputError("an adapter needs a name. Give it one.")
        info = parse_info(read_json(folder / INFO_FILE), folder / INFO_FILE)
        if not (folder / TENSORS_FILE).is_file():
            raise InputError(f"{folder / TENSORS_FILE} is missing. Copy the delta anew.")
        self._check(name, info)
        entry = AdapterSlot(
            ServedAdapter(
                name=name,
                folder=folder,
                recipe=info.recipe,
                base=info.base_name,
                trainable=info.trainable,
                total=info.total,
                bytes=self.entry_bytes,
                loaded=False,
                running=0,
                data=info.data,
                metrics=_numbers(info.metrics),
            ),
            info.sha256,
        )
        with self._lock:
            if name in self._registered:
                raise InputError(f"an adapter '{name}' is registered already. Remove it first.")
            self._registered[name] = entry
        return entry.info()

    def remove(self, name: str) -> None:
        """Forget an adapter; what was asked of it before is answered.

        Raises:
            UnknownAdapter: there is none of that name.
        """
        with self._lock:
            entry = self._registered.pop(name, None)
            if entry is None:
                raise UnknownAdapter(_unknown(name))
            entry.removed = True
            self._leave(entry)

    def find(self, name: str | None) -> AdapterSlot:
        """The adapter of that name; None: the base.

        Raises:
            UnknownAdapter: there is none.
        """
        if name is None:
            return self.base
        with self._lock:
            entry = self._registered.get(name)
        if entry is None:
            raise UnknownAdapter(_unknown(name))
        return entry

    def knows(self, name: str) -> bool:
        """Whether an adapter of that name is registered."""
        with self._lock:
            return name in self._registered

    def infos(self) -> list[ServedAdapter]:
        """All that are registered, in the order in which they were."""
        with self._lock:
            return [entry.info() for entry in self._registered.values()]

    def counts(self) -> tuple[int, int]:
        """(registered, loaded)."""
        with self._lock:
            return len(self._registered), len(self._loaded)

    def _check(self, name: str, info: AdapterInfo) -> None:
        if not same_base(info.base_fingerprint, self.fingerprint):
            raise InputError(
                f"adapter '{name}' was trained on '{info.base_name}', and the base here has other values or "
                "parts. Register adapters of this base."
            )
        for tensor, one in info.tensors.items():
            if one.method == "lora" and self.lora is not None:
                continue
            place = self.bank.slices.get(tensor)
            if place is None:
                served = "norms alone" if self.lora is None else "norms and LoRA alone"
                room = ", or make room for it (--lora-rank)" if one.method == "lora" else ""
                raise InputError(
                    f"adapter '{name}' trains {tensor} by {one.method}, and adapters are served together by "
                    f"their {served}. Merge it (normtune merge) and serve the merged model by itself{room}."
                )
            if one.shape != [place.stop - place.start]:
                raise InputError(f"adapter '{name}' has a {tensor} of another shape. Copy the delta anew.")
        if self.lora is not None:
            try:
                self.lora.check(info)
            except InputError as error:
                raise InputError(
                    f"adapter '{name}' cannot be served: {error}. Raise --lora-rank, or merge it (normtune "
                    "merge) and serve the merged model by itself."
                ) from error

    # --- the bank -------------------------------------------------------------------------------------------

    def pin(self, entry: AdapterSlot) -> int:
        """The slot of an adapter, loaded where it was not; it stays until it is unpinned as often.

        Raises:
            InputError: its files are gone or are others than those that were registered.
        """
        if entry is self.base:
            return BASE
        with self._lock:
            if entry.slot is not None:
                self._loaded.move_to_end(entry)
                entry.pins += 1
                return entry.slot
        began = time.monotonic()
        row, matrices = self._rows(entry)
        with self._lock:
            slot = self._free.pop() if self._free else self._evicted()
            self.bank.values[slot].copy_(row)
            if self.lora is not None:
                self.lora.set_adapter(slot, matrices)
            entry.slot, self._loaded[entry] = slot, slot
            entry.images = self._seen_by(row, matrices)
            entry.pins += 1
            self.loads += 1
            self.seconds_loading += time.monotonic() - began
        return slot

    def unpin(self, entry: AdapterSlot) -> None:
        """One request of the adapter is done."""
        if entry is self.base:
            return
        with self._lock:
            entry.pins -= 1
            if entry.removed:
                self._leave(entry)

    def looked_at_by(self, owners: RowAdapters | None) -> AbstractContextManager[None]:
        """Inside, text layers that read images give each study the LoRA of its owner."""
        return nullcontext() if self.lora is None else self.lora.memory.use(owners)

    def _rows(self, entry: AdapterSlot) -> tuple[Tensor, Tensor | None]:
        """All values of the bank's norms, those that the adapter trains and the base's others: [values]; and
        those of its LoRA."""
        name, folder = entry.told.name, entry.told.folder
        try:
            info = read_adapter_info(folder)
            if info.sha256 != entry.sha256:
                raise InputError("it is not the one that was registered")
            self._check(name, info)
            tensors = read_tensors(folder, info)
        except InputError as error:  # which may name a folder of the server to whoever asks
            _log.warning("adapter %s cannot be loaded: %s", name, error)
            raise InputError(
                f"adapter '{name}' cannot be loaded: its files are missing, damaged or others than those "
                "that were registered. Register it anew."
            ) from error
        row = self._base_row.clone()
        for tensor, values in tensors.items():
            if tensor in self.bank.slices:
                row[self.bank.slices[tensor]] = values.to(row.dtype)
        return row, None if self.lora is None else self.lora.row(info, tensors)

    def _seen_by(self, row: Tensor, matrices: Tensor | None) -> str:
        values = row[self._of_images]
        added = torch.zeros(0) if self.lora is None else self.lora.image_values(matrices)
        if torch.equal(values, self._base_row[self._of_images]) and not len(added):
            return ""
        return hashlib.sha256(torch.cat((values, added)).numpy().data).hexdigest()

    def _evicted(self) -> int:
        """The slot of the adapter that was idle for the longest time."""
        idle = next((entry for entry in self._loaded if not entry.pins), None)
        assert idle is not None, "a batch has no more adapters than there is room for"
        slot = self._loaded.pop(idle)
        idle.slot = None
        self.evictions += 1
        return slot

    def _leave(self, entry: AdapterSlot) -> None:
        """Free the slot of an adapter that is not running."""
        if entry.slot is not None and not entry.pins:
            self._free.append(self._loaded.pop(entry))
            entry.slot = None

    def close(self) -> None:
        """Give the base its own layers back."""
        if self.lora is not None:
            self.lora.remove()
        restore_base(self.bank.tuned)


def _base_info(size: int) -> ServedAdapter:
    return ServedAdapter("", Path(), "frozen", "", 0, 0, size, True, 0)


def _unknown(name: str) -> str:
    return f"no adapter '{name[:80]}' is registered. Register it, or ask one of those that are."


def _numbers(metrics: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Metrics without lists: loss logs are long, and thousands of adapters are held."""
    if metrics is None:
        return None
    return {
        name: _numbers(value) if isinstance(value, Mapping) else value
        for name, value in metrics.items()
        if not isinstance(value, list)
    }
