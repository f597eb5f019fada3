"""Modules that compute by another function for a while."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn

Forward = Callable[..., Any]


@contextmanager
def forwards(model: nn.Module, replacements: Mapping[str, Forward]) -> Iterator[None]:
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
