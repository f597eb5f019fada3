"""Answers under way that share one key-value cache: the cache only grows, and masks say who sees what in it.

A row of the cache holds one group: its image, its questions, and every token that any of its answers has
written. An answer sees the image, its own question and its own tokens. When a beam goes on from another, it
takes over that beam's mask, so nothing is copied; the image's keys and values are there once a group.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

Windows = Mapping[str, int | None]  # kind of attention layer -> how many positions it sees; None: all
Masks = dict[str, Tensor]  # kind of attention layer -> bool [B, 1, Q, S], true where seen
Decode = Callable[[Tensor, Tensor, Masks], Tensor]
"""`decode(input_ids [B, Q], position_ids [B, Q], masks [B, 1, Q, S + Q]) -> logits [B, Q, vocabulary]`; it
appends Q columns to the cache."""


class Cache(Protocol):
    """What is needed of a cache of B rows."""

    def batch_select_indices(self, indices: Tensor) -> None: ...


class SharedCacheDecoder:
    """The answers of a batch of groups; `step` is what `normtune.models.generation` asks for.

    Args:
        cache: B rows of S columns.
        decode: computes new tokens against the cache.
        windows: the kinds of attention layers.
        visible: [answers, S] bool, the columns that each answer sees so far.
        row: [answers] long, the cache row of each answer; never falls.
        position: [answers] long, the position of the next token of each answer.
        token_index: [answers] long, how many tokens precede it; what windows are measured in.
        column_token_index: [B, S] long, the same of each column.
        selected: told which rows of the cache stay, where some go.
    """

    def __init__(
        self,
        cache: Cache,
        decode: Decode,
        windows: Windows,
        *,
        visible: Tensor,
        row: Tensor,
        position: Tensor,
        token_index: Tensor,
        column_token_index: Tensor,
        on_select: Callable[[Tensor], None] | None = None,
    ) -> None:
        self.cache, self.decode, self.windows = cache, decode, windows
        self.visible, self.row, self.position, self.token_index = visible, row, position, token_index
        self.column_token_index = column_token_index
        self.selected = on_select

    def step(self, tokens: Tensor, cache_rows: Tensor | None) -> Tensor:
        """See `normtune.models.generation.Step`: tokens [answers] -> logits [answers, vocabulary]."""
        if cache_rows is not None:
            self._continue_from(cache_rows)
        count = torch.bincount(self.row, minlength=len(self.column_token_index))  # [B]
        slot = torch.arange(len(self.row), device=self.row.device) - (count.cumsum(0) - count)[self.row]
        slots = int(count.max())
        at = (self.row, slot)

        def spread(values: Tensor) -> Tensor:
            """[answers] -> [B, slots]; slots without an answer hold 0 and see themselves alone."""
            return values.new_zeros(len(count), slots).index_put(at, values)

        places = spread(self.token_index)
        seen = self.visible.new_zeros(len(count), slots, self.visible.shape[1])
        seen[at] = self.visible
        itself = torch.eye(slots, dtype=torch.bool, device=seen.device).expand(len(count), -1, -1)
        seen = torch.cat((seen, itself), 2)
        self.column_token_index = torch.cat((self.column_token_index, places), 1)
        logits = self.decode(spread(tokens), spread(self.position), self._masks(seen, places))[at]
        self.visible = torch.cat((self.visible, F.one_hot(slot, slots).bool()), 1)
        self.position, self.token_index = self.position + 1, self.token_index + 1
        return logits

    def _continue_from(self, answers: Tensor) -> None:
        """Answer r goes on from answer `answers[r]`; rows of the cache that nobody needs any more go."""
        self.visible, self.row = self.visible[answers], self.row[answers]
        self.position, self.token_index = self.position[answers], self.token_index[answers]
        needed, self.row = self.row.unique(return_inverse=True)
        if len(needed) < len(self.column_token_index):
            self.cache.batch_select_indices(needed)
            if self.selected is not None:
                self.selected(needed)
            self.column_token_index = self.column_token_index[needed]

    def _masks(self, seen: Tensor, places: Tensor) -> Masks:
        masks = {}
        for kind, window in self.windows.items():
            near = seen
            if window is not None:
                near = seen & (self.column_token_index[:, None] > places[:, :, None] - window)
            masks[kind] = near[:, None]
        return masks
