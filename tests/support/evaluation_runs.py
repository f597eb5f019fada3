"""Write the files of evaluations without a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from normtune.data.records import Example, Kind, Prediction, Split
from normtune.evaluation.results import Evaluation, Predictions, make_record
from normtune.metrics.answers import score_vqa
from tests.support.fake_family import fake_dataset


def make_question(number: int, answer: str = "lung", kind: Kind = "open") -> Example:
    """Question q<number> about image <number // 2>."""
    return Example(f"q{number}", (f"{number // 2}",), "which\u2028organ?", answer, kind, "test")


QUESTIONS = [make_question(n) for n in range(8)] + [make_question(n, "yes", "closed") for n in range(8, 12)]
REPORTS = [
    Example(f"r{n}", (f"{n}",), "", f"No effusion in case {n}. Heart is normal.", "report", "test") for n in range(4)
]


def write_vqa_run(
    out: Path,
    correct: set[int],
    examples: Sequence[Example] = QUESTIONS,
    *,
    normalisation: str = "vqa",
    scores: Mapping[int, float | None] | None = None,
    **about: Any,
) -> Path:
    """Write a run that answers the questions with an index in `correct` correctly, and the others "wrong"."""
    scores = scores or {}
    predictions = [
        Prediction(e.id, e.answer if index in correct else "wrong", scores.get(index, -0.1))
        for index, e in reversed(list(enumerate(examples)))
    ]
    about = {"metrics": score_vqa(examples, predictions, normalisation=normalisation), **about}
    return write_run(out, examples, predictions, normalisation=normalisation, **about)


def write_report_run(
    out: Path, changed: Mapping[int, str], examples: Sequence[Example] = REPORTS, **about: Any
) -> Path:
    """Write a run that predicts the reference reports, except for the texts in `changed` (by index)."""
    predictions = [Prediction(e.id, changed.get(n, e.answer), -0.5) for n, e in enumerate(examples)]
    return write_run(out, examples, predictions, metrics={}, normalisation=["none"], **about)


def write_run(out: Path, examples: Sequence[Example], predictions: Sequence[Prediction], **record: Any) -> Path:
    """Write the files of an evaluation."""
    split = Split(fake_dataset(list(examples)), examples)
    Evaluation(split, Predictions(examples, predictions), make_record(split, **record)).save(out)
    return out
