"""Charts as inline SVG: points with intervals, lines, rows of dots, and a grid of shades.

Colours and fonts come from the page's style sheet, so that one drawing serves the light and the dark theme;
each chart names what it shows (`aria-label`), and each mark its value (`title`, shown by a pointer).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from normtune.studies.page.axes import Axis, Scale, scale
from normtune.studies.page.html import Html, tag
from normtune.studies.page.labels import ADVANCE, Box, Place, beside, spread, width_of
from normtune.studies.page.palette import interval, marker

WIDTH = 460.0
LEFT, TOP, BOTTOM = 40.0, 34.0, 46.0  # room for the axes' ticks and titles
ROW = 22.0
MARKED = 12  # a line of so many points or fewer has marks


@dataclass(frozen=True)
class Point:
    """One mark: a value `y` with its interval at `x`."""

    name: str
    family: str
    x: float
    y: float
    low: float
    high: float
    told: str  # what the pointer shows
    named: bool = True


@dataclass(frozen=True)
class Line:
    """Points joined in order; `picked` is the index of the one to stand out."""

    name: str
    family: str
    points: tuple[Point, ...]
    picked: int | None = None


@dataclass(frozen=True)
class Level:
    """A value without a place on the other axis: the frozen base."""

    name: str
    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Dot:
    """One mark of a row; hollow ones are the second kind of a chart."""

    value: float
    low: float
    high: float
    hollow: bool
    told: str


@dataclass(frozen=True)
class Row:
    """The marks of one recipe."""

    name: str
    family: str
    dots: tuple[Dot, ...]


def scatter(label: str, points: Sequence[Point], x: Axis, y: Axis, level: Level | None = None) -> Html:
    """Points with intervals, their names beside them, and a level across."""
    height = 340.0
    across, up = _scales(points, x, y, level, height, right=WIDTH - 14)
    body = [*_frame(across, up, x, y)]
    if level:
        body += _level(level, across, up)
    marks = [(across(point.x), up(point.y)) for point in points]
    taken = [_level_box(level, across, up)] if level else []
    for point, (at, middle) in zip(points, marks, strict=True):
        body.append(interval(point.family, up, at, point.low, point.high, upright=True))
        taken += [Box(at - 2, up(point.high), at + 2, up(point.low)), _around(at, middle, 6)]
    frame = Box(LEFT + 2, TOP - 8, WIDTH, up.start - 2)
    named = [(point.name, mark) for point, mark in zip(points, marks, strict=True) if point.named]
    places = beside([name for name, _ in named], [mark for _, mark in named], taken, frame)
    for (name, mark), place in zip(named, places, strict=True):
        body += _placed(name, mark, place)
    for point, mark in zip(points, marks, strict=True):
        body.append(_titled(marker(point.family, *mark), point.told))
    return _svg(label, height, body)


def lines(
    label: str,
    drawn: Sequence[Line],
    x: Axis,
    y: Axis,
    level: Level | None = None,
    *,
    named_at_best: bool = False,
) -> Html:
    """Lines, each named at its end, or at its picked point; marks and intervals where points are few."""
    height = max(310.0, TOP + BOTTOM + 14 * len(drawn))  # as high as its names take
    room = 0.0 if named_at_best else max(width_of(line.name) for line in drawn)
    points = [point for line in drawn for point in line.points]
    across, up = _scales(points, x, y, level, height, right=WIDTH - room - 18)
    body = [*_frame(across, up, x, y)]
    if level:
        body += _level(level, across, up)
    marked = all(len(line.points) <= MARKED for line in drawn)
    for number, line in enumerate(drawn):
        beside_x = 3.5 * (number - (len(drawn) - 1) / 2) if marked and not named_at_best else 0.0
        path = " ".join(f"{across(point.x) + beside_x:.1f},{up(point.y):.1f}" for point in line.points)
        body.append(tag("polyline", tag("title", line.name), points=path, class_=f"c-{line.family} line"))
        if marked:
            body += _marks(line, across, up, beside_x)
    body += _names_at_best(drawn, across, up) if named_at_best else _names_at_end(drawn, across, up)
    return _svg(label, height, body)


def _marks(line: Line, across: Scale, up: Scale, beside_x: float) -> list[Html]:
    """The intervals and marks of a line, moved aside a little; where one is picked, the others are hollow."""
    body = []
    for number, point in enumerate(line.points):
        at, hollow = across(point.x) + beside_x, line.picked not in (None, number)
        body.append(interval(line.family, up, at, point.low, point.high, upright=True))
        body.append(_titled(marker(line.family, at, up(point.y), hollow=hollow), point.told))
    return body


def _names_at_end(drawn: Sequence[Line], across: Scale, up: Scale) -> list[Html]:
    ends = [(across(line.points[-1].x), up(line.points[-1].y)) for line in drawn]
    heights = spread([y + 4 for _, y in ends], up.end + 4, up.start)
    body = []
    for line, (x, y), height in zip(drawn, ends, heights, strict=True):
        name = tag("text", line.name, x=across.end + 14, y=height, class_=f"name c-{line.family} tinted")
        leader = tag("line", x1=x + 6, y1=y, x2=across.end + 11, y2=height - 4, class_="leader")
        body += [leader, name]
    return body


def _names_at_best(drawn: Sequence[Line], across: Scale, up: Scale) -> list[Html]:
    marks = [(across(p.x), up(p.y)) for line in drawn for p in [line.points[line.picked or 0]]]
    taken = [_around(across(p.x), up(p.y), 4) for line in drawn for p in line.points]
    frame = Box(LEFT + 2, TOP - 8, WIDTH, up.start - 2)
    places = beside([line.name for line in drawn], marks, taken, frame)
    return [
        part
        for line, mark, place in zip(drawn, marks, places, strict=True)
        for part in _placed(line.name, mark, place, f"c-{line.family} tinted")
    ]


def _around(x: float, y: float, reach: float) -> Box:
    return Box(x - reach, y - reach, x + reach, y + reach)


def _placed(name: str, mark: tuple[float, float], place: Place, kind: str = "") -> list[Html]:
    """A name at its place, with the line that leads to its mark where it is far."""
    text = tag("text", name, x=place.x, y=place.y, text_anchor=place.anchor, class_=f"name {kind}".strip())
    if not place.leader:
        return [text]
    return [tag("line", x1=mark[0], y1=mark[1], x2=place.x, y2=place.y - 4, class_="leader"), text]


def dot_rows(label: str, rows: Sequence[Row], x: Axis, level: Level | None = None) -> Html:
    """A row a recipe, its marks along one axis, and a level upright through all rows."""
    left = min(200.0, 12 + max(width_of(row.name) for row in rows))
    top = 22.0 if level else 8.0
    height = top + ROW * len(rows) + BOTTOM
    dots = [dot for row in rows for dot in row.dots]
    centres = [dot.value for dot in dots] + ([level.value] if level else [])
    ends = [end for dot in dots for end in (dot.low, dot.high)]
    across = scale(x, centres, ends, left + 8, WIDTH - 14)
    bottom = top + ROW * len(rows)
    body = [*_bottom_axis(across, x, top, bottom)]
    if level:
        a, b = across(level.low), across(level.high)
        at = across(level.value)
        body.append(tag("rect", x=a, y=top, width=b - a, height=bottom - top, class_="band"))
        body.append(tag("line", x1=at, x2=at, y1=top, y2=bottom, class_="level"))
        half = width_of(level.name) / 2
        body.append(
            tag(
                "text",
                level.name,
                x=min(max(at, half), WIDTH - half),
                y=top - 7,
                text_anchor="middle",
                class_="quiet",
            )
        )
    for number, row in enumerate(rows):
        y = top + ROW * (number + 0.5)
        body.append(tag("line", x1=left + 8, x2=WIDTH - 14, y1=y, y2=y, class_="grid"))
        body.append(tag("text", row.name, x=left, y=y + 4, text_anchor="end", class_="name"))
        shift = 3.0 if len(row.dots) > 1 else 0.0  # two intervals of one row lie side by side
        for order, dot in enumerate(row.dots):
            at = y - shift + 2 * shift * order / max(1, len(row.dots) - 1)
            body.append(interval(row.family, across, at, dot.low, dot.high, upright=False))
            body.append(
                _titled(marker(row.family, across(dot.value), at, hollow=dot.hollow, size=4.2), dot.told)
            )
    return _svg(label, height, body)


def shades(
    label: str,
    rows: Sequence[str],
    columns: Sequence[str],
    values: dict[tuple[str, str], float],
    told: dict[tuple[str, str], str],
    ends: tuple[str, str],
    columns_title: str,
) -> Html:
    """A grid: the darker a cell, the larger its value; `ends` are the words at 0 and at the largest."""
    left = 10 + max(width_of(row) for row in rows) * 0.92
    cell = max(15.0, min(26.0, (WIDTH - left - 16) / max(1, len(columns))))
    high_cell = 20.0
    width = max(WIDTH, left + cell * len(columns) + 16)  # the last column's name may be wider than it
    bottom = high_cell * len(rows) + 4
    largest = max(values.values(), default=0.0) or 1.0
    body: list[Html] = []
    for down, row in enumerate(rows):
        y = 2 + high_cell * down
        body.append(tag("text", row, x=left - 6, y=y + 14, text_anchor="end", class_="small"))
        for over, column in enumerate(columns):
            if (row, column) not in values:
                continue
            body.append(
                tag(
                    "rect",
                    tag("title", told[row, column]),
                    x=left + cell * over,
                    y=y,
                    width=cell - 1.5,
                    height=high_cell - 1.5,
                    fill_opacity=0.05 + 0.95 * values[row, column] / largest,
                    class_="shade",
                )
            )
    step = 1 + int(max(map(len, columns)) * ADVANCE // cell)
    for over, column in enumerate(columns):
        if over % step == 0 or not column.isdecimal():
            x = left + cell * (over + 0.5) - 0.75
            body.append(tag("text", column, x=x, y=bottom + 14, text_anchor="middle", class_="small"))
    middle = left + cell * len(columns) / 2
    body.append(tag("text", columns_title, x=middle, y=bottom + 31, text_anchor="middle", class_="small"))
    body += _shade_legend(left, bottom + 42, ends)
    return _svg(label, bottom + 62, body, width)


def _shade_legend(left: float, top: float, ends: tuple[str, str]) -> list[Html]:
    start = left + width_of(ends[0]) + 6
    steps = [
        tag(
            "rect",
            x=start + 12 * n,
            y=top,
            width=12.0,
            height=10.0,
            class_="shade",
            fill_opacity=0.05 + n * 0.095,
        )
        for n in range(11)
    ]
    return [
        tag("text", ends[0], x=left, y=top + 9, class_="small"),
        *steps,
        tag("text", ends[1], x=start + 12 * 11 + 6, y=top + 9, class_="small"),
    ]


def _scales(
    points: Sequence[Point], x: Axis, y: Axis, level: Level | None, height: float, right: float
) -> tuple[Scale, Scale]:
    centres = [point.y for point in points] + ([level.value] if level else [])
    ends = [end for point in points for end in (point.low, point.high)]
    across = scale(x, [point.x for point in points], [], LEFT, right)
    return across, scale(y, centres, ends, height - BOTTOM, TOP)


def _frame(across: Scale, up: Scale, x: Axis, y: Axis) -> list[Html]:
    body = []
    for value in up.ticks():
        at = up(value)
        body.append(tag("line", x1=across.start, x2=across.end, y1=at, y2=at, class_="grid"))
        body.append(tag("text", y.tick(value), x=LEFT - 7, y=at + 4, text_anchor="end", class_="tick"))
    body.append(tag("text", y.title, x=0.0, y=13.0, class_="axis"))  # level text: no turning of heads
    return body + _bottom_axis(across, x, up.end, up.start, upright=False)


def _bottom_axis(across: Scale, x: Axis, top: float, bottom: float, upright: bool = True) -> list[Html]:
    body = [tag("line", x1=across.start, x2=across.end, y1=bottom, y2=bottom, class_="edge")]
    last = -1e9
    for value in across.ticks():
        at, text = across(value), x.tick(value)
        if at - width_of(text) / 2 < last + 6:
            continue  # a tick that would touch the one before it
        last = at + width_of(text) / 2
        body.append(tag("line", x1=at, x2=at, y1=bottom, y2=bottom + 4, class_="edge"))
        if upright:
            body.append(tag("line", x1=at, x2=at, y1=top, y2=bottom, class_="grid"))
        body.append(tag("text", text, x=at, y=bottom + 17, text_anchor="middle", class_="tick"))
    middle = (across.start + across.end) / 2
    middle = max(middle, width_of(x.title) / 2)
    middle = min(middle, WIDTH - width_of(x.title) / 2)
    body.append(tag("text", x.title, x=middle, y=bottom + 37, text_anchor="middle", class_="axis"))
    return body


def _level(level: Level, across: Scale, up: Scale) -> list[Html]:
    top, bottom, at = up(level.high), up(level.low), up(level.value)
    width = across.end - across.start
    return [
        tag("rect", x=across.start, y=top, width=width, height=bottom - top, class_="band"),
        tag("line", x1=across.start, x2=across.end, y1=at, y2=at, class_="level"),
        tag("text", level.name, x=across.end - 2, y=at - 5, text_anchor="end", class_="quiet"),
    ]


def _level_box(level: Level, across: Scale, up: Scale) -> Box:
    at = up(level.value)
    return Box(across.end - 2 - width_of(level.name), at - 16, across.end, at - 1)


def _titled(mark: Html, told: str) -> Html:
    return tag("g", tag("title", told), mark)


def _svg(label: str, height: float, body: Sequence[Html], width: float = WIDTH) -> Html:
    box = {"viewBox": f"0 0 {width:.0f} {height:.0f}"}
    fixed = f"min-width:{width:.0f}px" if width > WIDTH else None
    return tag("svg", *body, role="img", aria_label=label, class_="chart", style=fixed, **box)
