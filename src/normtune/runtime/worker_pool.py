"""Calls side by side, each in a process of its own: one's memory, failure or end is not another's."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess, parent_process
from pathlib import Path
from typing import Any, TypeVar, cast

from normtune.errors import InputError
from normtune.runtime import distributed

T = TypeVar("T")
POLL_S = 1.0  # between calls of `tick`


@dataclass(frozen=True)
class CallResult:
    """What a call returned, or why it did not, in one sentence."""

    value: Any = None
    error: str | None = None


def call_safely(call: Callable[[T], Any], argument: T) -> CallResult:
    """Call, and tell a failure in one sentence: the words of an `InputError`, else where it was raised."""
    try:
        return CallResult(call(argument))
    except InputError as error:
        return CallResult(error=" ".join(str(error).split()))
    except Exception as error:
        frame = error.__traceback__
        while frame is not None and frame.tb_next is not None:
            frame = frame.tb_next
        where = f" at {Path(frame.tb_frame.f_code.co_filename).name}:{frame.tb_lineno}" if frame else ""
        words = " ".join(str(error).split())[:300]
        return CallResult(error=f"{type(error).__name__}{where}: {words or 'no message'}")


def run_in_processes(
    call: Callable[[T], Any],
    arguments: Iterable[T],
    workers: int,
    *,
    threads: int = 1,
    tick: Callable[[], None] | None = None,
) -> Iterator[tuple[T, CallResult]]:
    """Call with each argument, `workers` at once; yields arguments with their outcomes as they end.

    The processes are forked from one that has imported the libraries and done nothing else: they start at
    once, and no call's memory counts in another's peak. They end with this process, however it ends.

    Args:
        call: a function of a module.
        arguments: taken when a process is free.
        workers: how many at once.
        threads: torch's, of each; fewer where OMP_NUM_THREADS says so.
        tick: called about every second while calls run.

    Raises:
        InputError: a launcher started several processes, each of which would make all calls.
    """
    if distributed.launched_count() > 1:
        raise InputError("this starts processes of its own. Run it without torchrun or accelerate launch.")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["normtune.training.train", "normtune.evaluation.evaluate", "normtune.models.families.miss"]
    )
    left = iter(arguments)
    running: dict[Connection, tuple[BaseProcess, T]] = {}
    try:
        while True:
            while len(running) < workers:
                try:
                    argument = next(left)
                except StopIteration:
                    break
                receiver, sender = context.Pipe(duplex=False)
                process = context.Process(target=_work, args=(call, argument, sender, threads), daemon=True)
                process.start()
                sender.close()
                running[receiver] = (process, argument)
            if not running:
                return
            for ready in wait(list(running), timeout=POLL_S):
                receiver = cast(Connection, ready)
                ended, argument = running.pop(receiver)
                yield argument, _received(receiver, ended)
            if tick is not None:
                tick()
    finally:
        for left_over, _ in running.values():
            left_over.kill()
            left_over.join()


def _received(receiver: Connection, process: BaseProcess) -> CallResult:
    try:
        found: CallResult = receiver.recv()
    except (EOFError, OSError):
        process.join()
        code = process.exitcode or 0
        how = f"was killed by signal {-code}" if code < 0 else f"ended with status {code}"
        return CallResult(error=f"its process {how}. Where memory ran out, run fewer side by side.")
    finally:
        receiver.close()
    process.join()
    return found


def _work(call: Callable[[T], Any], argument: T, sender: Connection, threads: int) -> None:
    parent = parent_process()
    assert parent is not None
    threading.Thread(target=_end_with, args=(parent.sentinel,), daemon=True).start()
    distributed.clear_launcher_env()
    import torch

    torch.set_num_threads(min(threads, torch.get_num_threads()))
    found = call_safely(call, argument)
    with suppress(BrokenPipeError):
        sender.send(found)


def _end_with(sentinel: int) -> None:
    """Leave when the process that asked for the work has ended, by SIGKILL too."""
    wait([sentinel])
    os._exit(1)


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
