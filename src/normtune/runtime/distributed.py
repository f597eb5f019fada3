"""Distributed processes under a launcher (torchrun, accelerate): their rank, and what they exchange.

A run without a launcher is a single process, the main process; then no function here needs torch.
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
TIMEOUT = timedelta(hours=1)  # for a collective operation: one process may answer or write longer than others
REPORT_DELAY = timedelta(seconds=2)  # the time that other processes give the main process to report
# environment variables that a launcher sets: prefixes and whole names
LAUNCHER_PREFIXES = ("ACCELERATE_", "FSDP_", "PARALLELISM_CONFIG_", "TORCHELASTIC_", "GROUP_", "ROLE_")
LAUNCHER_NAMES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_FAILURE_KEY = "normtune/failed"  # in the launcher's store: how many processes wanted to report a failure


def launched_count() -> int:
    """Number of processes that the launcher started, this one included; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main_process() -> bool:
    """Whether this process writes files and prints; exactly one process does."""
    return int(os.environ.get("RANK", "0")) == 0


def rank() -> int:
    """The rank of this process in the process group, from 0 to `world_size() - 1`."""
    return int(os.environ["RANK"]) if world_size() > 1 else 0


def world_size() -> int:
    """Number of processes in the process group; 1 until `init_processes` has created it."""
    if "torch" not in sys.modules:  # no group without torch, and importing it takes seconds
        return 1
    import torch.distributed as dist

    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def is_sharded() -> bool:
    """Whether the launcher asks for FSDP2, where each process holds a shard of the base."""
    return "LOCAL_RANK" in os.environ and os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true"


def runs_on_cpu(device: str | None) -> bool:
    """Whether a run with this --device computes on the CPU."""
    import torch

    return device == "cpu" or (device is None and not torch.cuda.is_available())


def init_processes(device: str | None) -> None:
    """Create the process group; without a launcher do nothing.

    Args:
        device: the run's --device.

    Raises:
        InputError: the launcher asks for something that is not supported, or there are too few GPUs.
    """
    if "LOCAL_RANK" not in os.environ:
        return
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "").lower() == "true":
        raise InputError("DeepSpeed is not supported. Launch with --multi_gpu, or --use_fsdp --fsdp_version 2.")
    if is_sharded() and os.environ.get("FSDP_VERSION", "1") != "2":
        raise InputError("only version 2 of FSDP is supported. Launch with --use_fsdp --fsdp_version 2.")
    if device not in (None, "cpu", "cuda"):
        raise InputError(f"--device {device}: the launcher gives each process its GPU. Remove --device.")
    # --dtype and the recipe decide the precision, not accelerate; every process reads the base, so that it
    # knows the base's structure
    os.environ |= {"ACCELERATE_MIXED_PRECISION": "no", "FSDP_CPU_RAM_EFFICIENT_LOADING": "false"}
    import torch
    from accelerate import PartialState

    cpu = runs_on_cpu(device)
    if not cpu and int(os.environ["LOCAL_RANK"]) >= torch.cuda.device_count():
        raise InputError(
            f"{launched_count()} processes, but {torch.cuda.device_count()} GPUs on this machine. "
            "Start one process for each GPU, or give --device cpu."
        )
    os.environ.setdefault("OMP_NUM_THREADS", str(torch.get_num_threads()))  # accelerate warns without it
    PartialState(cpu=cpu, timeout=TIMEOUT)  # creates the process group: NCCL on GPUs, Gloo on CPUs


def all_gather(value: Value) -> list[Value]:
    """Collect a value from every process, in the order of the ranks. Every process must call this."""
    if world_size() == 1:
        return [value]
    import torch.distributed as dist

    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def broadcast_from_first(make: Callable[[], Value]) -> Value:
    """Compute a value in the main process and send it to all others. Every process must call this."""
    if world_size() == 1:
        return make()
    return all_gather(make() if is_main_process() else None)[0]  # type: ignore[return-value]


def barrier() -> None:
    """Wait until every process has called this."""
    all_gather(None)


def shut_down() -> None:
    """Destroy the process group at the end of the run."""
    if world_size() > 1:
        import torch.distributed as dist

        dist.destroy_process_group()


# --- Failures: of all processes that fail, one prints the reason --------------------------------------------


def _launcher_store() -> Any:
    """The launcher's key-value store, which works without a process group; None if it has none."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    from torch.distributed import TCPStore

    address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    try:
        return TCPStore(*address, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=10))
    except RuntimeError:  # the launcher has ended
        return None


def _failure_key() -> str:
    """The key of this start of the processes; torchrun can restart them with the same store."""
    return f"{_FAILURE_KEY}/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"


def should_report_failure() -> bool:
    """Whether this process prints why the run failed; exactly one process does.

    If all processes fail, the main process prints the reason; if one fails, that one does. The others wait
    for `REPORT_DELAY` before they end, because the launcher kills all processes once one has ended.
    """
    if launched_count() == 1:
        return True
    # before torch is imported only the command line can be wrong, which every process notices
    store = _launcher_store() if "torch" in sys.modules else None
    if store is None:
        if not is_main_process():
            time.sleep(REPORT_DELAY.total_seconds())
        return is_main_process()
    if not is_main_process():
        with suppress(RuntimeError):  # the main process has not reported the failure in that time
            store.wait([_failure_key()], REPORT_DELAY)
    return bool(store.add(_failure_key(), 1) == 1)  # the first process to add 1 prints the reason


def has_another_failed() -> bool:
    """Whether another process has printed already why the run failed."""
    store = _launcher_store() if launched_count() > 1 and "torch" in sys.modules else None
    return store is not None and bool(store.check([_failure_key()]))


@contextmanager
def lost_process_as_error() -> Iterator[None]:
    """Convert the communication error after the loss of another process into an `InputError` with advice."""
    try:
        yield
    except RuntimeError as error:
        import torch.distributed as dist

        if world_size() > 1 and (
            isinstance(error, dist.DistError) or any(name in str(error).lower() for name in ("gloo", "nccl"))
        ):
            raise InputError(
                "another process of the run has ended. Run the same command again: "
                "it resumes from the last complete checkpoint."
            ) from error
        raise


def clear_launcher_env() -> None:
    """Remove the launcher's environment variables, so that child processes run without a launcher."""
    for name in list(os.environ):
        if name.startswith(LAUNCHER_PREFIXES) or name in LAUNCHER_NAMES:
            del os.environ[name]
