"""Examples -> groups -> batches: one group is one image (or study) with several of its questions."""

from __future__ import annotations

import math
import random
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

from normtune.data.groups import group_by_image
from normtune.data.records import Example
from normtune.errors import InputError


@dataclass(frozen=True)
class TokenCosts:
    """What a group costs in tokens, padding left out: so measured, costs add up in any order.

    Padding rows to the longest of a batch adds 3 to 10% on SLAKE and VQA-RAD, about as evenly.

    Attributes:
        prefixes: by images, the tokens that stand once for all questions of a group.
        segments: by example id, the tokens of a question with its answer.
    """

    prefixes: Mapping[tuple[str, ...], int]
    segments: Mapping[str, int]

    def cost_of(self, group: Sequence[Example]) -> int:
        return self.prefixes[group[0].images] + sum(self.segments[example.id] for example in group)


def batch_count(sizes: Sequence[int], pairs: int, least: int = 1) -> int:
    """How many batches of about `pairs` pairs, and at least `least` groups, the groups make in any order.

    `sizes[i]` is the number of pairs in group i.
    """
    assert pairs >= 1 and all(size >= 1 for size in sizes), "batches and groups hold at least one pair"
    return min(len(sizes) // least, math.ceil(sum(sizes) / pairs))


def even_batches(costs: Sequence[int], count: int, least: int = 1) -> list[list[int]]:
    """Cut groups, in the order given, into `count` batches of about the same cost; lists of group indices.

    A group is never divided and none is left out. Each cut falls on the boundary of groups that is nearest to
    its even share: a batch of more than `least` groups costs at most an even share and the dearest group.
    """
    assert len(costs) >= count * least and (count or not costs), "every batch takes `least` groups"
    if not count:
        return []
    ends = [end * count for end in accumulate(costs)]  # in parts of 1 / count, where shares are whole numbers
    total = ends[-1] // count
    cuts = [0]
    for batch in range(1, count):
        share = total * batch
        after = bisect_left(ends, share)  # ends[after] is the first boundary at or after the share
        nearer = after - 1 if after and share - ends[after - 1] < ends[after] - share else after
        # every batch takes its least number of groups and leaves as many to each of those that follow
        cuts.append(min(max(nearer + 1, cuts[-1] + least), len(costs) - least * (count - batch)))
    cuts.append(len(costs))
    return [list(range(start, stop)) for start, stop in pairwise(cuts)]


def batches_of_pairs(sizes: Sequence[int], pairs: int) -> list[list[int]]:
    """`even_batches` of about `pairs` question-answer pairs; groups of one pair make at most that many.

    The number of batches, ceil(sum(sizes) / pairs) where there are that many groups, does not depend on the
    order. `sizes[i]` is the number of pairs in group i; returns lists of group indices.
    """
    return even_batches(sizes, batch_count(sizes, pairs))


def split_across_ranks(costs: Sequence[int], ranks: int) -> list[list[int]]:
    """Deal the groups of one step out to `ranks` processes, the dearest first, each to whoever has least.

    Every process gets a group, and no two differ by more than the dearest one (Graham 1969, LPT). Returns
    lists of group indices, each in the order given.
    """
    assert len(costs) >= ranks >= 1 and all(cost >= 1 for cost in costs), "a group for each process"
    held: list[list[int]] = [[] for _ in range(ranks)]
    loads = [0] * ranks
    for index in sorted(range(len(costs)), key=lambda index: -costs[index]):
        rank = loads.index(min(loads))
        held[rank].append(index)
        loads[rank] += costs[index]
    return [sorted(indices) for indices in held]


class EpochBatches:
    """A batch sampler whose order is a function of (seed, epoch) alone, so that a resumed run repeats it.

    Yields lists of groups, each a list of examples; every epoch yields every example once, in `len(self)`
    batches of about `pairs` pairs. `set_epoch` is called by the Trainer before each epoch.

    With `tokens` the batches are cut so that each holds about as many tokens as the others, instead of as
    many pairs; how many there are is the same. With `ranks` processes a step is cut for all of them together
    and dealt out: the batches of ranks 0, 1, ... follow each other, as accelerate takes them. They are a
    multiple of `ranks`, so that none is repeated to fill up the last step.

    Raises:
        InputError: there are fewer groups than processes.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        pairs: int,
        cap: int | None,
        seed: int,
        *,
        tokens: TokenCosts | None = None,
        ranks: int = 1,
    ) -> None:
        self.examples, self.pairs, self.cap, self.seed, self.epoch = list(examples), pairs, cap, seed, 0
        self.tokens, self.ranks = tokens, ranks
        sizes = [len(group) for group in group_by_image(self.examples, cap)]
        if 0 < len(sizes) < ranks:
            raise InputError(
                f"{ranks} processes cannot share {len(sizes)} groups of questions. "
                "Start fewer processes, or lower --cap."
            )
        self.steps = batch_count(sizes, pairs * ranks, least=ranks)

    def _of_epoch(self, epoch: int) -> Iterator[list[list[Example]]]:
        rng = random.Random(f"{self.seed}-{epoch}")
        groups = group_by_image(self.examples, self.cap, rng)
        rng.shuffle(groups)
        costs = [self.tokens.cost_of(group) if self.tokens else len(group) for group in groups]
        for step in even_batches(costs, self.steps, least=self.ranks):
            for share in split_across_ranks([costs[index] for index in step], self.ranks):
                yield [groups[step[index]] for index in share]

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.steps * self.ranks

    def __iter__(self) -> Iterator[list[list[Example]]]:
        yield from self._of_epoch(self.epoch)
