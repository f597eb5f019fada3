"""Runs one cell of a study in its own folder: train, evaluate, and write `result.json` last.

A cell that was interrupted resumes from its last checkpoint; what is finished is read again.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from normtune.errors import InputError
from normtune.runtime.environment import environment
from normtune.runtime.files import read_json, try_lock, write_json
from normtune.runtime.worker_pool import call_safely
from normtune.studies.changes import RESULT, TRAINING, read_result, record_rows
from normtune.studies.plan import Cell, Evaluation
from normtune.training.config import TrainConfig

# Files in a cell's folder besides its result: why it failed, its progress while it runs, the pairs that its minutes
# allow, and the lock of the process that runs it.
ERROR, PROGRESS, BUDGET, LOCK = "error.json", "progress.json", "budget.json", "lock"
CHECKPOINTS = 8  # approximate number of checkpoints in one run
PROGRESS_S = 1.0  # least seconds between two writes of the progress file
Z95 = 1.96  # half the width of a 95% interval, in standard errors
# Steps of the short run that measures pairs per second; the first four fill caches and are not timed.
TIMED_STEPS, UNTIMED_STEPS = 12, 4


@dataclass(frozen=True)
class CellJob:
    """A cell and the study's folder: all that a process on any machine needs to run the cell."""

    cell: Cell
    out: Path  # the study's folder, absolute

    @property
    def directory(self) -> Path:
        """The cell's folder."""
        return self.cell.directory(self.out)


def is_finished(out: Path, cell: Cell) -> bool:
    """Whether the cell has a result file with all of its evaluations."""
    result_file = cell.directory(out) / RESULT
    if not result_file.is_file():
        return False
    finished_folders = {evaluation["folder"] for evaluation in read_result(result_file.parent)["evaluations"]}
    return all(evaluation.folder in finished_folders for evaluation in cell.evaluations)


def run_cell(job: CellJob) -> str:
    """Run whatever is missing of a cell and write its result.

    A failure is written to `error.json`. A finished adapter in the cell's folder is not trained again.

    Returns:
        "done"; "busy" if another process holds the cell's lock; "failed: REASON" otherwise.
    """
    with try_lock(job.directory / LOCK) as acquired:
        if not acquired:
            return "busy"
        if is_finished(job.out, job.cell):
            return "done"
        (job.directory / ERROR).unlink(missing_ok=True)
        outcome = call_safely(_train_and_evaluate, job)
        if outcome.error is not None:
            record_failure(job, outcome.error)
            return f"failed: {outcome.error}"
        (job.directory / PROGRESS).unlink(missing_ok=True)
        return "done"


def record_failure(job: CellJob, error: str) -> None:
    """Write the reason why a cell failed, one sentence, to `error.json`."""
    write_json(job.directory / ERROR, {"error": error, "at": _now(), **environment()})


def _train_and_evaluate(job: CellJob) -> None:
    """Train and evaluate one cell, and write its `result.json`."""
    started = _now()
    training = None if job.cell.train is None else _train_or_read(job)
    evaluations = [_evaluate_or_read(job, evaluation, training is not None) for evaluation in job.cell.evaluations]
    write_json(
        job.directory / RESULT,
        {
            "key": job.cell.key,
            "training": training,
            "evaluations": evaluations,
            "base_fingerprint": _base_fingerprint(job),
            "started": started,
            "finished": _now(),
            **environment(),
        },
    )


def _train_or_read(job: CellJob) -> dict[str, Any]:
    """Train the cell, or read the result of a finished training."""
    from transformers.utils import logging

    from normtune.training.setup import read_examples
    from normtune.training.train import train

    logging.set_verbosity_error()  # it warns if two checkpoints are saved within one second
    adapter = job.directory / "adapter"
    if (adapter / "train_result.json").is_file():
        return _read_training_result(adapter)
    config, budget = job.cell.train, job.cell.budget
    assert config is not None and budget is not None
    record_rows(job.directory, TRAINING, config)
    # The budget is in minutes, passes or pairs: convert it to passes over the data.
    pairs = len(read_examples(config)[1])
    if "minutes" in budget:
        pairs_to_see = _pairs_within(job, config, 60 * budget["minutes"])
        epochs = pairs_to_see / pairs
    else:
        epochs = job.cell.passes or budget["pairs"] / pairs
    rates = set(job.cell.rates.values())
    config = config.model_copy(
        update={
            "out": adapter,
            "epochs": epochs,
            # a rate that all methods share is passed on; with None each method has its default
            "lr": rates.pop() if len(rates) == 1 else None,
            "save_every": max(1, round(epochs * pairs / (config.batch * config.accumulate) / CHECKPOINTS)),
        }
    )
    progress_file = ProgressFile(job.directory / PROGRESS, "training")
    result = train(config, progress=_after_steps(lambda state: progress_file(state.global_step, state.max_steps)))
    seconds = result.total_seconds or result.seconds
    write_json(
        adapter / "train_result.json",
        read_json(adapter / "train_result.json")
        | {"seconds": seconds, "pairs_per_second": result.pairs / seconds, "pairs_available": pairs},
    )
    return _read_training_result(adapter)


def _read_training_result(adapter: Path) -> dict[str, Any]:
    """The contents of `train_result.json` without the adapter's path."""
    return {name: value for name, value in read_json(adapter / "train_result.json").items() if name != "out"}


def _base_fingerprint(job: CellJob) -> str | None:
    """The fingerprint of the base that the cell's adapter was trained on; None for the frozen base."""
    if job.cell.train is None:
        return None
    from normtune.adapters.storage import read_adapter_info

    return read_adapter_info(job.directory / "adapter").base_fingerprint


def _evaluate_or_read(job: CellJob, evaluation: Evaluation, adapted: bool) -> dict[str, Any]:
    """Run or read one evaluation: the fields of `metrics.json` that no other file has, and what is evaluated."""
    from normtune.evaluation.evaluate import evaluate_config

    folder = job.directory / "evaluations" / evaluation.folder
    if not (folder / "metrics.json").is_file():
        record_rows(job.directory, evaluation.folder, evaluation.config)
        progress_file = ProgressFile(job.directory / PROGRESS, f"answering {evaluation.dataset}")
        config = evaluation.config.model_copy(
            update={"out": folder, "adapter": job.directory / "adapter" if adapted else None}
        )
        evaluate_config(config, progress=progress_file)
    scores = read_json(folder / "metrics.json")
    copied_fields = (
        *("rows", "images", "split_hash", "metrics", "normalisation"),
        *("seconds", "pairs_per_second", "peak_memory_bytes"),
    )
    return {
        "dataset": evaluation.dataset,
        "role": evaluation.role,
        "task": "report" if any(name.partition("/")[0].startswith("bleu") for name in scores["metrics"]) else "vqa",
        "split": evaluation.config.split,
        "folder": evaluation.folder,
        **{name: scores[name] for name in copied_fields},
    }


class ProgressFile:
    """Writes a cell's progress to a file for the study's process to show, at most once a second."""

    def __init__(self, path: Path, activity: str) -> None:
        self.path, self.activity = path, activity
        self._last = 0.0

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        if now - self._last >= PROGRESS_S:
            self._last = now
            write_json(self.path, {"what": self.activity, "done": done, "total": total})


def _after_steps(call: Callable[[Any], None]) -> Any:
    """A Trainer callback that calls a function with the Trainer's state after every step."""
    from transformers import TrainerCallback

    class Steps(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            call(state)

    return Steps()


def _pairs_within(job: CellJob, config: TrainConfig, seconds: float) -> int:
    """The number of pairs that this machine trains on in the given seconds.

    It is measured once for each cell and stored, so that a resumed run trains on as many pairs as an
    uninterrupted one.
    """
    from normtune.training.train import train

    path = job.directory / BUDGET
    if not path.is_file():
        times: list[float] = []
        out = job.directory / "timing"
        shutil.rmtree(out, ignore_errors=True)  # a run that was killed left it
        timed_config = config.model_copy(
            update={"out": out, "max_steps": TIMED_STEPS, "resume": False, "save_every": 1000}
        )
        result = train(timed_config, progress=_after_steps(lambda _: times.append(time.perf_counter())))
        shutil.rmtree(out, ignore_errors=True)
        step_seconds = (times[-1] - times[UNTIMED_STEPS - 1]) / (len(times) - UNTIMED_STEPS)
        speed = result.pairs / result.steps / step_seconds
        write_json(path, {"seconds": seconds, "pairs_per_second": speed, "pairs": max(1, round(speed * seconds))})
    return int(read_json(path)["pairs"])


def with_absolute_paths(cell: Cell) -> Cell:
    """The cell with its data root and model as absolute paths, if they are folders on this machine."""

    def absolute(config: Any) -> Any:
        root, splits = config.root, config.splits
        model = Path(config.model)
        return config.model_copy(
            update={
                "root": root.absolute() if root is not None and root.exists() else root,
                "splits": splits and splits.absolute(),
                "model": str(model.absolute()) if model.is_dir() and config.model != "nano" else config.model,
            }
        )

    return replace(
        cell,
        train=cell.train and absolute(cell.train),
        evaluations=tuple(
            replace(evaluation, config=absolute(evaluation.config), planned_folder=evaluation.folder)
            for evaluation in cell.evaluations
        ),
    )


def failure_reason(out: Path, cell: Cell) -> str | None:
    """Why the cell failed on its last attempt; None if it did not."""
    path = cell.directory(out) / ERROR
    return read_json(path)["error"] if path.is_file() else None


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def validation_score(out: Path, cell: Cell, metric: str | None) -> tuple[float, float]:
    """A trial's score on the validation split, and its standard error; an `InputError` if it has no such metric."""
    evaluations = read_json(cell.directory(out) / RESULT)["evaluations"]
    (evaluation,) = (evaluation for evaluation in evaluations if evaluation["role"] == "validate")
    name = metric or ("global_exact" if evaluation["task"] == "vqa" else "rouge_l/none")
    if name not in evaluation["metrics"]:
        raise InputError(
            f"search.metric: {evaluation['dataset']} has no metric '{name}'. It has {', '.join(evaluation['metrics'])}."
        )
    score = evaluation["metrics"][name]
    return float(score["value"]), (score["high"] - score["low"]) / (2 * Z95)
