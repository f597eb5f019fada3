"""Layers of the language model that torch.compile has fused, each the same graph, for rows of any length."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal

import torch
from torch import nn
from torch._dynamo.exc import BackendCompilerFailed
from torch.utils.checkpoint import checkpoint

from normtune.errors import InputError
from normtune.models.parts import layers


@contextmanager
def compile_layers(
    model: nn.Module, wanted: bool = True, *, backend: Any = "inductor"
) -> Iterator[Sequence[str]]:
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
        with replace_forwards(model, fused):
            yield chosen
    except BackendCompilerFailed as error:
        reason = str(error.inner_exception).splitlines()[0].rstrip(".")
        raise InputError(f"--compile: {reason}. Leave it out.") from error


Forward = Callable[..., Any]


@contextmanager
def replace_forwards(model: nn.Module, replacements: Mapping[str, Forward]) -> Iterator[None]:
    """Inside, the modules of these names compute by the functions given; after, as they did before."""
    held: list[tuple[nn.Module, Forward | None]] = []
    try:
        for name, function in replacements.items():
            module = model.get_submodule(name)
            held.append((module, module.__dict__.get("forward")))
            module.forward = function  # type: ignore[method-assign]
        yield
    finally:
        for module, own in reversed(held):
            if own is None:
                del module.forward
            else:
                module.forward = own  # type: ignore[method-assign]


MemoryTier = Literal["fast", "balanced", "tight"]
CHECKPOINT_EVERY: dict[MemoryTier, int] = {
    "fast": 0,
    "balanced": 2,
    "tight": 1,
}  # of so many layers one is run again; 0: none


@contextmanager
def checkpoint_activations(model: nn.Module, tier: MemoryTier) -> Iterator[Sequence[str]]:
    """Inside, some of the model's layers run again in the backward pass: none, every second one, or all.

    What one layer keeps while it runs again is its whole, so that a tier's peak is that of the layers' inputs
    and one layer. Loss and gradients are the same; dropout draws the same numbers again. Yields the layers.
    """
    every = CHECKPOINT_EVERY[tier]
    chosen = [name for name, (_, index) in layers(model).items() if index % every == 0] if every else []
    with replace_forwards(
        model, {name: partial(_with_checkpoint, model.get_submodule(name).forward) for name in chosen}
    ):
        yield chosen


def _with_checkpoint(forward: Forward, *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    return checkpoint(forward, *args, use_reentrant=False, **kwargs)
