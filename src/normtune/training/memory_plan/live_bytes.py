"""Counts the bytes of existing tensors exactly, for example what a forward pass saves for its backward pass.

The memory of a process or of CUDA also includes what allocators keep. This counts exactly the storages that
operations created and that something still references: autograd, a checkpoint, a cache, a local variable.

    with LiveTensorBytes() as counter:
        loss = model(x)             # counter.now: activations that autograd saved, and the loss
        loss.backward()             # counter.peak: the most that existed at a time
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from normtune.runtime.memory import LARGEST_HEAP_BLOCK


class LiveTensorBytes(TorchDispatchMode):
    """Counts every storage that an operation creates inside the block, until the storage is freed.

    Storages are counted, not tensors: a view shares the storage of its base, and keeps all of it alive.

    Attributes:
        now: bytes of the storages that were created inside and still exist.
        peak: the largest value of `now` since the last `reset_peak`.
        heap_now, heap_peak: the same, of storages that glibc takes from its heap (see `memory.LARGEST_HEAP_BLOCK`).
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = self.heap_now = self.heap_peak = 0
        self._known: weakref.WeakSet[Any] = weakref.WeakSet()  # storages that are counted already

    def reset_peak(self) -> None:
        """Start a new peak from the present count."""
        self.peak, self.heap_peak = self.now, self.heap_now

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        leaves = tree_leaves((args, kwargs))
        # an operation may return one of its inputs, or a view of it: its storage was there before
        inputs = {id(leaf.untyped_storage()) for leaf in leaves if isinstance(leaf, Tensor)}
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                storage = leaf.untyped_storage()
                # an in-place operation or a second view of a counted storage adds nothing
                if id(storage) not in inputs and storage not in self._known:
                    self._count(storage)
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        size = storage.nbytes()
        # weak references: counting must not keep a storage alive
        self._known.add(storage)
        self._add(size)
        self.peak, self.heap_peak = max(self.peak, self.now), max(self.heap_peak, self.heap_now)
        weakref.finalize(storage, self._add, -size).atexit = False  # called when the storage is freed

    def _add(self, size: int) -> None:
        self.now += size
        self.heap_now += size if abs(size) < LARGEST_HEAP_BLOCK else 0
