"""Reads the images of the next batches in the background, while the device computes the present one."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from normtune.data.batches import EpochBatches
from normtune.data.records import Example
from normtune.runtime import distributed

BATCHES_AHEAD = 2
GPU_WORKERS = 2  # threads by default where the model is on a GPU; on a CPU the model needs all cores

Groups = Sequence[Sequence[Example]]  # a batch: the examples of each group


class LookaheadBatches:
    """`EpochBatches` that passes each batch of this process to `prepare`, two batches before it is due.

    Everything else (length, epoch, number of processes) is that of the batches.
    """

    def __init__(self, batches: EpochBatches, prepare: Callable[[Groups], None]) -> None:
        self.batches, self.prepare = batches, prepare

    def __iter__(self) -> Iterator[Groups]:
        waiting: deque[Groups] = deque()
        for number, groups in enumerate(self.batches):
            if number % self.batches.ranks == distributed.rank():  # batches go to the processes in turn
                self.prepare(groups)
            waiting.append(groups)
            if len(waiting) > BATCHES_AHEAD * self.batches.ranks:
                yield waiting.popleft()
        yield from waiting

    def __len__(self) -> int:
        return len(self.batches)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.batches, name)


def worker_count(workers: int | None, device_type: str) -> int:
    """The number of threads that read images: `workers`, or the default for the device."""
    return workers if workers is not None else GPU_WORKERS if device_type == "cuda" else 0
