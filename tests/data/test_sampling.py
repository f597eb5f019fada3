from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from normtune.data.batches import EpochBatches
from normtune.data.examples import Example, Examples
from normtune.data.sampling import RowSampler, Strata, find_strata, sampling_text
from normtune.errors import InputError


def rows_of(counts: dict[str, int], questions_an_image: int = 3, kind: str = "open") -> Examples:
    """Rows of several datasets, with several questions about each image."""
    return Examples(
        Example(f"{name}-{i}", (f"{name}/{i // questions_an_image}",), "q", "lung", kind, "train", {"dataset": name})
        for name, count in counts.items()
        for i in range(count)
    )


def answers(*counts: tuple[str, str, int]) -> Examples:
    """`count` rows of each (kind, answer), two questions an image."""
    texts = [(kind, answer) for kind, answer, count in counts for _ in range(count)]
    return Examples(
        Example(str(i), (f"{i // 2}",), "q", answer, kind, "train") for i, (kind, answer) in enumerate(texts)
    )


def test_epochs_take_the_rows_of_a_dataset_in_turn() -> None:
    examples = rows_of({"a": 6, "b": 2})
    strata = find_strata(examples, {"a": 1, "b": 1}, balanced=False)
    assert strata is not None and strata.shares == [0.5, 0.5]
    sampler = RowSampler(examples, strata, seed=0)
    epochs = [Counter(sampler.rows_of_epoch(epoch)[0].tolist()) for epoch in range(3)]
    assert [sum(epoch[row] for row in range(6)) for epoch in epochs] == [4, 4, 4]
    assert all(epoch[6] == epoch[7] == 2 for epoch in epochs)
    total = sum(epochs, Counter())  # 12 questions of a: two passes over its 6 rows
    assert {total[row] for row in range(6)} == {2}
    counts = sampler.counts(1)
    assert counts["a"] == {"rows": 6, "share": 0.5, "questions": 4, "left_out": [2], "repeated": [0]}
    assert counts["b"]["left_out"] == [0] and counts["b"]["repeated"] == [2]
    assert sampling_text(counts) == (
        "sampling, first epoch: a 50.0% (4 questions of 6 rows, 2 left out); "
        "b 50.0% (4 questions of 2 rows, 2 repeated)"
    )


datasets = st.dictionaries(st.sampled_from("abcd"), st.integers(1, 30), min_size=2)


@given(datasets, st.lists(st.integers(1, 9), min_size=4, max_size=4), st.integers(-2, 3), st.integers(1, 12))
def test_any_number_of_epochs_takes_the_rows_of_a_dataset_equally_often(
    counts: dict[str, int], weights: list[int], seed: int, epochs: int
) -> None:
    examples = rows_of(counts)
    of_dataset = dict(zip(counts, map(float, weights), strict=False))
    strata = find_strata(examples, of_dataset, balanced=False)
    assert strata is not None
    sampler = RowSampler(examples, strata, seed)
    taken = np.concatenate([sampler.rows_of_epoch(epoch)[0] for epoch in range(epochs)])
    assert len(taken) == epochs * len(examples) and sum(sampler.quotas) == len(examples)
    times = np.bincount(taken, minlength=len(examples))
    for number, (name, quota) in enumerate(zip(strata.names, sampler.quotas, strict=True)):
        of_rows = times[strata.codes == number]
        assert of_rows.sum() == epochs * quota and np.ptp(of_rows) <= 1
        exact = of_dataset[name] / sum(of_dataset.values()) * len(examples)
        assert abs(quota - exact) < 1


@given(datasets, st.integers(1, 8), st.none() | st.integers(1, 4), st.integers(1, 3), st.integers(0, 4))
def test_batches_of_sampled_rows(counts: dict[str, int], pairs: int, cap: int | None, ranks: int, epoch: int) -> None:
    examples = rows_of(counts)
    strata = find_strata(examples, dict.fromkeys(counts, 1.0), balanced=False)
    try:
        batches = EpochBatches(examples, pairs, cap, 5, ranks=ranks, strata=strata)
    except InputError:
        assert len(examples) < ranks * pairs
        return
    batches.set_epoch(epoch)
    yielded = list(batches)
    assert len(yielded) == len(batches) == batches.steps * ranks
    groups = [group for batch in yielded for group in batch]
    for group in groups:
        assert len({example.images for example in group}) == 1 and len(group) <= min(cap or pairs, pairs)
        assert len({example.id for example in group}) == len(group)
    assert batches.sampler is not None
    rows = Counter(examples[row].id for row in batches.sampler.rows_of_epoch(epoch)[0].tolist())
    assert Counter(example.id for group in groups for example in group) == rows
    again = EpochBatches(examples, pairs, cap, 5, ranks=ranks, strata=strata)
    again.set_epoch(epoch)
    assert [[list(group) for group in batch] for batch in again] == [[list(g) for g in batch] for batch in yielded]


def test_answer_types_are_balanced() -> None:
    examples = answers(("open", "lung", 60), ("closed", "yes", 24), ("closed", "No.", 8), ("closed", "left", 8))
    strata = find_strata(examples, {}, balanced=True)
    assert strata is not None
    shares = dict(zip(strata.names, strata.shares, strict=True))
    # half of the questions are closed; 8 of 40 closed ones are neither yes nor no, the others are yes and no equally
    assert shares == pytest.approx({"open": 0.5, "closed": 0.1, "yes": 0.2, "no": 0.2})
    quotas = dict(zip(strata.names, RowSampler(examples, strata, 0).quotas, strict=True))
    assert quotas == {"open": 50, "closed": 10, "yes": 20, "no": 20}


def test_weights_and_balance_together() -> None:
    first = Examples([*rows_of({"a": 10}), *rows_of({"b": 4}, kind="closed")])
    strata = find_strata(first, {"a": 3, "b": 1}, balanced=True)
    assert strata is not None
    assert dict(zip(strata.names, strata.shares, strict=True)) == {"a: open": 0.75, "b: closed": 0.25}


def test_without_weights_and_balance_there_are_no_strata() -> None:
    assert find_strata(rows_of({"a": 3}), {}, balanced=False) is None


def test_what_cannot_be_sampled_is_refused() -> None:
    with pytest.raises(InputError, match="all answers are of one type \\(open\\)"):
        find_strata(rows_of({"a": 3}), {}, balanced=True)
    with pytest.raises(InputError, match="b has no row in the training split"):
        find_strata(rows_of({"a": 3}), {"a": 1, "b": 1}, balanced=False)


def test_images_of_an_epoch_are_whole_where_the_share_allows_it() -> None:
    """Half of 40 images of 5 questions: the rows of 20 images, not half of the questions of each."""
    examples = rows_of({"a": 200}, questions_an_image=5)
    strata = Strata(["a"], np.zeros(200, np.int32), [1.0])
    sampler = RowSampler(examples, strata, 0)
    sampler.quotas = [100]
    rows = sampler.rows_of_epoch(1)[0]
    assert len(rows) == 100 and len({examples[row].images for row in rows.tolist()}) == 20
