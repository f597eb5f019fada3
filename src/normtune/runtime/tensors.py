"""Workarounds for torch.compile."""

from __future__ import annotations

import torch
from torch import Tensor


def clone_while_compiling(result: Tensor) -> Tensor:
    """Clone the result of an autograd Function while torch.compile traces it (the copy is fused away).

    If the result is that of an in-place operation, or of a cast to the dtype that it already has, torch 2.11
    traces the Function without its gradient, silently.
    """
    return result.clone() if torch.compiler.is_compiling() else result
