"""Processes that torchrun or accelerate started side by side: who this one is, and what they tell each other.

A run without a launcher is one process, the first, and nothing here needs torch.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, TypeVar

from normtune.errors import InputError

Value = TypeVar("Value")
TIMEOUT = timedelta(hours=1)  # for a process that answers or writes longer than the others
REPORT_DELAY = timedelta(seconds=2)  # in which the first process reports a failure that all of them meet
LAUNCHER_WORDS = ("ACCELERATE_", "FSDP_", "PARALLELISM_CONFIG_", "TORCHELASTIC_", "GROUP_", "ROLE_")
LAUNCHER_NAMES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_FAILED = "normtune/failed"


def launched_count() -> int:
    """How many processes a launcher started with this one; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main_process() -> bool:
    """Whether this process writes the files and speaks to people."""
    return int(os.environ.get("RANK", "0")) == 0


def rank() -> int:
    """Which of `count()` processes this one is, from 0."""
    return int(os.environ["RANK"]) if count() > 1 else 0


def count() -> int:
    """How many processes work together: 1 until they have met in `join`."""
    if "torch" not in sys.modules:
        return 1
    import torch.distributed as dist

    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def sharded() -> bool:
    """Whether the launcher asks for FSDP2: each process holds a part of the base."""
    return "LOCAL_RANK" in os.environ and os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true"


def on_cpu(device: str | None) -> bool:
    """Whether a run with this --device computes on the CPU."""
    import torch

    return device == "cpu" or (device is None and not torch.cuda.is_available())


def init_processes(device: str | None) -> None:
    """Meet the other processes, where a launcher started this one; `device` is the run's --device.

    Raises:
        InputError: the launcher asks for something that is not offered, or there are too few GPUs.
    """
    if "LOCAL_RANK" not in os.environ:
        return
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "").lower() == "true":
        raise InputError("DeepSpeed is not offered. Launch with --multi_gpu, or --use_fsdp --fsdp_version 2.")
    if sharded() and os.environ.get("FSDP_VERSION", "1") != "2":
        raise InputError("FSDP is offered in its version 2. Launch with --use_fsdp --fsdp_version 2.")
    if device not in (None, "cpu", "cuda"):
        raise InputError(f"--device {device}: the launcher gives each process its GPU. Leave --device out.")
    # --dtype and the recipe decide the precision; every process reads the base and can tell its structure
    os.environ |= {"ACCELERATE_MIXED_PRECISION": "no", "FSDP_CPU_RAM_EFFICIENT_LOADING": "false"}
    import torch
    from accelerate import PartialState

    cpu = on_cpu(device)
    if not cpu and int(os.environ["LOCAL_RANK"]) >= torch.cuda.device_count():
        raise InputError(
            f"{launched_count()} processes, and {torch.cuda.device_count()} GPUs on this machine. "
            "Start one process a GPU, or say --device cpu."
        )
    os.environ.setdefault("OMP_NUM_THREADS", str(torch.get_num_threads()))  # accelerate warns without it
    PartialState(cpu=cpu, timeout=TIMEOUT)


def all_gather(value: Value) -> list[Value]:
    """What every process gave, in the order of the ranks; all of them call it."""
    if count() == 1:
        return [value]
    import torch.distributed as dist

    found: list[Any] = [None] * count()
    dist.all_gather_object(found, value)
    return found


def broadcast_from_first(make: Callable[[], Value]) -> Value:
    """What the first process makes; the others wait for it. All of them call it."""
    if count() == 1:
        return make()
    return all_gather(make() if is_main_process() else None)[0]  # type: ignore[return-value]


def barrier() -> None:
    """Go on when all processes are here."""
    all_gather(None)


def shut_down() -> None:
    """Part from the other processes, once all is done."""
    if count() > 1:
        import torch.distributed as dist

        dist.destroy_process_group()


# --- Failures -----------------------------------------------------------------------------------------------


def _failures() -> Any:
    """The launcher's own store; None where it has none."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    from torch.distributed import TCPStore

    where = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    try:
        return TCPStore(*where, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=10))
    except RuntimeError:  # the launcher is gone
        return None


def _key() -> str:
    return f"{_FAILED}/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"


def should_report_failure() -> bool:
    """Whether this process is the one that tells people why the run failed: one of them does.

    What all of them meet is told by the first; what one of them meets, by that one. The others leave time for
    it: the launcher ends all processes once one has ended.
    """
    if launched_count() == 1:
        return True
    store = _failures() if "torch" in sys.modules else None  # before, there are faults of the command alone
    if store is None:
        if not is_main_process():
            time.sleep(REPORT_DELAY.total_seconds())
        return is_main_process()
    if not is_main_process():
        with suppress(RuntimeError):  # the first has not told it in that time
            store.wait([_key()], REPORT_DELAY)
    return bool(store.add(_key(), 1) == 1)


def another_failed() -> bool:
    """Whether another process has told people already why the run failed."""
    store = _failures() if launched_count() > 1 and "torch" in sys.modules else None
    return store is not None and bool(store.check([_key()]))


@contextmanager
def lost_process_as_error() -> Iterator[None]:
    """Turns the loss of another process into an error that says what to do.

    Raises:
        InputError: another process was ended.
    """
    try:
        yield
    except RuntimeError as error:
        import torch.distributed as dist

        if count() > 1 and (isinstance(error, dist.DistError) or "gloo" in str(error).lower()):
            raise InputError(
                "another process of the run was ended. Start the same command again: "
                "it goes on from the last whole checkpoint."
            ) from error
        raise


def clear_launcher_env() -> None:
    """Forget the launcher: a process started from here is one of its own."""
    for name in list(os.environ):
        if name.startswith(LAUNCHER_WORDS) or name in LAUNCHER_NAMES:
            del os.environ[name]
