"""Runs of the same questions -> rows with every run's answer, counts by stratum, and the rows to be shown."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from normtune.data.records import Example
from normtune.evaluation.compare import EvaluationRun
from normtune.evaluation.results import read_scores
from normtune.metrics.answers import scores
from normtune.metrics.ngrams import rouge_l
from normtune.metrics.ptb_words import ptb_words
from normtune.metrics.strata import members

Strata = dict[str, dict[str, list[str]]]  # field -> value -> ids of its rows


@dataclass(frozen=True)
class Said:
    """What one run made of one row."""

    text: str
    value: float  # of an answer 1 where it is right, else 0; of a report its ROUGE-L
    recall: float | None  # of an open answer: share of the reference's words
    score: float | None  # mean log-probability of its tokens


@dataclass(frozen=True)
class Row:
    """One question or report, and what each run made of it, in the order of the runs."""

    example: Example
    said: tuple[Said, ...]

    @property
    def all_right(self) -> bool:
        """Whether no run is wrong (of answers)."""
        return all(one.value == 1 for one in self.said)


@dataclass(frozen=True)
class Count:
    """Of some rows: how many, and each run's share of right answers, or mean ROUGE-L."""

    value: str  # what they have in common
    rows: int
    shares: tuple[float, ...]


def read_rows(runs: Sequence[EvaluationRun], metas: Mapping[str, Mapping[str, str]]) -> list[Row]:
    """The rows of all runs, joined by id, in the order of the first; `metas` adds strata by id."""
    first = runs[0]
    columns = [_column(run) for run in runs]
    rows = []
    for example in first.examples:
        meta = {**metas.get(example.id, {}), **example.meta}
        rows.append(Row(replace(example, meta=meta), tuple(column[example.id] for column in columns)))
    return rows


def _column(run: EvaluationRun) -> dict[str, Said]:
    """What one run made of every row, by id."""
    scored = read_scores(run.directory)
    confidence = {id: score for id, score in scored.items() if score is not None and math.isfinite(score)}
    if run.is_report:
        values = {e.id: rouge_l(ptb_words(run.texts[e.id]), ptb_words(e.answer)) for e in run.examples}
        recalls: dict[str, float] = {}
    else:
        table = scores(run.examples, run.texts, normalisation=run.about["normalisation"])
        values, recalls = table["global_exact"], table.get("open_recall", {})
    return {id: Said(text, values[id], recalls.get(id), confidence.get(id)) for id, text in run.texts.items()}


def strata(rows: Sequence[Row]) -> Strata:
    """The fields that part the rows, each value with the ids of its rows, the most frequent first."""
    parts = members([row.example for row in rows])
    return {
        field: {value: [example.id for example in held] for value, held in values.items()}
        for field, values in parts.items()
    }


def count(rows: Sequence[Row], value: str) -> Count:
    """Some rows, at least one, as one line of a table."""
    columns = zip(*(row.said for row in rows), strict=True)
    shares = tuple(sum(said.value for said in column) / len(rows) for column in columns)
    return Count(value, len(rows), shares)


def chosen(rows: Sequence[Row], limit: int) -> tuple[list[Row], str]:
    """At most `limit` rows, in their order, and a sentence that says which.

    Answers: three quarters are rows that some run got wrong, the rest right ones, to see the contrast; where
    one kind runs out, the other fills up. Within each, and of reports, rows are drawn by a hash of their ids:
    evenly, and the same ones in every page of a split.
    """
    if len(rows) <= limit:
        return list(rows), f"All {len(rows)} rows are shown."
    if rows[0].example.kind == "report":
        kept = _drawn(rows, limit)
        sentence = f"Shown are {limit} of {len(rows)} reports, drawn evenly by a hash of their ids."
    else:
        wrong = [row for row in rows if not row.all_right]
        right = [row for row in rows if row.all_right]
        some = _drawn(wrong, max(limit - len(right), limit - limit // 4))
        rest = _drawn(right, limit - len(some))
        kept = [*some, *rest]
        sentence = (
            f"Shown are {limit} of {len(rows)} rows: {len(some)} of the {len(wrong)} that some run got "
            f"wrong, and {len(rest)} of the {len(right)} others, drawn evenly by a hash of their ids."
        )
    ids = {row.example.id for row in kept}
    return [row for row in rows if row.example.id in ids], f"{sentence} The tables count all rows."


def _drawn(rows: Sequence[Row], number: int) -> list[Row]:
    return sorted(rows, key=lambda row: hashlib.sha256(row.example.id.encode()).digest())[:number]
