"""Executors: where the cells of a study run. Local processes, Ray tasks, or SLURM jobs submitted by submitit.

All machines must be able to read and write the study's folder.
"""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from normtune.errors import InputError, did_you_mean
from normtune.runtime.worker_pool import POLL_S, CallResult, call_safely, run_in_processes
from normtune.studies.cell import CellJob

GPUS_VARIABLE = "NORMTUNE_STUDY_GPUS"  # GPUs of each cell, for Ray; 0 by default
SLURM_VARIABLE = "NORMTUNE_SLURM"  # parameters of submitit: "timeout_min=600 slurm_partition=gpu"
CLUSTER_VARIABLE = "NORMTUNE_SUBMITIT_CLUSTER"  # "local" runs the jobs without SLURM, for tests
EXECUTOR_NAMES = ("local", "ray", "slurm")
Call = Callable[[CellJob], str]  # `run_cell`
Tick = Callable[[], None] | None  # is called about once a second while jobs run
JobOutcomes = Iterator[tuple[CellJob, CallResult]]
# Calls the function with each job, at most so many at once, and yields the outcomes as the jobs end. The jobs are an
# iterator that is advanced only when a worker is free; the path is the study's folder.
Executor = Callable[[Call, Iterable[CellJob], int, Tick, Path], JobOutcomes]


def _call_with_one_thread(call: Call, job: CellJob) -> CallResult:
    """Call in a process that runs this call only, with one thread as in local processes."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import torch

    torch.set_num_threads(1)
    return call_safely(call, job)


def on_ray() -> Executor:
    """An executor of Ray tasks with one core each, a process for each cell.

    Ray uses the cluster of RAY_ADDRESS, or starts one on this machine.

    Raises:
        InputError: ray is not installed.
    """
    try:
        import ray
    except ImportError as error:
        raise InputError("--on ray: ray is not installed. pip install 'normtune[ray]'.") from error

    def execute(call: Call, jobs: Iterable[CellJob], workers: int, tick: Tick, folder: Path) -> JobOutcomes:
        if not ray.is_initialized():
            ray.init(log_to_driver=False, include_dashboard=False, logging_level="error", configure_logging=False)
        gpus = float(os.environ.get(GPUS_VARIABLE, "0"))
        # max_calls=1: a new process for each cell, so that its peak memory is its own
        task = ray.remote(num_cpus=1, num_gpus=gpus, max_calls=1, max_retries=0)(_call_with_one_thread)

        def wait(running: list[Any]) -> list[Any]:
            return ray.wait(running, num_returns=1, timeout=POLL_S)[0]

        def receive(reference: Any) -> CallResult:
            try:
                return ray.get(reference)
            except ray.exceptions.RayError as error:
                return CallResult(error=f"its Ray task failed: {type(error).__name__}")

        return _run_remotely(jobs, workers, tick, lambda job: task.remote(call, job), wait, receive)

    return execute


def on_slurm() -> Executor:
    """An executor of SLURM jobs with one core each; NORMTUNE_SLURM adds parameters of submitit.

    Raises:
        InputError: submitit is not installed, or a parameter is not written NAME=VALUE.
    """
    try:
        import submitit
    except ImportError as error:
        raise InputError("--on slurm: submitit is not installed. pip install 'normtune[slurm]'.") from error
    parameters: dict[str, Any] = {"timeout_min": 24 * 60, "cpus_per_task": 1, "name": "normtune"}
    for setting in os.environ.get(SLURM_VARIABLE, "").split():
        name, equals, value = setting.partition("=")
        if not equals:
            raise InputError(f"{SLURM_VARIABLE}: '{setting}' is not NAME=VALUE, such as slurm_partition=gpu.")
        parameters[name] = int(value) if value.isdecimal() else value

    def wait(running: list[Any]) -> list[Any]:
        if not (finished := [job for job in running if job.done()]):
            time.sleep(POLL_S)
        return finished

    def receive(submitted: Any) -> CallResult:
        try:
            return submitted.result()
        except Exception as error:
            return CallResult(error=f"its SLURM job {submitted.job_id} failed: {type(error).__name__}")

    def execute(call: Call, jobs: Iterable[CellJob], workers: int, tick: Tick, folder: Path) -> JobOutcomes:
        slurm = submitit.AutoExecutor(folder=folder / "slurm" / "%j", cluster=os.environ.get(CLUSTER_VARIABLE, "slurm"))
        slurm.update_parameters(**parameters)
        submit = functools.partial(slurm.submit, _call_with_one_thread, call)
        return _run_remotely(jobs, workers, tick, submit, wait, receive)

    return execute


def _run_remotely(
    jobs: Iterable[CellJob],
    workers: int,
    tick: Tick,
    submit: Callable[[CellJob], Any],
    wait: Callable[[list[Any]], list[Any]],
    receive: Callable[[Any], CallResult],
) -> JobOutcomes:
    """Keep up to `workers` jobs submitted; yield each with its result.

    Args:
        submit: starts a job and returns its handle.
        wait: the handles, of those that run, of jobs that have ended; it returns after about a second.
        receive: the result of an ended job.
    """
    waiting, running = iter(jobs), dict[Any, CellJob]()
    while True:
        for job in islice(waiting, workers - len(running)):
            running[submit(job)] = job
        if not running:
            return
        for ended in wait(list(running)):
            yield running.pop(ended), receive(ended)
        if tick is not None:
            tick()


def get_executor(on: str) -> Executor:
    """The executor of a name: local, ray or slurm; an `InputError` for another name, or without its package."""
    if on == "local":
        return lambda call, jobs, workers, tick, folder: run_in_processes(call, jobs, workers, tick=tick)
    if on not in EXECUTOR_NAMES:
        hint = did_you_mean(on, EXECUTOR_NAMES) or "."
        raise InputError(f"--on {on}: unknown{hint} Known: {', '.join(EXECUTOR_NAMES)}.")
    return on_ray() if on == "ray" else on_slurm()
