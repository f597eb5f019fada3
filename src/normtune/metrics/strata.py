"""An evaluation broken down by kind and type of question, organ, modality, plane and language.

A stratum is all rows of one value. A question of several types ("ABN, PRES" in VQA-RAD) stands in each of
them. A field in which all rows are alike is left out: it would repeat the whole. Rows that do not name a
value that others name are "not given".
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from normtune.data.records import Example
from normtune.metrics.statistics import RESAMPLES
from normtune.metrics.sum_metrics import SumMetric, intervals
from normtune.metrics.table import headline_metrics

FIELDS: dict[str, tuple[str, ...]] = {  # field -> keys of `Example.meta`, the first that is given
    "kind": (),
    "question_type": ("question_type", "content_type", "type"),
    "organ": ("organ",),
    "modality": ("modality",),
    "plane": ("plane",),
    "language": ("language",),
}
NOT_GIVEN = "not given"
SHOWN_VALUES = 8  # of a field, on the terminal
Strata = dict[str, dict[str, dict[str, Any]]]


def strata_of(example: Example) -> dict[str, str]:
    """What a row names of `FIELDS`, but for its kind, as the dataset writes it.

    SLAKE's content_type and a phantom's type are question types. A field that a row does not name is left
    out.
    """
    found = {}
    for field, keys in FIELDS.items():
        value = next((example.meta[key] for key in keys if example.meta.get(key)), "")
        if value:
            found[field] = value
    return found


def _values(example: Example, field: str) -> tuple[str, ...]:
    if field == "kind":
        return (example.kind,)
    value = strata_of(example).get(field, "")
    if field == "question_type":
        return tuple(dict.fromkeys(word.strip() for word in value.split(",") if word.strip())) or (NOT_GIVEN,)
    return (value or NOT_GIVEN,)


def members(examples: Sequence[Example]) -> dict[str, dict[str, list[Example]]]:
    """field -> value -> its rows, the value of most rows first; fields of one value are left out."""
    found: dict[str, dict[str, list[Example]]] = {}
    for field in FIELDS:
        parts: dict[str, list[Example]] = {}
        for example in examples:
            for value in _values(example, field):
                parts.setdefault(value, []).append(example)
        if len(parts) > 1:
            found[field] = dict(sorted(parts.items(), key=lambda item: (-len(item[1]), item[0])))
    return found


def strata(
    examples: Sequence[Example], table: Mapping[str, SumMetric], *, resamples: int = RESAMPLES
) -> Strata:
    """field -> value -> rows, images, and metrics (name -> value, low, high, rows, images).

    Metrics are those of `HEADLINES`. The interval resamples the images of the stratum; of one image alone
    nothing can be resampled, and `low` and `high` are None. CIDEr's weights are those of all rows.
    """
    return {
        field: {value: _stratum(rows, headline_metrics(table), resamples) for value, rows in parts.items()}
        for field, parts in members(examples).items()
    }


def _stratum(examples: Sequence[Example], table: Mapping[str, SumMetric], resamples: int) -> dict[str, Any]:
    cluster = {example.id: example.images for example in examples}
    metrics = {}
    for name, metric in table.items():
        rows = {id: metric.rows[id] for id in cluster if id in metric.rows}
        if not rows:
            continue
        images = len({cluster[id] for id in rows})
        found = intervals({name: SumMetric(rows, metric.value)}, cluster, resamples=resamples)[name]
        metrics[name] = {
            "value": found.value,
            "low": found.low if images > 1 else None,
            "high": found.high if images > 1 else None,
            "rows": len(rows),
            "images": images,
        }
    return {"rows": len(examples), "images": len(set(cluster.values())), "metrics": metrics}


def strata_text(found: Mapping[str, Any]) -> str:
    """The first metric of each stratum as an aligned table, in %; of long fields the largest strata alone."""
    name = next((name for parts in found.values() for one in parts.values() for name in one["metrics"]), "")
    shown = {field: list(parts.items())[:SHOWN_VALUES] for field, parts in found.items()}
    heads = {field: f"by {field.replace('_', ' ')}" for field in found}
    labels = [*heads.values(), *(value for parts in shown.values() for value, _ in parts)]
    width = max(map(len, labels), default=0)
    lines = []
    for field, parts in shown.items():
        lines.append(f"{heads[field]:<{width + 2}}   rows  images  {name}")
        for value, one in parts:
            score = _score(one["metrics"].get(name))
            lines.append(f"  {value:<{width}}  {one['rows']:5}  {one['images']:6}  {score}")
        if more := len(found[field]) - len(parts):
            lines.append(f"  and {more} more, in metrics.json")
    return "\n".join(lines)


def _score(metric: Mapping[str, Any] | None) -> str:
    if metric is None:
        return "–"
    if metric["low"] is None:
        return f"{100 * metric['value']:.1f}"
    return f"{100 * metric['value']:.1f} [{100 * metric['low']:.1f}, {100 * metric['high']:.1f}]"
