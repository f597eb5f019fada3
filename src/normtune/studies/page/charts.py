"""Charts as inline SVG: scatter plots, line charts, rows of dots, and heat maps.

Each chart has an `aria-label`, and each mark a `title` with its value, which browsers show as a tooltip.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from normtune.studies.page.drawing import (
    BOTTOM,
    INK,
    MONOSPACE,
    QUIET,
    WIDTH,
    Axis,
    Drawing,
    Level,
    Style,
    axis_limits,
    new_drawing,
)
from normtune.studies.page.palette import COLOURS

ROW_HEIGHT = 24.0  # height of a row of dots or cells, in pixels of the SVG's viewBox
MAX_MARKS = 12  # lines with more points than this have no marks


@dataclass(frozen=True)
class Point:
    """A mark at `x` and `y`, with its interval from `low` to `high`."""

    x: float
    y: float
    low: float
    high: float
    tooltip: str = ""  # the text that a browser shows at the mark
    style: Style = "solid"  # hollow: the second kind of mark in a chart; small: one seed of several


@dataclass(frozen=True)
class Series:
    """The marks of one recipe."""

    name: str
    family: str
    points: tuple[Point, ...]


def draw_scatter(
    label: str, series: Sequence[Series], x_axis: Axis, y_axis: Axis, level: Level | None = None
) -> Markup:
    """Points with intervals and labels, and a level across the chart."""
    with new_drawing(label, 340) as chart:
        _set_axes(chart, series, x_axis, y_axis, level)
        for item in series:
            _draw_points(chart, item)
        ends = [(item.points[0].x, item.points[0].y) for item in series]
        chart.label_points([item.name for item in series], ends, [INK] * len(series))
        return chart.to_svg()


def _set_axes(chart: Drawing, series: Sequence[Series], x_axis: Axis, y_axis: Axis, level: Level | None) -> None:
    """Set both axes of a chart of points, and draw the level."""
    points = [point for item in series for point in item.points]
    centres = [point.y for point in points] + ([level.value] if level else [])
    ends = [end for point in points for end in (point.low, point.high)]
    chart.set_axis("x", x_axis, axis_limits(x_axis, [point.x for point in points], []), grid=False)
    chart.set_axis("y", y_axis, axis_limits(y_axis, centres, ends))
    chart.add_level(level)


def _draw_points(chart: Drawing, series: Series, offset: float = 0.0) -> None:
    """Draw the marks of a series with their intervals, moved sideways by `offset` pixels."""
    for point in series.points:
        chart.add_interval(series.family, point.x, point.low, point.high, "y", offset)
        chart.add_mark(series.family, point.x, point.y, point.tooltip, point.style, offset)


def draw_lines(
    label: str,
    lines: Sequence[Series],
    x_axis: Axis,
    y_axis: Axis,
    level: Level | None = None,
    *,
    label_solid: bool = False,
) -> Markup:
    """Lines, each with a label at its end.

    Args:
        label: the chart's `aria-label`.
        label_solid: put each line's label at its first solid mark instead.
    """
    height = max(310.0, 90 + 15.0 * len(lines))  # high enough for the labels at the line ends
    right = 14 if label_solid else 22 + _text_width([line.name for line in lines])
    colours = [COLOURS[line.family][0] for line in lines]
    has_marks = all(len(line.points) <= MAX_MARKS for line in lines)
    with new_drawing(label, height, right=right) as chart:
        _set_axes(chart, lines, x_axis, y_axis, level)
        for index, (line, colour) in enumerate(zip(lines, colours, strict=True)):
            # lines are moved apart sideways a little, so that their intervals do not cover each other
            offset = 3.5 * (index - (len(lines) - 1) / 2) if has_marks and not label_solid else 0.0
            xs, ys = [point.x for point in line.points], [point.y for point in line.points]
            (path,) = chart.axes.plot(xs, ys, color=colour, linewidth=1.75, transform=chart.moved(offset))
            chart.add_tooltip(path, line.name)
            if has_marks:
                _draw_points(chart, line, offset)
        if label_solid:
            marks = [next((mark for mark in line.points if mark.style == "solid"), line.points[0]) for line in lines]
            chart.label_points([line.name for line in lines], [(mark.x, mark.y) for mark in marks], colours)
        else:
            _label_ends(chart, lines, colours)
        return chart.to_svg()


def _text_width(texts: Iterable[str]) -> float:
    """The approximate width of the longest text."""
    return 7.4 * max(map(len, texts))


def spread_heights(heights: Sequence[float], low: float, high: float, gap: float) -> list[float]:
    """Heights as near as possible to the given ones, at least `gap` apart, or less if there is no room."""
    order = sorted(range(len(heights)), key=lambda index: heights[index])
    gap = min(gap, (high - low) / max(1, len(heights) - 1))
    spread: list[float] = []
    for index in order:
        spread.append(max(heights[index], spread[-1] + gap if spread else low))
    for position in reversed(range(len(spread))):  # move what is beyond `high` back down to it
        spread[position] = min(spread[position], high - gap * (len(spread) - 1 - position))
    return [height for _, height in sorted(zip(order, spread, strict=True))]


def _label_ends(chart: Drawing, lines: Sequence[Series], colours: Sequence[str]) -> None:
    """Put a label right of the chart for each line, joined to the line's last point by a thin line."""
    ends = [(line.points[-1].x, line.points[-1].y) for line in lines]
    _, bottom, _, height = chart.axes.bbox.bounds
    preferred = chart.axes.transData.transform(ends)[:, 1] - bottom
    for line, end, y, colour in zip(lines, ends, spread_heights(preferred, 4, height - 4, 15), colours, strict=True):
        chart.axes.annotate(
            line.name, end, (chart.axes.bbox.width + 14, y), textcoords="axes pixels", color=colour, va="center",
            family=MONOSPACE,
            arrowprops={"arrowstyle": "-", "linewidth": 0.75, "color": QUIET, "shrinkA": 0, "shrinkB": 6},
        )  # fmt: skip


def draw_dot_rows(label: str, rows: Sequence[Series], axis: Axis, level: Level | None = None) -> Markup:
    """A row of marks for each recipe along the x axis; a level is a vertical line through all rows.

    `low` and `high` of a point are the interval of its `x`; its `y` is not used. Small marks are below the others.
    """
    dots = [dot for row in rows for dot in row.points]
    centres = [dot.x for dot in dots] + ([level.value] if level else [])
    ends = [end for dot in dots for end in (dot.low, dot.high)] + ([level.low, level.high] if level else [])
    left, top = min(200.0, 12 + _text_width([row.name for row in rows])), 22.0 if level else 8.0
    with new_drawing(label, top + ROW_HEIGHT * len(rows) + BOTTOM, left=left, top=top) as chart:
        chart.set_axis("x", axis, axis_limits(axis, centres, ends))
        chart.axes.set_ylim(len(rows) - 0.5, -0.5)
        chart.axes.set_yticks(range(len(rows)), [row.name for row in rows], color=INK, fontsize=12, family=MONOSPACE)
        chart.axes.grid(True, axis="y")
        if level:
            start, end = chart.axes.get_xlim()
            low, high = max(level.low, start), min(level.high, end)
            chart.axes.axvspan(low, high, color=QUIET, alpha=0.13, linewidth=0, zorder=1)
            chart.axes.axvline(level.value, color=QUIET, linewidth=1.25, dashes=(4, 3), zorder=2)
            at = (level.value - start) / (end - start)
            side = "left" if at < 0.3 else "right" if at > 0.7 else "center"
            chart.axes.text(at, 1.02, level.name, transform=chart.axes.transAxes, ha=side, color=QUIET, fontsize=11.5)
        for at, row in enumerate(rows):
            large = [dot for dot in row.points if dot.style != "small"]
            for dot in row.points:  # the two intervals of a row are moved apart
                y = at + 0.3 if dot.style == "small" else at + 0.28 * (large.index(dot) - (len(large) - 1) / 2)
                chart.add_interval(row.family, y, dot.low, dot.high, "x")
                chart.add_mark(row.family, dot.x, y, dot.tooltip, dot.style)
        return chart.to_svg()


def draw_heat_map(
    label: str,
    values: dict[tuple[str, str], float],
    tooltips: dict[tuple[str, str], str],
    columns: Sequence[str],
    title: str,
) -> Markup:
    """A grid of cells; the stronger a cell's colour, the larger its value.

    Args:
        values: the value of each (row, column), in the order of the rows; other cells are left empty.
        title: the title below the columns.
    """
    from matplotlib.patches import Rectangle

    rows = list(dict.fromkeys(row for row, _ in values))
    left = 10 + _text_width(rows)
    cell_width = max(15.0, min(26.0, (WIDTH - left - 16) / len(columns)))
    # 16: the last column's name may be wider than the column
    width = max(WIDTH, left + cell_width * len(columns) + 16)
    right = width - left - cell_width * len(columns)
    largest = max(values.values()) or 1.0
    with new_drawing(label, ROW_HEIGHT * len(rows) + BOTTOM + 2, left=left, right=right, top=2, width=width) as chart:
        for (row, column), value in values.items():
            at, alpha = (columns.index(column), rows.index(row)), 0.05 + 0.95 * value / largest
            cell = Rectangle(at, 0.94, 0.94, facecolor=COLOURS["ln"][0], alpha=alpha, linewidth=0)
            chart.add_tooltip(chart.axes.add_patch(cell), tooltips[row, column])
        chart.axes.set(xlim=(0, len(columns)), ylim=(len(rows), 0))
        chart.axes.spines["bottom"].set_visible(False)
        chart.axes.set_yticks([at + 0.5 for at in range(len(rows))], rows, color=INK)
        # column names are numbers mostly: leave some out if they are wider than a column
        every = 1 + int(_text_width(columns) // cell_width)
        ticks = [at for at, column in enumerate(columns) if at % every == 0 or not column.isdecimal()]
        chart.axes.set_xticks([at + 0.5 for at in ticks], [columns[at] for at in ticks], color=INK)
        chart.add_x_title(title)
        return chart.to_svg()
