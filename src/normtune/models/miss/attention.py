"""Parts that MISS's attentions share: heads, learned prefixes, masks, and questions that share an image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def split_heads(states: Tensor, heads: int) -> Tensor:
    """Split the last axis into heads: [batch, length, width] -> [batch, heads, length, head_dim], a view."""
    batch, length, width = states.shape
    return states.view(batch, length, heads, width // heads).transpose(1, 2)


def join_heads(states: Tensor) -> Tensor:
    """Concatenate heads: [batch, heads, length, head_dim] -> [batch, length, width]."""
    return states.transpose(1, 2).flatten(2)


def prepend_prefix(prefix: nn.Module | None, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, int]:
    """Prepend a learned prefix to keys and values.

    Prefix tuning: Li and Liang 2021. P-Tuning v2: Liu et al. 2022.

    Args:
        prefix: returns (key, value) when called, each [heads, n, head_dim]; None: no prefix.
        key, value: [batch, heads, length, head_dim].

    Returns:
        Keys and values [batch, heads, n + length, head_dim], and n. Every query attends to the whole prefix.
    """
    if prefix is None:
        return key, value, 0
    prefix_key, prefix_value = prefix()  # each [heads, n, head_dim], the same for every row of the batch
    batch = (key.shape[0], -1, -1, -1)
    key = torch.cat((prefix_key.to(key.dtype).expand(batch), key), 2)
    value = torch.cat((prefix_value.to(value.dtype).expand(batch), value), 2)
    return key, value, prefix_key.shape[1]


def extend_mask_for_prefix(mask: Tensor | None, length: int) -> Tensor | None:
    """Widen an additive mask [..., queries, keys] by `length` visible keys (zeros) at the front."""
    return mask if mask is None or length == 0 else F.pad(mask, (length, 0))


def causal_mask(queries: int, prefix: int, like: Tensor) -> Tensor:
    """Additive mask: a query attends to the prefix, to the tokens before it, and to itself.

    With a prefix of 2 and 3 queries (0: visible, x: -inf):

        0 0 0 x x
        0 0 0 0 x
        0 0 0 0 0

    Returns:
        [queries, prefix + queries], with dtype and device of `like`.
    """
    hidden = torch.ones(queries, prefix + queries, dtype=torch.bool, device=like.device).triu(prefix + 1)
    return torch.zeros_like(hidden, dtype=like.dtype).masked_fill_(hidden, -torch.inf)


def padding_mask(attention_mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Convert an attention mask to an additive mask.

    Args:
        attention_mask: [batch, keys], 1 for a token and 0 for padding; None: no padding.

    Returns:
        [batch, 1, 1, keys], 0 for a token and -inf for padding; None for None.
    """
    if attention_mask is None:
        return None
    zeros = torch.zeros(attention_mask.shape, dtype=dtype, device=attention_mask.device)
    return zeros.masked_fill_(attention_mask == 0, -torch.inf)[:, None, None, :]


@dataclass(frozen=True)
class QuerySlots:
    """Arranges the segments of each image in one query sequence, so that they share its keys and values.

    Each image has `width` slots, one for each of its segments; an image with fewer segments has empty slots.
    With images [0, 1, 1] of three segments, width is 2 and index is [0, 2, 3]: slot 1 is empty.
    """

    groups: int  # the number of images
    width: int  # slots per image, the number of segments of the image that has the most
    index: Tensor | None  # [segments], image * width + slot; None if every image has `width` segments, in order

    @classmethod
    def from_image_index(
        cls, image_index: Sequence[int] | Tensor | None, segments: int, groups: int, device: torch.device
    ) -> QuerySlots:
        """Assign a slot to each segment, on the host, so that a GPU is not waited for.

        Args:
            image_index: [segments], the image of each segment, in any order; None: every image has the same
                number of segments, in order.
            segments: the number of segments.
            groups: the number of images.
        """
        if image_index is None:
            assert segments % groups == 0, "without image_index every image has the same number of segments"
            return cls(groups, segments // groups, None)
        images = image_index.tolist() if isinstance(image_index, Tensor) else image_index
        counts = [0] * groups  # segments of each image so far
        slots = []
        for image in images:
            slots.append(counts[image])
            counts[image] += 1
        width = max(counts)
        index = [image * width + slot for image, slot in zip(images, slots, strict=True)]
        if index == list(range(groups * width)):
            return cls(groups, width, None)
        return cls(groups, width, torch.tensor(index).to(device, non_blocking=True))

    def gather(self, states: Tensor) -> Tensor:
        """[segments, length, width] -> [groups, slots * length, width]; empty slots are filled with zeros."""
        length, width = states.shape[1:]
        if self.index is not None:
            empty = states.new_zeros(self.groups * self.width, length, width)
            states = empty.index_copy(0, self.index, states)
        return states.reshape(self.groups, self.width * length, width)

    def scatter(self, states: Tensor, length: int) -> Tensor:
        """Undo `gather`: [groups, slots * length, width] -> [segments, length, width]."""
        states = states.reshape(self.groups * self.width, length, states.shape[-1])
        return states if self.index is None else states.index_select(0, self.index)
