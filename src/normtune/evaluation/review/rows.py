"""The rows of a review page: joins runs of the same questions, counts strata, and selects rows to show."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from normtune.data.records import Example
from normtune.evaluation.results import Evaluation
from normtune.metrics.answers import score_rows
from normtune.metrics.ngrams import rouge_l
from normtune.metrics.ptb_words import ptb_words
from normtune.metrics.strata import group_by_stratum

Strata = dict[str, dict[str, list[str]]]  # field -> value -> ids of its rows


@dataclass(frozen=True)
class RunPrediction:
    """The prediction of one run for one row, with its scores."""

    text: str
    value: float  # 1 for a right answer, 0 for a wrong one; for a report its ROUGE-L
    recall: float | None  # for an open answer, the share of the reference's words that it contains
    score: float | None  # mean log-probability of its tokens


@dataclass(frozen=True)
class Row:
    """One question or report with the prediction of each run."""

    example: Example
    predictions: tuple[RunPrediction, ...]  # in the order of the runs

    @property
    def all_right(self) -> bool:
        """Whether every run answered the question right."""
        return all(prediction.value == 1 for prediction in self.predictions)


@dataclass(frozen=True)
class StratumCount:
    """One line of a table: a group of rows with each run's share of right answers, or mean ROUGE-L."""

    value: str  # the value that the rows share in a field, or "all"
    rows: int
    shares: tuple[float, ...]  # one per run


def read_rows(runs: Sequence[Evaluation], metas: Mapping[str, Mapping[str, str]]) -> list[Row]:
    """Join the rows of all runs by id, in the order of the first run.

    Args:
        runs: evaluations of the same rows.
        metas: example id -> metadata of the dataset: further strata, besides the recorded ones.
    """
    first = runs[0]
    columns = [_read_predictions(run) for run in runs]
    rows = []
    for example in first.examples:
        meta = {**metas.get(example.id, {}), **example.meta}
        rows.append(Row(replace(example, meta=meta), tuple(column[example.id] for column in columns)))
    return rows


def _read_predictions(run: Evaluation) -> dict[str, RunPrediction]:
    """Read and score the predictions of one run: example id -> prediction."""
    confidence = {row.id: row.score for row in run.predictions if row.score is not None and math.isfinite(row.score)}
    texts = run.texts
    if run.is_report:
        values = {e.id: rouge_l(ptb_words(texts[e.id]), ptb_words(e.answer)) for e in run.examples}
        recalls: dict[str, float] = {}
    else:
        table = score_rows(run.examples, texts, normalisation=run.record["normalisation"])
        values, recalls = table["global_exact"], table.get("open_recall", {})
    return {id: RunPrediction(text, values[id], recalls.get(id), confidence.get(id)) for id, text in texts.items()}


def ids_by_stratum(rows: Sequence[Row]) -> Strata:
    """Group the ids of rows by field and value, the most frequent value first."""
    groups = group_by_stratum([row.example for row in rows])
    return {
        field: {value: [example.id for example in examples] for value, examples in values.items()}
        for field, values in groups.items()
    }


def count_rows(rows: Sequence[Row], value: str) -> StratumCount:
    """Summarise rows (at least one) as one line of a table; `value` labels the line."""
    columns = zip(*(row.predictions for row in rows), strict=True)  # one column per run
    shares = tuple(sum(prediction.value for prediction in column) / len(rows) for column in columns)
    return StratumCount(value, len(rows), shares)


def select_rows(rows: Sequence[Row], limit: int) -> tuple[list[Row], str]:
    """Select at most `limit` rows.

    For answers, three quarters of the selected rows are rows that at least one run got wrong, and one quarter
    are rows that all runs got right, for contrast. If there are too few of one kind, more of the other kind
    are taken. Within each kind, and for reports, the rows are selected by a hash of their ids. The selection
    is therefore even, and every page of a split has the same rows.

    Returns:
        The rows in their order, and a sentence for the page that describes the selection.
    """
    if len(rows) <= limit:
        return list(rows), f"The page shows all {len(rows)} rows."
    if rows[0].example.kind == "report":
        selected = _draw_rows(rows, limit)
        sentence = f"The page shows {limit} of {len(rows)} reports, selected evenly by a hash of their ids."
    else:
        wrong = [row for row in rows if not row.all_right]
        right = [row for row in rows if row.all_right]
        some_wrong = _draw_rows(wrong, max(limit - len(right), limit - limit // 4))
        some_right = _draw_rows(right, limit - len(some_wrong))
        selected = [*some_wrong, *some_right]
        sentence = (
            f"The page shows {limit} of {len(rows)} rows: {len(some_wrong)} of the {len(wrong)} that at "
            f"least one run got wrong, and {len(some_right)} of the {len(right)} others, "
            "selected evenly by a hash of their ids."
        )
    ids = {row.example.id for row in selected}
    return [row for row in rows if row.example.id in ids], f"{sentence} The tables count all rows."


def _draw_rows(rows: Sequence[Row], number: int) -> list[Row]:
    """Take the rows with the smallest hashes of their ids."""
    return sorted(rows, key=lambda row: hashlib.sha256(row.example.id.encode()).digest())[:number]
