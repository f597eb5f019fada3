"""The figures of a setting's scores: which marks and numbers each chart shows. `charts` draws them.

Each public generator yields the panels of one setting; it yields none if the setting has nothing to show there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from statistics import fmean

from markupsafe import Markup

from normtune.metrics.statistics.comparisons import MIN_SEEDS
from normtune.metrics.statistics.intervals import mean_over_seeds
from normtune.runtime.number_format import (
    format_bytes,
    format_duration,
    format_fixed,
    format_p_value,
    format_percent,
    format_points,
    format_share,
    format_tick,
)
from normtune.studies.page import charts
from normtune.studies.page.charts import Point, Series
from normtune.studies.page.drawing import Axis, Level, Style
from normtune.studies.page.results import (
    Arm,
    Estimate,
    Record,
    Results,
    Setting,
    is_about_recipes,
    is_fraction,
    metric_name,
)
from normtune.studies.recipe_names import FROZEN


@dataclass(frozen=True)
class Panel:
    """A chart with its title, the counts behind it, how to read it, and its numbers as a header and rows."""

    title: str
    counts: str  # such as "96 images, 3 seeds"
    chart: Markup
    text: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def format_score(metric: str, value: float | None) -> str:
    """A score as text: times 100 if 1 is the highest possible score, unchanged otherwise."""
    return format_percent(value) if is_fraction(metric) else format_fixed(value, 2)


def format_interval(metric: str, score: Estimate) -> str:
    """A score and its interval as text: `value [low, high]`."""
    return format_ends(partial(format_score, metric), score.value, score.low, score.high)


def format_ends(as_text: Callable[[float], str], value: float, low: float, high: float) -> str:
    """Three numbers, each by `as_text`, as `value [low, high]`."""
    return f"{as_text(value)} [{as_text(low)}, {as_text(high)}]"


def score_axis(metric: str, dataset: str, suffix: str = "") -> Axis:
    """The axis for scores of a metric on a data set."""
    bounds = (0.0, 1.0) if is_fraction(metric) else (0.0, math.inf)
    unit = " (%)" if is_fraction(metric) else ""
    as_text = _times_100 if is_fraction(metric) else format_tick
    return Axis(f"{metric_name(metric)} on {dataset}{suffix}{unit}", as_text, min_span=0.02, bounds=bounds)


def _times_100(value: float) -> str:
    return format_tick(round(100 * value, 9))


def percent_tick(value: float) -> str:
    return f"{_times_100(value)}%"


def differences(results: Results, setting: Setting) -> Iterator[Panel]:
    """The paired difference of each recipe to the reference, with its interval: a forest plot."""
    for dataset in results.datasets(setting, "in"):
        metric = results.primary_metric(dataset)
        rows, table = [], []
        families = {arm.recipe: arm.family for arm in results.arms(setting)}
        tests = [
            (share, test)
            for share in sorted({arm.share for arm in results.arms(setting)}, reverse=True)
            for test in results.tests_of(setting, share, dataset, metric)
        ]
        for share, test in tests:
            name = test["recipe"]
            label = "frozen base" if name == FROZEN else name
            label += f", {format_share(share)}" if results.is_curve(setting) else ""
            text, p = format_difference(test), format_p_value(test["p_holm"])
            dot = Point(test["difference"], 0.0, test["low"], test["high"], f"{label}: {text}, {p} after Holm")
            rows.append(Series(label, families.get(name, "frozen"), (dot,)))
            table.append((label, text, p, f"{test['images']:,}", str(test["seeds"])))
        if not tests:
            continue
        against = tests[0][1]["against"]
        axis = Axis(f"{metric_name(metric)} on {dataset}, difference in points", _times_100, min_span=0.02)
        margin = tests[0][1].get("margin") or 0.0
        level = Level("no difference", 0.0, -margin, margin)
        chart = charts.draw_dot_rows(f"{axis.title}: {setting.description}", rows, axis, level)
        text = "The difference of each recipe to the reference on the same images, with its 95% interval."
        text += f" Band: the margin of equivalence, {format_points(margin)} points either way." if margin else ""
        if not all(is_about_recipes(test) for _, test in tests):
            text += " With fewer than 3 seeds the interval is that of the trained models: another seed may differ."
        header = ("recipe", f"minus {against}", "p, Holm", "images", "seeds")
        counts = results.counts(dataset, results.arms(setting))
        yield Panel(f"Difference to `{against}`", counts, chart, text, header, tuple(table))


def format_difference(test: Record) -> str:
    """A difference with its interval, in percentage points if the metric is a fraction."""
    as_text = format_points if is_fraction(test["metric"]) else partial(format_fixed, digits=2)
    return format_ends(as_text, test["difference"], test["low"], test["high"])


def seed_scores(results: Results, setting: Setting) -> Iterator[Panel]:
    """The score of each seed, with the recipe's mean and interval."""
    for dataset in results.datasets(setting, "in"):
        metric = results.primary_metric(dataset)
        rows, table = [], []
        for arm in results.arms(setting):
            if (score := results.estimate(arm, dataset, metric)) is None:
                continue
            name, interval = results.label(arm), format_interval(metric, score)
            dots = [Point(score.value, 0.0, score.low, score.high, f"{name}: {interval}")]
            values = results.run_values(arm, dataset, metric)
            if len(values) > 1:
                dots += [
                    Point(value, 0.0, value, value, f"{name}, {run}: {format_score(metric, value)}", "small")
                    for run, value in values
                ]
            rows.append(Series(name, arm.family, tuple(dots)))
            table.append((name, interval, ", ".join(format_score(metric, value) for _, value in values)))
        if not rows:
            continue
        axis, level = score_axis(metric, dataset), base_level(results, setting.model, dataset)
        noun, large = "seed", "the mean over seeds"
        if any(arm.folds for arm in results.arms(setting)):
            noun, large = "fold", "the rows of all folds"
        chart = charts.draw_dot_rows(f"{axis.title} of each {noun}: {setting.description}", rows, axis, level)
        text = f"Large: {large} with the 95% interval. Small: each {noun}. Dashed: the frozen base."
        counts = results.counts(dataset, results.arms(setting))
        yield Panel(f"Score of each {noun}", counts, chart, text, ("recipe", axis.title, f"{noun}s"), tuple(table))


def against_share(results: Results, setting: Setting) -> Iterator[Panel]:
    """Scores against the trained share of the parameters."""
    axis = Axis("trained share of the parameters (log scale)", percent_tick, log=True)
    yield from _cost_panels(results, setting, axis, "trained share", "trainable_share", format_share)


def against_memory(results: Results, setting: Setting) -> Iterator[Panel]:
    """Scores against the memory of training above the loaded base, or of the process in studies by version 0.1."""
    title, column = "memory of training above the loaded base (MiB)", "train_bytes_above_base"
    if all(arm.mean(column) is None for arm in results.full_data_arms(setting)):
        title, column = "peak memory of the training process (MiB)", "train_peak_bytes"
    axis = Axis(title, format_tick)
    yield from _cost_panels(results, setting, axis, "memory", column, format_bytes, 2**20)


def _cost_panels(
    results: Results,
    setting: Setting,
    x: Axis,
    heading: str,
    column: str,
    format_value: Callable[[float], str],
    unit: float = 1,
) -> Iterator[Panel]:
    """Scores on the data set that a recipe was trained on, against a cost of training: a column of `cells`."""
    for dataset in results.datasets(setting, "in"):
        metric = results.primary_metric(dataset)
        scores = [
            (arm, value, score)
            for arm in results.full_data_arms(setting)
            if (value := arm.mean(column)) and (score := results.estimate(arm, dataset, metric))
        ]
        if len(scores) < 2:
            continue
        marks = []
        for arm, value, score in scores:
            seconds = arm.mean("train_seconds")
            tooltip = f"{arm.name}: {format_interval(metric, score)} at {format_value(value)}"
            tooltip += f", {format_duration(seconds)}" if seconds is not None else ""
            point = Point(value / unit, score.value, score.low, score.high, tooltip)
            marks.append(Series(arm.name, arm.family, (point,)))
        text = "The mean over seeds with its 95% interval. Dashed: the frozen base."
        y = score_axis(metric, dataset)
        label = f"{y.title} against {x.title}: {setting.description}"
        chart = charts.draw_scatter(label, marks, x, y, base_level(results, setting.model, dataset))
        rows = tuple((arm.name, format_value(value), format_interval(metric, score)) for arm, value, score in scores)
        counts = results.counts(dataset, [arm for arm, _, _ in scores])
        yield Panel(f"Score against {heading}", counts, chart, text, ("recipe", heading, y.title), rows)


def transfer(results: Results, setting: Setting) -> Iterator[Panel]:
    """Scores on data that the setting did not train on, beside the scores of recipes that trained on it."""
    for dataset in results.datasets(setting, "out"):
        metric = results.primary_metric(dataset)
        rows: dict[str, tuple[str, list[Point]]] = {}
        table = []
        trained_there = Setting(setting.grid, setting.model, dataset)
        arms = [*results.full_data_arms(trained_there), *results.full_data_arms(setting)]
        for arm in arms:
            if score := results.estimate(arm, dataset, metric):
                interval, trained_on = format_interval(metric, score), arm.setting.trained_on
                tooltip = f"{arm.name}, trained on {trained_on}: {interval}"
                style: Style = "solid" if arm.setting == trained_there else "hollow"
                dot = Point(score.value, 0.0, score.low, score.high, tooltip, style)
                rows.setdefault(arm.name, (arm.family, []))[1].append(dot)
                table.append((arm.name, trained_on, interval))
        if not table:
            continue
        if base := results.frozen_estimate(setting.model, dataset, metric):
            table.append(("frozen base", "nothing (zero-shot)", format_interval(metric, base)))
        axis, level = score_axis(metric, dataset), base_level(results, setting.model, dataset)
        chart_rows = [Series(name, family, tuple(dots)) for name, (family, dots) in rows.items()]
        chart = charts.draw_dot_rows(f"{axis.title} of {setting.model}, by training data", chart_rows, axis, level)
        text = f"Hollow: trained on {setting.trained_on}. Solid: trained on {dataset}. Dashed: the frozen base."
        header, counts = ("recipe", "trained on", axis.title), results.counts(dataset, arms)
        yield Panel(f"Transfer to {dataset}", counts, chart, text, header, tuple(table))


def forgetting(results: Results, setting: Setting) -> Iterator[Panel]:
    """How much each recipe lost on its base's own task."""
    for dataset in dict.fromkeys(row["dataset"] for row in results.tables["forgetting"]):
        rows, table = [], []
        for arm in results.full_data_arms(setting):
            if (lost := forgetting_estimate(results, arm, dataset)) is None:
                continue
            text = f"{format_ends(format_points, lost.value, lost.low, lost.high)} points"
            dot = Point(lost.value, 0.0, lost.low, lost.high, f"{arm.name}: {text}")
            rows.append(Series(arm.name, arm.family, (dot,)))
            table.append((arm.name, text, str(lost.seeds)))
        if not rows:
            continue
        metric = results.primary_metric(dataset)
        axis = Axis(f"points lost on {dataset}, {metric_name(metric)}", _times_100, from_zero=True, min_span=0.02)
        level = Level("nothing forgotten", 0.0, 0.0, 0.0)
        chart = charts.draw_dot_rows(f"{axis.title}: {setting.description}", rows, axis, level)
        text = (
            "The frozen base's score on its own task minus the trained model's: farther right, more lost. Intervals "
            f"are over seeds, from {MIN_SEEDS} on."
        )
        counts = results.counts(dataset, results.full_data_arms(setting))
        yield Panel("Forgetting", counts, chart, text, ("recipe", axis.title, "seeds"), tuple(table))


def forgetting_estimate(results: Results, arm: Arm, dataset: str) -> Estimate | None:
    """How much an arm lost on the base's own task, by the primary metric of the task; None if unknown."""
    keys, metric = {cell["key"]: cell.get("seed") for cell in arm.cells}, results.primary_metric(dataset)
    by_seed: dict[int | None, list[float]] = {}  # the folds of a seed are not further seeds: their mean counts
    for row in results.tables["forgetting"]:
        if row["key"] in keys and row["dataset"] == dataset and row["metric"] == metric:
            by_seed.setdefault(keys[row["key"]], []).append(float(row["forgotten"]))
    values = [fmean(of_folds) for of_folds in by_seed.values()]
    if not values:
        return None
    if len(values) < MIN_SEEDS:  # an interval over two seeds would span the whole scale
        mean = fmean(values)
        return Estimate(mean, mean, mean, len(values))
    interval = mean_over_seeds(values)
    return Estimate(interval.value, interval.low, interval.high, len(values))


def base_level(results: Results, model: str, dataset: str) -> Level | None:
    """The frozen base's score on a data set as a line across the chart; None if it was not evaluated."""
    base = results.frozen_estimate(model, dataset, results.primary_metric(dataset))
    return None if base is None else Level("frozen base", base.value, base.low, base.high)
