"""What differs while torch.compile traces."""

from __future__ import annotations

import torch
from torch import Tensor


def clone_while_compiling(result: Tensor) -> Tensor:
    """A Function's result, as a tensor of its own where a compiler traces it (and then fuses the copy away).

    torch 2.11 traces a Function whose result comes out of an in-place step, or of a cast to the dtype it
    has, without a gradient, and says nothing.
    """
    return result.clone() if torch.compiler.is_compiling() else result
