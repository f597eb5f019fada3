"""Timing, memory and failures of the GPU benchmark's measurements; it imports only torch."""

from __future__ import annotations

import gc
import signal
import statistics
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

MIB = 2**20
OPTIONAL_PACKAGES = ("bitsandbytes", "peft")  # a measurement without its package is left out, not failed


class TimeLimitReached(BaseException):
    """The time of a part is over. No Exception, so that no library handles it as a fault of its code."""


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise `TimeLimitReached` in the block after `seconds`, between two Python instructions.

    A call that stays outside Python, such as one long kernel, ends first. The caller's timer and handler of
    SIGALRM (pytest has one) are restored, its timer with the time that passed taken off.
    """

    def stop(*_: Any) -> None:
        raise TimeLimitReached

    began = time.perf_counter()
    handler = signal.signal(signal.SIGALRM, stop)
    left, interval = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
        if left:
            passed = time.perf_counter() - began
            signal.setitimer(signal.ITIMER_REAL, max(left - passed, 1e-3), interval)


def synchronize() -> None:
    """Wait until the GPU has finished all queued work."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def free_memory() -> None:
    """Collect dead tensors and return their memory to the GPU."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def measure(
    run: Callable[[], Any], pairs: int, *, steps: int = 5, seconds: float = 8.0, warmup: int = 1
) -> dict[str, Any]:
    """Median time and peak memory of a step, after `warmup` steps that are not counted.

    Args:
        run: the step.
        pairs: question-answer pairs that one step processes.
        steps: how many are timed at most.
        seconds: no further step begins after this time.

    Returns:
        pairs, steps, step_ms, pairs_per_s; host_ms, the time until the host has queued the step: if it is
        close to step_ms, the GPU waits for the host. On a GPU also peak_mib, step_mib (the memory of a step
        besides the weights and the optimizer's state) and step_mib_per_pair.
    """
    cuda = torch.cuda.is_available()
    for _ in range(warmup):
        run()
    synchronize()
    before = torch.cuda.memory_allocated() if cuda else 0
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    times: list[float] = []
    host_times: list[float] = []
    began = time.perf_counter()
    while len(times) < steps and (not times or time.perf_counter() - began < seconds):
        step_began = time.perf_counter()
        run()
        host_times.append(time.perf_counter() - step_began)
        synchronize()
        times.append(time.perf_counter() - step_began)
    figures: dict[str, Any] = {
        "pairs": pairs,
        "steps": len(times),
        "step_ms": round(1e3 * statistics.median(times), 2),
        "host_ms": round(1e3 * statistics.median(host_times), 2),
        "pairs_per_s": round(pairs / statistics.median(times), 2),
    }
    if cuda:
        peak = torch.cuda.max_memory_allocated()
        figures |= {
            "peak_mib": round(peak / MIB),
            "step_mib": round((peak - before) / MIB),
            "step_mib_per_pair": round((peak - before) / pairs / MIB, 1),
        }
    return figures


def host_waits(run: Callable[[], Any]) -> dict[str, int] | None:
    """How often the host waits for the GPU in one run, by "file:line"; None without a GPU."""
    if not torch.cuda.is_available():
        return None
    with warnings.catch_warnings(record=True) as messages:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            run()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return dict(
        Counter(
            f"{Path(message.filename).name}:{message.lineno}"
            for message in messages
            # the mode itself warns too, once, that it is a prototype
            if "called a synchronizing" in str(message.message)
        )
    )


def attempt(run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The figures of one measurement, or the reason why there are none.

    A measurement that fails does not affect the others of its part: {"error": reason, "at": "file:line"}. One
    that needs an optional package which is not installed gives {"missing": package}.
    """
    try:
        return run()
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        return {"missing": package} if package in OPTIONAL_PACKAGES else failure(error)
    except Exception as error:
        return failure(error)
    finally:
        free_memory()


def failure(error: Exception) -> dict[str, str]:
    """The reason of a failure in one line, and the line of code that raised it."""
    message = (str(error).splitlines() or [""])[0][:200]
    kind = "out of memory" if isinstance(error, torch.OutOfMemoryError) else type(error).__name__
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return {"error": f"{kind}: {message}", "at": f"{Path(frame.filename).name}:{frame.lineno}"}
