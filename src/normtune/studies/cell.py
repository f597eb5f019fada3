"""One cell in its directory: train, evaluate, and, last, `result.json`; after a kill it goes on."""

from __future__ import annotations

import fcntl
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from normtune.errors import InputError
from normtune.runtime.environment import environment
from normtune.runtime.files import read_json, write_json
from normtune.runtime.worker_pool import call_safely
from normtune.studies.plan import Cell, Evaluation
from normtune.training.config import TrainConfig

RESULT, ERROR, PROGRESS, BUDGET, SECONDS, LOCK = (
    "result.json", "error.json", "progress.json", "budget.json", "seconds.json", "lock",
)  # fmt: skip
CHECKPOINTS = 8  # about so many in a run
PROGRESS_S = 1.0  # between writes of the progress
Z95 = 1.96  # half of a 95% interval, in standard errors
TIMED_STEPS, UNTIMED_STEPS = 12, 4  # of the run that turns minutes into pairs; the first steps fill caches


@dataclass(frozen=True)
class CellJob:
    """A cell and the study's folder: all that a process anywhere needs."""

    cell: Cell
    out: Path  # absolute

    @property
    def directory(self) -> Path:
        return cell_directory(self.out, self.cell)


def cell_directory(out: Path, cell: Cell) -> Path:
    """Where a cell's files lie."""
    return out / "cells" / cell.key


def is_finished(out: Path, cell: Cell) -> bool:
    """Whether the cell has a result with all of its evaluations."""
    path = cell_directory(out, cell) / RESULT
    if not path.is_file():
        return False
    have = {one["folder"] for one in read_json(path)["evaluations"]}
    return all(one.folder in have for one in cell.evaluations)


@contextmanager
def try_lock(directory: Path) -> Iterator[bool]:
    """Hold a directory's lock, or learn that another process has it; it is let go when its holder ends."""
    directory.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(directory / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True
    finally:
        os.close(descriptor)


def run_cell(work: CellJob) -> str:
    """Do what is missing of a cell: "done"; "busy" where another process is at it; else "failed: WHY".

    A failure is written to `error.json`. An adapter that lies there whole is not trained again.
    """
    with try_lock(work.directory) as mine:
        if not mine:
            return "busy"
        if is_finished(work.out, work.cell):
            return "done"
        (work.directory / ERROR).unlink(missing_ok=True)
        found = call_safely(_run, work)
        if found.error is not None:
            record_failure(work, found.error)
            return f"failed: {found.error}"
        (work.directory / PROGRESS).unlink(missing_ok=True)
        return "done"


def record_failure(work: CellJob, error: str) -> None:
    """Write why a cell failed, in one sentence."""
    write_json(work.directory / ERROR, {"error": error, "at": _now(), **environment()})


def _run(work: CellJob) -> None:
    started = _now()
    training = None if work.cell.train is None else _train(work)
    evaluations = [_evaluate(work, one, training is not None) for one in work.cell.evaluations]
    write_json(
        work.directory / RESULT,
        {
            "key": work.cell.key,
            "training": training,
            "evaluations": evaluations,
            "base_fingerprint": _fingerprint(work),
            "started": started,
            "finished": _now(),
            **environment(),
        },
    )


def _train(work: CellJob) -> dict[str, Any]:
    """Train, or read what was trained.

    Norm adapters that one pass over the base trains together are put under their cells' `adapter/` before the
    cells run: each finds its `train_result.json` here.
    """
    from transformers.utils import logging

    from normtune.data.registry import open_configured
    from normtune.training.train import train

    logging.set_verbosity_error()  # it warns where two checkpoints fall into one second
    adapter = work.directory / "adapter"
    if (adapter / "train_result.json").is_file():
        return _trained(adapter)
    config, budget = work.cell.train, work.cell.budget
    assert config is not None and budget is not None
    pairs = len(config.select(open_configured(config).split(config.split)))
    if "minutes" in budget:
        seen = _pairs_in(work, config, 60 * budget["minutes"])
        epochs = seen / pairs
    else:
        epochs = budget.get("epochs") or budget["pairs"] / pairs
    given = set(work.cell.rates.values())
    config = config.model_copy(
        update={
            "out": adapter,
            "epochs": epochs,
            "lr": given.pop() if len(given) == 1 else None,
            "save_every": max(1, round(epochs * pairs / (config.batch * config.accumulate) / CHECKPOINTS)),
        }
    )
    clock = _clock(work)
    result = train(config, progress=clock)
    seconds = clock.before + result.seconds
    write_json(
        adapter / "train_result.json",
        read_json(adapter / "train_result.json")
        | {"seconds": seconds, "pairs_per_second": result.pairs / seconds, "pairs_available": pairs},
    )
    return _trained(adapter)


def _trained(adapter: Path) -> dict[str, Any]:
    found: dict[str, Any] = read_json(adapter / "train_result.json")
    return {name: value for name, value in found.items() if name != "out"}


def _fingerprint(work: CellJob) -> str | None:
    if work.cell.train is None:
        return None
    from normtune.adapters.storage import read_adapter_info

    return read_adapter_info(work.directory / "adapter").base_fingerprint


def _evaluate(work: CellJob, one: Evaluation, adapted: bool) -> dict[str, Any]:
    """Evaluate, or read what was evaluated: metrics.json without what other files hold."""
    from normtune.evaluation.evaluate import evaluate_config

    folder = work.directory / "evaluations" / one.folder
    if not (folder / "metrics.json").is_file():
        tick = ProgressFile(work.directory / PROGRESS, f"answering {one.dataset}")
        config = one.config.model_copy(
            update={"out": folder, "adapter": work.directory / "adapter" if adapted else None}
        )
        evaluate_config(config, progress=tick)
    found = read_json(folder / "metrics.json")
    kept = (
        "rows",
        "images",
        "split_hash",
        "metrics",
        "normalisation",
        "seconds",
        "pairs_per_second",
        "peak_memory_bytes",
    )
    return {
        "dataset": one.dataset,
        "role": one.role,
        "task": "report"
        if any(name.partition("/")[0].startswith("bleu") for name in found["metrics"])
        else "vqa",
        "split": one.config.split,
        "folder": one.folder,
        **{name: found[name] for name in kept},
    }


class ProgressFile:
    """Writes how far a cell is, for whoever watches; not more often than each second."""

    def __init__(self, path: Path, what: str) -> None:
        self.path, self.what = path, what
        self._last = 0.0

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        if now - self._last >= PROGRESS_S:
            self._last = now
            write_json(self.path, {"what": self.what, "done": done, "total": total})


def _clock(work: CellJob) -> Any:
    """A callback of the training run: tells its progress, and adds up the seconds of runs cut short."""
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        before = 0.0

        def __init__(self) -> None:
            self._told = ProgressFile(work.directory / PROGRESS, "training")

        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self._started = time.perf_counter()
            path = work.directory / SECONDS
            if state.global_step and path.is_file():
                self.before = float(read_json(path).get(str(state.global_step), 0.0))

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self._told(state.global_step, state.max_steps)

        def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            path = work.directory / SECONDS
            seconds = self.before + time.perf_counter() - self._started
            write_json(path, (read_json(path) if path.is_file() else {}) | {str(state.global_step): seconds})

    return Clock()


def _pairs_in(work: CellJob, config: TrainConfig, seconds: float) -> int:
    """How many pairs this machine sees in a time: measured once a cell, for a resumed run to end alike."""
    from transformers import TrainerCallback

    from normtune.training.train import train

    path = work.directory / BUDGET
    if not path.is_file():
        times: list[float] = []

        class Steps(TrainerCallback):
            def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                times.append(time.perf_counter())

        out = work.directory / "timing"
        timed = config.model_copy(
            update={"out": out, "max_steps": TIMED_STEPS, "resume": False, "save_every": 1000}
        )
        result = train(timed, progress=Steps())
        shutil.rmtree(out, ignore_errors=True)
        a_step = (times[-1] - times[UNTIMED_STEPS - 1]) / (len(times) - UNTIMED_STEPS)
        speed = result.pairs / result.steps / a_step
        write_json(
            path, {"seconds": seconds, "pairs_per_second": speed, "pairs": max(1, round(speed * seconds))}
        )
    return int(read_json(path)["pairs"])


def with_absolute_paths(cell: Cell) -> Cell:
    """The cell with its roots and model as absolute paths, where they are folders here."""

    def absolute(config: Any) -> Any:
        root = getattr(config, "root", None)
        model = Path(config.model)
        return config.model_copy(
            update={
                "root": root.absolute() if root is not None and root.exists() else root,
                "model": str(model.absolute()) if model.is_dir() and config.model != "nano" else config.model,
            }
        )

    return replace(
        cell,
        train=cell.train and absolute(cell.train),
        evaluations=tuple(replace(one, config=absolute(one.config)) for one in cell.evaluations),
    )


def failure_reason(out: Path, cell: Cell) -> str | None:
    """Why the cell failed when it was last tried."""
    path = cell_directory(out, cell) / ERROR
    if not path.is_file():
        return None
    found: str = read_json(path)["error"]
    return found


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def validation_score(out: Path, cell: Cell, metric: str | None) -> tuple[float, float]:
    """What a trial came to on the validation split, and the standard error of that.

    Raises:
        InputError: no such metric there.
    """
    found = read_json(cell_directory(out, cell) / RESULT)["evaluations"]
    (one,) = (one for one in found if one["role"] == "validate")
    name = metric or ("global_exact" if one["task"] == "vqa" else "rouge_l/none")
    if name not in one["metrics"]:
        raise InputError(
            f"search.metric: no metric '{name}' of {one['dataset']}; there are {', '.join(one['metrics'])}."
        )
    score = one["metrics"][name]
    return float(score["value"]), (score["high"] - score["low"]) / (2 * Z95)
