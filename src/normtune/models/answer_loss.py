"""The cross-entropy of answer tokens, without having the logits of all of them in memory at once."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

Head = Callable[[Tensor], Tensor]  # states [N, width] -> logits [N, vocabulary]

# Bytes of fp32 logits in memory at once. This is as much as one layer of a 7B model saves for 600 tokens, so
# that chunks never determine peak memory, and gives 128 rows or more for vocabularies up to 131,072, so that
# matrix products are large enough to be efficient.
LIMIT_BYTES = 64 * 2**20


def answer_loss(
    head: Head,
    states: Tensor,
    labels: Tensor,
    *,
    vocabulary: int,
    label_smoothing: float = 0.0,
    limit_bytes: int = LIMIT_BYTES,
    reduction: Literal["sum", "none"] = "sum",
) -> Tensor:
    """The summed cross-entropy of answer tokens, a scalar fp32; with `reduction="none"` one value a token, [N].

    If the fp32 logits exceed `limit_bytes`, they are computed in chunks of rows, and once more in the
    backward pass. If Liger is installed, a frozen linear head on CUDA uses its fused kernel instead.

    Args:
        head: states [N, width] -> logits [N, vocabulary].
        states: [N, width].
        labels: [N] long, the answer tokens.
        vocabulary: the number of tokens, which with N determines the number of chunks.
        label_smoothing: as in `torch.nn.functional.cross_entropy`.
        limit_bytes: the most bytes of fp32 logits in memory at once.
        reduction: as in `torch.nn.functional.cross_entropy`.
    """
    if reduction == "sum" and states.is_cuda and _is_frozen_linear(head) and (fused := _liger()) is not None:
        weight, bias = head.weight, head.bias  # type: ignore[attr-defined]
        return fused(states, weight, labels, bias=bias, label_smoothing=label_smoothing, reduction="sum")

    def chunk_loss(rows: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(head(rows).float(), targets, reduction=reduction, label_smoothing=label_smoothing)

    count = chunk_count(len(labels), vocabulary, limit_bytes)
    if count == 1:
        return chunk_loss(states, labels)
    parts = zip(states.tensor_split(count), labels.tensor_split(count), strict=True)
    if not torch.is_grad_enabled():
        losses = [chunk_loss(*part) for part in parts]
    else:  # without checkpointing autograd would save every chunk's logits
        losses = [checkpoint(chunk_loss, *part, use_reentrant=False) for part in parts]
    return torch.stack(losses).sum() if reduction == "sum" else torch.cat(losses)


def chunk_count(rows: int, vocabulary: int, limit_bytes: int) -> int:
    """The number of chunks of fp32 logits [rows, vocabulary]: at least one, at most one a row."""
    return max(1, min(rows, -(-rows * vocabulary * 4 // limit_bytes)))


def _is_frozen_linear(head: Head) -> bool:
    """Whether a head is a frozen, unquantised, unwrapped linear, so that a kernel can use its weight."""
    return type(head) is nn.Linear and type(head.weight) is nn.Parameter and not head.weight.requires_grad


@cache
def _liger() -> Callable[..., Any] | None:
    """Liger's fused linear cross-entropy (Hsu et al. 2024, arXiv 2410.10989); None if it is not installed."""
    try:
        from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy
    except ImportError:
        return None
    return liger_fused_linear_cross_entropy
