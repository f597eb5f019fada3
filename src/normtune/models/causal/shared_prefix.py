"""The grouping mask: one image and all its questions in one token sequence, computed in one pass.

A group is one image (or study) with its questions. Its tokens form a tree of runs: the root is the prefix, which
holds the image; a question with its answer (a segment) continues it; a later turn of a conversation continues the
turn before it, and two candidate answers continue one question. A token attends to the tokens before it in its own
run, and to all runs that its run continues, but never to another branch. Positions continue where the parent ends.
Each segment therefore computes exactly what it would compute in a separate sequence, and shared tokens are computed
once.
Prefix Grouper uses the same idea for text trees (Liu et al., 2025, arXiv 2506.05433).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor

from normtune.data.groups import Group, Segment

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
#
# Segments share more than the image if the tokens of one begin with the whole prompt of another. Example: the second
# turn of a conversation is `q q a s s c`, the first is `q q a`. Their runs are `q q a` (1) and `s s c` (2), and a
# further question is run 3. `segment_end` is the last run of a run's branch: a key is visible if its run is at most
# the query's, and the query's is at most the key's `segment_end`.
#
#     token           i  i  i  q  q  a  s  s  c  r  r  b
#     segment_of      0  0  0  1  1  1  2  2  2  3  3  3
#     segment_end     3  3  3  2  2  2  2  2  2  3  3  3
#     position_ids    0  1  2  3  4  5  6  7  8  3  4  5

RowLayout = Literal["pad", "pack"]  # one group a row, padded to one length; or all groups in a single row

PREFIX = 0  # the number of the run that is a group's prefix; further runs are numbered from 1, parents first
PAD = -1  # the group and run number of padding tokens


class Run(NamedTuple):
    """Consecutive tokens of a layout that one or more segments share."""

    rows: range  # the rows of its tokens in the flattened [B * S] tokens
    parent: int  # the index of the run that it continues; -1 for a group's prefix


@dataclass(frozen=True)
class SharedSequence:
    """Groups as rows of tokens: B rows of S tokens, N answer tokens in all. See the examples above."""

    input_ids: Tensor  # [B, S] long
    group_of: Tensor  # [B, S] long, the group of each token, -1 for padding
    segment_of: Tensor  # [B, S] long, the number of each token's run in its group, -1 for padding
    segment_end: Tensor  # [B, S] long, the largest number of a run that continues it, directly or not
    position_ids: Tensor  # [B, S] long; the positions of a run continue from the end of its parent
    answer_rows: Tensor  # [N] long, the row of the flattened [B * S] hidden states that predicts each label
    labels: Tensor  # [N] long, the answer tokens
    segment_index: Tensor  # [N] long, the segment of each label, counted over all groups in the order given
    runs: Sequence[Run]  # the runs of all groups, parents before their children
    last_runs: Sequence[int]  # for each segment the index of the run with which it ends

    @property
    def segment_count(self) -> int:
        """The number of segments, including those without an answer."""
        return len(self.last_runs)

    def rows_of(self, segment: int) -> tuple[range, list[int]]:
        """(rows of a segment's prefix, rows of its own tokens) in the flattened [B * S] tokens."""
        return _trace(self.runs, self.last_runs[segment])

    def targets(self) -> dict[str, Any]:
        """The part of a batch that the loss needs; see `CausalFamily.collate`."""
        return {
            "labels": self.labels,
            "answer_rows": self.answer_rows,
            "segment_index": self.segment_index,
            "pairs": self.segment_count,
        }


def _trace(runs: Sequence[Run], last: int) -> tuple[range, list[int]]:
    """(rows of the prefix, rows of all other runs from the prefix to run `last`), in the flattened [B * S] tokens."""
    ranges = []
    while runs[last].parent >= 0:
        ranges.append(runs[last].rows)
        last = runs[last].parent
    return runs[last].rows, [row for rows in reversed(ranges) for row in rows]


class _Part(NamedTuple):
    """A run of one group's segments, before it has a place in a row."""

    tokens: tuple[int, ...]
    start: int  # how many tokens of the segment are before it
    parent: int  # index of the part that it continues; -1: the prefix


def segment_tree(segments: Sequence[Segment]) -> tuple[list[_Part], list[int]]:
    """Divide segments into parts that each occur once.

    Two segments share their common beginning if it contains the whole prompt of one of them: turns of a conversation,
    and answers to one question. Questions that only begin with the same words share nothing but the prefix.

    Returns:
        The parts, parents before their children and each branch in one piece, and for each segment the index of its
        last part (-1 if it has no tokens).
    """
    tokens = [segment.prompt + segment.answer for segment in segments]
    prompts = {segment.prompt for segment in segments}
    lengths = sorted({len(prompt) for prompt in prompts})
    related: dict[tuple[int, ...], list[int]] = {}  # the shortest prompt with which they begin -> segments
    for index, ids in enumerate(tokens):
        related.setdefault(next(ids[:n] for n in lengths if ids[:n] in prompts), []).append(index)
    parts: list[_Part] = []
    last = [-1] * len(segments)

    def add(members: list[int], start: int, parent: int) -> None:
        first, other = (choose(tokens[member] for member in members) for choose in (min, max))
        shared = (n for n, (a, b) in enumerate(zip(first[start:], other[start:], strict=False)) if a != b)
        stop = start + next(shared, min(len(first), len(other)) - start)
        if stop > start:
            parts.append(_Part(first[start:stop], start, parent))
            parent = len(parts) - 1
        children: dict[int, list[int]] = {}
        for member in members:
            if len(tokens[member]) == stop:
                last[member] = parent
            else:
                children.setdefault(tokens[member][stop], []).append(member)
        for child in children.values():
            add(child, stop, parent)

    for members in related.values():
        add(members, 0, -1)
    return parts, last


class _PlacedRun(NamedTuple):
    """A run at its place in a row; its fields besides the place are as in `SharedSequence`."""

    row: int
    column: int  # of its first token
    tokens: Sequence[int]
    group: int
    number: int
    end: int
    position: int  # of its first token
    parent: int


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
        rows: one group a row, padded on the right ("pad"), or all groups in one row ("pack").
        multiple_of: the row length is rounded up to a multiple of this number.
    """
    assert len(groups) == len(prefixes) and groups, "one prefix a group, at least one group"
    placed: list[_PlacedRun] = []
    lengths: list[int] = []  # tokens in each row so far
    last_runs: list[int] = []
    for g, (group, prefix) in enumerate(zip(groups, prefixes, strict=True)):
        assert prefix, "a prefix holds at least the image"
        if rows == "pad" or not lengths:
            lengths.append(0)
        parts, last = segment_tree(group.segments)
        ends = [*range(len(parts))]  # the last part of each part's branch
        for number in reversed(range(len(parts))):
            if (parent := parts[number].parent) >= 0:
                ends[parent] = max(ends[parent], ends[number])
        root = len(placed)  # the index of the prefix; part n of the group has index root + 1 + n
        runs_of_group = [(prefix, PREFIX, PREFIX + len(parts), 0, -1)]
        for number, (ids, start, parent) in enumerate(parts, PREFIX + 1):
            end = ends[number - PREFIX - 1] + PREFIX + 1
            runs_of_group.append((ids, number, end, len(prefix) + start, root + 1 + parent))
        for tokens, number, end, position, parent in runs_of_group:
            placed.append(_PlacedRun(len(lengths) - 1, lengths[-1], tokens, g, number, end, position, parent))
            lengths[-1] += len(tokens)
        last_runs += [root + 1 + part for part in last]

    length = max(lengths)
    length += -length % multiple_of
    shape = len(lengths), length  # [B, S]
    input_ids, position_ids = torch.full(shape, pad_id), torch.zeros(shape, dtype=torch.long)
    group_of, segment_of, segment_end = (torch.full(shape, PAD) for _ in range(3))
    runs: list[Run] = []
    for run in placed:
        place = run.row, slice(run.column, run.column + len(run.tokens))
        input_ids[place] = torch.tensor(run.tokens)
        position_ids[place] = torch.arange(run.position, run.position + len(run.tokens))
        group_of[place], segment_of[place], segment_end[place] = run.group, run.number, run.end
        first = run.row * length + run.column
        runs.append(Run(range(first, first + len(run.tokens)), run.parent))

    targets: list[tuple[int, int, int]] = []  # flat row of the predicting token, label, segment
    for number, segment in enumerate(segment for group in groups for segment in group.segments):
        if segment.answer:
            prefix_rows, rows_after = _trace(runs, last_runs[number])
            # The token before predicts the label. Where a segment has no prompt, its first token is predicted by the
            # prefix's last token, which may be many columns to the left.
            predicting = [prefix_rows[-1], *rows_after][len(segment.prompt) :]
            targets += [(row, label, number) for row, label in zip(predicting, segment.answer, strict=False)]

    return SharedSequence(
        input_ids=input_ids,
        group_of=group_of,
        segment_of=segment_of,
        segment_end=segment_end,
        position_ids=position_ids,
        answer_rows=torch.tensor([row for row, _, _ in targets], dtype=torch.long),
        labels=torch.tensor([label for _, label, _ in targets], dtype=torch.long),
        segment_index=torch.tensor([segment for *_, segment in targets], dtype=torch.long),
        runs=runs,
        last_runs=last_runs,
    )


class MaskTokens(NamedTuple):
    """What decides which tokens see each other; all tensors have one shape, [B, S] for whole rows."""

    group: Tensor
    segment: Tensor
    end: Tensor  # the last segment of the branch that begins with it
    column: Tensor  # in the row
    block: Tensor | None
    position: Tensor | None

    def select(self, index: Any) -> MaskTokens:
        return MaskTokens(*(None if x is None else x[index] for x in self))  # type: ignore[arg-type]


def mask_tokens(
    group_of: Tensor,
    segment_of: Tensor,
    segment_end: Tensor,
    *,
    image_block: Tensor | None = None,
    position_ids: Tensor | None = None,
) -> MaskTokens:
    """The tokens of a layout, for its masks.

    Args:
        group_of, segment_of, segment_end: [B, S], as in `SharedSequence`.
        image_block: [B, S], the number of the image block of each token, -1 outside images; the tokens of
            one block see each other in both directions (Gemma 3).
        position_ids: [B, S]; needed with a window.
    """
    columns = torch.arange(group_of.shape[1], device=group_of.device).expand_as(group_of)
    return MaskTokens(group_of, segment_of, segment_end, columns, image_block, position_ids)


def _visible(q: MaskTokens, k: MaskTokens, window: int | None, whole_blocks: bool) -> Tensor:
    """Whether queries see keys, as bool of the broadcast shape of `q` and `k`.

    Dense masks call it with [B, S, 1] against [B, 1, S], FlexAttention with single tokens.
    """
    # same group, and the query's run is the key's or continues it
    related = (q.group == k.group) & (k.segment <= q.segment) & (q.segment <= k.end)
    # A run stands to the right of its parent, so that causal order in the row is causal order in the conversation.
    ordered = k.column <= q.column
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
    return ordered | (k.column == q.column)


def dense_mask(tokens: MaskTokens, window: int | None = None, whole_blocks: bool = False) -> Tensor:
    """The mask as bool [B, 1, S, S], true where the query (dim 2) sees the key (dim 3).

    Args:
        window: a query at position p sees the positions above p - window. The window is measured in
            positions and not in columns, since a segment may be many columns away from its prefix.
        whole_blocks: the tokens of one block see each other past the window too (PaliGemma 2).
    """
    every = slice(None)
    # [B, S, 1] and [B, 1, S] broadcast to [B, S, S]
    q, k = tokens.select((every, every, None)), tokens.select((every, None))
    return _visible(q, k, window, whole_blocks)[:, None]


def block_mask(tokens: MaskTokens, window: int | None = None, whole_blocks: bool = False) -> BlockMask:
    """`dense_mask` as a FlexAttention BlockMask, which skips blocks of the mask that are empty (CUDA).

    S must be a multiple of 128 (`shared_sequence(..., multiple_of=128)`): otherwise FlexAttention would
    compile a kernel for each new length.
    """
    from torch.nn.attention.flex_attention import create_block_mask

    batch, length = tokens.group.shape
    assert length % 128 == 0, f"block masks take lengths in multiples of 128, got {length}"

    def mask_mod(b: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return _visible(tokens.select((b, q)), tokens.select((b, k)), window, whole_blocks)

    # None for the heads: one mask for all of them
    return create_block_mask(mask_mod, batch, None, length, length, device=str(tokens.group.device))


def image_blocks(input_ids: Tensor, image_token_id: int) -> Tensor:
    """Number each run of consecutive image tokens: [B, S] long, -1 outside images.

    Example: tokens `[9, 7, 7, 5, 7, 4]` with image token 7 give `[-1, 0, 0, -1, 1, -1]`. Numbers continue
    from row to row, so that no two blocks of a batch share a number.
    """
    image = input_ids == image_token_id
    previous = torch.nn.functional.pad(image, (1, 0))[:, :-1]  # whether the token before is an image token
    number = (image & ~previous).flatten().cumsum(0).view_as(input_ids) - 1  # counts the starts of runs
    return torch.where(image, number, PAD)
