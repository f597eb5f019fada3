"""The figures of a setting's training: learning curves, losses, learning rates, and shares of the data."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import chain, groupby
from operator import itemgetter
from statistics import fmean

from normtune.runtime.number_format import format_share, format_significant, format_tick
from normtune.studies.page import charts
from normtune.studies.page.charts import Point, Series
from normtune.studies.page.drawing import Axis, Style
from normtune.studies.page.figures import Panel, base_level, format_interval, percent_tick, score_axis
from normtune.studies.page.results import Arm, Estimate, Record, Results, Setting, counted
from normtune.studies.pooling import group_by
from normtune.studies.spec import SEARCH

BINS = 60  # largest number of points of a loss curve


def learning_curves(results: Results, setting: Setting) -> Iterator[Panel]:
    """The score and the loss on the validation split over the passes: means over seeds."""
    curves = group_by(results.tables["curves"], itemgetter("key"))
    arms = [arm for arm in results.full_data_arms(setting) if any(cell["key"] in curves for cell in arm.cells)]
    if not arms:
        return
    noun = "fold" if any(arm.folds for arm in arms) else "seed"
    metric = next(iter(curves[arms[0].cells[0]["key"]]))["metric"]
    loss = Axis("loss a token, validation", format_tick)
    columns = {"score": score_axis(metric, setting.trained_on, ", validation")} if metric != "loss" else {}
    for column, y in (columns | {"validation_loss": loss}).items():
        lines, table = [], []
        for arm in arms:
            runs = [curves[cell["key"]] for cell in arm.cells if cell["key"] in curves]
            points = []
            for _, group in groupby(sorted(chain(*runs), key=itemgetter("step")), itemgetter("step")):
                rows = list(group)
                passes, value = (fmean(row[name] for row in rows) for name in ("passes", column))
                tooltip = f"{arm.name}, pass {passes:.3g}: {y.format_tick(round(value, 3))}, {counted(len(rows), noun)}"
                points.append(
                    Point(passes, value, value, value, tooltip, "solid" if len(rows) == len(runs) else "hollow")
                )
            lines.append(Series(arm.name, arm.family, tuple(points)))
            best = [row["passes"] for run in runs for row in run if row["is_best"]]
            capped = sum(not cell.get("stopped_early") for cell in arm.cells)
            numbers = y.format_tick(round(points[0].y, 3)), y.format_tick(round(points[-1].y, 3))
            table.append((arm.name, *numbers, f"{min(best):.3g} to {max(best):.3g}", str(len(runs)), str(capped)))
        x = Axis("passes over the training pairs", format_tick)
        chart = charts.draw_lines(f"{y.title} over {x.title}: {setting.description}", lines, x, y)
        text = (
            f"The mean over the {noun}s that still train; hollow: some {noun}s have stopped, because their score rose "
            f"no more. The evaluated adapter has the values of the best pass of its {noun}."
        )
        header = ("recipe", "at first", "at last", "best passes", f"{noun}s", f"{noun}s at the cap")
        title = "Learning curves" if column == "score" else "Validation loss"
        yield Panel(title, results.counts(None, arms), chart, text, header, tuple(table))


def loss_curves(results: Results, setting: Setting) -> Iterator[Panel]:
    """The training loss over the steps: means over bins of steps and over seeds."""
    rows_of = group_by(results.tables["losses"], itemgetter("key"))
    losses = {key: [(int(row["step"]), float(row["loss"])) for row in rows] for key, rows in rows_of.items()}
    lines, table, arms = [], [], []
    for arm in results.full_data_arms(setting):
        means = binned_means([losses[cell["key"]] for cell in arm.cells if cell["key"] in losses])
        if len(means) < 2:
            continue
        arms.append(arm)
        lines.append(Series(arm.name, arm.family, tuple(Point(step, loss, loss, loss) for step, loss in means)))
        losses_text = format_significant(means[0][1]), format_significant(means[-1][1])
        table.append((arm.name, *losses_text, f"{means[-1][0]:,.0f}"))
    if not lines:
        return
    values = [point.y for line in lines for point in line.points]
    # logarithmic only if the losses differ by more than a factor of three
    log = min(values) > 0 and max(values) > 3 * min(values)
    y = Axis(f"loss a token{' (log scale)' if log else ''}", format_tick, log=log)
    x = Axis("optimizer steps", format_tick)
    chart = charts.draw_lines(f"{y.title} over {x.title}: {setting.description}", lines, x, y)
    header = ("recipe", "loss at first", "loss at last", "about step")
    text = (
        "The mean over bins of steps and over seeds. Learning rates differ by method, so the order of the curves "
        "is not the order of the scores."
    )
    yield Panel("Training loss", results.counts(None, arms), chart, text, header, tuple(table))


def share_curves(results: Results, setting: Setting) -> Iterator[Panel]:
    """Scores over the share of the training images, for grids that compare shares."""
    for dataset in results.datasets(setting, "in") if results.is_curve(setting) else ():
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
        x = Axis("share of the training images (log scale)", percent_tick, log=True)
        y = score_axis(metric, dataset)
        lines = [Series(name, families[name], tuple(marks)) for name, marks in points_of.items()]
        level = base_level(results, setting.model, dataset)
        chart = charts.draw_lines(f"{y.title} over {x.title}: {setting.description}", lines, x, y, level)
        text = "Each seed trains on its own random sample of the images. Dashed: the frozen base."
        counts = results.counts(dataset, results.arms(setting))
        header = ("recipe", "share", y.title)
        yield Panel("Scores with less training data", counts, chart, text, header, tuple(table))


def rate_curves(results: Results, setting: Setting) -> Iterator[Panel]:
    """The validation scores of the learning-rate trials of a setting's recipes; the chosen rate is highlighted."""
    metric_rows = {
        (row["key"], row["metric"], row["dataset"]): row
        for row in results.tables["metrics"]
        if row.get("role") == "validate"
    }
    searched = {
        arm.recipe for arm in results.arms(setting) if any(cell.get("rate_source") == SEARCH for cell in arm.cells)
    }
    for dataset in dict.fromkeys(dataset for _, _, dataset in metric_rows):
        metric = _search_metric(results, dataset)
        trials_of: dict[str, list[Record]] = {}
        for cell in results.finished.values():
            is_same = (cell["model"], cell["trained_on"]) == (setting.model, setting.trained_on)
            is_trial = SEARCH in (cell.get("grids") or ()) and len(set((cell.get("rates") or {}).values())) == 1
            if is_same and is_trial and cell["recipe"] in searched and (cell["key"], metric, dataset) in metric_rows:
                trials_of.setdefault(cell["recipe"], []).append(cell)
        lines, table, arms = [], [], []
        for recipe in sorted(trials_of, key=results.recipe_order().index):
            trials = sorted(trials_of[recipe], key=_rate)
            best_rates = _chosen_rates(results, trials[0])
            arms.append(Arm(setting, 1.0, recipe, None, tuple(trials)))
            points = []
            for cell in trials:
                row, rate = metric_rows[cell["key"], metric, dataset], _rate(cell)
                interval = format_interval(metric, Estimate(row["value"], row["low"], row["high"], 1))
                tooltip = f"{recipe} at {rate:g}: {interval}"
                style: Style = "hollow" if best_rates and rate not in best_rates else "solid"
                points.append(Point(rate, row["value"], row["value"], row["value"], tooltip, style))
                table.append((recipe, f"{rate:g}", interval, "chosen" if rate in best_rates else ""))
            lines.append(Series(recipe, arms[-1].family, tuple(points)))
        if lines:
            x = Axis("learning rate (log scale)", format_tick, log=True)
            y = score_axis(metric, dataset, ", validation")
            chart = charts.draw_lines(f"{y.title} over {x.title}: {setting.description}", lines, x, y, label_solid=True)
            text = "The trials of the search, scored on the validation split. Solid: the rate that the search chose."
            header = ("recipe", "learning rate", y.title, "")
            yield Panel(
                "Learning rates", f"{row['images']:,} validation images, 1 seed", chart, text, header, tuple(table)
            )


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
    """The learning rate of a trial, the same for all of its methods."""
    return float(next(iter(cell["rates"].values())))


def binned_means(runs: Sequence[Sequence[tuple[int, float]]]) -> list[tuple[float, float]]:
    """The mean step and loss in each bin of steps, over all runs together.

    Args:
        runs: (step, loss) of each run; losses that are not finite are left out.

    Returns:
        (step, loss) of at most `BINS` bins of equal width.
    """
    last = max((step for run in runs for step, _ in run), default=0)
    finite = [(step, loss) for run in runs for step, loss in run if math.isfinite(loss)]
    bins = group_by(finite, lambda point: min(BINS - 1, point[0] * BINS // max(1, last)))
    return [
        (fmean(step for step, _ in points), fmean(loss for _, loss in points)) for _, points in sorted(bins.items())
    ]
