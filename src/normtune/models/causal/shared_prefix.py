"""The grouping mask: one image and all its questions in one token sequence, computed in one pass.

A group is one image (or study) with its questions. Its tokens form `prefix, segment 1, segment 2, ...`: the
prefix holds the image, and a segment is one question with its answer. A segment attends to the prefix and,
causally, to itself, but never to another segment. Its positions restart where the prefix ends. Each segment
therefore computes exactly what it would compute in a sequence of its own, but the image is computed once.
Prefix Grouper uses the same idea for text trees (Liu et al., 2025, arXiv 2506.05433).
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

# A worked example: one image of three tokens (i), a first question of two tokens (q) with the answer a, and a
# second question of two tokens (r) with the answer b. In a real batch the prefix also holds the tokens that
# the chat template writes before the image.
#
#     column          0  1  2  3  4  5  6  7  8
#     token           i  i  i  q  q  a  r  r  b
#     group_of        0  0  0  0  0  0  0  0  0     all tokens belong to group 0
#     segment_of      0  0  0  1  1  1  2  2  2     0 is the prefix
#     position_ids    0  1  2  3  4  5  3  4  5     segment 2 restarts after the prefix
#
# The mask: rows are queries, columns are keys, x means "the query sees the key".
#
#                     i  i  i  q  q  a  r  r  b
#     0  i            x  .  .  .  .  .  .  .  .
#     1  i            x  x  .  .  .  .  .  .  .
#     2  i            x  x  x  .  .  .  .  .  .
#     3  q            x  x  x  x  .  .  .  .  .
#     4  q            x  x  x  x  x  .  .  .  .     predicts a
#     5  a            x  x  x  x  x  x  .  .  .
#     6  r            x  x  x  .  .  .  x  .  .     the first question is invisible
#     7  r            x  x  x  .  .  .  x  x  .     predicts b
#     8  b            x  x  x  .  .  .  x  x  x
#
# The loss needs the hidden states of two columns only: answer_rows is [4, 7], labels is [a, b], and
# segment_index is [0, 1]. Nine tokens are computed; two sequences with an image each would have twelve. With
# 576 image tokens and 12 questions of 15 tokens the numbers are 756 and 7,092.

RowLayout = Literal["pad", "pack"]  # one group a row, padded to one length; or all groups in a single row

PREFIX = 0  # the segment number of a group's prefix; its segments are numbered from 1
PAD = -1  # the group and segment number of padding tokens


@dataclass(frozen=True)
class SharedSequence:
    """Groups as rows of tokens: B rows of S tokens, N answer tokens in all. See the example above.

    Attributes:
        input_ids: [B, S] long.
        group_of: [B, S] long, the group of each token, -1 for padding.
        segment_of: [B, S] long, 0 for a prefix token, 1... for its group's segments, -1 for padding.
        position_ids: [B, S] long; the positions of every segment continue from the end of its prefix.
        answer_rows: [N] long, the row of the flattened [B * S] hidden states that predicts each label.
        labels: [N] long, the answer tokens.
        segment_index: [N] long, the segment of each label, counted over all groups in the order given.
        segment_count: the number of segments, including those without an answer.
    """

    input_ids: Tensor
    group_of: Tensor
    segment_of: Tensor
    position_ids: Tensor
    answer_rows: Tensor
    labels: Tensor
    segment_index: Tensor
    segment_count: int


@dataclass
class _RowBuilder:
    """A row under construction: four lists of the same length."""

    ids: list[int] = field(default_factory=list)
    groups: list[int] = field(default_factory=list)
    segments: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)

    def add(self, ids: Sequence[int], group: int, segment: int, position: int) -> None:
        """Append tokens of one segment, the first of them at `position`."""
        self.ids += ids
        self.groups += [group] * len(ids)
        self.segments += [segment] * len(ids)
        self.positions += range(position, position + len(ids))


def shared_sequence(
    groups: Sequence[Group],
    prefixes: Sequence[Sequence[int]],
    pad_id: int,
    *,
    rows: RowLayout = "pad",
    multiple_of: int = 1,
) -> SharedSequence:
    """Lay groups out as rows of tokens.

    Args:
        groups: the groups; each segment holds its prompt and answer tokens.
        prefixes: `prefixes[g]` are the tokens that all segments of group g share, including image tokens.
        pad_id: the token id of padding.
        rows: one group a row, padded on the right ("pad"), or all groups in one row ("pack").
        multiple_of: the row length is rounded up to a multiple of this number.
    """
    assert len(groups) == len(prefixes) and groups, "one prefix a group, at least one group"
    layout: list[_RowBuilder] = []
    targets: list[tuple[int, int, int, int]] = []  # row, column of the predicting token, label, segment
    segment_count = 0
    for g, (group, prefix) in enumerate(zip(groups, prefixes, strict=True)):
        assert prefix, "a prefix holds at least the image"
        if rows == "pad" or not layout:
            layout.append(_RowBuilder())
        row = layout[-1]
        row.add(prefix, g, PREFIX, position=0)
        prefix_end = len(row.ids) - 1  # column of the prefix's last token
        for number, segment in enumerate(group.segments, start=PREFIX + 1):
            start = len(row.ids)
            # every segment starts at the same position, as if the prefix preceded it directly
            row.add(segment.prompt + segment.answer, g, number, position=len(prefix))
            for offset, token in enumerate(segment.answer, start=len(segment.prompt)):
                # The token before predicts the label. Where a segment has no prompt, its first token is
                # predicted by the prefix's last token, which may be many columns to the left.
                predictor = start + offset - 1 if offset else prefix_end
                targets.append((len(layout) - 1, predictor, token, segment_count))
            segment_count += 1

    length = max(len(row.ids) for row in layout)
    length += -length % multiple_of

    def pad(columns: list[list[int]], value: int) -> Tensor:
        """Lists of one value a token, one list a row -> [B, S] long."""
        return torch.tensor([values + [value] * (length - len(values)) for values in columns])

    return SharedSequence(
        input_ids=pad([row.ids for row in layout], pad_id),
        group_of=pad([row.groups for row in layout], PAD),
        segment_of=pad([row.segments for row in layout], PAD),
        position_ids=pad([row.positions for row in layout], 0),
        answer_rows=torch.tensor([row * length + column for row, column, _, _ in targets], dtype=torch.long),
        labels=torch.tensor([label for _, _, label, _ in targets], dtype=torch.long),
        segment_index=torch.tensor([segment for *_, segment in targets], dtype=torch.long),
        segment_count=segment_count,
    )


class _TokenInfo(NamedTuple):
    """What decides visibility, for the tokens of one side (queries or keys); all tensors of one shape."""

    group: Tensor
    segment: Tensor
    token_index: Tensor  # column in the row
    block: Tensor | None  # image block, -1 outside images
    position: Tensor | None

    def select(self, index: Any) -> _TokenInfo:
        return _TokenInfo(*(None if x is None else x[index] for x in self))  # type: ignore[arg-type]


def _visible(q: _TokenInfo, k: _TokenInfo, window: int | None, whole_blocks: bool) -> Tensor:
    """Whether queries see keys, as bool of the broadcast shape of `q` and `k`.

    Dense masks call it with [B, S, 1] against [B, 1, S], FlexAttention with single tokens.
    """
    # same group, and the key is in the prefix or in the query's own segment
    related = (q.group == k.group) & ((k.segment == PREFIX) | (k.segment == q.segment))
    # Columns of a segment follow those of its prefix, so causal order in the row is causal order in the
    # conversation.
    ordered = k.token_index <= q.token_index
    near = None
    if window is not None:
        assert q.position is not None and k.position is not None, "a window is measured in positions"
        near = k.position > q.position - window
    if q.block is not None and k.block is not None:
        # tokens of one image block see each other in both directions, in some models past the window too
        same_block = (q.block == k.block) & (k.block >= 0)
        ordered = ordered | same_block
        near = near | same_block if near is not None and whole_blocks else near
    ordered = related & ordered if near is None else related & ordered & near
    # a padding token sees itself: a softmax over no keys is NaN
    return ordered | (k.token_index == q.token_index)


def _token_info(
    group_of: Tensor, segment_of: Tensor, image_block: Tensor | None, position_ids: Tensor | None
) -> _TokenInfo:
    token_index = torch.arange(group_of.shape[1], device=group_of.device).expand_as(group_of)  # [B, S]
    return _TokenInfo(group_of, segment_of, token_index, image_block, position_ids)


def dense_mask(
    group_of: Tensor,
    segment_of: Tensor,
    *,
    image_block: Tensor | None = None,
    position_ids: Tensor | None = None,
    window: int | None = None,
    whole_blocks: bool = False,
) -> Tensor:
    """The mask as bool [B, 1, S, S], true where the query (dim 2) sees the key (dim 3).

    Args:
        group_of, segment_of: [B, S], as in `SharedSequence`.
        image_block: [B, S], the number of the image block of each token, -1 outside images; the tokens of
            one block see each other in both directions (Gemma 3).
        position_ids: [B, S]; needed with a window.
        window: a query at position p sees the positions above p - window. The window is measured in
            positions and not in columns, since a segment may be many columns away from its prefix.
        whole_blocks: the tokens of one block see each other past the window too (PaliGemma 2).
    """
    tokens = _token_info(group_of, segment_of, image_block, position_ids)
    every = slice(None)
    # [B, S, 1] and [B, 1, S] broadcast to [B, S, S]
    q, k = tokens.select((every, every, None)), tokens.select((every, None))
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
    """`dense_mask` as a FlexAttention BlockMask, which skips blocks of the mask that are empty (CUDA).

    S must be a multiple of 128 (`shared_sequence(..., multiple_of=128)`): otherwise FlexAttention would
    compile a kernel for each new length.
    """
    from torch.nn.attention.flex_attention import create_block_mask

    batch, length = group_of.shape
    assert length % 128 == 0, f"block masks take lengths in multiples of 128, got {length}"
    tokens = _token_info(group_of, segment_of, image_block, position_ids)

    def mask_mod(b: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return _visible(tokens.select((b, q)), tokens.select((b, k)), window, whole_blocks)

    # None for the heads: one mask for all of them
    return create_block_mask(mask_mod, batch, None, length, length, device=str(group_of.device))


def image_blocks(input_ids: Tensor, image_token_id: int) -> Tensor:
    """Number each run of consecutive image tokens: [B, S] long, -1 outside images.

    Example: tokens `[9, 7, 7, 5, 7, 4]` with image token 7 give `[-1, 0, 0, -1, 1, -1]`. Numbers continue
    from row to row, so that no two blocks of a batch share a number.
    """
    image = input_ids == image_token_id
    previous = torch.nn.functional.pad(image, (1, 0))[:, :-1]  # whether the token before is an image token
    number = (image & ~previous).flatten().cumsum(0).view_as(input_ids) - 1  # counts the starts of runs
    return torch.where(image, number, PAD)
