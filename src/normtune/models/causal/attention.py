"""Attention for shared sequences, one of transformers' attention functions, that keeps no copies.

For the backward pass a layer keeps queries, keys and values as they came, its output, and a logarithm a row
and head: in bf16, for width d, key/value width k and H heads, 4d + 4k + 4H bytes a token. Transformers' SDPA
with a bool mask also keeps a mask of its own in every layer, and keys and values once for each query head.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from normtune.errors import InputError

Backend = Literal["auto", "dense", "block"]

SHARED = "normtune_shared"  # what configs call this attention
BLOCK = 128  # FlexAttention's block: lengths are multiples of it, so that nothing is compiled anew
BLOCK_FROM = 2048  # tokens in a row from which "auto" takes block masks on CUDA; not yet measured on a GPU
ALIGNED = 8  # CUDA's memory-efficient kernel copies a mask whose rows are not so aligned


def shared_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | BlockMask | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attention under a mask that `additive` or `block_mask` made; under any other, transformers' own.

    query: [batch, heads, q, head_dim]; key, value: [batch, kv_heads, k, head_dim]; returns [batch, q, heads,
    head_dim].

    Raises:
        InputError: a block mask on the CPU, where gradients are wanted.
    """
    if isinstance(attention_mask, BlockMask):
        return _under_blocks(query, key, value, attention_mask, scaling), None
    sharing = query.shape[1] // key.shape[1]  # query heads that share one key head
    ours = attention_mask is not None and attention_mask.dtype == query.dtype
    folded = ours and sharing > 1 and attention_mask.shape[2] == sharing * query.shape[2]  # type: ignore[union-attr]
    if not folded and (not ours or (sharing > 1 and not _takes_groups(query.device))):
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **options
        )
    shape = query.shape
    if folded:
        query = query.reshape(shape[0], key.shape[1], sharing * shape[2], shape[3])
    out = F.scaled_dot_product_attention(
        query, key, value, attention_mask, dropout, scale=scaling, enable_gqa=sharing > 1 and not folded
    )
    return out.reshape(shape).transpose(1, 2).contiguous(), None


def _under_blocks(
    query: Tensor, key: Tensor, value: Tensor, mask: BlockMask, scaling: float | None
) -> Tensor:
    gradients = torch.is_grad_enabled() and any(one.requires_grad for one in (query, key, value))
    if query.device.type == "cpu" and gradients:
        raise InputError(
            "attention 'block' is FlexAttention, which has no backward pass on the CPU. Choose 'dense' or a "
            "CUDA device."
        )
    attend: Any = _compiled_flex() if query.is_cuda else flex_attention
    out: Tensor = attend(query, key, value, block_mask=mask, scale=scaling, enable_gqa=True)
    return out.transpose(1, 2).contiguous()


def use_shared_attention(decoder: Any) -> None:
    """Make a language model of transformers attend by `shared_attention`, the vision tower beside it not."""
    AttentionInterface.register(SHARED, shared_attention)
    AttentionMaskInterface.register(SHARED, sdpa_mask)
    decoder.set_attn_implementation(SHARED)


def additive(masks: Mapping[str, Tensor], decoder: Any, dtype: torch.dtype) -> dict[str, Tensor]:
    """Bool masks [B, 1, Q, K], true where seen -> 0 and -inf in the states' dtype, once for all layers.

    Where SDPA's kernels want as many key heads as query heads (all but the CPU's), queries of the heads that
    share a key head are attended as further rows, [B, 1, sharing * Q, K]: keys and values are never copied.
    """
    sharing = 1
    if decoder.config._attn_implementation == SHARED:  # a learned prefix has an attention of its own
        heads = decoder.config.num_attention_heads
        sharing = heads // (getattr(decoder.config, "num_key_value_heads", None) or heads)
    return {
        kind: _additive(mask, dtype, 1 if _takes_groups(mask.device) else sharing)
        for kind, mask in masks.items()
    }


def _additive(mask: Tensor, dtype: torch.dtype, sharing: int) -> Tensor:
    rows, heads, queries, keys = mask.shape
    width = keys + -keys % ALIGNED
    room = torch.zeros(rows, heads, sharing, queries, width, dtype=dtype, device=mask.device)
    room[..., :keys].masked_fill_(~mask[:, :, None], -torch.inf)
    return room.view(rows, heads, sharing * queries, width)[..., :keys]


def takes_blocks(backend: Backend, length: int, device: torch.device, decoder: Any) -> bool:
    """Whether rows of `length` tokens are attended under block masks.

    Raises:
        InputError: block masks are asked for, and the language model has an attention that takes none.
    """
    own = decoder.config._attn_implementation == SHARED
    if backend != "block":
        return backend == "auto" and own and device.type == "cuda" and length >= BLOCK_FROM
    if not own:
        raise InputError(
            "attention 'block' does not go with prefix or ptuning in the language model, whose keys no block "
            "mask knows, nor with PaliGemma 2. Choose 'dense' or another recipe."
        )
    return True


def _takes_groups(device: torch.device) -> bool:
    """Whether SDPA's fused kernels take fewer key heads than query heads together with a mask."""
    return device.type == "cpu"


@cache
def _compiled_flex() -> Callable[..., Any]:
    """Once a process, for all lengths."""
    return torch.compile(flex_attention, dynamic=True)
