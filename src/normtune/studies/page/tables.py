"""The tables of a study's page: recipes by part of the model, their costs and their scores."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial

from normtune.methods.registry import METHODS
from normtune.models.part_names import PARTS
from normtune.runtime.number_format import (
    NONE,
    format_bytes,
    format_duration,
    format_fixed,
    format_p_value,
    format_points,
    format_share,
)
from normtune.studies.page.figures import forgetting_estimate, format_ends, format_score
from normtune.studies.page.results import Arm, Estimate, Record, Results, Setting, is_fraction, metric_name
from normtune.studies.recipe_names import FROZEN

SIGNIFICANT = 0.05  # p-values below this are significant
ABOVE, BELOW = "▲", "▼"  # marks of scores that differ significantly from the reference
Column = tuple[str, str]  # data set, metric
# A method with its options and layers, such as `lora(r=4,alpha=32)[2:]`; and the + between two methods.
_ONE_METHOD = re.compile(r"([a-z0-9]+)(?:\(([^)]*)\))?(\[[^]]*\])?")
_BETWEEN_METHODS = re.compile(r"\+(?![^(]*\))")


@dataclass(frozen=True)
class Cell:
    """A cell of a table.

    Attributes:
        css: "number": aligned right; "quiet": in a weaker colour.
        bold: whether the text is the highest score of its column.
        mark: an arrow after the text, and what it means.
        ends: the interval, below the text.
        tooltip: the text that browsers show at the cell.
    """

    text: str
    css: str = ""
    bold: bool = False
    mark: tuple[str, str] | None = None
    ends: str = ""
    tooltip: str = ""


@dataclass(frozen=True)
class Table:
    """A table; the first cell of each row is its heading.

    Attributes:
        label: what screen readers say.
        groups: headings over several columns, with the number of columns; "" has no heading.
        title: the bold beginning of the caption.
        base: whether the first row is the frozen base.
    """

    label: str
    header: Sequence[Cell]
    rows: Sequence[Sequence[Cell]]
    groups: Sequence[tuple[str, int]] = ()
    title: str = ""
    caption: str = ""
    base: bool = False


def text_cells(texts: Iterable[str], numbers: Iterable[str] = ()) -> list[Cell]:
    """Cells with texts, then cells with numbers."""
    return [*map(Cell, texts), *(Cell(number, "number") for number in numbers)]


def setting_table(results: Results, setting: Setting) -> Table:
    """A row for each recipe (and share, if the setting compares shares): methods by part, costs, and scores.

    Costs are the trained share of the parameters, the peak memory and the time. An arrow marks scores that
    differ significantly from the reference.
    """
    arms = results.arms(setting)
    parts = [part for part in PARTS if any(part in arm.parts for arm in arms)]
    parts = list(dict.fromkeys([*parts, *(part for arm in arms for part in arm.parts)]))
    curve = results.is_curve(setting)
    columns = _columns(results, setting, curve)
    best = {column: _highest_mean(results, arms, column) for column in columns}
    header = [*text_cells(["recipe"], ["data"] if curve else []), *text_cells(parts, ["trained", "memory", "time"])]
    groups = [("", len(header))]
    groups += [(dataset, sum(c[0] == dataset for c in columns)) for dataset in dict.fromkeys(c[0] for c in columns)]
    header += [Cell(_metric_heading(metric), "number") for _, metric in columns]
    if homes := list(dict.fromkeys(row["dataset"] for row in results.tables["forgetting"])):
        groups.append((homes[0], 1))
        header.append(Cell("forgotten, points", "number"))
    base_scores = [results.frozen_estimate(setting.model, *column) for column in columns]
    rows = []
    if any(base_scores):
        row = [*text_cells(["frozen base"], [NONE] if curve else []), *(_methods_cell("") for _ in parts)]
        row += text_cells([], ["0%", NONE, NONE])
        for column, score in zip(columns, base_scores, strict=True):
            test = results.test_of_recipe(setting, arms[0].share, FROZEN, *column)
            row.append(_score_cell(column[1], score, False, test))
        rows.append([*row, *text_cells([], ["0"] if homes else [])])
    for arm in arms:
        row = text_cells([arm.name], [format_share(arm.share)] if curve else [])
        row += [_methods_cell(arm.parts.get(part, "")) for part in parts]
        share, peak, seconds = (arm.mean(c) for c in ("trainable_share", "train_peak_bytes", "train_seconds"))
        row += text_cells([], [format_share(share), format_bytes(peak), format_duration(seconds)])
        for column in columns:
            score = results.estimate(arm, *column)
            is_best = score is not None and score.value == best[column]
            row.append(_score_cell(column[1], score, is_best, results.test_of_arm(arm, *column)))
        rows.append([*row, *([_forgotten_cell(results, arm, homes[0])] if homes else [])])
    title = f"{setting.description[0].upper()}{setting.description[1:]}."
    caption = _caption(results, setting, arms)
    return Table(setting.description, header, rows, groups, title, caption, base=any(base_scores))


def models_table(results: Results) -> Table | None:
    """A table of all models: a row a recipe, a column a model and data set; None for a single model."""
    settings = results.settings(curves=False)
    if len({setting.model for setting in settings}) < 2:
        return None
    columns = [
        (setting, dataset, results.primary_metric(dataset))
        for setting in settings
        for dataset in results.datasets(setting, "in")
    ]
    arms = {(setting, arm.name): arm for setting in settings for arm in results.full_data_arms(setting)}
    order = results.recipe_order()
    recipes = {arm.name: arm.recipe for arm in arms.values()}
    rows = []
    base_scores = [results.frozen_estimate(setting.model, dataset, metric) for setting, dataset, metric in columns]
    if any(base_scores):
        scored = zip(columns, base_scores, strict=True)
        rows.append(
            [Cell("frozen base"), *(_score_cell(metric, score, False, None) for (_, _, metric), score in scored)]
        )
    for name in sorted(recipes, key=lambda name: order.index(recipes[name])):
        row = [Cell(name)]
        for setting, dataset, metric in columns:
            arm = arms.get((setting, name))
            score = None if arm is None else results.estimate(arm, dataset, metric)
            test = None if arm is None else results.test_of_arm(arm, dataset, metric)
            row.append(_score_cell(metric, score, False, test))
        rows.append(row)
    header = [
        Cell("recipe"),
        *(
            Cell(setting.model, "number", ends=f"{data}, {_metric_heading(metric)}")
            for setting, data, metric in columns
        ),
    ]
    caption = "All models, each trained and tested on the data set of its column."
    return Table("models side by side", header, rows, caption=caption)


def paired_table(results: Results) -> Table | None:
    """All paired tests with their intervals and p-values; None if there are none."""
    tests = results.tables["tests"]
    if not tests:
        return None
    rows = []
    for test in tests:
        row = text_cells(
            [test["recipe"], test["model"], str(test["trained_on"])], [format_share(float(test.get("share") or 1))]
        )
        row += text_cells([test["dataset"], metric_name(test["metric"])], [_format_difference(test)])
        row += [Cell(format_p_value(test[p]).removeprefix("p ").removeprefix("= "), "number") for p in ("p", "p_holm")]
        rows.append([*row, *text_cells([], [f"{test['images']:,}", str(test["seeds"])])])
    against = " or ".join(dict.fromkeys(test["against"] for test in tests))
    header = text_cells(["recipe", "model", "trained on"], ["data"])
    header += text_cells(["tested on", "metric"], [f"minus {against}", "p", "p, Holm", "images", "seeds"])
    caption = "Paired tests, all common seeds together, resampled by image."
    return Table("paired tests", header, rows, caption=caption)


def _columns(results: Results, setting: Setting, curve: bool) -> list[Column]:
    """The score columns of a setting's table: data sets that it was trained on first, then others."""
    columns: list[Column] = []
    for dataset in results.datasets(setting, "in"):
        metrics = results.table_metrics(dataset) or [results.primary_metric(dataset)]
        columns += [(dataset, metric) for metric in ([results.primary_metric(dataset)] if curve else metrics)]
    columns += [(dataset, results.primary_metric(dataset)) for dataset in results.datasets(setting, "out")]
    return columns


def _metric_heading(metric: str) -> str:
    """A metric's name with its unit, without places where a line may break."""
    unit = "\u00a0%" if is_fraction(metric) else ""
    return metric_name(metric).replace("-", "\u2011") + unit  # no line break within "BLEU-1" or before "%"


def _highest_mean(results: Results, arms: Sequence[Arm], column: Column) -> float | None:
    """The highest mean in a column; None if only one recipe has a score."""
    values = [score.value for arm in arms if (score := results.estimate(arm, *column))]
    return max(values) if len(values) > 1 else None


def _score_cell(metric: str, score: Estimate | None, best: bool, test: Record | None) -> Cell:
    """A score with its interval, in bold if it is the best, with an arrow if it differs significantly."""
    if score is None:
        return Cell(NONE, "number")
    mark = None
    if test and test.get("p_holm") is not None and test["p_holm"] < SIGNIFICANT:
        is_higher = test["difference"] > 0
        text = f"{'above' if is_higher else 'below'} {test['against']}: {_format_difference(test)}"
        mark = (ABOVE if is_higher else BELOW, f"{text}, {format_p_value(test['p_holm'])} after Holm")
    ends = f"{format_score(metric, score.low)} to {format_score(metric, score.high)}"
    return Cell(format_score(metric, score.value), "number", best, mark, ends)


def _format_difference(test: Record) -> str:
    """A difference with its interval, in percentage points if the metric is a fraction."""
    as_text = format_points if is_fraction(test["metric"]) else partial(format_fixed, digits=2)
    return format_ends(as_text, test["difference"], test["low"], test["high"])


def _methods_cell(text: str) -> Cell:
    """A part's methods, shortened; the tooltip shows them in full."""
    return Cell(FROZEN, "quiet") if text in ("", FROZEN) else Cell(shorten_methods(text), tooltip=text)


def shorten_methods(text: str) -> str:
    """`lora(r=4,alpha=32)[2:]+ln` as `lora r=4 [2:] + ln`: only the size option of each method."""
    return " + ".join(_ONE_METHOD.sub(_shorten_method, method) for method in _BETWEEN_METHODS.split(text))


def _shorten_method(match: re.Match[str]) -> str:
    """One matched method with its size option and its layers."""
    name, options, layers = match.groups()
    size = next((option for option in ("r", "n", "width") if option in METHODS.get(name, {})), None)
    set_options = dict(pair.split("=", 1) for pair in (options or "").split(",") if "=" in pair)
    words = [name]
    if size is not None and (name == "lora" or size in set_options):
        words.append(f"{size}={set_options.get(size, METHODS[name][size])}")
    if name == "ln" and set_options:  # gains only, or biases only
        words.append("biases" if set_options.get("gain") == "0" else "gains")
    return " ".join([*words, *([layers] if layers else [])])


def _forgotten_cell(results: Results, arm: Arm, home: str) -> Cell:
    """The points lost on the base's own task, with their interval if there are several seeds."""
    loss = forgetting_estimate(results, arm, home)
    if loss is None:
        return Cell(NONE, "number")
    ends = f"{format_points(loss.low)} to {format_points(loss.high)}" if loss.seeds > 1 else ""
    return Cell(format_points(loss.value), "number", ends=ends)


def _caption(results: Results, setting: Setting, arms: Sequence[Arm]) -> str:
    """A setting's number of seeds, and what bold and arrows mean."""
    seeds = sorted({len(arm.cells) for arm in arms})
    count = f"{seeds[0]}" if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]}"
    averaged = "one seed" if seeds == [1] else f"means over {count} seeds"
    text = f"Grid {setting.grid}, {averaged}, with 95% intervals; bold: the highest."
    if against := results.reference_recipe(setting):
        text += f" {ABOVE} above, {BELOW} below {against} (paired by image, p < {SIGNIFICANT} after Holm)."
    return text
