"""Examples -> groups -> batches: one group is one image (or study) with several of its questions."""

from __future__ import annotations

import math
import random
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

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
    assert cap is None or cap >= 1, "a group holds at least one question"
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

    A group is never divided and none is left out. The number of batches, ceil(sum(sizes) / pairs) where there
    are that many groups, does not depend on the order, so that every epoch has as many; each cut falls on the
    boundary of groups that is nearest to its even share. `sizes[i]` is the number of pairs in group i;
    returns lists of group indices. Groups of one pair make batches of at most `pairs`.
    """
    assert pairs >= 1 and all(size >= 1 for size in sizes), "batches and groups hold at least one pair"
    if not sizes:
        return []
    ends = list(accumulate(sizes))
    count = min(len(sizes), math.ceil(ends[-1] / pairs))
    cuts = [0]
    for batch in range(1, count):
        share = ends[-1] * batch / count
        after = bisect_left(ends, share)  # ends[after] is the first boundary at or after the share
        nearer = after - 1 if after and share - ends[after - 1] < ends[after] - share else after
        # every batch takes at least one group and leaves one to each of those that follow
        cuts.append(min(max(nearer + 1, cuts[-1] + 1), len(sizes) - (count - batch)))
    cuts.append(len(sizes))
    return [list(range(start, stop)) for start, stop in pairwise(cuts)]


class EpochBatches:
    """A batch sampler whose order is a function of (seed, epoch) alone, so that a resumed run repeats it.

    Yields lists of groups, each a list of examples; every epoch yields every example once, in `len(self)`
    batches. `set_epoch` is called by accelerate before each epoch.
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
        assert len(batches) == self.length, "the number of groups and pairs is the same in every epoch"
        yield from batches
