"""Charts as inline SVG: scatter plots, line charts, rows of dots, and heat maps.

Colours and fonts are set by the page's style sheet, so that one drawing serves the light and the dark theme.
Each chart has an `aria-label`, and each mark a `title` with its value, which browsers show as a tooltip.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from normtune.studies.page.axes import Axis, Scale, make_scale
from normtune.studies.page.html import Html, tag
from normtune.studies.page.labels import ADVANCE, Box, LabelPosition, place_labels, spread_heights, text_width
from normtune.studies.page.palette import draw_interval, draw_marker

WIDTH = 460.0  # of a chart; all lengths are in units of the SVG's viewBox
LEFT, TOP, BOTTOM = 40.0, 34.0, 46.0  # margins for the ticks and titles of the axes
ROW_HEIGHT = 22.0  # of a row of dots
MAX_MARKS = 12  # lines with more points than this have no marks


@dataclass(frozen=True)
class Point:
    """A mark at `x` with the value `y` and its interval from `low` to `high`."""

    name: str
    family: str
    x: float
    y: float
    low: float
    high: float
    tooltip: str  # the text that a browser shows at the mark
    labelled: bool = True


@dataclass(frozen=True)
class Line:
    """Points joined in order. The point at index `highlighted` is drawn solid, the others are outlined."""

    name: str
    family: str
    points: tuple[Point, ...]
    highlighted: int | None = None


@dataclass(frozen=True)
class Level:
    """A value drawn as a line across the whole chart, with its interval as a band: the frozen base."""

    name: str
    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Dot:
    """A mark in a row; outlined dots are the second kind of mark in a chart."""

    value: float
    low: float
    high: float
    outlined: bool
    tooltip: str


@dataclass(frozen=True)
class Row:
    """The marks of one recipe in `draw_dot_rows`."""

    name: str
    family: str
    dots: tuple[Dot, ...]


def draw_scatter(label: str, points: Sequence[Point], x_axis: Axis, y_axis: Axis, level: Level | None = None) -> Html:
    """Points with intervals and labels, and a level across the chart."""
    height = 340.0
    x_scale, y_scale = _scales(points, x_axis, y_axis, level, height, right=WIDTH - 14)
    body = [*_draw_axes(x_scale, y_scale, x_axis, y_axis)]
    if level:
        body += _draw_level(level, x_scale, y_scale)
    marks = [(x_scale(point.x), y_scale(point.y)) for point in points]
    occupied = [_level_box(level, x_scale, y_scale)] if level else []
    for point, (x, y) in zip(points, marks, strict=True):
        body.append(draw_interval(point.family, y_scale, x, point.low, point.high, upright=True))
        occupied += [Box(x - 2, y_scale(point.high), x + 2, y_scale(point.low)), _box_around(x, y, 6)]
    frame = Box(LEFT + 2, TOP - 8, WIDTH, y_scale.start - 2)
    labelled = [(point.name, mark) for point, mark in zip(points, marks, strict=True) if point.labelled]
    positions = place_labels([name for name, _ in labelled], [mark for _, mark in labelled], occupied, frame)
    for (name, mark), position in zip(labelled, positions, strict=True):
        body += _draw_label(name, mark, position)
    for point, mark in zip(points, marks, strict=True):
        body.append(_with_tooltip(draw_marker(point.family, *mark), point.tooltip))
    return _svg(label, height, body)


def draw_lines(
    label: str,
    lines: Sequence[Line],
    x_axis: Axis,
    y_axis: Axis,
    level: Level | None = None,
    *,
    label_highlighted: bool = False,
) -> Html:
    """Lines, each with a label at its end.

    Args:
        label: the chart's `aria-label`.
        level: a value drawn across the chart.
        label_highlighted: put each line's label at its highlighted point instead.
    """
    height = max(310.0, TOP + BOTTOM + 14 * len(lines))  # high enough for the labels at the line ends
    label_width = 0.0 if label_highlighted else max(text_width(line.name) for line in lines)
    points = [point for line in lines for point in line.points]
    x_scale, y_scale = _scales(points, x_axis, y_axis, level, height, right=WIDTH - label_width - 18)
    body = [*_draw_axes(x_scale, y_scale, x_axis, y_axis)]
    if level:
        body += _draw_level(level, x_scale, y_scale)
    has_marks = all(len(line.points) <= MAX_MARKS for line in lines)
    for index, line in enumerate(lines):
        # lines are moved apart sideways a little, so that their intervals do not cover each other
        offset = 3.5 * (index - (len(lines) - 1) / 2) if has_marks and not label_highlighted else 0.0
        path = " ".join(f"{x_scale(point.x) + offset:.1f},{y_scale(point.y):.1f}" for point in line.points)
        body.append(tag("polyline", tag("title", line.name), points=path, class_=f"c-{line.family} line"))
        if has_marks:
            body += _line_marks(line, x_scale, y_scale, offset)
    draw_labels = _labels_at_highlighted if label_highlighted else _labels_at_end
    body += draw_labels(lines, x_scale, y_scale)
    return _svg(label, height, body)


def _line_marks(line: Line, x_scale: Scale, y_scale: Scale, offset: float) -> list[Html]:
    """The intervals and marks of a line, moved sideways by `offset`.

    If a point is highlighted, the others are outlined.
    """
    body = []
    for index, point in enumerate(line.points):
        x, outlined = x_scale(point.x) + offset, line.highlighted not in (None, index)
        body.append(draw_interval(line.family, y_scale, x, point.low, point.high, upright=True))
        mark = draw_marker(line.family, x, y_scale(point.y), outlined=outlined)
        body.append(_with_tooltip(mark, point.tooltip))
    return body


def _labels_at_end(lines: Sequence[Line], x_scale: Scale, y_scale: Scale) -> list[Html]:
    """A label right of the chart for each line, joined to the line's last point by a thin line."""
    ends = [(x_scale(line.points[-1].x), y_scale(line.points[-1].y)) for line in lines]
    heights = spread_heights([y + 4 for _, y in ends], y_scale.end + 4, y_scale.start)
    body = []
    for line, (x, y), height in zip(lines, ends, heights, strict=True):
        name = tag("text", line.name, x=x_scale.end + 14, y=height, class_=f"name c-{line.family} tinted")
        leader = tag("line", x1=x + 6, y1=y, x2=x_scale.end + 11, y2=height - 4, class_="leader")
        body += [leader, name]
    return body


def _labels_at_highlighted(lines: Sequence[Line], x_scale: Scale, y_scale: Scale) -> list[Html]:
    """A label near each line's highlighted point."""
    marks = [(x_scale(p.x), y_scale(p.y)) for line in lines for p in [line.points[line.highlighted or 0]]]
    occupied = [_box_around(x_scale(p.x), y_scale(p.y), 4) for line in lines for p in line.points]
    frame = Box(LEFT + 2, TOP - 8, WIDTH, y_scale.start - 2)
    positions = place_labels([line.name for line in lines], marks, occupied, frame)
    return [
        element
        for line, mark, position in zip(lines, marks, positions, strict=True)
        for element in _draw_label(line.name, mark, position, f"c-{line.family} tinted")
    ]


def _box_around(x: float, y: float, reach: float) -> Box:
    """The square with its centre at (x, y) and sides of twice `reach`."""
    return Box(x - reach, y - reach, x + reach, y + reach)


def _draw_label(name: str, mark: tuple[float, float], position: LabelPosition, css_class: str = "") -> list[Html]:
    """A label at its position, with a thin line to its mark if it is far from it."""
    css_class = f"name {css_class}".strip()
    text = tag("text", name, x=position.x, y=position.y, text_anchor=position.anchor, class_=css_class)
    if not position.leader:
        return [text]
    return [tag("line", x1=mark[0], y1=mark[1], x2=position.x, y2=position.y - 4, class_="leader"), text]


def draw_dot_rows(label: str, rows: Sequence[Row], axis: Axis, level: Level | None = None) -> Html:
    """A row of marks for each recipe along one axis; a level is a vertical line through all rows."""
    left = min(200.0, 12 + max(text_width(row.name) for row in rows))
    top = 22.0 if level else 8.0
    height = top + ROW_HEIGHT * len(rows) + BOTTOM
    dots = [dot for row in rows for dot in row.dots]
    centres = [dot.value for dot in dots] + ([level.value] if level else [])
    ends = [end for dot in dots for end in (dot.low, dot.high)]
    x_scale = make_scale(axis, centres, ends, left + 8, WIDTH - 14)
    bottom = top + ROW_HEIGHT * len(rows)
    body = [*_draw_x_axis(x_scale, axis, top, bottom)]
    if level:
        low_x, high_x = x_scale(level.low), x_scale(level.high)
        at = x_scale(level.value)
        body.append(tag("rect", x=low_x, y=top, width=high_x - low_x, height=bottom - top, class_="band"))
        body.append(tag("line", x1=at, x2=at, y1=top, y2=bottom, class_="level"))
        half_width = text_width(level.name) / 2
        body.append(
            tag(
                "text",
                level.name,
                x=min(max(at, half_width), WIDTH - half_width),
                y=top - 7,
                text_anchor="middle",
                class_="quiet",
            )
        )
    for row_index, row in enumerate(rows):
        y = top + ROW_HEIGHT * (row_index + 0.5)
        body.append(tag("line", x1=left + 8, x2=WIDTH - 14, y1=y, y2=y, class_="grid"))
        body.append(tag("text", row.name, x=left, y=y + 4, text_anchor="end", class_="name"))
        shift = 3.0 if len(row.dots) > 1 else 0.0  # moves the two intervals of a row apart
        for index, dot in enumerate(row.dots):
            at = y - shift + 2 * shift * index / max(1, len(row.dots) - 1)
            body.append(draw_interval(row.family, x_scale, at, dot.low, dot.high, upright=False))
            mark = draw_marker(row.family, x_scale(dot.value), at, outlined=dot.outlined, size=4.2)
            body.append(_with_tooltip(mark, dot.tooltip))
    return _svg(label, height, body)


def draw_heat_map(
    label: str,
    rows: Sequence[str],
    columns: Sequence[str],
    values: dict[tuple[str, str], float],
    tooltips: dict[tuple[str, str], str],
    ends: tuple[str, str],
    columns_title: str,
) -> Html:
    """A grid of cells; the darker a cell, the larger its value.

    Args:
        values: the value of each (row, column); a cell without a value is left empty.
        tooltips: the text of each cell that has a value.
        ends: the legend's texts at 0 and at the largest value.
        columns_title: the title below the columns.
    """
    left = 10 + max(text_width(row) for row in rows) * 0.92
    cell_width = max(15.0, min(26.0, (WIDTH - left - 16) / max(1, len(columns))))
    cell_height = 20.0
    # 16: the last column's name may be wider than the column
    width = max(WIDTH, left + cell_width * len(columns) + 16)
    bottom = cell_height * len(rows) + 4
    largest = max(values.values(), default=0.0) or 1.0
    body: list[Html] = []
    for row_index, row in enumerate(rows):
        y = 2 + cell_height * row_index
        body.append(tag("text", row, x=left - 6, y=y + 14, text_anchor="end", class_="small"))
        for column_index, column in enumerate(columns):
            if (row, column) not in values:
                continue
            body.append(
                tag(
                    "rect",
                    tag("title", tooltips[row, column]),
                    x=left + cell_width * column_index,
                    y=y,
                    width=cell_width - 1.5,
                    height=cell_height - 1.5,
                    fill_opacity=0.05 + 0.95 * values[row, column] / largest,
                    class_="shade",
                )
            )
    # column names are numbers mostly: leave some out if they are wider than a column
    label_every = 1 + int(max(map(len, columns)) * ADVANCE // cell_width)
    for column_index, column in enumerate(columns):
        if column_index % label_every == 0 or not column.isdecimal():
            x = left + cell_width * (column_index + 0.5) - 0.75
            body.append(tag("text", column, x=x, y=bottom + 14, text_anchor="middle", class_="small"))
    middle = left + cell_width * len(columns) / 2
    body.append(tag("text", columns_title, x=middle, y=bottom + 31, text_anchor="middle", class_="small"))
    body += _shade_legend(left, bottom + 42, ends)
    return _svg(label, bottom + 62, body, width)


def _shade_legend(left: float, top: float, ends: tuple[str, str]) -> list[Html]:
    """The legend of a heat map: eleven shades from 0 to the largest value."""
    start = left + text_width(ends[0]) + 6
    steps = [
        tag(
            "rect",
            x=start + 12 * step,
            y=top,
            width=12.0,
            height=10.0,
            class_="shade",
            fill_opacity=0.05 + step * 0.095,
        )
        for step in range(11)
    ]
    return [
        tag("text", ends[0], x=left, y=top + 9, class_="small"),
        *steps,
        tag("text", ends[1], x=start + 12 * 11 + 6, y=top + 9, class_="small"),
    ]


def _scales(
    points: Sequence[Point], x_axis: Axis, y_axis: Axis, level: Level | None, height: float, right: float
) -> tuple[Scale, Scale]:
    """The x and the y scale of a chart."""
    centres = [point.y for point in points] + ([level.value] if level else [])
    ends = [end for point in points for end in (point.low, point.high)]
    x_scale = make_scale(x_axis, [point.x for point in points], [], LEFT, right)
    return x_scale, make_scale(y_axis, centres, ends, height - BOTTOM, TOP)


def _draw_axes(x_scale: Scale, y_scale: Scale, x_axis: Axis, y_axis: Axis) -> list[Html]:
    """Both axes with ticks, titles and horizontal grid lines."""
    body = []
    for value in y_scale.ticks():
        y = y_scale(value)
        body.append(tag("line", x1=x_scale.start, x2=x_scale.end, y1=y, y2=y, class_="grid"))
        text = y_axis.format_tick(value)
        body.append(tag("text", text, x=LEFT - 7, y=y + 4, text_anchor="end", class_="tick"))
    # above the axis and horizontal: easier to read than a vertical title
    body.append(tag("text", y_axis.title, x=0.0, y=13.0, class_="axis"))
    return body + _draw_x_axis(x_scale, x_axis, y_scale.end, y_scale.start, grid_lines=False)


def _draw_x_axis(x_scale: Scale, axis: Axis, top: float, bottom: float, grid_lines: bool = True) -> list[Html]:
    """The axis at the bottom with its ticks and title, and vertical grid lines if asked for."""
    body = [tag("line", x1=x_scale.start, x2=x_scale.end, y1=bottom, y2=bottom, class_="edge")]
    last_end = -1e9
    for value in x_scale.ticks():
        x, text = x_scale(value), axis.format_tick(value)
        if x - text_width(text) / 2 < last_end + 6:
            continue  # its text would touch the text of the tick before
        last_end = x + text_width(text) / 2
        body.append(tag("line", x1=x, x2=x, y1=bottom, y2=bottom + 4, class_="edge"))
        if grid_lines:
            body.append(tag("line", x1=x, x2=x, y1=top, y2=bottom, class_="grid"))
        body.append(tag("text", text, x=x, y=bottom + 17, text_anchor="middle", class_="tick"))
    middle = (x_scale.start + x_scale.end) / 2
    middle = max(middle, text_width(axis.title) / 2)
    middle = min(middle, WIDTH - text_width(axis.title) / 2)
    body.append(tag("text", axis.title, x=middle, y=bottom + 37, text_anchor="middle", class_="axis"))
    return body


def _draw_level(level: Level, x_scale: Scale, y_scale: Scale) -> list[Html]:
    """A level as a horizontal line with its band and name."""
    top, bottom, y = y_scale(level.high), y_scale(level.low), y_scale(level.value)
    width = x_scale.end - x_scale.start
    return [
        tag("rect", x=x_scale.start, y=top, width=width, height=bottom - top, class_="band"),
        tag("line", x1=x_scale.start, x2=x_scale.end, y1=y, y2=y, class_="level"),
        tag("text", level.name, x=x_scale.end - 2, y=y - 5, text_anchor="end", class_="quiet"),
    ]


def _level_box(level: Level, x_scale: Scale, y_scale: Scale) -> Box:
    """The box of a level's name, which labels must not cover."""
    y = y_scale(level.value)
    return Box(x_scale.end - 2 - text_width(level.name), y - 16, x_scale.end, y - 1)


def _with_tooltip(mark: Html, tooltip: str) -> Html:
    """A mark with the text that browsers show as its tooltip."""
    return tag("g", tag("title", tooltip), mark)


def _svg(label: str, height: float, body: Sequence[Html], width: float = WIDTH) -> Html:
    """The SVG element of a chart, as wide as its column; one wider than `WIDTH` scrolls instead."""
    box = {"viewBox": f"0 0 {width:.0f} {height:.0f}"}
    style = f"min-width:{width:.0f}px" if width > WIDTH else None
    return tag("svg", *body, role="img", aria_label=label, class_="chart", style=style, **box)
