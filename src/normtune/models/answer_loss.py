"""The cross-entropy of answer tokens, without the logits of all of them at once."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

Head = Callable[[Tensor], Tensor]  # states [N, width] -> logits [N, vocabulary]

# fp32 logits that are held at once: as much as one layer of a 7B model keeps of 600 tokens, so that chunks
# never decide the peak, and of 128 rows or more for vocabularies up to 131,072, so that matmuls stay whole.
LIMIT_BYTES = 64 * 2**20


def answer_loss(
    head: Head,
    states: Tensor,
    labels: Tensor,
    *,
    vocabulary: int,
    label_smoothing: float = 0.0,
    limit_bytes: int = LIMIT_BYTES,
) -> Tensor:
    """Summed cross-entropy of `labels` [N] under `head(states)`, states [N, width]: a scalar, fp32.

    Where the fp32 logits exceed `limit_bytes` they are made chunk by chunk of rows, and made again in the
    backward pass. With Liger on CUDA a plain linear head goes through its fused kernel instead.
    """
    if states.is_cuda and _is_plain(head) and (fused := _liger()) is not None:
        weight, bias = head.weight, head.bias  # type: ignore[attr-defined]
        return fused(states, weight, labels, bias=bias, label_smoothing=label_smoothing, reduction="sum")

    def summed(some: Tensor, wanted: Tensor) -> Tensor:
        return F.cross_entropy(head(some).float(), wanted, reduction="sum", label_smoothing=label_smoothing)

    count = chunks(len(labels), vocabulary, limit_bytes)
    if count == 1:
        return summed(states, labels)
    parts = zip(states.tensor_split(count), labels.tensor_split(count), strict=True)
    if not torch.is_grad_enabled():
        return torch.stack([summed(*part) for part in parts]).sum()
    return torch.stack([checkpoint(summed, *part, use_reentrant=False) for part in parts]).sum()


def answer_log_probs(
    head: Head, states: Tensor, labels: Tensor, *, vocabulary: int, limit_bytes: int = LIMIT_BYTES
) -> Tensor:
    """Log-probability of each label, [N] fp32; arguments as for `answer_loss`."""
    count = chunks(len(labels), vocabulary, limit_bytes)
    parts = zip(states.tensor_split(count), labels.tensor_split(count), strict=True)
    return torch.cat([-F.cross_entropy(head(some).float(), one, reduction="none") for some, one in parts])


def chunks(rows: int, vocabulary: int, limit_bytes: int) -> int:
    """Into how many chunks logits of 4 bytes are cut; at least one, at most one a row."""
    return max(1, min(rows, -(-rows * vocabulary * 4 // limit_bytes)))


def _is_plain(head: Head) -> bool:
    """A frozen linear layer, neither quantised nor wrapped, which a kernel may take apart."""
    return type(head) is nn.Linear and type(head.weight) is nn.Parameter and not head.weight.requires_grad


@cache
def _liger() -> Callable[..., Any] | None:
    """Liger's fused linear cross-entropy (Hsu et al. 2024, arXiv 2410.10989), where it is installed."""
    try:
        from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy
    except ImportError:
        return None
    return liger_fused_linear_cross_entropy
