"""Groups -> shared sequences: one image prefix and the segments that see it, but never each other.

A row holds `prefix, segment 1, segment 2, ...`. Every segment sees its group's prefix and itself, causally,
and its positions restart where the prefix ends, so that each segment computes what it would compute alone.
The same idea serves text trees in Prefix Grouper (Liu et al., 2025, arXiv 2506.05433).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor

from normtune.data.groups import Group

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

Rows = Literal["pad", "pack"]

PREFIX = 0  # the segment number of a group's prefix; its segments are numbered from 1
PAD = -1


@dataclass(frozen=True)
class SharedSequence:
    """Groups as token rows. B rows of S tokens, N answer tokens in all.

    Attributes:
        input_ids: [B, S] long.
        group_of: [B, S] long, the group of each token, -1 for padding.
        segment_of: [B, S] long, 0 for a prefix token, 1... for its group's segments, -1 for padding.
        position_ids: [B, S] long; every segment of a group goes on where the prefix ended.
        answer_rows: [N] long, the row of the flattened [B * S] hidden states that predicts each label.
        labels: [N] long, the answer tokens.
        segment_index: [N] long, the segment of each label, counted over all groups in the order given.
        segments: how many segments there are, those without an answer included.
    """

    input_ids: Tensor
    group_of: Tensor
    segment_of: Tensor
    position_ids: Tensor
    answer_rows: Tensor
    labels: Tensor
    segment_index: Tensor
    segments: int


@dataclass
class _Row:
    """A row under construction: four lists of one length."""

    ids: list[int] = field(default_factory=list)
    groups: list[int] = field(default_factory=list)
    segments: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)

    def add(self, ids: Sequence[int], group: int, segment: int, position: int) -> None:
        self.ids += ids
        self.groups += [group] * len(ids)
        self.segments += [segment] * len(ids)
        self.positions += range(position, position + len(ids))


def shared_sequence(
    groups: Sequence[Group],
    prefixes: Sequence[Sequence[int]],
    pad_id: int,
    *,
    rows: Rows = "pad",
    multiple_of: int = 1,
) -> SharedSequence:
    """Lay groups out as rows: one group a row, padded on the right ("pad"), or all in one row ("pack").

    `prefixes[g]` are the tokens that all segments of group g share, image tokens included. Row length is
    rounded up to `multiple_of`.
    """
    assert len(groups) == len(prefixes) and groups, "one prefix a group, at least one group"
    laid: list[_Row] = []
    labelled: list[tuple[int, int, int, int]] = []  # row, column of the predicting token, label, segment
    segments = 0
    for g, (group, prefix) in enumerate(zip(groups, prefixes, strict=True)):
        assert prefix, "a prefix holds at least the image"
        if rows == "pad" or not laid:
            laid.append(_Row())
        row = laid[-1]
        row.add(prefix, g, PREFIX, position=0)
        prefix_end = len(row.ids) - 1
        for number, segment in enumerate(group.segments, start=PREFIX + 1):
            start = len(row.ids)
            row.add(segment.prompt + segment.answer, g, number, position=len(prefix))
            for before, token in enumerate(segment.answer, start=len(segment.prompt)):
                # a segment's very first token is predicted by the prefix's last row
                predictor = start + before - 1 if before else prefix_end
                labelled.append((len(laid) - 1, predictor, token, segments))
            segments += 1

    length = max(len(row.ids) for row in laid)
    length += -length % multiple_of

    def padded(column: list[list[int]], value: int) -> Tensor:
        return torch.tensor([tokens + [value] * (length - len(tokens)) for tokens in column])

    return SharedSequence(
        input_ids=padded([row.ids for row in laid], pad_id),
        group_of=padded([row.groups for row in laid], PAD),
        segment_of=padded([row.segments for row in laid], PAD),
        position_ids=padded([row.positions for row in laid], 0),
        answer_rows=torch.tensor([row * length + column for row, column, _, _ in labelled], dtype=torch.long),
        labels=torch.tensor([label for _, _, label, _ in labelled], dtype=torch.long),
        segment_index=torch.tensor([segment for *_, segment in labelled], dtype=torch.long),
        segments=segments,
    )


class _Tokens(NamedTuple):
    """What decides who sees whom, for the tokens of one side (queries or keys); all of one shape."""

    group: Tensor
    segment: Tensor
    token_index: Tensor  # column in the row
    block: Tensor | None  # image block, -1 outside images
    position: Tensor | None

    def at(self, index: Any) -> _Tokens:
        return _Tokens(*(None if x is None else x[index] for x in self))  # type: ignore[arg-type]


def _visible(q: _Tokens, k: _Tokens, window: int | None, whole_blocks: bool) -> Tensor:
    """Whether queries see keys; the two sides broadcast, so it serves dense and block masks alike."""
    shared = (q.group == k.group) & ((k.segment == PREFIX) | (k.segment == q.segment))
    seen = k.token_index <= q.token_index
    near = None
    if window is not None:
        assert q.position is not None and k.position is not None, "a window is measured in positions"
        near = k.position > q.position - window
    if q.block is not None and k.block is not None:
        together = (q.block == k.block) & (k.block >= 0)
        seen = seen | together
        near = near | together if near is not None and whole_blocks else near
    seen = shared & seen if near is None else shared & seen & near
    return seen | (
        k.token_index == q.token_index
    )  # a padding token sees itself: a softmax over nothing is NaN


def _tokens(
    group_of: Tensor, segment_of: Tensor, image_block: Tensor | None, position_ids: Tensor | None
) -> _Tokens:
    place = torch.arange(group_of.shape[1], device=group_of.device).expand_as(group_of)
    return _Tokens(group_of, segment_of, place, image_block, position_ids)


def dense_mask(
    group_of: Tensor,
    segment_of: Tensor,
    *,
    queries: int | None = None,
    image_block: Tensor | None = None,
    position_ids: Tensor | None = None,
    window: int | None = None,
    whole_blocks: bool = False,
) -> Tensor:
    """The mask as bool [B, 1, Q, S], true where the query (dim 2) sees the key (dim 3).

    Args:
        group_of, segment_of: [B, S], as in `SharedSequence`.
        queries: how many of the last tokens of each row are queries; all of them (Q = S) by default. With a
            key-value cache the earlier ones have been computed already.
        image_block: [B, S], the number of the image block of each token, -1 outside images; the tokens of
            one block see each other in both directions (Gemma 3).
        position_ids, window: with a window, a query at position p sees the positions above p - window. The
            window is measured in positions, since a segment may stand far from the prefix that it follows.
        whole_blocks: the tokens of one block see each other past the window too (PaliGemma 2).
    """
    tokens = _tokens(group_of, segment_of, image_block, position_ids)
    start = 0 if queries is None else group_of.shape[1] - queries
    whole = slice(None)
    q, k = tokens.at((whole, slice(start, None), None)), tokens.at((whole, None))
    return _visible(q, k, window, whole_blocks)[:, None]


def block_mask(
    group_of: Tensor,
    segment_of: Tensor,
    *,
    image_block: Tensor | None = None,
    position_ids: Tensor | None = None,
    window: int | None = None,
    whole_blocks: bool = False,
) -> BlockMask:
    """`dense_mask` as a FlexAttention BlockMask, which skips the blocks in which nothing is seen (CUDA).

    S must be a multiple of 128 (`shared_sequence(..., multiple_of=128)`): FlexAttention would otherwise
    compile anew for each length.
    """
    from torch.nn.attention.flex_attention import create_block_mask

    batch, length = group_of.shape
    assert length % 128 == 0, f"block masks take lengths in multiples of 128, got {length}"
    tokens = _tokens(group_of, segment_of, image_block, position_ids)

    def mask_mod(b: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return _visible(tokens.at((b, q)), tokens.at((b, k)), window, whole_blocks)

    return create_block_mask(mask_mod, batch, None, length, length, device=str(group_of.device))


def image_blocks(input_ids: Tensor, image_token_id: int) -> Tensor:
    """Number each run of consecutive image tokens: [B, S] long, -1 outside images."""
    image = input_ids == image_token_id
    before = torch.nn.functional.pad(image, (1, 0))[:, :-1]
    number = (image & ~before).flatten().cumsum(0).view_as(input_ids) - 1
    return torch.where(image, number, PAD)
