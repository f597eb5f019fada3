"""How far each norm moved, layer by layer: heat maps of gains and biases."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

from normtune.studies.page import charts
from normtune.studies.page.figures import Panel
from normtune.studies.page.number_format import significant
from normtune.studies.page.results import Arm, Record, Results

OUTSIDE = "other"  # the column of norms that stand in no layer
_IN_LAYER = re.compile(r"\.(\d+)\.(.+)$")
_WORDS = (  # of norms' names in the families' code, as people say them
    (r"^attention\.output\.layernorm$", "self-attention"),
    (r"^crossattention\.output\.layernorm$", "cross-attention"),
    (r"^output\.layernorm$", "feed-forward"),
    (r"^(norm1|layer_?norm1|input_layernorm|ln_1)$", "before attention"),
    (r"^(norm2|layer_?norm2|post_attention_layernorm|ln_2)$", "before feed-forward"),
    (r"(^|\.)embeddings\.layernorm$", "embeddings"),
    (r"(^|\.)transform\.layernorm$", "head"),
    (r"(^|\.)(post_layernorm|norm|ln_f)$", "last"),
    (r"(^|\.)(pre_layrnorm|pre_layernorm)$", "first"),
)


@dataclass(frozen=True)
class Moved:
    """One cell of a heat map."""

    row: str
    column: str
    value: float


def moved(results: Results, arm: Arm, kind: str) -> list[Moved]:
    """How far an arm's norms moved, mean over its seeds.

    Args:
        results: the study.
        arm: a recipe of a setting.
        kind: "gain", by the step's norm over the start's; "bias", by the step's root mean square.
    """
    keys = {cell["key"] for cell in arm.cells}
    found: dict[tuple[str, str], list[float]] = {}
    for row in results.tables["norms"]:
        if row["key"] in keys and row["kind"] == kind:
            value = row["relative"] if kind == "gain" else row["rms"]
            if value is not None:
                found.setdefault(place(row), []).append(float(value))
    return [Moved(*where, math.fsum(values) / len(values)) for where, values in found.items()]


def place(row: Record) -> tuple[str, str]:
    """The row (part and which norm) and the column (layer) of a norm."""
    name = re.sub(r"\.(weight|bias|gain)$", "", row["name"])
    layer = row.get("layer")
    if layer is None:
        return f"{row['part']}: {_said('.'.join(name.split('.')[-2:]))}", OUTSIDE
    inside = _IN_LAYER.search(name)
    return f"{row['part']}: {_said(inside.group(2) if inside else name.split('.')[-1])}", str(layer)


def _said(name: str) -> str:
    for pattern, words in _WORDS:
        if re.search(pattern, name, re.IGNORECASE):
            return words
    return name


def heat_maps(results: Results) -> Iterator[tuple[Arm, list[Panel]]]:
    """Per recipe that moved norms, the map of its gains and that of its biases."""
    for setting in results.settings():
        if results.is_curve(setting):
            continue
        for arm in results.full_data(setting):
            panels = []
            for kind, unit in (("gain", "% of its start"), ("bias", "root mean square of the step")):
                cells = moved(results, arm, kind)
                if not cells:
                    continue
                rows = list(dict.fromkeys(cell.row for cell in cells))
                rows.sort(key=lambda row: [c.row for c in cells].index(row))
                columns = sorted(
                    {cell.column for cell in cells},
                    key=lambda c: (not c.isdecimal(), int(c) if c.isdecimal() else 0),
                )
                told = {
                    (c.row, c.column): f"{c.row}, layer {c.column}: {_amount(kind, c.value)}" for c in cells
                }
                largest = max(cell.value for cell in cells)
                chart = charts.shades(
                    f"How far each {kind} moved, {unit}, by norm and layer: {arm.name}, {setting.told}",
                    rows,
                    columns,
                    {(c.row, c.column): c.value for c in cells},
                    told,
                    ("0", _amount(kind, largest)),
                    "layer",
                )
                table = tuple((c.row, c.column, _amount(kind, c.value)) for c in cells)
                panels.append(
                    Panel(
                        f"{'gains' if kind == 'gain' else 'biases'}, {unit}",
                        chart,
                        ("norm", "layer", f"{kind} moved"),
                        table,
                    )
                )
            if panels:
                yield arm, panels


def _amount(kind: str, value: float) -> str:
    return f"{significant(100 * value, 2)}%" if kind == "gain" else significant(value, 2)
