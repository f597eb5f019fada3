"""Breaks an evaluation down by kind and type of question, organ, modality, plane and language.

A stratum is the set of all rows that have the same value in a field. A question with several types
("ABN, PRES" in VQA-RAD) belongs to each of their strata. A field is omitted if all rows have the same value,
because its only stratum would repeat the whole. Rows without a value belong to the stratum "not given".
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from normtune.data.records import Example
from normtune.metrics.sum_metrics import SumMetric, cluster_rows, metric_intervals
from normtune.metrics.table import headline_metrics
from normtune.runtime.number_format import format_interval
from normtune.runtime.text_table import text_table

# Field -> keys of `Example.meta`; the first key that the example has gives the value.
STRATUM_FIELDS: dict[str, tuple[str, ...]] = {
    "kind": (),
    "options": (),
    "question_type": ("question_type", "content_type", "type"),
    "organ": ("organ",),
    "modality": ("modality",),
    "plane": ("plane",),
    "language": ("language",),
}
NOT_GIVEN = "not given"
MAX_PRINTED_VALUES = 8  # most values of a field in the printed table
Strata = dict[str, dict[str, dict[str, Any]]]  # field -> value -> the stratum, as `score_strata` describes it


def strata_of(example: Example) -> dict[str, str]:
    """Read a row's values of `STRATUM_FIELDS` as the dataset spells them, without kind and options: field -> value.

    SLAKE's content_type and a phantom's type are question types. Fields without a value are omitted.
    """
    values = {}
    for field, keys in STRATUM_FIELDS.items():
        value = next((example.meta[key] for key in keys if example.meta.get(key)), "")
        if value:
            values[field] = value
    return values


def _values(example: Example, field: str) -> tuple[str, ...]:
    """Read the values of one field: several for a question of several types, else one."""
    if field == "kind":
        return (example.kind,)
    if field == "options":
        return (f"{len(example.options)} options" if example.options else "no options",)
    value = strata_of(example).get(field, "")
    if field == "question_type":
        return tuple(dict.fromkeys(word.strip() for word in value.split(",") if word.strip())) or (NOT_GIVEN,)
    return (value or NOT_GIVEN,)


def group_by_stratum(examples: Sequence[Example]) -> dict[str, dict[str, list[Example]]]:
    """Group rows by the values of each field: field -> value -> rows, the value with the most rows first.

    Fields with only one value are omitted.
    """
    groups: dict[str, dict[str, list[Example]]] = {}
    for field in STRATUM_FIELDS:
        rows_of_value: dict[str, list[Example]] = {}
        for example in examples:
            for value in _values(example, field):
                rows_of_value.setdefault(value, []).append(example)
        if len(rows_of_value) > 1:
            groups[field] = dict(sorted(rows_of_value.items(), key=lambda item: (-len(item[1]), item[0])))
    return groups


def score_strata(examples: Sequence[Example], table: Mapping[str, SumMetric]) -> Strata:
    """Score each stratum with the `HEADLINE_METRICS`.

    The interval is clustered by the stratum's images or patients. A stratum of one image has no variance, so its
    `low` and `high` are None. CIDEr takes its n-gram weights from all rows.

    Args:
        examples: all rows of the evaluation.
        table: `metric_table` of all rows.

    Returns:
        field -> value -> {rows, images, metrics: name -> {value, low, high, rows, images}}.
    """
    headlines = headline_metrics(table)
    return {
        field: {value: _score_stratum(rows, headlines) for value, rows in values.items()}
        for field, values in group_by_stratum(examples).items()
    }


def _score_stratum(examples: Sequence[Example], table: Mapping[str, SumMetric]) -> dict[str, Any]:
    images_of = {example.id: example.images for example in examples}
    cluster = cluster_rows(examples)
    metrics = {}
    for name, metric in table.items():
        rows = {id: metric.row_statistics[id] for id in cluster if id in metric.row_statistics}
        if not rows:
            continue
        images = len({images_of[id] for id in rows})
        interval = metric_intervals({name: SumMetric(rows, metric.from_sums)}, cluster)[name]
        metrics[name] = {
            "value": interval.value,
            "low": interval.low if images > 1 else None,
            "high": interval.high if images > 1 else None,
            "rows": len(rows),
            "images": images,
        }
    return {"rows": len(examples), "images": len(set(images_of.values())), "metrics": metrics}


def strata_text(strata: Mapping[str, Any]) -> str:
    """Format the first metric of each stratum as an aligned table, in %.

    Only the largest strata of a field with many values are listed.
    """
    metrics = (stratum["metrics"] for values in strata.values() for stratum in values.values())
    name = next((name for table in metrics for name in table), "")
    largest = {field: list(values.items())[:MAX_PRINTED_VALUES] for field, values in strata.items()}
    rows: list[list[str]] = []
    notes: list[tuple[int, str]] = []  # a line, and the row that it is inserted before
    for field, values in largest.items():
        rows.append([f"by {field.replace('_', ' ')}", "rows", "images", name])
        for value, stratum in values:
            score = _format_score(stratum["metrics"].get(name))
            rows.append([f"  {value}", str(stratum["rows"]), str(stratum["images"]), score])
        if more := len(strata[field]) - len(values):
            notes.append((len(rows), f"  and {more} more, in metrics.json"))
    lines = text_table(rows, "lrrl")
    for at, note in reversed(notes):
        lines.insert(at, note)
    return "\n".join(lines)


def _format_score(metric: Mapping[str, Any] | None) -> str:
    if metric is None:
        return "–"
    if metric["low"] is None:
        return f"{100 * metric['value']:.1f}"
    return format_interval(metric)
