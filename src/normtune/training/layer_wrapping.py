"""Wraps the layers of a model for the time of a `with` block: recomputation, compilation.

- `replace_forwards` sets the `forward` of modules by name, and restores it; the other two are built on it.
- `checkpoint_activations` runs layers again in the backward pass in place of saving their activations.
- `compile_layers` compiles the language model's layers with torch.compile.

Layers are wrapped one by one, not the whole model: what is around them (embeddings, masks, caches) varies
between families and batches, while a layer is one function of its inputs. The graph that torch.compile makes
of a layer serves rows of any length.

    with save_fewer_activations(model), compile_layers(model), checkpoint_activations(model, "tight"):
        loss.backward()     # inside: forward = checkpoint(compiled(layer.forward))
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from normtune.errors import InputError
from normtune.models.parts import layers

Forward = Callable[..., Any]  # a module's forward, or what replaces it
MemoryTier = Literal["fast", "balanced", "tight"]  # values of `TrainConfig.memory`
# tier -> n: every n-th layer of each stack is recomputed (layers 0, n, 2n, ...); 0: none
CHECKPOINT_EVERY: dict[MemoryTier, int] = {"fast": 0, "balanced": 2, "tight": 1}
# graphs of one kind of layer: with or without gradients for its input, one row or several, full or sliding
# attention, training or evaluation
MAX_GRAPHS = 16


@contextmanager
def replace_forwards(model: nn.Module, replacements: Mapping[str, Forward]) -> Iterator[None]:
    """Replace the `forward` of modules by name inside the block; their hooks still run, outside of the function."""
    # an instance's `forward`, where there is one, hides the class's; None: the instance had none
    previous: list[tuple[nn.Module, Forward | None]] = []
    try:
        for name, function in replacements.items():
            module = model.get_submodule(name)
            previous.append((module, module.__dict__.get("forward")))
            module.forward = function  # type: ignore[method-assign]
        yield
    finally:
        for module, forward in reversed(previous):
            if forward is None:
                del module.forward
            else:
                module.forward = forward  # type: ignore[method-assign]


@contextmanager
def checkpoint_activations(model: nn.Module, tier: MemoryTier) -> Iterator[Sequence[str]]:
    """Recompute some layers in the backward pass inside the block: none, every second one, or all.

    A recomputed layer saves only its input. In the backward pass it runs again and saves everything, one
    layer at a time, so that the peak is the inputs of all recomputed layers plus the activations of one. Loss
    and gradients are the same; dropout draws the same random numbers again.

    Yields:
        The names of the recomputed layers.
    """
    every = CHECKPOINT_EVERY[tier]
    names = [name for name, (_, index) in layers(model).items() if index % every == 0] if every else []
    with replace_forwards(
        model, {name: partial(_with_checkpoint, model.get_submodule(name).forward) for name in names}
    ):
        yield names


def _with_checkpoint(forward: Forward, *args: Any, **kwargs: Any) -> Any:
    # without gradients nothing is saved, so that there is nothing to recompute (evaluation, generation)
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    # the non-reentrant kind allows inputs that need no gradient, such as the input of the first trained layer
    return checkpoint(forward, *args, use_reentrant=False, **kwargs)


@contextmanager
def compile_layers(model: nn.Module, enabled: bool = True, *, backend: Any = "inductor") -> Iterator[Sequence[str]]:
    """Compile the language model's layers inside the block; all layers of one kind share a graph.

    Vision towers stay as they are: in most of them transformers' code breaks the graph in every layer.

    Args:
        enabled: False compiles nothing.
        backend: backend of torch.compile.

    Yields:
        The names of the compiled layers.

    Raises:
        InputError: torch.compile fails, for example because there is no C++ compiler, or the layers need more
            than `MAX_GRAPHS` graphs; torch would run the remaining layers without compiling them.
    """
    if not enabled:
        yield []
        return
    # here, since importing the compiler takes a second
    from torch._dynamo.exc import BackendCompilerFailed, FailOnRecompileLimitHit

    names = [name for name, (part, _) in layers(model).items() if part == "language"]
    # dynamic: the number and the length of rows differ from batch to batch; one graph serves all of them
    compiled = {name: torch.compile(model.get_submodule(name).forward, dynamic=True, backend=backend) for name in names}
    limits = torch._dynamo.config.patch(recompile_limit=MAX_GRAPHS, fail_on_recompile_limit_hit=True)
    try:
        with limits, replace_forwards(model, compiled):
            yield names
    except FailOnRecompileLimitHit as error:
        raise InputError(
            f"--compile: torch.compile needs more than {MAX_GRAPHS} graphs for the layers of this model. "
            "Leave out --compile."
        ) from error
    except BackendCompilerFailed as error:  # compilation happens at the first call, so inside the block
        reason = str(error.inner_exception).splitlines()[0].rstrip(".")
        raise InputError(f"--compile: {reason}. Leave out --compile.") from error
