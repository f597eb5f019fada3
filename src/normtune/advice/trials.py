"""One trial: train a recipe at a rate for some passes, answer the validation rows, and write `result.json` last.

All trials of a search use the loaded base, the opened data and one folder with the outputs of frozen layers. A trial
is an ordinary training in its own folder, so that a killed search resumes from its last checkpoint.
"""

from __future__ import annotations

import io
import re
import shutil
from collections.abc import Mapping
from contextlib import redirect_stderr
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from normtune.adapters.storage import use_adapter
from normtune.advice.config import AdviseConfig
from normtune.data.records import Dataset, Split
from normtune.data.splits import share_of_images
from normtune.errors import InputError
from normtune.evaluation.evaluate import evaluate
from normtune.evaluation.results import Evaluation, read_evaluation
from normtune.metrics.sum_metrics import PairedDifference, cluster_rows, paired_difference, score_span
from normtune.metrics.table import metric_table
from normtune.models.family import Family
from normtune.runtime.files import read_json, write_json
from normtune.training.config import TrainConfig
from normtune.training.result import TrainResult
from normtune.training.train import train

SELECT, ESTIMATE = "select", "estimate"  # the halves of the validation rows, and their folders
SAVE_EVERY = 100  # steps between checkpoints
_RESULT = "result.json"


@dataclass(frozen=True)
class Trial:
    """A recipe at a rate, trained for some passes. The field names are keys of its `result.json`."""

    round: int
    number: int  # in the order of the search
    recipe: str
    lr: float
    epochs: float
    trainable: int
    pairs: int
    seconds: float  # of the steps of training
    metric: dict[str, float] = field(default_factory=dict)  # on the rows that trials are selected on: value, low, high
    warning: str | None = None  # of the training

    @property
    def score(self) -> float:
        """The score on the rows that trials are selected on."""
        return self.metric["value"]


@dataclass(frozen=True)
class Workplace:
    """What all trials of a search share."""

    config: AdviseConfig
    family: Family
    dataset: Dataset
    halves: Mapping[str, Split]  # SELECT and ESTIMATE

    def train(self, config: TrainConfig, memory_plan: dict[str, Any] | None = None) -> TrainResult:
        """Train, with the outputs of frozen layers from the folder that all trials share."""
        config = config.model_copy(update={"cache": self.config.out / "cache", "save_every": SAVE_EVERY})
        return train(config, family=self.family, dataset=self.dataset, memory_plan=memory_plan)

    def folder(self, round: int, number: int, recipe: str) -> Path:
        """The folder of a trial."""
        name = re.sub(r"[^\w.+-]+", "-", recipe)[:40].strip("-")
        return self.config.out / "trials" / f"{round}-{number:03d}-{name}"

    def run(
        self,
        round: int,
        number: int,
        recipe: str,
        lr: float,
        epochs: float,
        *,
        keep: bool,
        memory_plan: dict[str, Any] | None = None,
    ) -> Trial:
        """Train and evaluate a trial, or read its result.

        Args:
            keep: keep the adapter. Otherwise it is deleted once its answers are written.
        """
        folder = self.folder(round, number, recipe)
        if (folder / _RESULT).is_file():
            return Trial(**read_json(folder / _RESULT))
        config = self.config.train_config(tune=recipe, lr=lr, out=folder / "adapter", epochs=epochs)
        with redirect_stderr(io.StringIO()):  # the first training of a recipe has printed the same messages
            result = self.train(config, memory_plan)
        evaluation = self.evaluate(SELECT, folder, config.out)
        trial = Trial(
            round=round,
            number=number,
            recipe=recipe,
            lr=lr,
            epochs=epochs,
            trainable=result.trainable,
            pairs=result.pairs,
            seconds=result.total_seconds or result.seconds,
            metric=metric_of(evaluation, self.config.metric),
            warning=result.warning,
        )
        write_json(folder / _RESULT, asdict(trial))
        if not keep:
            shutil.rmtree(config.out)
        return trial

    def evaluate(self, half: str, folder: Path, adapter: Path | None) -> Evaluation:
        """Answer half of the validation rows, or read the answers."""
        out = folder / half
        if (out / "metrics.json").is_file():
            return read_evaluation(out)
        config = self.config.evaluate_config(out, adapter)
        with self.family.pixel_limit(config.max_pixels), use_adapter(self.family, adapter):
            return evaluate(self.family, self.halves[half], config)

    def answers_of_base(self, half: str) -> Evaluation:
        """The frozen base's answers to half of the validation rows."""
        return self.evaluate(half, self.config.out / "frozen", None)

    def answers_of(self, trial: Trial, half: str) -> Evaluation:
        """A trial's answers to half of the validation rows."""
        folder = self.folder(trial.round, trial.number, trial.recipe)
        return self.evaluate(half, folder, folder / "adapter")


def metric_of(evaluation: Evaluation, name: str | None) -> dict[str, float]:
    """The score that trials are chosen by, with its interval.

    Raises:
        InputError: there is no such score.
    """
    name = metric_name(evaluation, name)
    if name not in evaluation.metrics:
        raise InputError(f"--metric {name}: there is no such score. There are {', '.join(evaluation.metrics)}.")
    score = evaluation.metrics[name]
    return {"value": score.value, "low": score.low, "high": score.high}


def metric_name(evaluation: Evaluation, name: str | None) -> str:
    """The name of the score that trials are chosen by."""
    return name or ("rouge_l/none" if evaluation.is_report else "global_exact")


def paired(first: Evaluation, second: Evaluation, name: str | None) -> PairedDifference:
    """The score of the second minus the score of the first, on the same images."""
    name = metric_name(first, name)
    normalisation = first.record["normalisation"]
    before, after = (metric_table(item.examples, item.predictions, normalisation)[name] for item in (first, second))
    return paired_difference(before, after, cluster_rows(first.examples), maximum=score_span(name))


def split_in_halves(examples: Split, limit: int | None, seed: int) -> dict[str, Split]:
    """Divide validation rows by image, and by patient where the data name patients.

    Raises:
        InputError: there are too few images.
    """
    rows = (
        examples if limit is None or len(examples) <= limit else share_of_images(examples, limit / len(examples), seed)
    )
    selected = {example.id for example in share_of_images(rows, 0.5, seed + 1)}
    halves = {
        SELECT: [example for example in rows if example.id in selected],
        ESTIMATE: [example for example in rows if example.id not in selected],
    }
    if any(len({example.images for example in half}) < 2 for half in halves.values()):
        raise InputError(
            f"the split {examples.name} has rows of too few images: half of them select a recipe, and the others "
            "measure it. Give --validation-split or new splits with more images (--split-ratio, or normtune split)."
        )
    return {name: Split(examples.dataset, half, examples.name) for name, half in halves.items()}
