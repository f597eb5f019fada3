"""The model card (README.md) of an adapter."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from normtune.adapters.info import AdapterInfo


def model_card(info: AdapterInfo) -> str:
    """The text of an adapter's README.md: base, recipe, trained share, data and licence, metrics, notice."""
    share = info.trainable / info.total if info.total else 0.0
    rows = [
        ("base", f"`{info.base_name}`"),
        ("recipe", f"`{info.recipe}`"),
        ("trained", f"{info.trainable:,} of {info.total:,} parameters ({share:.4%})"),
    ]
    rows += [(f"data: {name}", str(value)) for name, value in (info.data or {"": "not recorded"}).items()]
    lines = ["# A Normtune adapter", "", f"For {info.notice}.", "", *_table(("", ""), rows)]
    if metrics := list(_metric_rows(info.metrics or {})):
        lines += ["", "## Metrics", "", *_table(("metric", "value"), metrics)]
    lines += [
        "",
        "`adapter.safetensors` holds the trained tensors in fp32, `adapter.json` names the base that they "
        "belong to. Load them with `normtune.load_adapter(model, directory)`, or give this directory as "
        "`--adapter`.",
        "",
    ]
    return "\n".join(lines)


def _metric_rows(metrics: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """(name, value) of every number, with its interval if it has one; lists (loss curves) are skipped."""
    for name, value in metrics.items():
        if isinstance(value, Mapping):
            if {"value", "low", "high"} <= value.keys():
                yield prefix + name, "{value:.4f} [{low:.4f}, {high:.4f}]".format(**value)
            else:
                yield from _metric_rows(value, f"{prefix}{name} ")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield prefix + name, f"{value:.4f}" if isinstance(value, float) else f"{value:,}"


def _table(head: tuple[str, str], rows: list[tuple[str, str]]) -> list[str]:
    """Lines of a Markdown table; bars in cells are escaped and line ends replaced by blanks."""
    cells = [[" ".join(cell.split()).replace("|", "\\|") for cell in row] for row in (head, *rows)]
    lines = [f"| {first} | {second} |" for first, second in cells]
    return [lines[0], "|---|---|", *lines[1:]]
