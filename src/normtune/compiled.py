"""Layers of the language model that torch.compile has fused, each the same graph, for rows of any length."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch._dynamo.exc import BackendCompilerFailed

from normtune.anatomy import layers
from normtune.errors import InputError
from normtune.forwards import forwards


@contextmanager
def compiled(model: nn.Module, wanted: bool = True, *, backend: Any = "inductor") -> Iterator[Sequence[str]]:
    """Inside, the language model's layers run compiled; yields their names, none where that is not wanted.

    Raises:
        InputError: torch.compile fails, as it does without a C++ compiler.
    """
    chosen = [name for name, (part, _) in layers(model).items() if part == "language"] if wanted else []
    fused = {
        name: torch.compile(model.get_submodule(name).forward, dynamic=True, backend=backend)
        for name in chosen
    }
    try:
        with forwards(model, fused):
            yield chosen
    except BackendCompilerFailed as error:
        reason = str(error.inner_exception).splitlines()[0].rstrip(".")
        raise InputError(f"--compile: {reason}. Leave it out.") from error
