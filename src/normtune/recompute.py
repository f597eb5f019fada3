"""Layers that keep their input alone and run again in the backward pass (Chen et al. 2016, 1604.06174)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from normtune.anatomy import layers
from normtune.forwards import Forward, forwards

Tier = Literal["fast", "balanced", "tight"]
EVERY: dict[Tier, int] = {"fast": 0, "balanced": 2, "tight": 1}  # of so many layers one is run again; 0: none


@contextmanager
def recomputed(model: nn.Module, tier: Tier) -> Iterator[Sequence[str]]:
    """Inside, some of the model's layers run again in the backward pass: none, every second one, or all.

    What one layer keeps while it runs again is its whole, so that a tier's peak is that of the layers' inputs
    and one layer. Loss and gradients are the same; dropout draws the same numbers again. Yields the layers.
    """
    every = EVERY[tier]
    chosen = [name for name, (_, index) in layers(model).items() if index % every == 0] if every else []
    with forwards(model, {name: partial(_twice, model.get_submodule(name).forward) for name in chosen}):
        yield chosen


def _twice(forward: Forward, *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    return checkpoint(forward, *args, use_reentrant=False, **kwargs)
