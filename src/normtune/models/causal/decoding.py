"""Decodes all answers of a batch of groups from one key-value cache, in which an image is stored once.

A row of the cache holds one group: its image, its questions, and every token that any of its answers has
written. An answer sees the image, its own question and its own tokens; a mask over the columns decides this.
When a beam continues from another beam, it takes over that beam's mask, and no keys or values are copied.

Cache and masks have room for the next steps from the start, and a step writes its columns in place. On CUDA a
step reads nothing back and its shapes stay the same, so that it can be captured once and replayed
(`normtune.models.causal.step_graph`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from transformers import Cache

from normtune.models.causal.attention import Windows
from normtune.models.causal.step_graph import StepGraph
from normtune.models.generation import FIXED_STEPS

Masks = dict[str, Tensor]  # kind of attention layer -> bool [B, 1, Q, S], true where the query sees the key
Decode = Callable[[Tensor, Tensor, Masks], Tensor]
"""`decode(input_ids [B, Q], position_ids [B, Q], masks [B, 1, Q, S]) -> hidden states [B, Q, width]`; it writes
Q columns of the cache."""

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


class ColumnCache(Cache):
    """Keys and values of B rows in buffers with spare columns, so that a step copies none of the earlier ones.

    All layers keep all columns, also those with a window: columns of several answers alternate, so that the
    masks apply the windows.

    Attributes:
        layer_states: attention layer -> its keys and values, [B, key heads, capacity, head_dim] each.
        capacity: the number of columns for which there is room.
        columns: [Q] long, the columns that the next pass writes; None during the prompts' pass, which writes
            the first columns.
        width: how many columns the layers read.
        fixed_layers: cross-attention layers: the prompts' pass writes their keys and values, and no step adds to them.
        row_values: further values of the rows, [B, ...] each.
    """

    def __init__(self, capacity: int, fixed_layers: Collection[int] = ()) -> None:
        super().__init__(layers=[])
        self.layer_states: dict[int, tuple[Tensor, Tensor]] = {}
        self.capacity, self.width = capacity, 0
        self.columns: Tensor | None = None
        self.fixed_layers = frozenset(fixed_layers)
        self.row_values: dict[str, Tensor] = {}
        if fixed_layers:
            self.layers = _FixedLayers(self)  # type: ignore[assignment]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """More than 0 in a step: transformers before 5.24 then reads the keys of cross-attention."""
        return self.width

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write new keys and values [B, key heads, Q, head_dim]; returns the first `width` columns of all."""
        if layer_idx in self.fixed_layers:
            self.layer_states[layer_idx] = key_states, value_states
            return key_states, value_states
        if self.columns is None:
            assert layer_idx not in self.layer_states, "every layer writes once in the prompts' pass"
            self.layer_states[layer_idx] = _widen(key_states, self.capacity, 2), _widen(value_states, self.capacity, 2)
            return key_states, value_states
        keys, values = self.layer_states[layer_idx]
        keys.index_copy_(2, self.columns, key_states)
        values.index_copy_(2, self.columns, value_states)
        return keys[:, :, : self.width], values[:, :, : self.width]

    def reserve(self, capacity: int) -> None:
        """Make room for so many columns in all."""
        self._replace(lambda states: _widen(states, capacity, 2), self.layer_states.keys() - self.fixed_layers)
        self.capacity = capacity

    def select(self, rows: Tensor) -> None:
        """Continue with these rows only: [rows that remain] long."""
        self._replace(lambda states: states.index_select(0, rows), [*self.layer_states])
        self.row_values = {name: values.index_select(0, rows) for name, values in self.row_values.items()}

    def _replace(self, change: Callable[[Tensor], Tensor], layers: Iterable[int]) -> None:
        for layer in layers:  # one by one, which limits the peak of memory
            keys, values = self.layer_states[layer]
            self.layer_states[layer] = change(keys), change(values)


class _FixedLayers:
    """The layers of a cache in the form in which transformers reads the keys and values of cross-attention."""

    def __init__(self, cache: ColumnCache) -> None:
        self.cache = cache

    def __iter__(self) -> Iterator[Any]:
        return iter(())

    def __len__(self) -> int:
        return 1 + max(self.cache.layer_states, default=-1)

    def __getitem__(self, layer: int) -> Any:
        keys, values = self.cache.layer_states[layer]
        return SimpleNamespace(is_initialized=True, keys=keys, values=values)


class SharedCacheDecoder:
    """The answers of a batch of groups; its `step` is the step that `normtune.models.generation` calls.

    Args:
        cache: B rows, of which the prompts' pass has written S columns.
        head: hidden states [answers, width] -> logits [answers, vocabulary].
        windows: the kinds of attention layers, each with its window.
        steps: how often `step` will be called at most.
        visible: [answers, S] bool, the columns that each answer sees so far.
        cache_row: the cache row of each answer; never decreases from answer to answer.
        position: [answers] long, the rotary position of the next token of each answer.
        token_index: [answers] long, the number of tokens before it in its own conversation. Windows are
            measured in these; they differ from positions with M-RoPE, for example.
        column_token_index: [B, S] long, the token index of each column.
        on_select: called with the cache rows that stay, whenever some are dropped.
        graph: captures steps and replays them; None: every step is launched kernel by kernel.
        on_continue: called with the answers from which the next step's answers continue, where they change.
    """

    def __init__(
        self,
        cache: ColumnCache,
        decode: Decode,
        head: Callable[[Tensor], Tensor],
        windows: Windows,
        *,
        steps: int,
        visible: Tensor,
        cache_row: Sequence[int],
        position: Tensor,
        token_index: Tensor,
        column_token_index: Tensor,
        on_select: Callable[[Tensor], None] | None = None,
        graph: StepGraph | None = None,
        on_continue: Callable[[Tensor], None] | None = None,
    ) -> None:
        self.cache, self.decode, self.head, self.windows = cache, decode, head, windows
        self.steps, self.length = steps, visible.shape[1]
        self.column_token_index = _widen(column_token_index, cache.capacity, 1)  # [B, capacity]
        self.all_columns = torch.arange(cache.capacity, device=visible.device)
        self.on_select, self.graph, self.on_continue = on_select, graph, on_continue
        # CUDA's kernels are set up anew for each shape, and a captured step has one shape
        self.reads_all_columns = visible.is_cuda or graph is not None
        self._arrange(cache_row)
        self._spread(_widen(visible, cache.capacity, 1), position, token_index)

    def step(self, tokens: Tensor, cache_rows: Tensor | None) -> Tensor:
        """Feed one token an answer: tokens [answers] -> logits [answers, vocabulary].

        See `normtune.models.generation.Step` for `cache_rows`. The next call may overwrite the result.
        """
        if cache_rows is not None:
            self._continue_from(cache_rows)
        if self.length + self.slots > self.cache.capacity:
            self._reserve(self.length + self.slots * min(self.steps, FIXED_STEPS))
        self.input_ids.index_put_(self.at, tokens)
        self.length, self.steps = self.length + self.slots, self.steps - 1
        self.cache.width = self.cache.capacity if self.reads_all_columns else self.length
        if self.graph is None:
            return self._advance()
        return self.graph.run(self._advance, self.steps, self.all_columns.device)

    def _advance(self) -> Tensor:
        """Compute the logits of `input_ids`, and prepare all buffers for the next step.

        It changes buffers in place, reads nothing back from the device, and uses no value of the host that
        differs between steps on CUDA: replaying its kernels is the same as calling it.
        """
        # every new token sees its own new column, and no other new one
        self.visible |= self.columns[:, None] == self.all_columns
        self.column_token_index.index_copy_(1, self.columns, self.token_index)
        states = self.decode(self.input_ids, self.position, self._masks())
        logits = self.head(states[self.at])
        self.columns += self.slots
        self.position += 1
        self.token_index += 1
        return logits

    def _masks(self) -> Masks:
        """The mask of each kind of layer, [B, 1, slots, columns that layers read]."""
        visible, masks = self.visible[..., : self.cache.width], {}  # [B, slots, columns]
        for kind, window in self.windows.items():
            near = visible
            if window is not None:
                near = visible & (
                    self.column_token_index[:, None, : self.cache.width] > self.token_index[:, :, None] - window
                )
            masks[kind] = near[:, None]
        return masks

    def _continue_from(self, answers: Tensor) -> None:
        """Let answer r continue from answer `answers[r]`."""
        if self.on_continue is not None:
            self.on_continue(answers)
        state = [values[self.at][answers] for values in (self.visible, self.position, self.token_index)]
        rows = [self.cache_row[answer] for answer in answers.tolist()]
        if rows != self.cache_row:
            self._arrange(rows)
        self._spread(*state)

    def _arrange(self, cache_row: Sequence[int]) -> None:
        """Assign a slot to each answer, and drop cache rows that no answer needs."""
        needed = sorted(set(cache_row))
        if len(needed) < len(self.column_token_index):
            index = torch.tensor(needed, device=self.all_columns.device)
            self.cache.select(index)
            if self.on_select is not None:
                self.on_select(index)
            self.column_token_index = self.column_token_index[index]
        self.cache_row = [needed.index(row) for row in cache_row]
        # slot of an answer: its number minus the number of the first answer in its cache row
        slot = [number - self.cache_row.index(row) for number, row in enumerate(self.cache_row)]
        self.slots = max(Counter(self.cache_row).values())
        # indexes [B, slots] with one entry an answer
        rows, slots = torch.tensor([self.cache_row, slot]).to(self.all_columns.device, non_blocking=True)
        self.at = (rows, slots)
        self.columns = torch.arange(self.length, self.length + self.slots, device=self.all_columns.device)
        self.cache.columns = self.columns

    def _spread(self, visible: Tensor, position: Tensor, token_index: Tensor) -> None:
        """Make the buffers [B, slots, ...] of a step; slots without an answer hold 0 and see nothing."""

        def spread(values: Tensor) -> Tensor:
            return values.new_zeros(len(self.column_token_index), self.slots, *values.shape[1:]).index_put_(
                self.at, values
            )

        self.visible, self.position, self.token_index = spread(visible), spread(position), spread(token_index)
        self.input_ids = torch.zeros_like(self.position)
        if self.graph is not None:
            self.graph.clear()  # it writes to the former buffers

    def _reserve(self, capacity: int) -> None:
        """Make room for so many columns in all."""
        self.cache.reserve(capacity)
        self.visible = _widen(self.visible, capacity, 2)
        self.column_token_index = _widen(self.column_token_index, capacity, 1)
        self.all_columns = torch.arange(capacity, device=self.all_columns.device)
        if self.graph is not None:
            self.graph.clear()


def _widen(values: Tensor, size: int, axis: int) -> Tensor:
    """A copy with `size` entries along an axis; those added are 0, since a NaN in a hidden key would spread."""
    widened = values.new_zeros(*values.shape[:axis], size, *values.shape[axis + 1 :])
    widened.narrow(axis, 0, values.shape[axis]).copy_(values)
    return widened
