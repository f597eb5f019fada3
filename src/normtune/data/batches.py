"""Examples -> groups -> batches. One group is one image (or study) with several of its questions."""

from __future__ import annotations

import math
import random
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from normtune.data.examples import Example, Examples, as_examples
from normtune.data.groups import group_by_image, group_rows
from normtune.data.sampling import RowSampler, Strata
from normtune.errors import InputError


@dataclass(frozen=True)
class TokenCosts:
    """The number of tokens of each group, without padding.

    Padding depends on the batch that a row is in. Without it, costs add up in any order. Padding the rows to
    the longest of a batch adds 3 to 10% on SLAKE and VQA-RAD, about evenly over the batches.

    Attributes:
        prefixes: image keys of a group -> tokens that all questions of the group share (the images).
        segments: example id -> tokens of the question with its answer.
    """

    prefixes: Mapping[tuple[str, ...], int]
    segments: Mapping[str, int]

    def cost_of(self, group: Sequence[Example]) -> int:
        """Tokens of one group: its prefix once, and the segment of each question; a turn is counted once."""
        turns = {}  # a conversation -> tokens of its last turn with all before it
        if any(example.history for example in group):
            turns = {(*e.history, (e.question, e.answer)): self.segments[e.id] for e in group}
        segments = (self.segments[example.id] - turns.get(example.history, 0) for example in group)
        return self.prefixes[group[0].images] + sum(segments)


def even_cuts(costs: NDArray[np.integer], count: int, min_groups: int = 1) -> list[int]:
    """Cut a sequence of groups into `count` consecutive batches of about the same cost.

    Every group is in exactly one batch, and groups are never divided. Each cut is made at the boundary
    between two groups that is nearest to the ideal cut. A batch of more than `min_groups` groups costs at
    most the mean cost of a batch plus the cost of the most expensive group.

    Example: costs [4, 4, 1, 3], two batches. The ideal cut is at half of 12, that is 6. Groups end at 4, 8, 9
    and 12; 4 and 8 are equally near and the later boundary wins, so the cuts are [0, 2, 4]: the batches have the
    groups [0, 1] (cost 8) and [2, 3] (cost 4).

    Args:
        costs: cost of each group, in tokens or pairs.
        count: number of batches, at least one.
        min_groups: fewest groups that a batch may hold.

    Returns:
        The index of the first group of each batch, and the number of groups.
    """
    assert 1 <= count * min_groups <= len(costs), "each batch needs `min_groups` groups"
    # ends[i]: summed cost of groups 0 to i, times `count`. In this unit the ideal cuts total, 2 * total, ...
    # are whole numbers, so that no rounding of floats decides where a cut is made.
    ends = np.cumsum(costs, dtype=np.int64) * count
    ideal = (int(ends[-1]) // count) * np.arange(1, count)
    after = np.searchsorted(ends, ideal)  # ends[after] is the first boundary at or after the ideal cut
    before = np.maximum(after - 1, 0)
    nearer = np.where((after > 0) & (ideal - ends[before] < ends[after] - ideal), before, after) + 1
    # The batch that ends at a cut needs `min_groups` groups, and so does each batch that follows: cut b is at least
    # cut b - 1 plus `min_groups`. Less b * min_groups, that is a running maximum.
    steps = min_groups * np.arange(1, count)
    cuts = np.maximum.accumulate(np.maximum(nearer - steps, 0)) + steps
    return [0, *np.minimum(cuts, len(costs) - min_groups * count + steps).tolist(), len(costs)]


def batches_of_pairs(sizes: Sequence[int], pairs: int) -> list[list[int]]:
    """Cut a sequence of groups into batches of about `pairs` question-answer pairs.

    Where every group holds one pair, no batch holds more than `pairs`. The number of batches is
    ceil(sum(sizes) / pairs), or the number of groups where that is smaller. It does not depend on the order.

    Args:
        sizes: number of pairs in each group.
        pairs: pairs that a batch should hold, about.

    Returns:
        For each batch the indices of its groups, in order.
    """
    assert pairs >= 1 and min(sizes, default=1) >= 1, "batches and groups hold at least one pair"
    count = min(len(sizes), math.ceil(sum(sizes) / pairs))
    return [list(range(*cut)) for cut in pairwise(even_cuts(np.asarray(sizes), count))] if count else []


def split_across_ranks(costs: Sequence[int], ranks: int) -> list[list[int]]:
    """Distribute the groups of one step over `ranks` processes of about the same cost.

    The most expensive group is assigned first, each group to the process with the least cost so far (LPT,
    Graham 1969). Every process gets a group, and the costs of two processes differ by at most the cost of the
    most expensive group.

    Example: costs [1, 9, 8, 2] on two ranks are assigned in the order 9, 8, 2, 1. Rank 0 gets 9 and 1 (groups
    [0, 1], cost 10), rank 1 gets 8 and 2 (groups [2, 3], cost 10).

    Returns:
        For each rank the indices of its groups, in order.
    """
    assert len(costs) >= ranks >= 1 and all(cost >= 1 for cost in costs), "a group for each process"
    groups_of_rank: list[list[int]] = [[] for _ in range(ranks)]
    loads = [0] * ranks
    for index in sorted(range(len(costs)), key=lambda index: -costs[index]):
        rank = loads.index(min(loads))
        groups_of_rank[rank].append(index)
        loads[rank] += costs[index]
    return [sorted(indices) for indices in groups_of_rank]


def examples_of_rank(examples: Sequence[Example], rank: int, ranks: int) -> list[Example]:
    """Select the examples that process `rank` answers.

    All examples of an image go to the same process, and all processes get about the same number of examples.
    """
    groups = group_by_image(examples)
    counts = [len(group) for group in groups]
    shares = split_across_ranks(counts, min(ranks, len(groups)))
    group_indices = shares[rank] if rank < len(shares) else []
    return [example for index in group_indices for example in groups[index]]


class EpochBatches:
    """A batch sampler with an order that depends only on (seed, epoch), so that a resumed run repeats it.

    Iterating yields batches: lists of groups, each group the examples of one image. Every epoch yields every example
    once, or with `strata` as often as `normtune.data.sampling` describes, in `len(self)` batches. The Trainer calls
    `set_epoch` before each epoch.

    With several processes, each step is first cut as one large batch and then distributed over the ranks. The
    batches of ranks 0, 1, ... of a step follow each other, as accelerate expects them: for two ranks, step 0
    is batches 0 and 1, step 1 is batches 2 and 3. The number of batches is a multiple of `ranks`, so that
    accelerate repeats no batch to complete the last step.

    Args:
        examples: the examples of one epoch.
        pairs: question-answer pairs that a batch should hold, about.
        max_group_size: most questions of one image in a group; None sets no limit.
        seed: seed of the order.
        token_costs: if given, batches hold about the same number of tokens instead of pairs; the number of
            batches stays the same.
        ranks: number of processes.
        strata: how often rows are taken; None: once an epoch. Groups then have at most `pairs` questions, so that
            every epoch has enough groups for the same number of batches.

    Attributes:
        sampler: takes the rows of each epoch; None without `strata`.

    Raises:
        InputError: there are fewer groups than processes.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        pairs: int,
        max_group_size: int | None,
        seed: int,
        *,
        token_costs: TokenCosts | None = None,
        ranks: int = 1,
        strata: Strata | None = None,
    ) -> None:
        self.examples = as_examples(examples)
        self.pairs, self.seed, self.epoch = pairs, seed, 0
        self.max_group_size, self.token_costs, self.ranks = max_group_size, token_costs, ranks
        self.groups = group_rows(self.examples, max_group_size)
        group_count = len(self.groups.sizes)
        self.sampler: RowSampler | None = None
        if strata is not None:
            self.sampler = RowSampler(self.examples, strata, seed)
            self.max_group_size = min(max_group_size or pairs, pairs)
            group_count = math.ceil(len(self.examples) / self.max_group_size)  # the fewest of an epoch
        if 0 < group_count < ranks:
            raise InputError(
                f"{ranks} processes cannot share {group_count} groups of questions. "
                "Start fewer processes, or lower --cap."
            )
        self.steps = min(group_count // ranks, math.ceil(len(self.examples) / (pairs * ranks)))  # steps of one epoch

    def _batches_of_epoch(self, epoch: int) -> Iterator[list[Examples]]:
        if not self.steps:
            return
        # Arrays of row numbers: of ten million rows the order of an epoch takes seconds and no object for a row.
        rng = random.Random(f"{self.seed}-{epoch}")
        rows, ends = self._groups_of_epoch(epoch, rng)
        shuffled = array("i", range(len(ends) - 1))
        rng.shuffle(shuffled)
        order = np.frombuffer(shuffled, np.int32)
        costs = self._costs(rows, ends)[order]
        for start, stop in pairwise(even_cuts(costs, self.steps, self.ranks)):
            step = order[start:stop].tolist()  # groups of all processes
            # the ranks' indices count within the step
            for share in split_across_ranks(costs[start:stop].tolist(), self.ranks):
                yield [self.examples.take(rows[ends[step[index]] : ends[step[index] + 1]]) for index in share]

    def _groups_of_epoch(self, epoch: int, rng: random.Random) -> tuple[NDArray[Any], NDArray[np.int64]]:
        """The rows of an epoch group by group, and the ends of the groups."""
        if self.sampler is None:
            return self.groups.shuffled(rng), self.groups.ends
        assert self.max_group_size is not None
        return self.sampler.groups_of_epoch(epoch, self.max_group_size)

    def _costs(self, rows: NDArray[Any], ends: NDArray[np.int64]) -> NDArray[np.int64]:
        """The cost of each group, [groups]; `rows` are the rows group by group."""
        if self.token_costs is None:
            return np.diff(ends)
        if self.examples.codes("history")[1] != [()]:  # a turn that several questions of a group share counts once
            return np.array([self.token_costs.cost_of(self.examples.take(rows[a:b])) for a, b in pairwise(ends)])
        codes, images = self.examples.codes("images")
        prefixes = np.array([self.token_costs.prefixes[keys] for keys in images], np.int64)
        segments = self.examples.numbers("id", self.token_costs.segments.__getitem__)
        starts = ends[:-1]
        return prefixes[codes[rows[starts]]] + np.add.reduceat(segments[rows], starts)

    def set_epoch(self, epoch: int) -> None:
        """Select the epoch that the next iteration yields."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.steps * self.ranks

    def __iter__(self) -> Iterator[list[Examples]]:
        yield from self._batches_of_epoch(self.epoch)
