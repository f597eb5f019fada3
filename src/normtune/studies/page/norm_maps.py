"""Heat maps of how far each norm's gain and bias moved in training, layer by layer."""

from __future__ import annotations

import re
from collections.abc import Iterator
from statistics import fmean

from normtune.runtime.number_format import format_significant
from normtune.studies.page import charts
from normtune.studies.page.figures import Panel
from normtune.studies.page.results import Arm, Record, Results, Setting
from normtune.studies.pooling import group_by

OUTSIDE_LAYERS = "other"  # the column of norms that are not in a layer
_IN_LAYER = re.compile(r"\.(\d+)\.(.+)$")
_NORM_WORDS = (  # pattern of a norm's name in a family's code -> plain words
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


def norm_changes(results: Results, arm: Arm, kind: str) -> dict[tuple[str, str], float]:
    """How far the norms of an arm moved, mean over its seeds, by row and column of its heat map.

    Args:
        kind: "gain": the norm of the change divided by the norm of the start; "bias": the root mean square of
            the change.
    """
    keys, column = {cell["key"] for cell in arm.cells}, "relative" if kind == "gain" else "rms"
    rows = [row for row in results.tables["norms"] if row["key"] in keys and row["kind"] == kind]
    rows_of = group_by((row for row in rows if row[column] is not None), map_cell)
    return {cell: fmean(float(row[column]) for row in cell_rows) for cell, cell_rows in rows_of.items()}


def map_cell(row: Record) -> tuple[str, str]:
    """The row (part, and which norm of a layer) and the column (layer) of a norm."""
    name = re.sub(r"\.(weight|bias|gain)$", "", row["name"])
    layer = row.get("layer")
    if layer is None:
        return f"{row['part']}: {_norm_words('.'.join(name.split('.')[-2:]))}", OUTSIDE_LAYERS
    in_layer = _IN_LAYER.search(name)
    return f"{row['part']}: {_norm_words(in_layer.group(2) if in_layer else name.split('.')[-1])}", str(layer)


def _norm_words(name: str) -> str:
    """A norm's name in plain words; the name itself if it is not known."""
    for pattern, words in _NORM_WORDS:
        if re.search(pattern, name, re.IGNORECASE):
            return words
    return name


def heat_maps(results: Results, setting: Setting) -> Iterator[Panel]:
    """For each recipe of a setting that trains norms, a heat map of the gains and one of the biases."""
    for arm in results.full_data_arms(setting):
        for kind, unit in (("gain", "% of its start"), ("bias", "root mean square of the step")):
            moved = norm_changes(results, arm, kind)
            if not moved:
                continue
            texts = {cell: _as_text(kind, value) for cell, value in moved.items()}
            chart = charts.draw_heat_map(
                f"How far each {kind} moved, {unit}, by norm and layer: {arm.name}, {setting.description}",
                moved,
                {(row, column): f"{row}, layer {column}: {text}" for (row, column), text in texts.items()},
                sorted(
                    {column for _, column in moved}, key=lambda c: (not c.isdecimal(), int(c) if c.isdecimal() else 0)
                ),
                f"layer (strongest colour: {_as_text(kind, max(moved.values()))})",
            )
            rows = tuple((*cell, text) for cell, text in texts.items())
            title = f"`{arm.name}`: {'gains' if kind == 'gain' else 'biases'}, {unit}"
            text = "The mean over seeds; norms outside the layers are under 'other'. Each map has its own scale."
            yield Panel(title, results.counts(None, [arm]), chart, text, ("norm", "layer", f"{kind} moved"), rows)


def _as_text(kind: str, value: float) -> str:
    """How far a norm moved as text."""
    return f"{format_significant(100 * value, 2)}%" if kind == "gain" else format_significant(value, 2)
