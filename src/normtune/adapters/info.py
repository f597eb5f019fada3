"""What a delta says of itself: `adapter.json` for programs and `README.md`, a model card, for people."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from normtune.errors import InputError

FORMAT = 1
NOTICE = "research use, not for diagnosis"

_FINGERPRINT = re.compile(r"[0-9a-f]{32}-([0-9a-f]{32}|quantised)")


@dataclass(frozen=True)
class TrainedTensor:
    """One tensor of a delta."""

    shape: list[int]
    part: str
    role: str  # of an added tensor: its method
    method: str


@dataclass(frozen=True)
class DeltaInfo:
    """The contents of `adapter.json`."""

    base_name: str
    base_fingerprint: str
    recipe: str
    trainable: int
    total: int
    data: dict[str, Any] | None  # what it was trained on: name, split, licence ...
    metrics: dict[str, Any] | None
    versions: dict[str, str]
    notice: str
    sha256: str  # of adapter.safetensors
    tensors: dict[str, TrainedTensor]

    def to_json(self) -> dict[str, Any]:
        """The object that `adapter.json` holds."""
        values = asdict(self)
        base = {"name": values.pop("base_name"), "fingerprint": values.pop("base_fingerprint")}
        return {"format": FORMAT, "base": base, **values}


def parse_info(found: Any, path: Path) -> DeltaInfo:
    """Check what was read from `path`.

    Raises:
        InputError: another format, or an entry that is missing or of the wrong kind.
    """
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise InputError(f"{path} is not a delta of format {FORMAT}. Was it written by normtune?")
    values = {name: value for name, value in found.items() if name not in ("format", "base")}
    if isinstance(base := found.get("base"), dict):
        values |= {f"base_{name}": value for name, value in base.items()}
    try:
        info = _delta_info().validate_python(values)
    except ValidationError as error:
        fault = error.errors()[0]
        entry = ".".join(str(step) for step in fault["loc"]).replace("base_", "base.", 1)
        raise InputError(f"{path}, entry {entry}: {fault['msg'].lower()}. Copy the delta anew.") from error
    if not _FINGERPRINT.fullmatch(info.base_fingerprint):
        raise InputError(f"{path}, entry base.fingerprint: no fingerprint. Copy the delta anew.")
    return info


@cache
def _delta_info() -> TypeAdapter[DeltaInfo]:
    return TypeAdapter(DeltaInfo)  # takes longer to build than to use, and a server reads thousands


def model_card(info: DeltaInfo) -> str:
    """The delta's README: base, recipe, trainable share, data and its licence, metrics, notice."""
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
        "`adapter.safetensors` holds the trained tensors in fp32, `adapter.json` says which base they belong "
        "to. Load them with `normtune.delta.load_delta`, or give this directory as `--adapter`.",
        "",
    ]
    return "\n".join(lines)


def _metric_rows(metrics: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """(name, value) of every number, with its interval where it has one; lists (loss curves) are left out."""
    for name, value in metrics.items():
        if isinstance(value, Mapping):
            if {"value", "low", "high"} <= value.keys():
                yield prefix + name, "{value:.4f} [{low:.4f}, {high:.4f}]".format(**value)
            else:
                yield from _metric_rows(value, f"{prefix}{name} ")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield prefix + name, f"{value:.4f}" if isinstance(value, float) else f"{value:,}"


def _table(head: tuple[str, str], rows: list[tuple[str, str]]) -> list[str]:
    """Lines of a Markdown table; a cell's own bars and line ends are made harmless."""
    cells = [[" ".join(cell.split()).replace("|", "\\|") for cell in row] for row in (head, *rows)]
    lines = [f"| {first} | {second} |" for first, second in cells]
    return [lines[0], "|---|---|", *lines[1:]]
