"""Validation while a run trains: loss and scores on another split, the best step, and when to stop.

The curve of a run is part of HF's `trainer_state.json` (the log entries with `eval_` names), so that a resumed run
continues it. Best step and early stopping are functions of the curve alone.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate.utils import send_to_device

from normtune.data.batches import batches_of_pairs, examples_of_rank
from normtune.data.groups import group_by_image
from normtune.data.records import Dataset, Example, Prediction, Split
from normtune.errors import InputError, did_you_mean
from normtune.inference.limits import answer_limit
from normtune.inference.predict import answer_all
from normtune.metrics.answers import score_rows
from normtune.metrics.ngrams import bleu, bleu_statistics, rouge_l
from normtune.metrics.normalisation import separate_ideographs
from normtune.metrics.ptb_words import ptb_words
from normtune.metrics.reports import text_pairs
from normtune.models.family import Family
from normtune.runtime import distributed
from normtune.training.collator import Collator
from normtune.training.config import TrainConfig

LOSS = "loss"  # the name of the validation loss among the metrics; the only one of which lower is better
_PREFIX = "eval_"  # of HF's log entries about validation
_NUMBERS = ("pairs", "passes", "seconds", "train_loss", "validation_loss")  # fields of `CurvePoint` besides the metrics
_REPORT_METRICS = ("rouge_l", "bleu_1", "bleu_4")


@dataclass(frozen=True)
class CurvePoint:
    """One validation of a run. The field names are JSON keys of `train_result.json`."""

    step: int
    pairs: int  # question-answer pairs trained on so far
    passes: float  # passes over the training pairs so far
    seconds: float  # of training so far, without set-up and validation
    train_loss: float  # mean loss per answer token of the steps since the last entry of the loss log
    validation_loss: float  # mean loss per answer token of the validation rows
    metrics: dict[str, float]  # scores of the answers to the validation rows: fractions (0.47 is 47%)

    def score(self, metric: str) -> float:
        """The value of a metric, negative for the loss, so that higher is better."""
        return -self.validation_loss if metric == LOSS else self.metrics[metric]


class Validation:
    """Computes loss and scores on the validation rows.

    Args:
        config: `metric_for_best` and the batch size.
        examples: the validation rows, all questions or all reports.
        collate: the collator of the training; its images are used, so that each one is decoded once.

    Attributes:
        metric: the name of the metric that chooses the best step.

    Raises:
        InputError: there is no row, tasks are mixed, or the metric does not exist.
    """

    def __init__(self, config: TrainConfig, family: Family, examples: Split, collate: Collator) -> None:
        self.config, self.family, self.examples, self._images = config, family, examples, collate.images
        # with FSDP every forward pass is one of all processes: all compute all rows, in the same passes
        self._divides_rows = not distributed.is_sharded()
        self._rows: Sequence[Example] = examples  # the rows that this process answers
        if self._divides_rows:
            self._rows = examples_of_rank(examples, distributed.rank(), distributed.world_size())
        self._collate = Collator(family, collate.images)  # without cached states: their questions are the training's
        self._max_new_tokens = answer_limit(family, examples)
        report = examples[0].kind == "report"
        self.metric = config.metric_for_best or ("rouge_l" if report else "global_exact")
        known = (LOSS, *(_REPORT_METRICS if report else self._score({e.id: e.answer for e in examples})))
        if self.metric not in known:
            raise InputError(
                f"--metric-for-best {self.metric}: the validation rows have no such metric"
                f"{did_you_mean(self.metric, known) or '.'} They have {', '.join(known)}."
            )

    def run(self) -> tuple[float, dict[str, float]]:
        """Return the loss per answer token and the scores; every process must call it, and gets the same.

        With FSDP, call it within the forward pass of the sharded module, which gathers what is outside of the layers.
        """
        self.family.model.eval()
        dataset, limit = self.examples.dataset, self._max_new_tokens
        predictions: list[Prediction] = []
        if self._rows:
            predictions = answer_all(self.family, dataset, self._rows, max_new_tokens=limit, images=self._images)
        result = predictions, *self._sum_losses()
        # (predictions, sum of losses, answer tokens) of each process
        results = distributed.all_gather(result) if self._divides_rows else [result]
        loss = sum(loss for _, loss, _ in results) / sum(tokens for *_, tokens in results)
        return loss, self._score([prediction for of_process, *_ in results for prediction in of_process])

    @torch.no_grad()
    def _sum_losses(self) -> tuple[float, int]:
        """The sum of this process's losses, and its number of answer tokens."""
        total, tokens = 0.0, 0
        groups = group_by_image(self._rows, self.config.cap if self.config.group else 1)
        for batch in batches_of_pairs([len(group) for group in groups], self.config.batch) if groups else ():
            inputs = send_to_device(self._collate([groups[index] for index in batch]), self.family.device)
            loss, count = self.family.loss(inputs)
            total, tokens = total + float(loss), tokens + int(count)
        return total, tokens

    def _score(self, predictions: Mapping[str, str] | Sequence[Prediction]) -> dict[str, float]:
        if self.examples[0].kind != "report":
            table = score_rows(self.examples, predictions)
            return {name: float(np.mean(list(rows.values()))) for name, rows in table.items()}
        texts = text_pairs(self.examples, predictions).values()
        words = [tuple(ptb_words(separate_ideographs(text)) for text in pair) for pair in texts]
        counts = np.sum([bleu_statistics(*pair) for pair in words], axis=0, keepdims=True)
        scores = [float(np.mean([rouge_l(*pair) for pair in words])), *(float(bleu(counts, n)[0]) for n in (1, 4))]
        return dict(zip(_REPORT_METRICS, scores, strict=True))


def read_validation(config: TrainConfig, dataset: Dataset) -> Split | None:
    """Select the validation rows of a run; None if it does not validate.

    With `validation_limit` these are all questions of some random images, the same in every run, as a split's first
    rows may be about a few images only.

    Raises:
        InputError: an option has no effect, there is no such split, or its rows are of two tasks.
    """
    if config.validate_every is None:
        names = ("validation_split", "validation_limit", "metric_for_best", "patience", "keep")
        if unused := [name for name in names if getattr(config, name) is not None]:
            options = ", ".join(f"--{name.replace('_', '-')}" for name in unused)
            raise InputError(f"{options}: the run does not validate. Add --validate-every epoch, or leave it out.")
        return None
    name = config.validation_split or "validate"
    examples = Split(dataset, dataset.split(name), name)
    if config.validation_limit is not None and len(examples) > config.validation_limit:
        groups = group_by_image(examples)
        random.Random("validation").shuffle(groups)
        rows = [example for group in groups for example in group]
        examples = Split(dataset, rows[: config.validation_limit], name)
    if not examples or len({example.kind == "report" for example in examples}) > 1:
        raise InputError(f"--validation-split {name}: it must have rows, all questions or all reports.")
    return examples


def log_entry(point: CurvePoint) -> dict[str, float]:
    """A validation as an entry of HF's log; `curve` reads it."""
    values = {name: getattr(point, name) for name in _NUMBERS} | point.metrics
    return {_PREFIX + name: value for name, value in values.items()}


def curve(log_history: Sequence[Mapping[str, Any]]) -> tuple[CurvePoint, ...]:
    """The validations in HF's log history, in the order of their steps."""
    points = []
    for row in log_history:
        values = {name.removeprefix(_PREFIX): value for name, value in row.items() if name.startswith(_PREFIX)}
        if "validation_loss" in values:
            numbers = {name: values.pop(name) for name in _NUMBERS}
            points.append(CurvePoint(step=row["step"], **numbers, metrics=values))
    return tuple(points)


def best_point(points: Sequence[CurvePoint], metric: str) -> CurvePoint:
    """The point with the best score; the first of equal ones."""
    return max(points, key=lambda point: point.score(metric))


def is_stopped(points: Sequence[CurvePoint], metric: str, patience: int | None) -> bool:
    """Whether the last `patience` validations have not improved on the best score before them."""
    if patience is None or len(points) <= patience:
        return False
    return points.index(best_point(points, metric)) < len(points) - patience
