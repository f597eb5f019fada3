"""The figures of a study's page: which marks and numbers each chart shows. `charts` draws them.

Each public generator yields the panels of one section; it yields none if the study has nothing to show there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

from markupsafe import Markup

from normtune.metrics.statistics import mean_over_seeds
from normtune.runtime.number_format import (
    format_bytes,
    format_duration,
    format_fixed,
    format_percent,
    format_points,
    format_share,
    format_significant,
    format_tick,
)
from normtune.studies.page import charts
from normtune.studies.page.charts import Point, Series
from normtune.studies.page.drawing import Axis, Level
from normtune.studies.page.results import Arm, Estimate, Record, Results, Setting, is_fraction, metric_name
from normtune.studies.spec import SEARCH

BINS = 60  # largest number of points of a loss curve
MAX_LABELS = 14  # with more marks than this, a chart labels only the Pareto front


@dataclass(frozen=True)
class Panel:
    """A chart with its title, and its numbers as a table: a header and rows."""

    title: str
    chart: Markup
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


def _percent_tick(value: float) -> str:
    return f"{_times_100(value)}%"


def against_share(results: Results) -> Iterator[Panel]:
    """Scores against the trained share of the parameters."""
    axis = Axis("trained share of the parameters (log scale)", _percent_tick, log=True)
    yield from _cost_panels(results, axis, lambda arm: arm.mean("trainable_share"), format_share, "trained share")


def against_memory(results: Results) -> Iterator[Panel]:
    """Scores against the peak memory of training."""
    axis = Axis("peak memory of training (GB)", lambda size: format_tick(round(size / 1e9, 9)))
    yield from _cost_panels(results, axis, lambda arm: arm.mean("train_peak_bytes"), format_bytes, "peak memory")


def _cost_panels(
    results: Results,
    x: Axis,
    value_of: Callable[[Arm], float | None],
    format_value: Callable[[float], str],
    column: str,
) -> Iterator[Panel]:
    """Scores on the data set that a recipe was trained on, against a cost of training.

    Args:
        x: the axis of the cost.
        value_of: the cost of a recipe; a recipe without one is left out.
        format_value: the cost as text.
        column: the cost's heading in the table of numbers.
    """
    for setting in results.settings(curves=False):
        for dataset in results.datasets(setting, "in"):
            metric = results.primary_metric(dataset)
            scores = [
                (arm, value, score)
                for arm in results.arms(setting)
                if (value := value_of(arm)) and (score := results.estimate(arm, dataset, metric))
            ]
            if len(scores) < 2:
                continue
            marks = []
            for arm, value, score in scores:
                seconds = arm.mean("train_seconds")
                tooltip = f"{arm.name}: {format_interval(metric, score)} at {format_value(value)}"
                tooltip += f", {format_duration(seconds)}" if seconds is not None else ""
                marks.append(Series(arm.name, arm.family, (Point(value, score.value, score.low, score.high, tooltip),)))
            if len(marks) > MAX_LABELS:
                marks = label_pareto_front(marks, results.reference_recipe(setting))
            y = score_axis(metric, dataset)
            label = f"{y.title} against {x.title}: {setting.description}"
            chart = charts.draw_scatter(label, marks, x, y, _base_level(results, setting.model, dataset))
            rows = tuple(
                (arm.name, format_value(value), format_interval(metric, score)) for arm, value, score in scores
            )
            yield Panel(setting_title(results, setting), chart, ("recipe", column, y.title), rows)


def label_pareto_front(marks: Sequence[Series], reference: str | None) -> list[Series]:
    """Label only the recipes on the Pareto front, and the reference.

    A mark is on the front if no other mark has a higher `y` at the same or a lower `x`.
    """
    points = [mark.points[0] for mark in marks]
    return [
        replace(
            mark,
            labelled=mark.name == reference or not any(other.x <= point.x and other.y > point.y for other in points),
        )
        for mark, point in zip(marks, points, strict=True)
    ]


def transfer(results: Results) -> Iterator[Panel]:
    """Scores in and out of distribution: recipes trained on the data set (solid) or on another (outlined)."""
    for grid, model, dataset in _evaluated_sets(results):
        metric = results.primary_metric(dataset)
        settings = [s for s in results.settings() if (s.grid, s.model) == (grid, model)]
        rows: dict[str, tuple[str, list[Point]]] = {}
        table = []
        for setting in sorted(settings, key=lambda s: s.trained_on != dataset):
            for arm in results.full_data_arms(setting):
                if score := results.estimate(arm, dataset, metric):
                    interval = format_interval(metric, score)
                    tooltip = f"{arm.name}, trained on {setting.trained_on}: {interval}"
                    outlined = setting.trained_on != dataset
                    dot = Point(score.value, 0.0, score.low, score.high, tooltip, outlined)
                    rows.setdefault(arm.name, (arm.family, []))[1].append(dot)
                    table.append((arm.name, setting.trained_on, interval))
        if not any(dot.outlined for _, dots in rows.values() for dot in dots):
            continue
        level = _base_level(results, model, dataset, "frozen base, zero-shot")
        if base := results.frozen_estimate(model, dataset, metric):
            table.append(("frozen base", "nothing (zero-shot)", format_interval(metric, base)))
        axis = score_axis(metric, dataset)
        chart_rows = [Series(name, family, tuple(dots)) for name, (family, dots) in rows.items()]
        chart = charts.draw_dot_rows(f"{axis.title} of {model}, by training data", chart_rows, axis, level)
        title = f"{model} evaluated on {dataset}"
        yield Panel(title_with_grid(results, title, grid), chart, ("recipe", "trained on", axis.title), tuple(table))


def forgetting(results: Results) -> Iterator[Panel]:
    """How much each recipe lost on its base's own task."""
    datasets = list(dict.fromkeys(row["dataset"] for row in results.tables["forgetting"]))
    for setting in results.settings(curves=False):
        for dataset in datasets:
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
            yield Panel(setting_title(results, setting), chart, ("recipe", axis.title, "seeds"), tuple(table))


def loss_curves(results: Results) -> Iterator[Panel]:
    """The training loss over the steps: means over bins of steps and over seeds."""
    losses: dict[str, list[tuple[int, float]]] = {}
    for row in results.tables["losses"]:
        losses.setdefault(row["key"], []).append((int(row["step"]), float(row["loss"])))
    for setting in results.settings(curves=False):
        lines, table = [], []
        for arm in results.full_data_arms(setting):
            means = binned_means([losses[cell["key"]] for cell in arm.cells if cell["key"] in losses])
            if len(means) < 2:
                continue
            lines.append(Series(arm.name, arm.family, tuple(Point(step, loss, loss, loss) for step, loss in means)))
            losses_text = format_significant(means[0][1]), format_significant(means[-1][1])
            table.append((arm.name, *losses_text, f"{means[-1][0]:,.0f}"))
        if not lines:
            continue
        values = [point.y for line in lines for point in line.points]
        # logarithmic only if the losses differ by more than a factor of three
        log = min(values) > 0 and max(values) > 3 * min(values)
        y = Axis(f"loss a token{' (log scale)' if log else ''}", format_tick, log=log)
        x = Axis("optimizer steps", format_tick)
        chart = charts.draw_lines(f"{y.title} over {x.title}: {setting.description}", lines, x, y)
        header = ("recipe", "loss at first", "loss at last", "about step")
        yield Panel(setting_title(results, setting), chart, header, tuple(table))


def share_curves(results: Results) -> Iterator[Panel]:
    """Scores over the share of the training images, for grids that compare shares."""
    for setting in results.settings(curves=True):
        for dataset in results.datasets(setting, "in"):
            metric = results.primary_metric(dataset)
            points_of: dict[str, list[Point]] = {}
            families, table = {}, []
            for arm in sorted(results.arms(setting), key=lambda arm: arm.share):
                if score := results.estimate(arm, dataset, metric):
                    interval = format_interval(metric, score)
                    tooltip = f"{arm.name} with {format_share(arm.share)}: {interval}"
                    point = Point(arm.share, score.value, score.low, score.high, tooltip)
                    points_of.setdefault(arm.name, []).append(point)
                    families[arm.name] = arm.family
                    table.append((arm.name, format_share(arm.share), interval))
            if not points_of:
                continue
            x = Axis("share of the training images (log scale)", _percent_tick, log=True)
            y = score_axis(metric, dataset)
            lines = [Series(name, families[name], tuple(marks)) for name, marks in points_of.items()]
            level = _base_level(results, setting.model, dataset)
            chart = charts.draw_lines(f"{y.title} over {x.title}: {setting.description}", lines, x, y, level)
            yield Panel(setting_title(results, setting), chart, ("recipe", "share", y.title), tuple(table))


def rate_curves(results: Results) -> Iterator[Panel]:
    """The validation scores of learning-rate trials; the chosen rate is highlighted."""
    metric_rows = {
        (row["key"], row["metric"], row["dataset"]): row
        for row in results.tables["metrics"]
        if row.get("role") == "validate"
    }
    datasets = {key: dataset for key, _, dataset in metric_rows}
    trials_of: dict[tuple[str, str, str], list[Record]] = {}
    for cell in results.finished.values():
        if SEARCH in (cell.get("grids") or ()) and cell["key"] in datasets and len(cell.get("rates") or {}) == 1:
            trials_of.setdefault((cell["model"], datasets[cell["key"]], cell["recipe"]), []).append(cell)
    for model, dataset in dict.fromkeys((model, dataset) for model, dataset, _ in trials_of):
        metric = _search_metric(results, dataset)
        lines, table = [], []
        for recipe in results.recipe_order():
            trials = sorted(trials_of.get((model, dataset, recipe), []), key=_rate)
            scored = [
                (cell, metric_rows[cell["key"], metric, dataset])
                for cell in trials
                if (cell["key"], metric, dataset) in metric_rows
            ]
            if not scored:
                continue
            selected = _chosen_rates(results, trials[0])
            highlighted = next((index for index, (cell, _) in enumerate(scored) if _rate(cell) in selected), None)
            arm = Arm(Setting(SEARCH, model, dataset), 1.0, recipe, None, tuple(trials))
            points = []
            for index, (cell, row) in enumerate(scored):
                rate = _rate(cell)
                score = Estimate(row["value"], row["low"], row["high"], 1)
                tooltip = f"{recipe} at {rate:g}: {format_interval(metric, score)}"
                outlined = index != highlighted and highlighted is not None
                points.append(Point(rate, score.value, score.value, score.value, tooltip, outlined))
                note = "chosen" if rate in selected else ""
                table.append((recipe, f"{rate:g}", format_interval(metric, score), note))
            lines.append(Series(recipe, arm.family, tuple(points)))
        if lines:
            x = Axis("learning rate (log scale)", format_tick, log=True)
            y = score_axis(metric, dataset, ", validation")
            chart = charts.draw_lines(f"{y.title} over {x.title}: {model}", lines, x, y, label_solid=True)
            yield Panel(f"{model} on {dataset}", chart, ("recipe", "learning rate", y.title, ""), tuple(table))


def _search_metric(results: Results, dataset: str) -> str:
    """The metric that learning-rate searches maximise on a data set."""
    metric = (results.spec.get("search") or {}).get("metric")
    if isinstance(metric, str) and metric in results.metrics_of.get(dataset, ()):
        return metric
    return results.primary_metric(dataset)


def _chosen_rates(results: Results, trial: Record) -> set[float]:
    """The rates of the cells that use the result of the search that the trial belongs to."""
    columns = ("model", "recipe", "trained_on")
    return {
        _rate(cell)
        for cell in results.finished.values()
        if cell.get("rate_source") == SEARCH and all(cell[name] == trial[name] for name in columns)
    }


def _rate(cell: Record) -> float:
    """The learning rate of a trial, which has a single method."""
    return float(next(iter(cell["rates"].values())))


def forgetting_estimate(results: Results, arm: Arm, dataset: str) -> Estimate | None:
    """How much an arm lost on the base's own task, by the primary metric of the task; None if unknown."""
    keys, metric = {cell["key"] for cell in arm.cells}, results.primary_metric(dataset)
    values = [
        float(row["forgotten"])
        for row in results.tables["forgetting"]
        if row["key"] in keys and row["dataset"] == dataset and row["metric"] == metric
    ]
    if len(values) < 2:  # a single value is its own interval
        return Estimate(values[0], values[0], values[0], 1) if values else None
    mean = mean_over_seeds(values)
    return Estimate(mean.value, mean.low, mean.high, len(values))


def binned_means(runs: Sequence[Sequence[tuple[int, float]]]) -> list[tuple[float, float]]:
    """The mean step and loss in each bin of steps, over all runs together.

    Args:
        runs: (step, loss) of each run; losses that are not finite are left out.

    Returns:
        (step, loss) of at most `BINS` bins of equal width.
    """
    last = max((step for run in runs for step, _ in run), default=0)
    bins: dict[int, list[tuple[int, float]]] = {}
    for run in runs:
        for step, loss in run:
            if math.isfinite(loss):
                bins.setdefault(min(BINS - 1, step * BINS // max(1, last)), []).append((step, loss))
    return [
        (math.fsum(step for step, _ in bin_) / len(bin_), math.fsum(loss for _, loss in bin_) / len(bin_))
        for _, bin_ in sorted(bins.items())
    ]


def _evaluated_sets(results: Results) -> list[tuple[str, str, str]]:
    """Grid, model and data set of every evaluation of a trained model, except on the base's own task."""
    evaluated = (
        (setting.grid, setting.model, dataset)
        for setting in results.settings(curves=False)
        for role in ("in", "out")
        for dataset in results.datasets(setting, role)
    )
    return list(dict.fromkeys(evaluated))


def _base_level(results: Results, model: str, dataset: str, name: str = "frozen base") -> Level | None:
    """The frozen base's score on a data set as a line across the chart; None if it was not evaluated."""
    base = results.frozen_estimate(model, dataset, results.primary_metric(dataset))
    return None if base is None else Level(name, base.value, base.low, base.high)


def setting_title(results: Results, setting: Setting) -> str:
    """A setting's description, with its grid if that is needed to identify it."""
    return title_with_grid(results, setting.description, setting.grid)


def title_with_grid(results: Results, title: str, grid: str) -> str:
    """The title, with the grid's name if the study has several grids of the same kind."""
    curves = {setting.grid: results.is_curve(setting) for setting in results.settings()}
    return f"{title} ({grid})" if list(curves.values()).count(curves[grid]) > 1 else title
