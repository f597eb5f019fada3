"""The model card (README.md) of an adapter."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from normtune.adapters.info import AdapterInfo
from normtune.runtime.number_format import format_interval
from normtune.runtime.templates import render_template
from normtune.runtime.text_table import markdown_table


def model_card(info: AdapterInfo) -> str:
    """The text of an adapter's README.md: base, recipe, trained share, data and licence, metrics, notice."""
    share = info.trainable / info.total if info.total else 0.0
    rows = [
        ("base", f"`{info.base_name}`"),
        ("recipe", f"`{info.recipe}`"),
        ("trained", f"{info.trainable:,} of {info.total:,} parameters ({share:.4%})"),
    ]
    data = dict(info.data or {"": "not recorded"})
    privacy = data.pop("privacy", None)
    rows += [(f"data: {name}", _as_text(value)) for name, value in data.items()]
    metrics = list(_metric_rows(info.metrics or {}))
    return render_template(
        "adapters/model_card.md.j2",
        notice=info.notice,
        facts=markdown_table(("", ""), rows, "l"),
        privacy=privacy,
        metrics=markdown_table(("metric", "value"), metrics, "l") if metrics else [],
    )


def _as_text(value: Any) -> str:
    """A value of `adapter.json`; a mapping, such as the rows of the preflight, as "read 12, used 10"."""
    if isinstance(value, list):
        return "; ".join(map(_as_text, value))
    if isinstance(value, Mapping):
        inner = ((name, f"({_as_text(v)})" if isinstance(v, Mapping) else _as_text(v)) for name, v in value.items())
        return ", ".join(f"{name.replace('_', ' ')} {text}" for name, text in inner) or "none"
    return "no limit" if value is None else f"{value:.4f}" if isinstance(value, float) else str(value)


def _metric_rows(metrics: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """(name, value) of every number, with its interval if it has one; lists (loss curves) are skipped."""
    for name, value in metrics.items():
        if isinstance(value, Mapping):
            if {"value", "low", "high"} <= value.keys():
                yield prefix + name, format_interval(value, scale=1, digits=4)
            else:
                yield from _metric_rows(value, f"{prefix}{name} ")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield prefix + name, f"{value:.4f}" if isinstance(value, float) else f"{value:,}"
