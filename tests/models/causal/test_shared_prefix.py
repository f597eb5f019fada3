from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from normtune.data.groups import Group, Segment
from normtune.models.causal.shared_prefix import (
    PAD,
    PREFIX,
    MaskTokens,
    RowLayout,
    SharedSequence,
    block_mask,
    dense_mask,
    image_blocks,
    mask_tokens,
    shared_sequence,
)

tokens = st.integers(1, 3)  # few, so that some segments continue others
segments = st.builds(
    Segment, st.just("q"), st.lists(tokens, max_size=3).map(tuple), st.lists(tokens, max_size=3).map(tuple)
)
grouped = st.lists(
    st.tuples(st.lists(tokens, min_size=1, max_size=4), st.lists(segments, min_size=1, max_size=4)),
    min_size=1,
    max_size=4,
)


def tokens_of(s: SharedSequence) -> MaskTokens:
    return mask_tokens(s.group_of, s.segment_of, s.segment_end, position_ids=s.position_ids)


@given(grouped, st.sampled_from(["pad", "pack"]), st.sampled_from([1, 8]))
def test_each_label_is_predicted_by_the_token_before_it(
    drawn: list[tuple[list[int], list[Segment]]], rows: RowLayout, multiple_of: int
) -> None:
    groups = [Group((str(g),), tuple(members)) for g, (_, members) in enumerate(drawn)]
    prefixes = [prefix for prefix, _ in drawn]
    sequence = shared_sequence(groups, prefixes, 0, rows=rows, multiple_of=multiple_of)

    assert sequence.input_ids.shape[1] % multiple_of == 0
    assert sequence.input_ids.shape[0] == (len(groups) if rows == "pad" else 1)
    flat = [segment for group in groups for segment in group.segments]
    owners = [g for g, group in enumerate(groups) for _ in group.segments]
    assert sequence.segment_count == len(flat)
    assert sequence.labels.tolist() == [token for segment in flat for token in segment.answer]
    assert sequence.segment_index.tolist() == [i for i, s in enumerate(flat) for _ in s.answer]

    # the row that predicts a label sees exactly the tokens that stand before it in a sequence of its own
    mask = dense_mask(tokens_of(sequence))[:, 0]  # [B, S, S]
    length = sequence.input_ids.shape[1]
    seen_labels: dict[int, int] = {}
    for at, label, index in zip(
        sequence.answer_rows.tolist(), sequence.labels.tolist(), sequence.segment_index.tolist(), strict=True
    ):
        row, column = divmod(at, length)
        visible = sequence.input_ids[row][mask[row, column]].tolist()
        taken = seen_labels.get(index, 0)
        segment = flat[index]
        assert visible == prefixes[owners[index]] + [*segment.prompt, *segment.answer[:taken]]
        positions = sequence.position_ids[row][mask[row, column]].tolist()
        assert positions == list(range(len(visible)))
        assert segment.answer[taken] == label
        seen_labels[index] = taken + 1


def example() -> tuple[list[Group], list[list[int]]]:
    first = Group(("a",), (Segment("1", (11, 12), (13,)), Segment("2", (), (21, 22))))
    second = Group(("b",), (Segment("3", (31,), (32,)),))
    return [first, second], [[1, 2], [3]]


def test_layout_of_padded_rows() -> None:
    groups, prefixes = example()
    sequence = shared_sequence(groups, prefixes, 0)
    assert sequence.input_ids.tolist() == [[1, 2, 11, 12, 13, 21, 22], [3, 31, 32, 0, 0, 0, 0]]
    assert sequence.group_of.tolist() == [[0] * 7, [1] * 3 + [PAD] * 4]
    assert sequence.segment_of.tolist() == [[PREFIX, PREFIX, 1, 1, 1, 2, 2], [PREFIX, 1, 1] + [PAD] * 4]
    assert sequence.position_ids.tolist() == [[0, 1, 2, 3, 4, 2, 3], [0, 1, 2, 0, 0, 0, 0]]
    assert sequence.labels.tolist() == [13, 21, 22, 32]
    assert sequence.answer_rows.tolist() == [3, 1, 5, 8]  # 21 is predicted by the prefix's last row


def conversation() -> tuple[list[Group], list[list[int]]]:
    """The turn (11, 12; 13), two turns that continue it, a question that only begins like them, and a second answer."""
    first = ((11, 12), (13,))
    turns = (((11, 12, 13, 21), (22,)), first, ((11, 12, 13, 31), (32,)), ((11, 14), (15,)), ((11, 12), (16,)))
    return [Group(("a",), tuple(Segment(str(i), *texts) for i, texts in enumerate(turns)))], [[1, 2]]


def test_turns_continue_the_turns_before_them() -> None:
    s = shared_sequence(*conversation(), 0)
    #                 prefix  11, 12   13  21, 22  31, 32   16  11, 14, 15
    assert s.input_ids.tolist() == [[1, 2, 11, 12, 13, 21, 22, 31, 32, 16, 11, 14, 15]]
    assert s.segment_of.tolist() == [[0, 0, 1, 1, 2, 3, 3, 4, 4, 5, 6, 6, 6]]
    assert s.segment_end.tolist() == [[6, 6, 5, 5, 4, 3, 3, 4, 4, 5, 6, 6, 6]]
    assert s.position_ids.tolist() == [[0, 1, 2, 3, 4, 5, 6, 5, 6, 4, 2, 3, 4]]
    assert s.labels.tolist() == [22, 13, 32, 15, 16]
    assert s.answer_rows.tolist() == [5, 3, 7, 11, 3]
    assert s.segment_index.tolist() == [0, 1, 2, 3, 4]
    mask = dense_mask(tokens_of(s))[0, 0]
    assert mask[8].nonzero().flatten().tolist() == [0, 1, 2, 3, 4, 7, 8]  # the sibling turn is invisible
    assert mask[9].nonzero().flatten().tolist() == [0, 1, 2, 3, 9]
    assert [s.rows_of(i) for i in (0, 4)] == [(range(2), [2, 3, 4, 5, 6]), (range(2), [2, 3, 9])]


def test_packed_groups_do_not_see_each_other() -> None:
    groups, prefixes = example()
    sequence = shared_sequence(groups, prefixes, 0, rows="pack")
    mask = dense_mask(tokens_of(sequence))[0, 0]
    assert not mask[7:, :7].any() and not mask[:7, 7:].any()


def test_window_is_measured_in_positions() -> None:
    groups, prefixes = example()
    s = shared_sequence(groups, prefixes, 0)
    mask = dense_mask(tokens_of(s), window=2)[0, 0]
    # token 22 (column 6, position 3) sees itself and 21; the prefix's last token is at distance 2
    assert mask[6].tolist() == [False] * 5 + [True, True]
    # token 21 at position 2 sees the prefix's last token, four columns away
    assert mask[5].tolist() == [False, True, False, False, False, True, False]


def test_image_block_sees_itself_in_both_directions() -> None:
    ids = torch.tensor([[9, 7, 7, 5, 7, 4]])
    blocks = image_blocks(ids, 7)
    assert blocks.tolist() == [[-1, 0, 0, -1, 1, -1]]
    mask = dense_mask(mask_tokens(*3 * [torch.zeros_like(ids)], image_block=blocks))[0, 0]
    assert mask[1, 2] and not mask[1, 4] and not mask[0, 1] and not mask[3, 4]


def test_adjacent_rows_hold_different_image_blocks() -> None:
    assert image_blocks(torch.tensor([[1, 7], [7, 1]]), 7).tolist() == [[-1, 0], [1, -1]]


@pytest.mark.parametrize("window", [None, 2])
@pytest.mark.parametrize("rows", ["pad", "pack"])
def test_block_mask_equals_dense_mask(rows: RowLayout, window: int | None) -> None:
    from torch.nn.attention.flex_attention import create_mask

    groups, prefixes = (one + other for one, other in zip(example(), conversation(), strict=True))
    s = shared_sequence(groups, prefixes, 0, rows=rows, multiple_of=128)
    blocks = image_blocks(s.input_ids, 2)
    of_mask = tokens_of(s)._replace(block=blocks)
    sparse = block_mask(of_mask, window)
    batch, length = s.input_ids.shape
    dense = create_mask(sparse.mask_mod, batch, 1, length, length, device="cpu")
    assert torch.equal(dense, dense_mask(of_mask, window))


def test_block_mask_wants_multiples_of_128() -> None:
    groups, prefixes = example()
    s = shared_sequence(groups, prefixes, 0)
    with pytest.raises(AssertionError, match="128"):
        block_mask(tokens_of(s))
