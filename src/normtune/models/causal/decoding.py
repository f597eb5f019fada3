"""Decodes all answers of a batch of groups from one key-value cache, in which an image is stored once.

A row of the cache holds one group: its image, its questions, and every token that any of its answers has
written. An answer sees the image, its own question and its own tokens; a mask over the columns decides this.
The cache only grows. When a beam continues from another beam, it takes over that beam's mask, and no keys or
values are copied.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

Windows = Mapping[str, int | None]  # kind of attention layer -> how many positions it sees; None: all
Masks = dict[str, Tensor]  # kind of attention layer -> bool [B, 1, Q, S], true where the query sees the key
Decode = Callable[[Tensor, Tensor, Masks], Tensor]
"""`decode(input_ids [B, Q], position_ids [B, Q], masks [B, 1, Q, S + Q]) -> logits [B, Q, vocabulary]`; it
appends Q columns to the cache."""

# A worked example: two groups (B = 2). Group 0 is `i i q r`: an image of two tokens and two questions of one
# token, so two answers x and y. Group 1 is `i i q .` with one answer z; the dot is padding. S = 4 columns.
#
#     answer   cache_row   visible            position   token_index
#     x        0           [1 1 1 0]          3          3            two image tokens and q precede it
#     y        0           [1 1 0 1]          3          3            two image tokens and r
#     z        1           [1 1 1 0]          3          3
#
# Step 1 feeds the tokens x1, y1, z1. Every row needs as many slots as the largest number of answers in a row,
# here 2. Answers fill their row's slots in order; the slot that is left over gets token 0 and sees nothing
# but itself, since a softmax over no keys is NaN.
#
#              slots        columns of the cache after the step
#     row 0    x1  y1       i  i  q  r  x1 y1
#     row 1    z1  -        i  i  q  .  z1 -
#
#     visible    x [1 1 1 0 | 1 0]     y [1 1 0 1 | 0 1]     z [1 1 1 0 | 1 0]
#
# Now z ends and leaves: `cache_rows` is [0, 1], row 1 of the cache is dropped, and step 2 feeds x2 and y2.
#
#     row 0    x2  y2       i  i  q  r  x1 y1 x2 y2
#
#     visible    x [1 1 1 0 | 1 0 | 1 0]     y [1 1 0 1 | 0 1 | 0 1]
#
# Suppose instead that x and y are two beams of one question, and that y is replaced by a second continuation
# of x: `cache_rows` is [0, 0, 2], so y begins the step with x's mask [1 1 1 0 | 1 0] and ends it with
# [1 1 1 0 | 1 0 | 0 1]. It reads x1 in the column where x wrote it.


class Cache(Protocol):
    """What is needed of a key-value cache of B rows."""

    def batch_select_indices(self, indices: Tensor) -> None: ...


class SharedCacheDecoder:
    """The answers of a batch of groups; its `step` is the step that `normtune.models.generation` calls.

    Args:
        cache: B rows of S columns.
        decode: computes new tokens against the cache.
        windows: the kinds of attention layers, each with its window.
        visible: [answers, S] bool, the columns that each answer sees so far.
        cache_row: [answers] long, the cache row of each answer; never decreases from answer to answer.
        position: [answers] long, the rotary position of the next token of each answer.
        token_index: [answers] long, the number of tokens before it in its own conversation. Windows are
            measured in these; they differ from positions with M-RoPE, for example.
        column_token_index: [B, S] long, the token index of each column.
        on_select: called with the cache rows that stay, whenever some are dropped.
    """

    def __init__(
        self,
        cache: Cache,
        decode: Decode,
        windows: Windows,
        *,
        visible: Tensor,
        cache_row: Tensor,
        position: Tensor,
        token_index: Tensor,
        column_token_index: Tensor,
        on_select: Callable[[Tensor], None] | None = None,
    ) -> None:
        self.cache, self.decode, self.windows = cache, decode, windows
        self.visible, self.cache_row = visible, cache_row
        self.position, self.token_index = position, token_index
        self.column_token_index = column_token_index
        self.on_select = on_select

    def step(self, tokens: Tensor, cache_rows: Tensor | None) -> Tensor:
        """Feed one token an answer: tokens [answers] -> logits [answers, vocabulary].

        See `normtune.models.generation.Step` for `cache_rows`.
        """
        if cache_rows is not None:
            self._continue_from(cache_rows)
        count = torch.bincount(self.cache_row, minlength=len(self.column_token_index))  # [B]
        # slot of an answer: its number minus that of the first answer of its cache row
        slot = torch.arange(len(self.cache_row), device=count.device) - (count.cumsum(0) - count)[self.cache_row]
        slots = int(count.max())
        at = (self.cache_row, slot)  # indexes [B, slots] with one entry an answer

        def spread(values: Tensor) -> Tensor:
            """[answers] -> [B, slots]; slots without an answer hold 0."""
            return values.new_zeros(len(count), slots).index_put(at, values)

        token_index = spread(self.token_index)
        visible = self.visible.new_zeros(len(count), slots, self.visible.shape[1])  # [B, slots, S]
        visible[at] = self.visible
        # every new token sees its own new column, and no other new one
        itself = torch.eye(slots, dtype=torch.bool, device=visible.device).expand(len(count), -1, -1)
        visible = torch.cat((visible, itself), 2)  # [B, slots, S + slots]
        self.column_token_index = torch.cat((self.column_token_index, token_index), 1)  # [B, S + slots]
        logits = self.decode(spread(tokens), spread(self.position), self._masks(visible, token_index))[at]
        self.visible = torch.cat((self.visible, F.one_hot(slot, slots).bool()), 1)  # [answers, S + slots]
        self.position, self.token_index = self.position + 1, self.token_index + 1
        return logits

    def _continue_from(self, answers: Tensor) -> None:
        """Let answer r continue from answer `answers[r]`, and drop cache rows that no answer needs."""
        self.visible, self.cache_row = self.visible[answers], self.cache_row[answers]
        self.position, self.token_index = self.position[answers], self.token_index[answers]
        # `unique` sorts, so that rows stay in order and the answers' rows still never decrease
        needed, self.cache_row = self.cache_row.unique(return_inverse=True)
        if len(needed) < len(self.column_token_index):
            self.cache.batch_select_indices(needed)
            if self.on_select is not None:
                self.on_select(needed)
            self.column_token_index = self.column_token_index[needed]

    def _masks(self, visible: Tensor, token_index: Tensor) -> Masks:
        """visible [B, Q, S], token_index [B, Q] -> the mask of each kind of layer."""
        masks = {}
        for kind, window in self.windows.items():
            near = visible
            if window is not None:
                near = visible & (self.column_token_index[:, None] > token_index[:, :, None] - window)
            masks[kind] = near[:, None]
        return masks
