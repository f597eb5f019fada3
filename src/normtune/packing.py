"""Examples -> groups -> batches: one group is one image (or study) with several of its questions."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from normtune.data.records import Example


@dataclass(frozen=True)
class Segment:
    """One tokenised question with its answer. The answer is empty when the model is to write it."""

    id: str
    prompt: tuple[int, ...]
    answer: tuple[int, ...] = ()

    def __len__(self) -> int:
        return len(self.prompt) + len(self.answer)


@dataclass(frozen=True)
class Group:
    """One image (or study of several views) and the segments that share it."""

    images: tuple[str, ...]
    segments: tuple[Segment, ...]


def group_by_image(
    examples: Sequence[Example], cap: int | None = None, rng: random.Random | None = None
) -> list[list[Example]]:
    """Split examples into groups of one image each, at most `cap` questions a group.

    With `cap=1` every question stands alone. With `rng`, the questions of each image are shuffled before
    they are cut into groups, so that capped groups differ between epochs; without it the order is kept.
    """
    by_image: dict[tuple[str, ...], list[Example]] = {}
    for example in examples:
        by_image.setdefault(example.images, []).append(example)
    groups = []
    for members in by_image.values():
        if rng is not None:
            rng.shuffle(members)
        size = cap or len(members)
        groups += [members[start : start + size] for start in range(0, len(members), size)]
    return groups


def pair_batches(sizes: Sequence[int], pairs: int) -> list[list[int]]:
    """Cut groups, in the order given, into batches of about `pairs` question-answer pairs.

    A group is never divided: a batch is closed where taking the next group would leave it further from
    `pairs` than it is now. `sizes[i]` is the number of pairs in group i; returns lists of group indices.
    """
    batches: list[list[int]] = []
    batch: list[int] = []
    held = 0
    for index, size in enumerate(sizes):
        if batch and abs(held + size - pairs) > abs(held - pairs):
            batches.append(batch)
            batch, held = [], 0
        batch.append(index)
        held += size
    if batch:
        batches.append(batch)
    return batches


class EpochBatches:
    """A batch sampler whose order is a function of (seed, epoch) alone, so that a resumed run repeats it.

    Yields lists of groups, each a list of examples. `set_epoch` is called by accelerate before each epoch.
    Every epoch has `len(self)` batches: the number varies a little with shuffling, so the shortest
    epoch's tail is topped up and the longest one's is cut.
    """

    def __init__(self, examples: Sequence[Example], pairs: int, cap: int | None, seed: int) -> None:
        self.examples, self.pairs, self.cap, self.seed, self.epoch = list(examples), pairs, cap, seed, 0
        self.length = len(self._of_epoch(0))

    def _of_epoch(self, epoch: int) -> list[list[list[Example]]]:
        rng = random.Random(f"{self.seed}-{epoch}")
        groups = group_by_image(self.examples, self.cap, rng)
        rng.shuffle(groups)
        return [[groups[i] for i in batch] for batch in pair_batches([len(g) for g in groups], self.pairs)]

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[list[list[Example]]]:
        batches = self._of_epoch(self.epoch)
        while len(batches) < self.length:
            batches += self._of_epoch(self.epoch)[: self.length - len(batches)]
        yield from batches[: self.length]
