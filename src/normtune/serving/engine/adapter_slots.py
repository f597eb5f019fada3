"""Registered adapters, and the bounded number of slots into which they are loaded.

Thousands of adapters may be registered: only `adapter.json` is read at registration, and little of it is kept
in memory. The bank that the base's layers read has a bounded number of slots. An adapter is loaded into one
when it is first requested, and evicted when it is the least recently used and another adapter needs a slot.
An adapter that a running batch uses is pinned, which means that it is not evicted.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections import OrderedDict
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from torch import Tensor, nn

from normtune.adapters.fingerprint import fingerprint, same_base
from normtune.adapters.info import WEIGHTS_FILE, AdapterInfo
from normtune.adapters.multi.bank import AdapterBank, build_bank
from normtune.adapters.multi.lora import LoRABank, add_lora_bank, lora_matrices
from normtune.adapters.storage import INFO_FILE, fit_names, read_adapter_info, read_tensors
from normtune.data.choices import ChoiceFormat
from normtune.errors import InputError
from normtune.methods.adapt import adapt, restore_base
from normtune.models.part_names import IMAGE_PARTS
from normtune.serving.engine.requests import NameTaken, ServedAdapter, UnknownAdapter, UnusableAdapter

BASE_SLOT = 0  # the slot of the base's own norm values; no adapter is loaded into it
# Without a limit by the caller, the bank has this size, and at most this many slots.
DEFAULT_BANK_BYTES = 256 << 20
MAX_SLOTS = 1024

_log = logging.getLogger(__name__)


@dataclass(eq=False)
class RegisteredAdapter:
    """One registered adapter, or the base."""

    registered_info: ServedAdapter  # its description, as read at registration; `info` adds the current state
    sha256: str  # digest of its tensors at registration
    slot: int | None = None  # its slot in the bank; None while it is not loaded
    pins: int = 0  # how many running requests use it; it is not evicted while there are any
    image_digest: str = ""  # "" if it encodes images as the base does, else a digest of its image parts' values
    removed: bool = False  # no longer registered; requests that were accepted before are still answered
    modified: int = 0  # the last seen modification time of its `adapter.json`, in ns

    @property
    def choices(self) -> ChoiceFormat:
        """How questions with options were written in its training."""
        data: dict[str, Any] = self.registered_info.data or {}
        return ChoiceFormat(**data.get("choices", {}))

    @property
    def limits(self) -> Any:
        """The limits of texts in its training, for `Family.use_limits`; None if its file records none."""
        return (self.registered_info.data or {}).get("limits")

    def info(self) -> ServedAdapter:
        return replace(self.registered_info, loaded=self.slot is not None, running=self.pins)


class AdapterSlots:
    """The registered adapters of one base, and the bank of slots that they are loaded into.

    Only one thread may call `pin` and `unpin`; all other methods are thread-safe.

    Args:
        model: the base without an adapter. Its norms (and the projections that LoRA adapts) are replaced by
            modules that read the bank, until `close`.
        memory: size of the bank in bytes; None is `DEFAULT_BANK_BYTES` and at most `MAX_SLOTS` slots.
        lora_rank: the largest LoRA rank that a slot can hold; 0 supports adapters of norms only.
        max_pixels: of an image, for all adapters, which share its features; None: the model's own limit.

    Raises:
        InputError: the memory is too small for one adapter besides the base, or the model has a norm that
            cannot hold several adapters.
    """

    def __init__(
        self, model: nn.Module, memory: int | None = None, lora_rank: int = 0, max_pixels: int | None = None
    ) -> None:
        self.fingerprint, self.max_pixels = fingerprint(model), max_pixels
        self._model, self._names = model, frozenset(name for name, _ in model.named_parameters(remove_duplicate=False))
        matrices = lora_matrices(model, lora_rank) if lora_rank else {}
        tuned = adapt(model, "ln", train_unused=True)  # adapters of version 0.1 hold them
        # Every slot has room for all norms and for LoRA of `lora_rank` on all parts, used or not.
        values = tuned.trainable + sum(matrix.shape[0] * matrix.shape[1] for matrix in matrices.values())
        self.bytes_per_adapter = values * torch.float32.itemsize
        if memory is None:
            memory = min(DEFAULT_BANK_BYTES, MAX_SLOTS * self.bytes_per_adapter)
        slots = memory // self.bytes_per_adapter
        try:
            if slots < 2:
                raise InputError(
                    f"the memory for adapters is too small: each takes {self.bytes_per_adapter:,} bytes, and "
                    "so do the base's own values. Raise --adapter-memory."
                )
            self.bank: AdapterBank = build_bank(tuned, slots)
        except InputError:
            restore_base(tuned)
            raise
        self.lora: LoRABank | None = None
        if matrices:
            self.lora = add_lora_bank(model, matrices, slots, self.bank.image_rows, self.bank.text_rows)
        base_info = ServedAdapter("", Path(), "frozen", "", 0, 0, self.bytes_per_adapter, True, 0, {"limits": {}})
        self.base = RegisteredAdapter(base_info, "", BASE_SLOT)
        self.loads = self.evictions = 0
        self.seconds_loading = 0.0
        self._base_values = self.bank.values[BASE_SLOT].cpu()  # [norm values]
        self._in_image_parts = torch.zeros(len(self._base_values), dtype=torch.bool)  # [norm values]
        for name, columns in self.bank.columns.items():
            self._in_image_parts[columns] = tuned.part_and_role[name][0] in IMAGE_PARTS
        self._registered: dict[str, RegisteredAdapter] = {}
        self._loaded: OrderedDict[RegisteredAdapter, int] = OrderedDict()  # to slot; least recently used first
        self._free = [*range(slots - 1, BASE_SLOT, -1)]  # a stack, so that slot 1 is used first
        self._lock = Lock()

    @property
    def capacity(self) -> int:
        """How many adapters can be loaded at once, not counting the base."""
        return len(self.bank.values) - 1

    # --- registered adapters --------------------------------------------------------------------------------

    def register(self, name: str, folder: Path) -> ServedAdapter:
        """Register the adapter of a folder under a name. Its tensors are not read yet.

        An adapter that was trained again in its folder is replaced by registering it again: requests from then
        on use the new files. Those that were accepted before use the values that are loaded, which keep their
        slot until another adapter needs it.

        Raises:
            InputError: the folder holds no adapter, or the adapter is of another base or trains more than norms
                (and LoRA, with `lora_rank`).
            NameTaken: an adapter of another folder has the name.
        """
        if not name.strip():
            raise InputError("an adapter needs a name. Give it one.")
        modified = _modified(folder)  # before reading, so that a later change is noticed
        info = fit_names(read_adapter_info(folder, verify=False), self._model, self._names)
        self._check(name, info)
        adapter = RegisteredAdapter(
            ServedAdapter(
                name=name,
                folder=folder,
                recipe=info.recipe,
                base=info.base_name,
                trainable=info.trainable,
                total=info.total,
                bytes=self.bytes_per_adapter,
                loaded=False,
                running=0,
                data=info.data,
            ),
            info.sha256,
            modified=modified,
        )
        with self._lock:
            replaced = self._registered.get(name)
            if replaced is not None and replaced.registered_info.folder.resolve() != folder.resolve():
                raise NameTaken(f"an adapter '{name}' is already registered from another folder. Remove it first.")
            self._registered[name] = adapter
        return adapter.info()

    def remove(self, name: str) -> None:
        """Remove an adapter, or raise `UnknownAdapter`. Requests that were accepted before are still answered."""
        with self._lock:
            adapter = self.find(name)
            del self._registered[name]
            adapter.removed = True
            self._unload(adapter)

    def find(self, name: str | None) -> RegisteredAdapter:
        """Return the adapter of that name, or the base for None; raise `UnknownAdapter` if there is none."""
        adapter = self.base if name is None else self._registered.get(name)
        if adapter is None:
            raise UnknownAdapter(f"no adapter '{str(name)[:80]}' is registered. Register it, or use one that is.")
        return adapter

    def has_adapter(self, name: str) -> bool:
        """Return whether an adapter of that name is registered."""
        return name in self._registered

    def infos(self) -> list[ServedAdapter]:
        """Return all registered adapters, in the order of registration."""
        with self._lock:
            return [adapter.info() for adapter in self._registered.values()]

    def counts(self) -> tuple[int, int]:
        """Return how many adapters are (registered, loaded)."""
        with self._lock:
            return len(self._registered), len(self._loaded)

    def _check(self, name: str, info: AdapterInfo) -> None:
        """Check that an adapter belongs to this base and fits into a slot."""
        # an adapter of PEFT records no fingerprint: its names and shapes are checked below
        if info.base_fingerprint and not same_base(info.base_fingerprint, self.fingerprint):
            raise InputError(
                f"adapter '{name}' was trained on '{info.base_name}', but the served base has other values "
                "or parts. Register adapters of the served base."
            )
        trained_with = ((info.data or {}).get("limits") or {}).get("max_pixels")
        if trained_with is not None and trained_with != self.max_pixels:
            raise InputError(
                f"adapter '{name}' was trained with --max-pixels {trained_with}, and this server reads images with "
                f"{self.max_pixels or 'the limit of the model'}. Start a server with --max-pixels {trained_with}."
            )
        for tensor_name, tensor in info.tensors.items():
            if tensor.method == "lora" and self.lora is not None:
                continue
            columns = self.bank.columns.get(tensor_name)
            if columns is None:
                supported = "norms" if self.lora is None else "norms and LoRA"
                hint = ", or serve LoRA with --lora-rank" if tensor.method == "lora" else ""
                raise InputError(
                    f"adapter '{name}' trains {tensor_name} by {tensor.method}, but only {supported} can be "
                    f"served. Merge it (normtune merge) and serve the merged model as a base{hint}."
                )
            if tensor.shape != [columns.stop - columns.start]:
                raise InputError(f"adapter '{name}': {tensor_name} has the wrong shape. Copy the adapter again.")
        if self.lora is not None:
            try:
                self.lora.check_fits(info)
            except InputError as error:
                raise InputError(
                    f"adapter '{name}' cannot be served: {error}. Raise --lora-rank, or merge it (normtune "
                    "merge) and serve the merged model as a base."
                ) from error

    # --- loaded adapters ------------------------------------------------------------------------------------

    def pin(self, adapter: RegisteredAdapter) -> int:
        """Load an adapter if necessary, and keep it loaded until `unpin` was called as often as `pin`.

        Returns:
            Its slot.

        Raises:
            UnusableAdapter: its files are missing, damaged, or not those that were registered.
        """
        if adapter is self.base:
            return BASE_SLOT
        if adapter.slot is not None:  # only this thread loads adapters
            self._log_change(adapter)
        with self._lock:
            if adapter.slot is not None:
                self._loaded.move_to_end(adapter)
                adapter.pins += 1
                return adapter.slot
        # Files are read without the lock, so that other threads can register adapters meanwhile.
        began = time.monotonic()
        norm_values, lora_values = self._read_values(adapter)
        with self._lock:
            slot = self._free.pop() if self._free else self._evict()
            self.bank.values[slot].copy_(norm_values)
            if self.lora is not None:
                self.lora.set_adapter(slot, lora_values)
            adapter.slot, self._loaded[adapter] = slot, slot
            adapter.image_digest = self._image_digest(norm_values, lora_values)
            adapter.pins += 1
            self.loads += 1
            self.seconds_loading += time.monotonic() - began
        return slot

    def unpin(self, adapter: RegisteredAdapter) -> None:
        """Undo one `pin`, when a request of the adapter is done."""
        if adapter is self.base:
            return
        with self._lock:
            adapter.pins -= 1
            if adapter.removed:
                self._unload(adapter)

    def _read_values(self, adapter: RegisteredAdapter) -> tuple[Tensor, Tensor | None]:
        """Read an adapter's tensors as the values of a slot.

        Returns:
            [norm values], where norms that the adapter does not train have the base's values; and its LoRA
            values as `LoRABank.set_adapter` takes them.
        """
        name, folder = adapter.registered_info.name, adapter.registered_info.folder
        try:
            info = fit_names(read_adapter_info(folder), self._model, self._names)
            if info.sha256 != adapter.sha256:
                raise InputError("its tensors are not those that were registered")
            self._check(name, info)
            tensors = read_tensors(folder, info)
        except InputError as error:  # its message may name a folder of the server: log it, do not send it
            _log.warning("adapter %s cannot be loaded: %s", name, error)
            raise UnusableAdapter(
                f"adapter '{name}' cannot be loaded: its files are missing, damaged, or not those that were "
                "registered. Register it again, or restart a server that does not register adapters."
            ) from error
        norm_values = self._base_values.clone()
        for tensor_name, values in tensors.items():
            if tensor_name in self.bank.columns:
                norm_values[self.bank.columns[tensor_name]] = values.to(norm_values.dtype)
        return norm_values, None if self.lora is None else self.lora.pack_values(info, tensors)

    def _log_change(self, adapter: RegisteredAdapter) -> None:
        """Log, once for each change, that a loaded adapter has other files now. Its loaded values stay in use."""
        name, folder = adapter.registered_info.name, adapter.registered_info.folder
        modified = _modified(folder)
        if modified == adapter.modified or self._registered.get(name) is not adapter:
            return
        adapter.modified = modified
        try:
            problem = "" if read_adapter_info(folder).sha256 == adapter.sha256 else "its tensors are others"
        except InputError as error:
            problem = str(error)
        if problem:
            _log.warning(
                "the files of adapter %s changed: %s. Its requests get the values that were registered, while "
                "these are loaded. Register it again, or restart the server.",
                name,
                problem.rstrip("."),
            )

    def _image_digest(self, norm_values: Tensor, lora_values: Tensor | None) -> str:
        """Return the digest of an adapter's values in the image parts; "" if they are the base's.

        Adapters with equal digests encode an image to the same states, so that these can be shared.
        """
        values = norm_values[self._in_image_parts]
        added = torch.zeros(0) if self.lora is None else self.lora.image_values(lora_values)
        if torch.equal(values, self._base_values[self._in_image_parts]) and not len(added):
            return ""
        return hashlib.sha256(torch.cat((values, added)).numpy().data).hexdigest()

    def _evict(self) -> int:
        """Unload the least recently used adapter that is not pinned, and return its slot."""
        oldest = next((adapter for adapter in self._loaded if not adapter.pins), None)
        assert oldest is not None, "a batch has at most as many adapters as there are slots"
        slot = self._loaded.pop(oldest)
        oldest.slot = None
        self.evictions += 1
        return slot

    def _unload(self, adapter: RegisteredAdapter) -> None:
        """Free the slot of an adapter, unless it is pinned."""
        if adapter.slot is not None and not adapter.pins:
            self._free.append(self._loaded.pop(adapter))
            adapter.slot = None

    def close(self) -> None:
        """Restore the base's original layers."""
        if self.lora is not None:
            self.lora.remove()
        restore_base(self.bank.tuned)


def _modified(folder: Path) -> int:
    """Return when an adapter's files were modified, in ns; 0 if they cannot be read.

    Those are the description of one of Normtune's, which is written last, and the tensors of one of PEFT's.
    """
    for name in (INFO_FILE, WEIGHTS_FILE):
        try:
            return (folder / name).stat().st_mtime_ns
        except OSError:
            continue
    return 0
