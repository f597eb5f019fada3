from __future__ import annotations

import math
import random
from collections import Counter
from itertools import chain, pairwise

import numpy as np
import pytest
from accelerate.data_loader import BatchSamplerShard
from hypothesis import assume, given
from hypothesis import strategies as st

from normtune.data.batches import EpochBatches, TokenCosts, batches_of_pairs, even_cuts, split_across_ranks
from normtune.data.groups import Segment, group_by_image
from normtune.data.records import Example
from normtune.errors import InputError


def examples_of(counts: list[int]) -> list[Example]:
    """counts[i] questions of image i, in random order as in a shuffled file."""
    examples = [
        Example(f"{image}-{q}", (f"image{image}",), f"question {q}", "yes", "closed", "train")
        for image, count in enumerate(counts)
        for q in range(count)
    ]
    random.Random(0).shuffle(examples)
    return examples


counts = st.lists(st.integers(1, 12), min_size=1, max_size=12)
caps = st.none() | st.integers(1, 5)
sizes = st.lists(st.integers(1, 12), max_size=30)
costs = st.lists(st.integers(1, 2000), max_size=30)


@given(counts, caps, st.none() | st.integers(0, 5))
def test_groups_hold_every_example_once_with_one_image_and_a_limited_size(
    counts: list[int], cap: int | None, seed: int | None
) -> None:
    examples = examples_of(counts)
    groups = group_by_image(examples, cap, None if seed is None else random.Random(seed))
    assert Counter(e.id for group in groups for e in group) == Counter(e.id for e in examples)
    assert all(len({e.images for e in group}) == 1 for group in groups)
    assert len(groups) == sum(1 if cap is None else math.ceil(count / cap) for count in counts)
    if cap is not None:
        assert max(map(len, groups)) <= cap


def test_without_rng_the_questions_keep_their_order() -> None:
    examples = examples_of([5, 3])
    groups = group_by_image(examples, 2)
    for image in ("image0", "image1"):
        grouped = [e for group in groups for e in group if e.images == (image,)]
        assert grouped == [e for e in examples if e.images == (image,)]


def test_studies_of_several_views_are_separate_groups() -> None:
    views = [("a", "b"), ("a",), ("b", "a"), ("a", "b")]
    examples = [Example(str(i), keys, "", "r", "report", "train") for i, keys in enumerate(views)]
    assert [[e.id for e in group] for group in group_by_image(examples)] == [["0", "3"], ["1"], ["2"]]


def test_a_shuffled_image_is_cut_differently_in_different_epochs() -> None:
    examples = examples_of([10])
    divisions = {
        tuple(frozenset(e.id for e in group) for group in group_by_image(examples, 5, random.Random(seed)))
        for seed in range(5)
    }
    assert len(divisions) > 1


@given(sizes, st.integers(1, 40))
def test_batches_keep_the_order_and_do_not_divide_groups(sizes: list[int], pairs: int) -> None:
    batches = batches_of_pairs(sizes, pairs)
    assert [index for batch in batches for index in batch] == list(range(len(sizes)))
    assert all(batches) and len(batches) == min(len(sizes), math.ceil(sum(sizes) / pairs))


@given(sizes.filter(bool), st.integers(1, 40))
def test_batches_hold_about_the_requested_number_of_pairs(sizes: list[int], pairs: int) -> None:
    largest = max(sizes)
    for batch in batches_of_pairs(sizes, pairs):
        pairs_in_batch = sum(sizes[index] for index in batch)
        # both cuts are within half a group of the ideal ones, and a mean batch has at most `pairs`
        assert len(batch) == 1 or pairs_in_batch <= pairs + largest


@given(st.integers(0, 100), st.integers(1, 20))
def test_batches_of_single_questions_hold_at_most_the_requested_pairs(count: int, pairs: int) -> None:
    batch_sizes = [len(batch) for batch in batches_of_pairs([1] * count, pairs)]
    assert sum(batch_sizes) == count and max(batch_sizes, default=0) <= pairs
    assert max(batch_sizes, default=0) - min(batch_sizes, default=0) <= 1


@given(sizes, st.integers(1, 40), st.randoms(use_true_random=False))
def test_the_number_of_batches_does_not_depend_on_the_order(sizes: list[int], pairs: int, rng: random.Random) -> None:
    before = len(batches_of_pairs(sizes, pairs))
    rng.shuffle(sizes)
    assert len(batches_of_pairs(sizes, pairs)) == before


def test_each_cut_is_at_the_nearest_boundary() -> None:
    assert batches_of_pairs([4, 4, 4, 4], 8) == [[0, 1], [2, 3]]
    assert batches_of_pairs([3, 3, 6], 6) == [[0, 1], [2]]
    assert batches_of_pairs([10, 1, 1], 4) == [[0], [1], [2]]
    assert batches_of_pairs([1, 1, 10], 4) == [[0], [1], [2]]
    assert batches_of_pairs([5], 2) == [[0]]
    assert batches_of_pairs([2, 6, 1], 5) == [[0], [1, 2]]
    assert batches_of_pairs([], 4) == []


@given(costs, st.integers(1, 30), st.integers(1, 4))
def test_no_batch_costs_more_than_the_mean_and_one_group(costs: list[int], count: int, min_groups: int) -> None:
    count = min(count, len(costs) // min_groups)
    assume(count)
    batches = [range(*cut) for cut in pairwise(even_cuts(np.asarray(costs), count, min_groups))]
    assert [index for batch in batches for index in batch] == list(range(len(costs)))
    assert len(batches) == count and all(len(batch) >= min_groups for batch in batches)
    for batch in batches:
        cost = sum(costs[index] for index in batch)
        assert len(batch) == min_groups or cost <= sum(costs) / count + max(costs)


@given(costs.filter(bool), st.integers(1, 6))
def test_costs_of_processes_differ_by_at_most_the_most_expensive_group(costs: list[int], ranks: int) -> None:
    assume(len(costs) >= ranks)
    shares = split_across_ranks(costs, ranks)
    assert sorted(index for share in shares for index in share) == list(range(len(costs)))
    loads = [sum(costs[index] for index in share) for share in shares]
    assert len(loads) == ranks and min(loads) > 0 and max(loads) - min(loads) <= max(costs)


def test_the_most_expensive_groups_go_to_different_processes() -> None:
    assert split_across_ranks([1, 9, 8, 2], 2) == [[0, 1], [2, 3]]
    assert split_across_ranks([3, 1, 2], 1) == [[0, 1, 2]]


def token_costs_of(examples: list[Example], prefix: int, rng: random.Random | None = None) -> TokenCosts:
    """Costs with random segments of 5 to 60 tokens, or of 10 tokens each without `rng`."""
    return TokenCosts(
        {example.images: prefix for example in examples},
        {example.id: rng.randint(5, 60) if rng else 10 for example in examples},
    )


@given(counts, st.integers(1, 20), caps, st.integers(0, 3), st.integers(0, 600))
def test_batches_of_even_tokens_hold_every_example_once_and_are_as_many(
    counts: list[int], pairs: int, cap: int | None, seed: int, prefix: int
) -> None:
    examples = examples_of(counts)
    tokens = token_costs_of(examples, prefix, random.Random(seed))
    by_tokens = EpochBatches(examples, pairs, cap, seed, token_costs=tokens)
    assert len(by_tokens) == len(EpochBatches(examples, pairs, cap, seed))
    for epoch in range(3):
        by_tokens.set_epoch(epoch)
        yielded = list(by_tokens)
        assert len(yielded) == len(by_tokens) and all(yielded)
        assert Counter(e.id for b in yielded for group in b for e in group) == Counter(e.id for e in examples)
        most_expensive = max(tokens.cost_of(group) for batch in yielded for group in batch)
        batch_costs = [sum(map(tokens.cost_of, batch)) for batch in yielded]
        for batch, cost in zip(yielded, batch_costs, strict=True):
            assert len(batch) == 1 or cost <= sum(batch_costs) / len(batch_costs) + most_expensive


@given(counts, st.integers(1, 20), caps, st.integers(0, 3))
def test_equal_token_costs_give_the_same_batches_as_pairs(
    counts: list[int], pairs: int, cap: int | None, seed: int
) -> None:
    examples = examples_of(counts)
    by_pairs = EpochBatches(examples, pairs, cap, seed)
    assert ids(EpochBatches(examples, pairs, cap, seed, token_costs=token_costs_of(examples, 0)), 1) == ids(by_pairs, 1)
    single = EpochBatches(examples, pairs, 1, seed)
    assert ids(EpochBatches(examples, pairs, 1, seed, token_costs=token_costs_of(examples, 576)), 1) == ids(single, 1)


def test_batches_of_even_tokens_account_for_large_prefixes() -> None:
    """One image with 12 questions and 12 images with one each: by pairs, the batches have 1 and 12 images."""
    examples = examples_of([12] + [1] * 12)
    tokens = token_costs_of(examples, prefix=500)

    def spread(tokens_of_batch: TokenCosts | None) -> int:
        batches = list(EpochBatches(examples, 12, None, 0, token_costs=tokens_of_batch))
        batch_costs = [sum(map(tokens.cost_of, batch)) for batch in batches]
        assert len(batch_costs) == 2
        return max(batch_costs) - min(batch_costs)

    assert spread(tokens) <= 620 < spread(None)


@given(counts, st.integers(1, 10), caps, st.integers(0, 3), st.integers(1, 4), st.booleans())
def test_accelerates_shards_give_every_example_to_one_process(
    counts: list[int], pairs: int, cap: int | None, seed: int, ranks: int, even: bool
) -> None:
    examples = examples_of(counts)
    assume(len(group_by_image(examples, cap)) >= ranks)
    tokens = token_costs_of(examples, 576, random.Random(seed))
    batches = EpochBatches(examples, pairs, cap, seed, token_costs=tokens, ranks=ranks)
    batches.set_epoch(1)
    shards = [
        list(BatchSamplerShard(batches, ranks, rank, even_batches=even))  # type: ignore[arg-type]
        for rank in range(ranks)
    ]
    id_counts = Counter(e.id for shard in shards for batch in shard for group in batch for e in group)
    assert id_counts == Counter(example.id for example in examples)
    assert {len(shard) for shard in shards} == {batches.steps} and len(batches) == batches.steps * ranks
    for step in zip(*shards, strict=True):
        batch_costs = [sum(map(tokens.cost_of, batch)) for batch in step]
        most_expensive = max(tokens.cost_of(group) for batch in step for group in batch)
        assert min(batch_costs) > 0 and max(batch_costs) - min(batch_costs) <= most_expensive


@given(counts, st.integers(1, 6), st.integers(0, 3), st.integers(2, 3), st.booleans())
def test_steps_of_several_processes_equal_those_of_one_process(
    counts: list[int], pairs: int, seed: int, ranks: int, balanced: bool
) -> None:
    """Holds if each step of one process has at least a group for each of several processes."""
    examples = examples_of(counts)
    tokens = token_costs_of(examples, 100, random.Random(seed)) if balanced else None
    one_process = ids(EpochBatches(examples, pairs * ranks, 2, seed, token_costs=tokens), 0)
    assume(all(len(step) >= ranks for step in one_process))
    batches = ids(EpochBatches(examples, pairs, 2, seed, token_costs=tokens, ranks=ranks), 0)
    steps = [sorted(chain(*batches[start : start + ranks])) for start in range(0, len(batches), ranks)]
    assert steps == [sorted(step) for step in one_process]


def test_fewer_groups_than_processes_are_refused() -> None:
    with pytest.raises(InputError, match=r"3 processes cannot share 2 groups.* fewer processes, or"):
        EpochBatches(examples_of([4, 4]), 4, None, 0, ranks=3)
    assert len(EpochBatches(examples_of([4, 4]), 4, 2, 0, ranks=3)) == 3


@given(counts, st.integers(1, 20), caps, st.integers(0, 3))
def test_every_epoch_yields_every_example_once_in_the_same_number_of_batches(
    counts: list[int], pairs: int, cap: int | None, seed: int
) -> None:
    examples = examples_of(counts)
    batches = EpochBatches(examples, pairs, cap, seed)
    for epoch in range(4):
        batches.set_epoch(epoch)
        yielded = list(batches)
        assert len(yielded) == len(batches) > 0
        assert Counter(e.id for b in yielded for group in b for e in group) == Counter(e.id for e in examples)
        for group in (group for batch in yielded for group in batch):
            assert len({e.images for e in group}) == 1 and (cap is None or len(group) <= cap)


def ids(batches: EpochBatches, epoch: int) -> list[list[list[str]]]:
    batches.set_epoch(epoch)
    return [[[e.id for e in group] for group in batch] for batch in batches]


def test_the_order_depends_only_on_seed_and_epoch() -> None:
    examples = examples_of([5, 8, 3, 9, 1, 7])
    first = EpochBatches(examples, 6, 4, seed=1)
    orders = {epoch: ids(first, epoch) for epoch in (0, 1, 2)}
    random.seed(99)
    resumed = EpochBatches(examples, 6, 4, seed=1)
    assert ids(resumed, 2) == orders[2] and ids(resumed, 0) == orders[0]
    assert ids(first, 1) == orders[1], "iterating over an epoch again repeats it"
    assert orders[0] != orders[1] != orders[2]
    assert ids(EpochBatches(examples, 6, 4, seed=2), 0) != orders[0]


def test_no_examples_make_no_batches() -> None:
    batches = EpochBatches([], 4, None, 0)
    assert len(batches) == 0 and list(batches) == []


def test_a_group_size_below_one_is_refused() -> None:
    with pytest.raises(AssertionError, match="at least one question"):
        group_by_image(examples_of([2]), 0)


def test_a_segment_is_as_long_as_its_tokens() -> None:
    assert len(Segment("1", (1, 2), (3,))) == 3 and len(Segment("1", (1, 2))) == 2


def test_the_tokens_of_earlier_turns_are_counted_once() -> None:
    turns = (("q", "a"), ("r", "b"))
    first = Example("1", ("i",), *turns[0], "open", "train")
    second = Example("2", ("i",), *turns[1], "open", "train", history=turns[:1])
    third = Example("3", ("i",), "s", "c", "open", "train", history=turns)
    tokens = TokenCosts({("i",): 100}, {"1": 5, "2": 12, "3": 20})
    assert tokens.cost_of([third, second, first]) == 100 + 20
    assert tokens.cost_of([third, first]) == 100 + 20 + 5  # without the second turn, the third computes all turns
