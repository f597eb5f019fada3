"""The figures of a study's page: which marks each chart holds. How they are drawn is in `charts`."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from normtune.errors import InputError
from normtune.metrics.statistics import mean_over_seeds
from normtune.studies.page import charts
from normtune.studies.page.axes import Axis
from normtune.studies.page.charts import Dot, Level, Line, Point, Row
from normtune.studies.page.html import Html
from normtune.studies.page.number_format import (
    duration,
    fixed,
    memory,
    percent,
    points,
    share,
    significant,
    tick,
)
from normtune.studies.page.results import (
    SEARCH,
    Arm,
    Estimate,
    Record,
    Results,
    Setting,
    is_fraction,
    metric_name,
)

BINS = 60  # points of a loss curve
NAMED = 14  # of more marks in one chart only the foremost are named


@dataclass(frozen=True)
class Panel:
    """One chart with what stands over it, and its numbers as a table: a header and rows."""

    title: str
    chart: Html
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def score(metric: str, value: float | None) -> str:
    """A score as it is printed: of 100 where 1 is the most, else as it is."""
    return percent(value) if is_fraction(metric) else fixed(value, 2)


def score_interval(metric: str, found: Estimate) -> str:
    """A score with the ends of its interval."""
    return f"{score(metric, found.value)} [{score(metric, found.low)}, {score(metric, found.high)}]"


def score_axis(metric: str, dataset: str, where: str = "") -> Axis:
    """The axis of a metric."""
    bound = (0.0, 1.0) if is_fraction(metric) else (0.0, math.inf)
    unit = " (%)" if is_fraction(metric) else ""
    written = _hundredfold if is_fraction(metric) else tick
    return Axis(f"{metric_name(metric)} on {dataset}{where}{unit}", written, least=0.02, bound=bound)


def _hundredfold(value: float) -> str:
    return tick(round(100 * value, 9))


def _percent_tick(value: float) -> str:
    return f"{_hundredfold(value)}%"


def against_share(results: Results) -> Iterator[Panel]:
    """Score against the share of the parameters that is trained."""
    axis = Axis("trained share of the parameters (log scale)", _percent_tick, log=True)
    yield from _against(results, axis, lambda arm: arm.mean("trainable_share"), share, "trained share")


def against_memory(results: Results) -> Iterator[Panel]:
    """Score against the peak memory of training."""
    axis = Axis("peak memory of training (GB)", lambda size: tick(round(size / 1e9, 9)))
    yield from _against(results, axis, lambda arm: arm.mean("train_peak_bytes"), memory, "peak memory")


def _against(
    results: Results, axis: Axis, of: Callable[[Arm], float | None], told: Callable[[float], str], column: str
) -> Iterator[Panel]:
    for setting in results.settings():
        if results.is_curve(setting):
            continue
        for dataset in results.datasets(setting, "in"):
            metric = results.primary(dataset)
            found = [
                (arm, at, one)
                for arm in results.arms(setting)
                if (at := of(arm)) and (one := results.estimate(arm, dataset, metric))
            ]
            if len(found) < 2:
                continue
            drawn = [
                Point(
                    arm.name, arm.family, at, one.value, one.low, one.high, _told(arm, metric, one, told(at))
                )
                for arm, at, one in found
            ]
            if len(drawn) > NAMED:
                drawn = foremost_named(drawn, results.reference(setting))
            y = score_axis(metric, dataset)
            chart = charts.scatter(
                f"{y.title} against {axis.title}: {setting.told}",
                drawn,
                axis,
                y,
                _level(results, setting, dataset),
            )
            rows = tuple((arm.name, told(at), score_interval(metric, one)) for arm, at, one in found)
            yield Panel(title(results, setting), chart, ("recipe", column, y.title), rows)


def foremost_named(points: Sequence[Point], reference: str | None) -> list[Point]:
    """The points, named where no other has a higher `y` at no more `x`, or where it is the reference's."""
    return [
        replace(
            point,
            named=point.name == reference
            or not any(other.x <= point.x and other.y > point.y for other in points),
        )
        for point in points
    ]


def transfer(results: Results) -> Iterator[Panel]:
    """In and out of distribution: each recipe trained on this data set (solid) and on others (hollow)."""
    for grid, model, dataset in _evaluated(results):
        metric = results.primary(dataset)
        settings = [s for s in results.settings() if (s.grid, s.model) == (grid, model)]
        rows: dict[str, tuple[str, list[Dot]]] = {}
        table = []
        for setting in sorted(settings, key=lambda s: s.trained_on != dataset):
            for arm in results.full_data(setting):
                if one := results.estimate(arm, dataset, metric):
                    told = f"{arm.name}, trained on {setting.trained_on}: {score_interval(metric, one)}"
                    dot = Dot(one.value, one.low, one.high, setting.trained_on != dataset, told)
                    rows.setdefault(arm.name, (arm.family, []))[1].append(dot)
                    table.append((arm.name, setting.trained_on, score_interval(metric, one)))
        if not any(dot.hollow for _, dots in rows.values() for dot in dots):
            continue
        base = results.frozen(model, dataset, metric)
        level = Level("frozen base, zero-shot", base.value, base.low, base.high) if base else None
        if base:
            table.append(("frozen base", "nothing (zero-shot)", score_interval(metric, base)))
        y = score_axis(metric, dataset)
        drawn = [Row(name, kind, tuple(dots)) for name, (kind, dots) in rows.items()]
        chart = charts.dot_rows(f"{y.title} of {model}, by what it was trained on", drawn, y, level)
        asked = f"{model} asked about {dataset}"
        yield Panel(grid_named(results, asked, grid), chart, ("recipe", "trained on", y.title), tuple(table))


def forgetting(results: Results) -> Iterator[Panel]:
    """What tuning took from the base's own task."""
    datasets = list(dict.fromkeys(row["dataset"] for row in results.tables["forgetting"]))
    for setting in results.settings():
        if results.is_curve(setting):
            continue
        for dataset in datasets:
            rows, table = [], []
            for arm in results.full_data(setting):
                if (one := forgotten_by(results, arm, dataset)) is None:
                    continue
                told = f"{points(one.value)} [{points(one.low)}, {points(one.high)}] points"
                rows.append(
                    Row(
                        arm.name,
                        arm.family,
                        (Dot(one.value, one.low, one.high, False, f"{arm.name}: {told}"),),
                    )
                )
                table.append((arm.name, told, str(one.seeds)))
            if not rows:
                continue
            metric = results.primary(dataset)
            axis = Axis(
                f"points lost on {dataset}, {metric_name(metric)}", _hundredfold, zero=True, least=0.02
            )
            level = Level("nothing forgotten", 0.0, 0.0, 0.0)
            chart = charts.dot_rows(f"{axis.title}: {setting.told}", rows, axis, level)
            yield Panel(title(results, setting), chart, ("recipe", axis.title, "seeds"), tuple(table))


def loss_curves(results: Results) -> Iterator[Panel]:
    """Training loss over steps, the mean of each bin of steps and of the seeds."""
    losses: dict[str, list[tuple[int, float]]] = {}
    for row in results.tables["losses"]:
        losses.setdefault(row["key"], []).append((int(row["step"]), float(row["loss"])))
    for setting in results.settings():
        if results.is_curve(setting):
            continue
        drawn, table = [], []
        for arm in results.full_data(setting):
            binned = binned_means([losses[cell["key"]] for cell in arm.cells if cell["key"] in losses])
            if len(binned) < 2:
                continue
            marks = tuple(Point(arm.name, arm.family, step, loss, loss, loss, "") for step, loss in binned)
            drawn.append(Line(arm.name, arm.family, marks))
            first, last = binned[0][1], binned[-1][1]
            table.append((arm.name, significant(first), significant(last), f"{binned[-1][0]:,.0f}"))
        if not drawn:
            continue
        every = [point.y for line in drawn for point in line.points]
        log = min(every) > 0 and max(every) > 3 * min(every)
        y = Axis(f"loss a token{' (log scale)' if log else ''}", tick, log=log)
        x = Axis("optimizer steps", tick)
        chart = charts.lines(f"{y.title} over {x.title}: {setting.told}", drawn, x, y)
        header = ("recipe", "loss at first", "loss at last", "about step")
        yield Panel(title(results, setting), chart, header, tuple(table))


def share_curves(results: Results) -> Iterator[Panel]:
    """Score over the share of the training images, of grids that try several."""
    for setting in results.settings():
        if not results.is_curve(setting):
            continue
        for dataset in results.datasets(setting, "in"):
            metric = results.primary(dataset)
            lines: dict[str, list[Point]] = {}
            families, table = {}, []
            for arm in sorted(results.arms(setting), key=lambda arm: arm.share):
                if one := results.estimate(arm, dataset, metric):
                    told = f"{arm.name} with {share(arm.share)}: {score_interval(metric, one)}"
                    lines.setdefault(arm.name, []).append(
                        Point(arm.name, arm.family, arm.share, one.value, one.low, one.high, told)
                    )
                    families[arm.name] = arm.family
                    table.append((arm.name, share(arm.share), score_interval(metric, one)))
            if not lines:
                continue
            x = Axis("share of the training images (log scale)", _percent_tick, log=True)
            y = score_axis(metric, dataset)
            drawn = [Line(name, families[name], tuple(marks)) for name, marks in lines.items()]
            level = _level(results, setting, dataset)
            chart = charts.lines(f"{y.title} over {x.title}: {setting.told}", drawn, x, y, level)
            yield Panel(title(results, setting), chart, ("recipe", "share", y.title), tuple(table))


def rate_curves(results: Results) -> Iterator[Panel]:
    """Validation score over the learning rate, of the search's trials; the rate taken stands out."""
    values = {
        (row["key"], row["metric"], row["dataset"]): row
        for row in results.tables["metrics"]
        if row.get("role") == "validate"
    }
    datasets = {key: dataset for key, _, dataset in values}
    groups: dict[tuple[str, str, str], list[Record]] = {}
    for cell in results.done.values():
        if (
            SEARCH in (cell.get("grids") or ())
            and cell["key"] in datasets
            and len(cell.get("rates") or {}) == 1
        ):
            groups.setdefault((cell["model"], datasets[cell["key"]], cell["recipe"]), []).append(cell)
    for model, dataset in dict.fromkeys((model, dataset) for model, dataset, _ in groups):
        metric = _search_metric(results, dataset)
        drawn, table = [], []
        for recipe in results.recipe_order():
            trials = sorted(groups.get((model, dataset, recipe), []), key=_rate)
            scored = [
                (cell, values[cell["key"], metric, dataset])
                for cell in trials
                if (cell["key"], metric, dataset) in values
            ]
            if not scored:
                continue
            taken = _taken(results, trials[0])
            picked = next((i for i, (cell, _) in enumerate(scored) if _rate(cell) in taken), None)
            arm = Arm(Setting(SEARCH, model, dataset), 1.0, recipe, None, tuple(trials))
            marks = []
            for cell, row in scored:
                one = Estimate(row["value"], row["low"], row["high"], 1)
                told = f"{recipe} at {_rate(cell):g}: {score_interval(metric, one)}"
                marks.append(Point(recipe, arm.family, _rate(cell), one.value, one.value, one.value, told))
                mark = "taken" if _rate(cell) in taken else ""
                table.append((recipe, f"{_rate(cell):g}", score_interval(metric, one), mark))
            drawn.append(Line(recipe, arm.family, tuple(marks), picked))
        if drawn:
            x = Axis("learning rate (log scale)", tick, log=True)
            y = score_axis(metric, dataset, ", validation")
            chart = charts.lines(f"{y.title} over {x.title}: {model}", drawn, x, y, named_at_best=True)
            yield Panel(
                f"{model} on {dataset}", chart, ("recipe", "learning rate", y.title, ""), tuple(table)
            )


def _search_metric(results: Results, dataset: str) -> str:
    wanted = (results.spec.get("search") or {}).get("metric")
    if isinstance(wanted, str) and wanted in results.metrics_of.get(dataset, ()):
        return wanted
    return results.primary(dataset)


def _taken(results: Results, trial: Record) -> set[float]:
    """The rates of the cells that waited for a trial's search."""
    of = ("model", "recipe", "trained_on")
    return {
        _rate(cell)
        for cell in results.done.values()
        if cell.get("rate_source") == SEARCH and all(cell[name] == trial[name] for name in of)
    }


def _rate(cell: Record) -> float:
    return float(next(iter(cell["rates"].values())))


def forgotten_by(results: Results, arm: Arm, dataset: str) -> Estimate | None:
    """What an arm lost on the base's own task, by the task's primary metric."""
    keys, metric = {cell["key"] for cell in arm.cells}, results.primary(dataset)
    values = [
        float(row["forgotten"])
        for row in results.tables["forgetting"]
        if row["key"] in keys and row["dataset"] == dataset and row["metric"] == metric
    ]
    return over_seeds(values) if values else None


def over_seeds(values: Sequence[float]) -> Estimate:
    """Mean and Student's t interval; of one value, the value alone."""
    try:
        found = mean_over_seeds(values)
    except InputError:
        return Estimate(values[0], values[0], values[0], 1)
    return Estimate(found.value, found.low, found.high, len(values))


def binned_means(runs: Sequence[Sequence[tuple[int, float]]]) -> list[tuple[float, float]]:
    """(step, loss) of several runs -> the mean of each of at most `BINS` bins of steps, all runs together."""
    last = max((step for run in runs for step, _ in run), default=0)
    bins: dict[int, list[tuple[int, float]]] = {}
    for run in runs:
        for step, loss in run:
            if math.isfinite(loss):
                bins.setdefault(min(BINS - 1, step * BINS // max(1, last)), []).append((step, loss))
    return [
        (math.fsum(s for s, _ in found) / len(found), math.fsum(loss for _, loss in found) / len(found))
        for _, found in sorted(bins.items())
    ]


def _evaluated(results: Results) -> list[tuple[str, str, str]]:
    """Grid, model and data set of every evaluation that is not of the base's own task."""
    found: dict[tuple[str, str, str], None] = {}
    for setting in results.settings():
        if results.is_curve(setting):
            continue
        for role in ("in", "out"):
            for dataset in results.datasets(setting, role):
                found[setting.grid, setting.model, dataset] = None
    return list(found)


def _level(results: Results, setting: Setting, dataset: str) -> Level | None:
    base = results.frozen(setting.model, dataset, results.primary(dataset))
    return None if base is None else Level("frozen base", base.value, base.low, base.high)


def _told(arm: Arm, metric: str, one: Estimate, at: str) -> str:
    seconds = arm.mean("train_seconds")
    took = f", {duration(seconds)}" if seconds is not None else ""
    return f"{arm.name}: {score_interval(metric, one)} at {at}{took}"


def title(results: Results, setting: Setting) -> str:
    """A setting in words, with its grid where it takes one to tell it."""
    return grid_named(results, setting.told, setting.grid)


def grid_named(results: Results, words: str, grid: str) -> str:
    """The title with the grid's name where several of its kind could be meant."""
    kinds = {setting.grid: results.is_curve(setting) for setting in results.settings()}
    return f"{words} ({grid})" if list(kinds.values()).count(kinds[grid]) > 1 else words
