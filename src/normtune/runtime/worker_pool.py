"""Runs calls in parallel, each in a new process: memory, errors and crashes of one do not affect others."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess, parent_process
from pathlib import Path
from typing import Any, TypeVar, cast

from normtune.errors import InputError
from normtune.runtime import distributed

T = TypeVar("T")
POLL_S = 1.0  # seconds between calls of `tick`


@dataclass(frozen=True)
class CallResult:
    """What a call returned, or the reason why it failed, in one sentence."""

    value: Any = None
    error: str | None = None


def call_safely(call: Callable[[T], Any], argument: T) -> CallResult:
    """Run a call and catch its exception.

    Returns:
        The result, or an error in one sentence: the message of an `InputError`; for any other exception also
        its type, and the file and line where it was raised.
    """
    try:
        return CallResult(call(argument))
    except InputError as error:
        return CallResult(error=" ".join(str(error).split()))
    except Exception as error:
        frame = error.__traceback__
        while frame is not None and frame.tb_next is not None:
            frame = frame.tb_next
        location = f" at {Path(frame.tb_frame.f_code.co_filename).name}:{frame.tb_lineno}" if frame else ""
        message = " ".join(str(error).split())[:300]
        return CallResult(error=f"{type(error).__name__}{location}: {message or 'no message'}")


def run_in_processes(
    call: Callable[[T], Any], arguments: Iterable[T], workers: int, *, tick: Callable[[], None] | None = None
) -> Iterator[tuple[T, CallResult]]:
    """Call a function with each argument, in up to `workers` processes at a time, each with one thread.

    Each call gets a new process, forked from a server process that has only imported the libraries. So it
    starts quickly, and its peak memory does not include that of other calls. The processes end with this one,
    even if it is killed.

    Args:
        call: a function at the top level of a module, so that it can be pickled.
        arguments: consumed as processes become free.
        workers: maximum number of processes at a time.
        tick: called about every second while calls run.

    Yields:
        (argument, result) as the calls end, in any order.

    Raises:
        InputError: a launcher started several processes, each of which would run all calls.
    """
    if distributed.launched_count() > 1:
        raise InputError("this starts its own processes. Run it without torchrun or accelerate launch.")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["normtune.training.train", "normtune.evaluation.evaluate", "normtune.models.families.miss"]
    )
    remaining = iter(arguments)
    running: dict[Connection, tuple[BaseProcess, T]] = {}
    try:
        while True:
            for argument in islice(remaining, workers - len(running)):
                receiver, sender = context.Pipe(duplex=False)
                process = context.Process(target=_run, args=(call, argument, sender), daemon=True)
                process.start()
                sender.close()  # only the child's copy stays open: its end is then noticed here
                running[receiver] = (process, argument)
            if not running:
                return
            for ready in wait(list(running), timeout=POLL_S):
                receiver = cast(Connection, ready)
                ended, argument = running.pop(receiver)
                yield argument, _receive_result(receiver, ended)
            if tick is not None:
                tick()
    finally:
        for unfinished, _ in running.values():  # the caller stopped, or an error was raised
            unfinished.kill()
            unfinished.join()


def _receive_result(receiver: Connection, process: BaseProcess) -> CallResult:
    """The result that a process sent, or an error if it ended without one."""
    try:
        result: CallResult = receiver.recv()
    except (EOFError, OSError):
        process.join()
        code = process.exitcode or 0
        how = f"was killed by signal {-code}" if code < 0 else f"ended with status {code}"
        return CallResult(error=f"its process {how}. If memory ran out, run fewer in parallel.")
    finally:
        receiver.close()
    process.join()
    return result


def _run(call: Callable[[T], Any], argument: T, sender: Connection) -> None:
    """The main function of a worker process."""
    parent = parent_process()
    assert parent is not None
    threading.Thread(target=_exit_with_parent, args=(parent.sentinel,), daemon=True).start()
    distributed.clear_launcher_env()
    import torch

    torch.set_num_threads(1)  # sums of floats then do not depend on the number of cores
    result = call_safely(call, argument)
    with suppress(BrokenPipeError):  # the parent has ended
        sender.send(result)


def _exit_with_parent(sentinel: int) -> None:
    """Wait for the end of the parent process, even by SIGKILL, and exit."""
    wait([sentinel])
    os._exit(1)


def count_cores() -> int:
    """The number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
