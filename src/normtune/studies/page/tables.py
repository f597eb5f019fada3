"""The tables of a study's page: recipes by part of the model, their costs and their scores."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from normtune.runtime.number_format import (
    NONE,
    format_bytes,
    format_duration,
    format_p_value,
    format_points,
    format_share,
    format_significant,
)
from normtune.studies.page.figures import forgetting_estimate, format_difference, format_score
from normtune.studies.page.results import (
    SIGNIFICANT,
    Arm,
    Estimate,
    Record,
    Results,
    Setting,
    is_about_recipes,
    is_fraction,
    is_significant,
    metric_name,
)
from normtune.studies.pooling import group_by
from normtune.studies.recipe_names import FROZEN

# Marks of scores above and below the reference: whether recipes are compared, or their trained models only -> marks.
MARKS = {True: ("▲", "▼"), False: ("△", "▽")}
_OPTIONS = re.compile(r"\([^)]*\)")  # options of a method, such as (r=4,alpha=32)
Column = tuple[str, str]  # data set, metric


@dataclass(frozen=True)
class Cell:
    """A cell of a table."""

    text: str
    # classes: "number": aligned right; "quiet": in a weaker colour; "code": in the font of recipes' names
    css: str = ""
    bold: bool = False  # whether the text is the highest score of its column
    mark: tuple[str, str] | None = None  # an arrow after the text, and what it means
    ends: str = ""  # the interval, below the text
    tooltip: str = ""  # the text that browsers show at the cell


@dataclass(frozen=True)
class Table:
    """A table; the first cell of each row is its heading."""

    label: str  # what screen readers say
    header: Sequence[Cell]
    rows: Sequence[Sequence[Cell]]
    # headings over several columns, with the number of columns; "" has no heading
    groups: Sequence[tuple[str, int]] = ()
    caption: str = ""
    base: bool = False  # whether the first row is the frozen base


# Columns of `cells` that a setting's table shows as means over seeds, with their headings and formats.
COSTS: Sequence[tuple[str, str, Callable[[float | None], str]]] = (
    ("trainable_share", "trained", format_share),
    ("train_bytes_above_base", "memory above the base", format_bytes),
    ("train_peak_bytes", "peak memory", format_bytes),
    ("passes", "passes", partial(format_significant, digits=2)),
    ("train_seconds", "time", format_duration),
)


def text_cells(texts: Iterable[str], numbers: Iterable[str] = ()) -> list[Cell]:
    """Cells with texts, then cells with numbers."""
    return [*map(Cell, texts), *(Cell(number, "number") for number in numbers)]


def setting_table(results: Results, setting: Setting) -> Table:
    """A row for each recipe (and share, if the setting compares shares): scores, costs, and what it trains.

    An arrow marks scores that differ significantly from the reference.
    """
    arms = results.arms(setting)
    curve = results.is_curve(setting)
    columns = _columns(results, setting, curve)
    best = {column: _highest_mean(results, arms, column) for column in columns}
    homes = list(dict.fromkeys(row["dataset"] for row in results.tables["forgetting"]))[:1]
    costs = [cost for cost in COSTS if any(arm.mean(cost[0]) is not None for arm in arms)]
    header = [*text_cells(["recipe"], [*(["data"] if curve else []), "seeds"])]
    groups = [("", len(header))]
    for dataset in dict.fromkeys(dataset for dataset, _ in columns):
        groups.append((f"{dataset}, {results.counts(dataset, ())}", sum(column[0] == dataset for column in columns)))
    header += [Cell(_metric_heading(metric), "number") for _, metric in columns]
    groups += [(f"{home}, {results.counts(home, ())}", 1) for home in homes]
    header += text_cells([], ["forgotten, points" for _ in homes])
    groups.append(("costs", len(costs) + 1))
    header += text_cells([], [heading for _, heading, _ in costs]) + text_cells(["trains"])
    base_scores = [results.frozen_estimate(setting.model, *column) for column in columns]
    rows = []
    if any(base_scores):
        row = text_cells(["frozen base"], [*([NONE] if curve else []), NONE])
        for column, score in zip(columns, base_scores, strict=True):
            test = results.test_of_recipe(setting, arms[0].share, FROZEN, *column)
            row.append(_score_cell(column[1], score, False, test))
        rows.append([*row, *text_cells([], ["0" for _ in homes] + [NONE for _ in costs]), Cell("nothing", "quiet")])
    for arm in arms:
        row = [Cell(arm.name, "code")]
        row += text_cells([], [*([format_share(arm.share)] if curve else []), str(arm.seeds)])
        for column in columns:
            score = results.estimate(arm, *column)
            is_best = score is not None and score.value == best[column]
            row.append(_score_cell(column[1], score, is_best, results.test_of_arm(arm, *column)))
        row += [_forgotten_cell(results, arm, home) for home in homes]
        row += text_cells([], [as_text(arm.mean(column)) for column, _, as_text in costs])
        rows.append(
            [*row, Cell(describe_parts(arm.parts), "code", tooltip=", ".join(map("=".join, arm.parts.items())))]
        )
    return Table(setting.description, header, rows, groups, caption=_caption(results, setting), base=any(base_scores))


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
        row = [Cell(name, "code")]
        for setting, dataset, metric in columns:
            arm = arms.get((setting, name))
            score = None if arm is None else results.estimate(arm, dataset, metric)
            test = None if arm is None else results.test_of_arm(arm, dataset, metric)
            row.append(_score_cell(metric, score, False, test))
        rows.append(row)
    header = [
        Cell("recipe"),
        *(
            Cell(setting.model, "number", ends=f"{data}, {results.counts(data, ())}, {_metric_heading(metric)}")
            for setting, data, metric in columns
        ),
    ]
    seeds = results.counts(None, arms.values())
    caption = f"All models, each trained and tested on the data set of its column; {seeds}."
    return Table("models side by side", header, rows, caption=caption)


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
    if test and is_significant(test):
        is_higher = test["difference"] > 0
        text = f"{'above' if is_higher else 'below'} {test['against']}: {format_difference(test)}"
        up, down = MARKS[is_about_recipes(test)]
        mark = (up if is_higher else down, f"{text}, {format_p_value(test['p_holm'])} after Holm")
    ends = f"{format_score(metric, score.low)} to {format_score(metric, score.high)}"
    return Cell(format_score(metric, score.value), "number", best, mark, ends)


def describe_parts(parts: Mapping[str, str]) -> str:
    """What a recipe trains, without options: `ln` if it is the same in all parts, else `ln: encoder, decoder`."""
    trained_parts = [part for part, text in parts.items() if text not in ("", FROZEN)]
    parts_of = group_by(trained_parts, lambda part: _OPTIONS.sub("", parts[part]))
    if len(parts_of) == 1 and len(*parts_of.values()) == len(parts):
        return next(iter(parts_of))
    return "; ".join(f"{methods}: {', '.join(trained)}" for methods, trained in parts_of.items()) or "nothing"


def _forgotten_cell(results: Results, arm: Arm, home: str) -> Cell:
    """The points lost on the base's own task, with their interval if there are several seeds."""
    loss = forgetting_estimate(results, arm, home)
    if loss is None:
        return Cell(NONE, "number")
    ends = f"{format_points(loss.low)} to {format_points(loss.high)}" if loss.low < loss.high else ""
    return Cell(format_points(loss.value), "number", ends=ends)


def _caption(results: Results, setting: Setting) -> str:
    """What the numbers, bold and the arrows mean."""
    text = f"Grid {setting.grid}: means over seeds with 95% intervals; bold: the highest mean."
    if against := results.reference_recipe(setting):
        text += (
            f" ▲ above, ▼ below `{against}` (p < {SIGNIFICANT} after Holm); △ ▽ the same of the trained models only."
        )
    return text
