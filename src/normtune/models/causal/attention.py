"""Attention for shared sequences without copies of keys, values or masks.

`shared_attention` is registered among transformers' attention functions; a language model that uses it is
configured as "normtune_shared". For the backward pass a layer then saves queries, keys and values as they
are, its output, and one logarithm a row and head: in bf16, for width d, key/value width k and H heads,
4d + 4k + 4H bytes a token. Transformers' SDPA with a bool mask also saves a mask in every layer, and copies
keys and values once for each query head.
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
from normtune.models.causal.recurrent import RECURRENT

# Grouped-query attention: several query heads read the same key and value head. SDPA's CUDA kernels that take
# a mask need as many key heads as query heads, and the usual remedy (`repeat_kv`) copies keys and values,
# which autograd then saves for every layer. Here the queries are folded instead. With 4 query heads, 2 key
# heads, Q queries and K keys:
#
#     query    [B, 4, Q, d]      -> [B, 2, 2 * Q, d]    heads that share a key head become further rows
#     key      [B, 2, K, d]                             unchanged, no copy; values likewise
#     mask     [B, 1, Q, K]      -> [B, 1, 2 * Q, K]    rows repeated, once for all layers
#     output   [B, 2, 2 * Q, d]  -> [B, 4, Q, d]
#
# Query heads 0 and 1 read key head 0, heads 2 and 3 read key head 1, so the reshape needs no transpose.

Windows = Mapping[str, int | None]  # kind of attention layer -> how many positions it sees; None: all
FULL, SLIDING = "full_attention", "sliding_attention"  # transformers' names of the kinds of attention layers
ONE_KIND = ""  # the key of the mask in models with one kind of attention layer

Backend = Literal["auto", "dense", "block"]  # masks as tensors, or as FlexAttention's block masks

ATTENTION_NAME = "normtune_shared"  # what configs call this attention
BLOCK_SIZE = 128  # FlexAttention's block; lengths are multiples of it, so that no new kernel is compiled
# Under "auto", rows of this length or longer use block masks on CUDA. Dense masks were faster at all measured lengths,
# up to 1,721 tokens; at 8,192 tokens a mask folded for 4 query heads a key head takes 512 MiB.
MIN_BLOCK_MASK_TOKENS = 8192
MASK_ALIGNMENT = 8  # values; CUDA's memory-efficient kernel copies a mask with rows that start elsewhere


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
    """Attention under a mask of `additive_masks` or `block_mask`; any other mask goes to transformers' SDPA.

    Args:
        module: the attention layer; only transformers' SDPA reads it.
        query: [batch, heads, q, head_dim].
        key: [batch, kv_heads, k, head_dim].
        value: [batch, kv_heads, k, head_dim].
        attention_mask: [batch, 1, q, k] in the states' dtype, or folded [batch, 1, heads / kv_heads * q, k].
        scaling: what scores are multiplied by; None is 1 / sqrt(head_dim).
        options: for transformers' SDPA.

    Returns:
        The output [batch, q, heads, head_dim], and None in place of attention weights.

    Raises:
        InputError: a block mask on the CPU, where gradients are needed.
    """
    if isinstance(attention_mask, BlockMask):
        return _block_attention(query, key, value, attention_mask, scaling), None
    sharing = query.shape[1] // key.shape[1]  # query heads that share one key head
    # Transformers makes bool masks; one in the states' dtype is ours. Its rows show whether it is folded.
    ours = attention_mask is not None and attention_mask.dtype == query.dtype
    folded = ours and sharing > 1 and attention_mask.shape[2] == sharing * query.shape[2]  # type: ignore[union-attr]
    if not folded and (not ours or (sharing > 1 and not _supports_grouped_heads(query.device))):
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **options
        )
    shape = query.shape
    if folded:
        query = query.reshape(shape[0], key.shape[1], sharing * shape[2], shape[3])
    out = F.scaled_dot_product_attention(
        query, key, value, attention_mask, dropout, scale=scaling, enable_gqa=sharing > 1 and not folded
    )
    # back to [batch, heads, q, head_dim], then to the axes that transformers expects
    return out.reshape(shape).transpose(1, 2).contiguous(), None


def _block_attention(query: Tensor, key: Tensor, value: Tensor, mask: BlockMask, scaling: float | None) -> Tensor:
    """FlexAttention; shapes as for `shared_attention`. It supports grouped heads, so nothing is folded."""
    gradients = torch.is_grad_enabled() and any(states.requires_grad for states in (query, key, value))
    if query.device.type == "cpu" and gradients:
        raise InputError(
            "attention 'block' is FlexAttention, which has no backward pass on the CPU. Choose 'dense' or a "
            "CUDA device."
        )
    # uncompiled FlexAttention materialises all scores, so only the CPU uses it
    attend: Any = _compiled_flex() if query.is_cuda else flex_attention
    out: Tensor = attend(query, key, value, block_mask=mask, scale=scaling, enable_gqa=True)
    return out.transpose(1, 2).contiguous()


def use_shared_attention(decoder: Any) -> None:
    """Set `shared_attention` as the attention of a transformers language model; vision towers keep theirs."""
    AttentionInterface.register(ATTENTION_NAME, shared_attention)
    AttentionMaskInterface.register(ATTENTION_NAME, sdpa_mask)
    decoder.set_attn_implementation(ATTENTION_NAME)


def additive_masks(masks: Mapping[str, Tensor], decoder: Any, dtype: torch.dtype) -> dict[str, Tensor]:
    """Bool masks -> masks to add to the scores (0 visible, -inf hidden), made once for all layers.

    SDPA turns a bool mask into such a mask in every layer, and autograd saves each of them.

    Args:
        masks: kind of attention layer -> bool [B, 1, Q, K], true where the query sees the key.
        decoder: the language model; its heads decide whether masks are folded.

    Returns:
        Kind -> [B, 1, Q, K], or [B, 1, sharing * Q, K] where SDPA needs folded queries: everywhere except on
        the CPU, if `sharing` (query heads a key head) is above 1.
    """
    additive = {}
    for kind, mask in masks.items():
        sharing = 1 if _supports_grouped_heads(mask.device) else heads_per_key_head(decoder, kind)
        rows, heads, queries, keys = mask.shape
        width = keys + -keys % MASK_ALIGNMENT  # allocated columns; the view at the end cuts off those past `keys`
        buffer = torch.zeros(rows, heads, sharing, queries, width, dtype=dtype, device=mask.device)
        buffer[..., :keys].masked_fill_(~mask[:, :, None], -torch.inf)
        additive[kind] = buffer.view(rows, heads, sharing * queries, width)[..., :keys]
    return additive


def heads_per_key_head(decoder: Any, kind: str) -> int:
    """The number of query heads that share a key head in the attention layers of a kind.

    1 in a language model with a learned prefix, which has another attention, for which masks are not folded.
    """
    config = decoder.config
    if config._attn_implementation != ATTENTION_NAME:
        return 1
    if kind != ONE_KIND and hasattr(config, "per_layer_config"):  # Gemma 4's kinds of layers differ in key heads
        layer: int = list(config.layer_types).index(kind)
        return config.num_attention_heads // int(config.per_layer_config[layer].num_key_value_heads)
    heads: int = config.num_attention_heads
    return heads // (getattr(config, "num_key_value_heads", None) or heads)


def mask_argument(masks: dict[str, Any]) -> Any:
    """Transformers takes a dict of masks if the kinds of layers differ, else the mask itself."""
    return masks.get(ONE_KIND, masks)


def attention_windows(config: Any) -> Windows:
    """The kinds of attention layers of a language model, each with its window in tokens.

    Raises:
        InputError: the model has layers that neither a mask nor `normtune.models.causal.recurrent` controls.
    """
    kinds = set(getattr(config, "layer_types", None) or ())
    if unknown := kinds - {FULL, SLIDING, *RECURRENT}:
        raise InputError(
            f"the language model has layers of kind {', '.join(sorted(unknown))}, in which "
            f"questions of one image would see each other. Known kinds: {', '.join((FULL, SLIDING, *RECURRENT))}."
        )
    if kinds & RECURRENT.keys():
        return {kind: config.sliding_window if kind == SLIDING else None for kind in kinds - RECURRENT.keys()}
    if SLIDING in kinds:
        return {FULL: None, SLIDING: config.sliding_window}
    return {ONE_KIND: None if kinds else getattr(config, "sliding_window", None)}


def uses_block_masks(backend: Backend, length: int, device: torch.device, decoder: Any) -> bool:
    """Whether rows of `length` tokens are attended under block masks.

    Raises:
        InputError: "block" is required, but the language model's attention does not support block masks.
    """
    shared = decoder.config._attn_implementation == ATTENTION_NAME
    if backend != "block":
        return backend == "auto" and shared and device.type == "cuda" and length >= MIN_BLOCK_MASK_TOKENS
    if not shared:
        raise InputError(
            "attention 'block' supports neither prefix or ptuning in the language model (block masks do not "
            "cover the prefix's keys) nor PaliGemma 2. Choose 'dense' or another recipe."
        )
    return True


def _supports_grouped_heads(device: torch.device) -> bool:
    """Whether SDPA's fused kernels take fewer key heads than query heads together with a mask."""
    return device.type == "cpu"


@cache
def _compiled_flex() -> Callable[..., Any]:
    """FlexAttention, compiled once a process for all lengths."""
    return torch.compile(flex_attention, dynamic=True)
