"""CUDA graphs of a decoding step: its kernels are launched together, and not one by one by the host.

A step of a 7B model for a few answers is about 1,600 kernels. Launching them takes the host longer than
computing them takes the GPU. A graph records the launches once and repeats them at a fraction of that time.
"""

from __future__ import annotations

import logging
import threading
import warnings
from collections import Counter
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor, nn

_log = logging.getLogger(__name__)

Step = Callable[[], Tensor]
"""A function of buffers that it changes in place; a graph repeats its kernels on the same memory."""

MIN_REPLAYS = 3  # capturing takes about as long as launching a step, so that fewer replays do not pay

_capture_lock = threading.Lock()
"""Held while work is queued on the capture stream: a capture would record the launches of other threads there."""

fallbacks: Counter[str] = Counter()
"""Why steps ran kernel by kernel although a graph was asked for -> the number of batches."""


class StepGraph:
    """Runs a step again and again: the first time as it is, the second time it is captured, then replayed."""

    def __init__(self) -> None:
        self.failure: str | None = None  # why a step could not be captured; None: none has failed
        self.clear()

    def clear(self) -> None:
        """Free the captured step. It must not be replayed after its buffers or shapes have changed."""
        self.replay: Step | None = None
        self.is_warm = False

    def run(self, step: Step, remaining: int, device: torch.device) -> Tensor:
        """Run the step once; the next call may overwrite the result.

        A step that cannot be captured runs as it is, which is reported.

        Args:
            remaining: how often it will be run after this, at most.
        """
        if self.replay is None and self.is_warm and self.failure is None and remaining >= MIN_REPLAYS:
            try:
                self.replay = capture(step, device)
            except Exception as error:
                self.failure = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
                report_fallback(self.failure)
        if self.replay is not None:
            return self.replay()
        self.is_warm = True
        return run_on_capture_stream(step, device)


def report_fallback(reason: str) -> None:
    """Count a batch that runs kernel by kernel; each reason is logged the first time."""
    if not fallbacks[reason]:
        _log.warning("decoding without CUDA graphs, which is slower: %s", reason)
    fallbacks[reason] += 1


def graph_obstacle(model: nn.Module) -> str | None:
    """Why the steps of a model must not be captured; None if they can be."""
    if model.training:
        return "the model is in training mode"
    for name, module in model.named_modules():
        if module._forward_hooks or module._forward_pre_hooks or hasattr(module, "_hf_hook"):
            return f"{name or type(module).__name__} has hooks, which a graph would not call"
        if module._compiled_call_impl is not None:
            return f"{name or type(module).__name__} is compiled"
    if any(type(parameter) is not nn.Parameter for parameter in model.parameters()):
        return "the model is quantised"
    return None


def capture(step: Step, device: torch.device) -> Step:
    """Record a step without running it; the returned function runs it and overwrites its former result.

    Only CUDA has graphs: elsewhere the function calls the step again, which gives the same if the step can be
    captured.
    """
    if device.type != "cuda":
        return step
    graph = torch.cuda.CUDAGraph()

    def record() -> Tensor:
        # other threads, such as a server's, may allocate memory meanwhile
        graph.capture_begin(pool=_empty_graph(device).pool(), capture_error_mode="thread_local")
        try:
            return step()
        finally:
            graph.capture_end()

    result = run_on_capture_stream(record, device)

    def replay() -> Tensor:
        graph.replay()
        return result

    return replay


def run_on_capture_stream(step: Step, device: torch.device) -> Tensor:
    """Run a step where it will be captured, so that libraries set up there what a capture does not allow."""
    if device.type != "cuda":
        return step()
    stream, current = _capture_stream(device), torch.cuda.current_stream(device)
    with _capture_lock:
        _empty_graph(device)
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            result = step()
        current.wait_stream(stream)
    return result


@cache
def _capture_stream(device: torch.device) -> torch.cuda.Stream:
    """The stream of all captures of a device; one, since libraries allocate a workspace for each stream."""
    return torch.cuda.Stream(device)


@cache
def _empty_graph(device: torch.device) -> torch.cuda.CUDAGraph:
    """A graph that keeps the memory of captures: without it, each capture would allocate new memory."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(_capture_stream(device)), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the graph is empty
        graph.capture_begin(capture_error_mode="thread_local")
        graph.capture_end()
    return graph
