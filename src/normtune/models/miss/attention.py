"""What every attention of MISS shares: heads, learned prefixes, one image's keys for all its questions."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def split_heads(states: Tensor, heads: int) -> Tensor:
    """[batch, length, width] -> [batch, heads, length, head_dim], a view."""
    batch, length, width = states.shape
    return states.view(batch, length, heads, width // heads).transpose(1, 2)


def join_heads(states: Tensor) -> Tensor:
    """[batch, heads, length, head_dim] -> [batch, length, width]."""
    return states.transpose(1, 2).flatten(2)


def with_prefix(prefix: nn.Module | None, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, int]:
    """Prepend a learned prefix to keys and values [batch, heads, length, head_dim]; also its length.

    `prefix()` returns (key, value), each [heads, n, head_dim]; every query sees all of it (prefix-tuning, Li
    and Liang 2021; P-Tuning v2, Liu et al. 2022).
    """
    if prefix is None:
        return key, value, 0
    first_key, first_value = prefix()
    rows = (key.shape[0], -1, -1, -1)
    key = torch.cat((first_key.to(key.dtype).expand(rows), key), 2)
    value = torch.cat((first_value.to(value.dtype).expand(rows), value), 2)
    return key, value, first_key.shape[1]


def see_prefix(mask: Tensor | None, length: int) -> Tensor | None:
    """Widen an additive mask [.., queries, keys] by `length` visible keys at the front."""
    return mask if mask is None or length == 0 else F.pad(mask, (length, 0))


def causal_mask(queries: int, prefix: int, like: Tensor) -> Tensor:
    """Additive mask [queries, prefix + queries]: a query sees the prefix, what came before it, and itself."""
    hidden = torch.ones(queries, prefix + queries, dtype=torch.bool, device=like.device).triu(prefix + 1)
    return torch.zeros_like(hidden, dtype=like.dtype).masked_fill_(hidden, -torch.inf)


def padding_mask(attention_mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """[batch, keys], 1 where there is a token -> additive [batch, 1, 1, keys]; None stays None."""
    if attention_mask is None:
        return None
    bare = torch.zeros(attention_mask.shape, dtype=dtype, device=attention_mask.device)
    return bare.masked_fill_(attention_mask == 0, -torch.inf)[:, None, None, :]


@dataclass(frozen=True)
class Slots:
    """Where each segment's queries stand in the one long query sequence of its image.

    Attributes:
        groups: the number of images.
        width: the most segments that one of them has.
        index: [segments], image * width + place; None where every image has `width` segments, in order.
    """

    groups: int
    width: int
    index: Tensor | None

    @classmethod
    def of(cls, image_index: Tensor | None, segments: int, groups: int) -> Slots:
        """Slots for segments whose images are `image_index` [segments], in any order (None: as many each)."""
        if image_index is None:
            assert segments % groups == 0, "without image_index every image has the same number of segments"
            return cls(groups, segments // groups, None)
        counts = torch.bincount(image_index, minlength=groups)
        width = int(counts.max())
        sorted_index, order = image_index.sort(stable=True)
        if width * groups == segments and bool((sorted_index == image_index).all()):
            return cls(groups, width, None)
        rank = torch.arange(segments, device=order.device) - (counts.cumsum(0) - counts)[sorted_index]
        return cls(groups, width, torch.empty_like(order).scatter(0, order, sorted_index * width + rank))

    def gather(self, states: Tensor) -> Tensor:
        """[segments, length, width] -> [groups, slots * length, width]; empty slots are zeros."""
        length, width = states.shape[1:]
        if self.index is not None:
            empty = states.new_zeros(self.groups * self.width, length, width)
            states = empty.index_copy(0, self.index, states)
        return states.reshape(self.groups, self.width * length, width)

    def scatter(self, states: Tensor, length: int) -> Tensor:
        """[groups, slots * length, width] -> [segments, length, width], the way back."""
        states = states.reshape(self.groups * self.width, length, states.shape[-1])
        return states if self.index is None else states.index_select(0, self.index)
