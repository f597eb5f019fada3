"""The same cells on other machines: Ray tasks, or SLURM jobs by submitit. All see the study's folder."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol

from normtune.errors import InputError, did_you_mean
from normtune.runtime.worker_pool import POLL_S, CallResult, call_safely, run_in_processes
from normtune.studies.cell import CellJob

GPUS_VARIABLE = "NORMTUNE_STUDY_GPUS"  # of each cell; 0 by default
SLURM_VARIABLE = "NORMTUNE_SLURM"  # parameters of submitit, such as "timeout_min=600 slurm_partition=gpu"
CLUSTER_VARIABLE = "NORMTUNE_SUBMITIT_CLUSTER"  # "local" tries it without SLURM


def _call_in_own_process(call: Callable[[CellJob], str], work: CellJob) -> CallResult:
    """A call in a process that has no other: one thread, as on one machine."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import torch

    torch.set_num_threads(1)
    return call_safely(call, work)


def on_ray() -> Executor:
    """Ray tasks of one core each, on the cluster of RAY_ADDRESS or one of this machine; a process a cell.

    Raises:
        InputError: ray is not installed.
    """
    try:
        import ray
    except ImportError as error:
        raise InputError("--on ray: ray is not installed. pip install 'normtune[ray]'.") from error

    def execute(
        call: Callable[[CellJob], str],
        works: Iterable[CellJob],
        workers: int,
        *,
        tick: Callable[[], None] | None,
        folder: Path,
    ) -> JobResults:
        if not ray.is_initialized():
            ray.init(
                log_to_driver=False, include_dashboard=False, logging_level="error", configure_logging=False
            )
        gpus = float(os.environ.get(GPUS_VARIABLE, "0"))
        task = ray.remote(num_cpus=1, num_gpus=gpus, max_calls=1, max_retries=0)(_call_in_own_process)
        left, running = iter(works), dict[Any, CellJob]()
        while True:
            while len(running) < workers and (work := next(left, None)) is not None:
                running[task.remote(call, work)] = work
            if not running:
                return
            ready, _ = ray.wait(list(running), num_returns=1, timeout=POLL_S)
            for one in ready:
                work = running.pop(one)
                try:
                    yield work, ray.get(one)
                except ray.exceptions.RayError as error:
                    yield work, CallResult(error=f"its Ray task ended: {type(error).__name__}")
            if tick is not None:
                tick()

    return execute


def on_slurm() -> Executor:
    """SLURM jobs of one core each; their parameters are those of submitit in NORMTUNE_SLURM.

    Raises:
        InputError: submitit is not installed, or a parameter is not written NAME=VALUE.
    """
    try:
        import submitit
    except ImportError as error:
        raise InputError("--on slurm: submitit is not installed. pip install 'normtune[slurm]'.") from error
    given: dict[str, Any] = {"timeout_min": 24 * 60, "cpus_per_task": 1, "name": "normtune"}
    for word in os.environ.get(SLURM_VARIABLE, "").split():
        name, sign, value = word.partition("=")
        if not sign:
            raise InputError(f"{SLURM_VARIABLE}: '{word}' is not NAME=VALUE, such as slurm_partition=gpu.")
        given[name] = int(value) if value.isdecimal() else value

    def execute(
        call: Callable[[CellJob], str],
        works: Iterable[CellJob],
        workers: int,
        *,
        tick: Callable[[], None] | None,
        folder: Path,
    ) -> JobResults:
        jobs = submitit.AutoExecutor(
            folder=folder / "slurm" / "%j", cluster=os.environ.get(CLUSTER_VARIABLE, "slurm")
        )
        jobs.update_parameters(**given)
        left, running = iter(works), list[tuple[Any, CellJob]]()
        while True:
            while len(running) < workers and (work := next(left, None)) is not None:
                running.append((jobs.submit(_call_in_own_process, call, work), work))
            if not running:
                return
            ended = [pair for pair in running if pair[0].done()]
            for job, work in ended:
                running.remove((job, work))
                try:
                    yield work, job.result()
                except Exception as error:
                    yield work, CallResult(error=f"its SLURM job {job.job_id} ended: {type(error).__name__}")
            if tick is not None:
                tick()
            if not ended:
                time.sleep(POLL_S)

    return execute


PLACES = ("local", "ray", "slurm")
JobResults = Iterator[tuple[CellJob, CallResult]]


class Executor(Protocol):
    """Calls `run_cell` with each work, several at once; yields the outcomes as they come."""

    def __call__(
        self,
        call: Callable[[CellJob], str],
        works: Iterable[CellJob],
        workers: int,
        *,
        tick: Callable[[], None] | None,
        folder: Path,
    ) -> JobResults: ...


def run_locally(
    call: Callable[[CellJob], str],
    works: Iterable[CellJob],
    workers: int,
    *,
    tick: Callable[[], None] | None,
    folder: Path,
) -> JobResults:
    """On this machine, a process a cell, one thread each: sums of floats then do not depend on the cores."""
    return run_in_processes(call, works, workers, tick=tick)


def get_executor(on: str) -> Executor:
    """Where cells run.

    Raises:
        InputError: no such place, or its package is not installed.
    """
    if on == "local":
        return run_locally
    if on not in PLACES:
        raise InputError(f"--on {on}: unknown{did_you_mean(on, PLACES) or '.'} Known: {', '.join(PLACES)}.")
    return on_ray() if on == "ray" else on_slurm()
