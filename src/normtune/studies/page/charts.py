"""Charts as inline SVG, drawn by matplotlib: scatter plots, line charts, rows of dots, and heat maps.

Colours are CSS variables of the page's style sheet, so that one drawing serves the light and the dark theme. The
text is text in the page's font. Each chart has an `aria-label`, and each mark a `title` with its value, which
browsers show as a tooltip. The same data always gives the same bytes.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

from markupsafe import Markup

from normtune.studies.page.palette import COLOURS, MARKERS, THEME

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.transforms import BboxBase

WIDTH = 460.0  # of a chart, in pixels of the SVG's viewBox
ROW_HEIGHT = 22.0  # of a row of dots or of a heat map
BOTTOM = 46.0  # the margin below a chart, for the ticks and the title of its axis
MAX_MARKS = 12  # lines with more points than this have no marks
INK, QUIET, GRID, PAGE = (THEME[name][0] for name in ("ink", "quiet", "grid", "page"))
_DEFAULT_RULES = (  # rules of matplotlib's that the page's style sheet has, or that are SVG's defaults
    "font-family", "font-size: 11.5px", "stroke-linejoin", "stroke-linecap", "stroke-dashoffset", "text-anchor: start",
)  # fmt: skip
_SVG = "{http://www.w3.org/2000/svg}"
_VARIABLES = {pair[0]: f"var(--{name})" for name, pair in {**COLOURS, **THEME}.items()}
_SETTINGS: Any = {
    "svg.fonttype": "none",  # text stays text
    "text.parse_math": False,
    "font.size": 12,
    "text.color": INK,
    "axes.labelcolor": QUIET,
    "axes.edgecolor": QUIET,
    "axes.axisbelow": True,
    "axes.spines.left": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": GRID,
    "grid.linewidth": 1,
    "xtick.bottom": False,
    "ytick.left": False,
    "xtick.labelcolor": QUIET,
    "ytick.labelcolor": QUIET,
    "xtick.labelsize": 11.5,
    "ytick.labelsize": 11.5,
}
# Positions of a label around its mark, in pixels, with their penalties: next to it, then farther away with a line.
_NEAR = [(8, 6, 0.0), (10, 0, 1.0), (-8, 6, 2.0), (8, -10, 3.0), (-10, 0, 3.0), (-8, -10, 4.0)]
_FAR = [(s * (8 + r / 3), v * r, 8.0 + r) for r in (24, 36, 50, 66) for s in (1, -1) for v in (1, -1)]


@dataclass(frozen=True)
class Axis:
    """An axis's title, the format of its ticks, and which values it must cover."""

    title: str  # with the unit
    format_tick: Callable[[float], str]
    log: bool = False
    from_zero: bool = False  # whether the axis begins at 0
    min_span: float = 0.0  # the least difference between the ends of the axis
    bounds: tuple[float, float] = (-math.inf, math.inf)  # the least and greatest possible value


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


def axis_limits(
    axis: Axis, centres: Iterable[float], ends: Iterable[float], padding: float = 0.06
) -> tuple[float, float]:
    """The ends of an axis that shows all values, and the ends of their intervals unless they are much wider.

    An interval over two seeds may be ten times as wide as all differences between recipes; an axis that
    showed it whole would hide the differences. Linear axes are therefore extended by at most the span of the
    values on each side.

    Args:
        axis: what the axis must cover.
        centres: the values of the marks.
        ends: the ends of their intervals.
        padding: the margin at both ends, as a fraction of the axis.
    """
    centres = [value for value in centres if math.isfinite(value) and (value > 0 or not axis.log)]
    assert centres, "an axis needs a value"
    low, high = min(centres), max(centres)
    if axis.log:
        low, high = (low / 2, high * 2) if high / low < 1.5 else (low, high)
        margin = (high / low) ** padding
        return low / margin, high * margin
    # never 0, so that equal values have an axis too
    span = max(high - low, axis.min_span, 0.02 * max(abs(high), abs(low)), 1e-9)
    ends = [value for value in ends if math.isfinite(value)]
    low = max(min([low, *ends]), low - span)
    high = min(max([high, *ends]), high + span)
    if high - low < span:
        low, high = low - span / 2, high + span / 2
    margin = padding * (high - low)
    low, high = max(low - margin, axis.bounds[0]), min(high + margin, axis.bounds[1])
    return (min(0.0, low), max(0.0, high)) if axis.from_zero else (low, high)


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


@contextmanager
def _new_chart(
    label: str, height: float, *, left: float = 40, right: float = 14, top: float = 30, width: float = WIDTH
) -> Iterator[_Chart]:
    """An empty chart with margins in pixels, while matplotlib's settings are those of charts."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_SETTINGS):
        figure = Figure(figsize=(width / 72, height / 72), dpi=72)
        figure.patch.set_visible(False)
        inner = (left / width, BOTTOM / height, 1 - (left + right) / width, 1 - (top + BOTTOM) / height)
        axes = figure.add_axes(inner)
        axes.patch.set_visible(False)
        yield _Chart(label, figure, axes, width, height)


class _Chart:
    """A matplotlib figure with one pair of axes, the tooltips of its marks, and the boxes that are covered."""

    def __init__(self, label: str, figure: Figure, axes: Axes, width: float, height: float) -> None:
        self.label, self.figure, self.axes, self.width, self.height = label, figure, axes, width, height
        self.tooltips: dict[str, str] = {}
        self.occupied: list[BboxBase] = []

    def set_axis(self, which: str, axis: Axis, limits: tuple[float, float], grid: bool = True) -> None:
        """Set the limits, the ticks and the title of the axis x or y."""
        from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator

        getattr(self.axes, f"set_{which}scale")("log" if axis.log else "linear")
        getattr(self.axes, f"set_{which}lim")(*limits)
        matplotlib_axis = getattr(self.axes, f"{which}axis")
        if axis.log:
            decades = math.log10(limits[1] / limits[0])
            subs = (
                (1, 2, 3, 5, 7) if decades < 0.8 else (1, 2, 5) if decades < 1.1 else (1, 3) if decades < 2.2 else (1,)
            )
            matplotlib_axis.set_major_locator(LogLocator(subs=subs, numticks=8))
            matplotlib_axis.set_minor_locator(LogLocator(subs=()))
        else:
            matplotlib_axis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
        matplotlib_axis.set_major_formatter(FuncFormatter(lambda value, _: axis.format_tick(value)))
        if grid:
            matplotlib_axis.grid(True, color=GRID)
        if which == "x":
            self.add_x_title(axis.title)
        else:  # above the axis and horizontal: easier to read than a vertical title
            self.figure.text(0, 1 - 13 / self.height, axis.title, fontsize=12.5, color=QUIET)

    def add_x_title(self, title: str) -> None:
        """Write the title of the x axis below it."""
        box = self.axes.get_position()
        reach = 3.4 * len(title) / self.width  # half of its approximate width: it must not run out of the drawing
        at = min(max((box.x0 + box.x1) / 2, reach), 1 - reach)
        self.figure.text(at, 6 / self.height, title, ha="center", fontsize=12.5, color=QUIET)

    def add_mark(
        self, family: str, x: float, y: float, tooltip: str, outlined: bool = False, offset: float = 0.0
    ) -> None:
        """Draw the mark of a family, moved sideways by `offset` pixels."""
        mark = self.axes.scatter(
            x,
            y,
            s=64 if outlined else 72,
            marker=MARKERS[family][0],
            facecolor=PAGE if outlined else COLOURS[family][0],
            edgecolor=COLOURS[family][0] if outlined else PAGE,
            linewidth=1.75 if outlined else 0.75,
            zorder=4,
            transform=self.moved(offset),
        )
        self.add_tooltip(mark, tooltip)
        self.occupy((x, y), (x, y), 6)

    def occupy(self, low: tuple[float, float], high: tuple[float, float], margin: float) -> None:
        """Keep labels off the box between two points of the data."""
        from matplotlib.transforms import Bbox

        self.occupied.append(Bbox(self.axes.transData.transform([low, high])).padded(margin))

    def add_tooltip(self, artist: Any, tooltip: str) -> None:
        """Give a drawn element the text that browsers show as its tooltip."""
        artist.set_gid(f"tooltip-{len(self.tooltips)}")
        self.tooltips[artist.get_gid()] = tooltip

    def add_interval(self, family: str, at: float, low: float, high: float, which: str, offset: float = 0.0) -> None:
        """Draw an interval along the axis x or y, with an arrowhead where the axis cuts it off."""
        if low == high:
            return
        start, end = map(float, getattr(self.axes, f"get_{which}lim")())
        ends = max(low, start), min(high, end)
        transform = self.moved(offset)
        style = {"color": COLOURS[family][0], "alpha": 0.75, "zorder": 3, "transform": transform}
        xs, ys = (ends, (at, at)) if which == "x" else ((at, at), ends)
        self.axes.plot(xs, ys, linewidth=1.6, **style)
        self.occupy((xs[0], ys[0]), (xs[1], ys[1]), 2)
        heads = [(ends[0], "<v"[which == "y"])] * (low < start) + [(ends[1], ">^"[which == "y"])] * (high > end)
        for tip, shape in heads:
            self.axes.scatter(*((tip, at) if which == "x" else (at, tip)), marker=shape, s=30, linewidth=0, **style)

    def moved(self, offset: float) -> Any:
        """The transform of the data, moved sideways by some pixels."""
        from matplotlib.transforms import ScaledTranslation

        if not offset:
            return self.axes.transData
        return self.axes.transData + ScaledTranslation(offset / 72, 0, self.figure.dpi_scale_trans)

    def add_level(self, level: Level | None) -> None:
        """Draw a level across the chart, with its band and its name."""
        if level is None:
            return
        bottom, top = self.axes.get_ylim()
        self.axes.axhspan(max(level.low, bottom), min(level.high, top), color=QUIET, alpha=0.13, linewidth=0, zorder=1)
        self.axes.axhline(level.value, color=QUIET, linewidth=1.25, dashes=(4, 3), zorder=2)
        name = self.axes.annotate(
            level.name, (1, level.value), (-2, 3), ("axes fraction", "data"), "offset points",
            ha="right", color=QUIET, fontsize=11.5,
        )  # fmt: skip
        self.occupied.append(name.get_window_extent())

    def label_points(self, names: Sequence[str], points: Sequence[tuple[float, float]], colours: Sequence[str]) -> None:
        """Put a name near each point where it covers as little as possible, with a line to a point farther away."""
        from matplotlib.text import Text
        from matplotlib.transforms import Bbox

        frame = Bbox.from_extents(self.axes.bbox.x0, self.axes.bbox.y0 + 2, self.width - 2, self.axes.bbox.y1 + 10)
        for index in sorted(range(len(names)), key=lambda index: points[index]):
            text = self.axes.annotate(
                names[index], points[index], (0, 0), textcoords="offset points", color=colours[index], va="center",
                arrowprops={"arrowstyle": "-", "linewidth": 0.75, "color": QUIET, "shrinkA": 0, "shrinkB": 0},
            )  # fmt: skip
            text.get_window_extent()  # lets the text know its transform
            best, best_cost = (0.0, 0.0), math.inf
            for x, y, penalty in (*_NEAR, *_FAR):
                text.set(position=(x, y), ha="left" if x > 0 else "right")
                box = Text.get_window_extent(text)
                # covered area in pixels; area outside the frame is twelve times as bad
                outside = box.width * box.height - _overlap(box, frame)
                cost = penalty + 12 * outside + sum(_overlap(box, other) for other in self.occupied)
                if cost < best_cost:
                    best, best_cost = (x, y), cost
            text.set(position=best, ha="left" if best[0] > 0 else "right")
            self.occupied.append(Text.get_window_extent(text))
            assert text.arrow_patch is not None
            text.arrow_patch.set_visible(abs(best[1]) > 20)

    def to_svg(self) -> Markup:
        """The chart as an SVG element, as wide as its column; one wider than `WIDTH` scrolls instead."""
        from matplotlib.backends.backend_svg import FigureCanvasSVG

        file = io.StringIO()
        FigureCanvasSVG(self.figure).print_svg(file, metadata={"Date": None})
        root = ElementTree.fromstring(file.getvalue())
        svg = ElementTree.Element("svg", {"role": "img", "aria-label": self.label, "class": "chart"})
        svg.set("viewBox", f"0 0 {self.width:.0f} {self.height:.0f}")
        if self.width > WIDTH:
            svg.set("style", f"min-width:{self.width:.0f}px")
        shapes = {path.get("id", ""): path for path in root.iter(f"{_SVG}path")}
        svg.extend(element for child in root for element in _simplify(child, self.tooltips, shapes))
        return Markup(ElementTree.tostring(svg, encoding="unicode"))


def _overlap(first: BboxBase, second: BboxBase) -> float:
    """The area that both boxes cover."""
    width = min(first.x1, second.x1) - max(first.x0, second.x0)
    height = min(first.y1, second.y1) - max(first.y0, second.y0)
    return max(0.0, width) * max(0.0, height)


def _simplify(
    element: ElementTree.Element, tooltips: dict[str, str], shapes: dict[str, ElementTree.Element]
) -> list[ElementTree.Element]:
    """matplotlib's SVG with short numbers, the page's colours and tooltips, without groups and references.

    Args:
        element: an element of matplotlib's SVG.
        tooltips: the tooltip of each group with this id.
        shapes: the paths that marks refer to, by id.
    """
    tag = element.tag.removeprefix(_SVG)
    if tag in ("metadata", "defs"):  # shapes of marks, and clip paths: nothing is drawn outside the axes
        return []
    children = [part for child in element for part in _simplify(child, tooltips, shapes)]
    if tag == "g":
        if (tooltip := tooltips.get(element.get("id", ""))) is None:
            return children
        group = ElementTree.Element("g")
        ElementTree.SubElement(group, "title").text = tooltip
        group.extend(children)
        return [group]
    attributes = dict(element.attrib)
    if tag == "use":
        tag, x, y = "path", *(float(attributes.pop(name)) for name in "xy")
        shape = shapes[attributes.pop("{http://www.w3.org/1999/xlink}href")[1:]].get("d", "")
        if "C" in shape:
            radius = float(shape.split()[2])  # a circle begins at its lowest point
            tag, attributes = "circle", attributes | {"cx": f"{x:.1f}", "cy": f"{y:.1f}", "r": f"{radius:.1f}"}
        else:
            attributes |= {"d": shape, "transform": f"translate({x:.1f} {y:.1f})"}
    new = ElementTree.Element(tag)
    new.text = element.text
    for name, value in attributes.items():
        if name == "style":
            rules = [rule for rule in value.split("; ") if not rule.startswith(_DEFAULT_RULES)]
            value = ";".join(rules).replace(": ", ":")
            value = re.sub(r"#[0-9a-f]{6}", lambda match: _VARIABLES.get(match[0], match[0]), value)
        elif name in ("d", "x", "y"):
            value = re.sub(r"-?\d+\.\d+", lambda match: f"{float(match[0]):.1f}".removesuffix(".0"), value)
            value = re.sub(r"\s*([A-Za-z])\s*", r"\1", value)
        elif name in ("clip-path", "id") or value.startswith("rotate(-0"):
            continue
        new.set(name, value)
    new.extend(children)
    return [new]


def draw_scatter(label: str, points: Sequence[Point], x_axis: Axis, y_axis: Axis, level: Level | None = None) -> Markup:
    """Points with intervals and labels, and a level across the chart."""
    with _new_chart(label, 340) as chart:
        _set_axes(chart, points, x_axis, y_axis, level)
        for point in points:
            chart.add_interval(point.family, point.x, point.low, point.high, "y")
            chart.add_mark(point.family, point.x, point.y, point.tooltip)
        labelled = [point for point in points if point.labelled]
        chart.label_points([p.name for p in labelled], [(p.x, p.y) for p in labelled], [INK] * len(labelled))
        return chart.to_svg()


def _set_axes(chart: _Chart, points: Sequence[Point], x_axis: Axis, y_axis: Axis, level: Level | None) -> None:
    """Set both axes of a chart of points, and draw the level."""
    centres = [point.y for point in points] + ([level.value] if level else [])
    ends = [end for point in points for end in (point.low, point.high)]
    chart.set_axis("x", x_axis, axis_limits(x_axis, [point.x for point in points], []), grid=False)
    chart.set_axis("y", y_axis, axis_limits(y_axis, centres, ends))
    chart.add_level(level)


def draw_lines(
    label: str,
    lines: Sequence[Line],
    x_axis: Axis,
    y_axis: Axis,
    level: Level | None = None,
    *,
    label_highlighted: bool = False,
) -> Markup:
    """Lines, each with a label at its end.

    Args:
        label: the chart's `aria-label`.
        level: a value drawn across the chart.
        label_highlighted: put each line's label at its highlighted point instead.
    """
    height = max(310.0, 90 + 15.0 * len(lines))  # high enough for the labels at the line ends
    right = 14 if label_highlighted else 22 + _text_width([line.name for line in lines])
    colours = [COLOURS[line.family][0] for line in lines]
    has_marks = all(len(line.points) <= MAX_MARKS for line in lines)
    with _new_chart(label, height, right=right) as chart:
        _set_axes(chart, [point for line in lines for point in line.points], x_axis, y_axis, level)
        for index, (line, colour) in enumerate(zip(lines, colours, strict=True)):
            # lines are moved apart sideways a little, so that their intervals do not cover each other
            offset = 3.5 * (index - (len(lines) - 1) / 2) if has_marks and not label_highlighted else 0.0
            xs, ys = [point.x for point in line.points], [point.y for point in line.points]
            (path,) = chart.axes.plot(xs, ys, color=colour, linewidth=1.75, transform=chart.moved(offset))
            chart.add_tooltip(path, line.name)
            for at, point in enumerate(line.points if has_marks else ()):
                chart.add_interval(line.family, point.x, point.low, point.high, "y", offset)
                outlined = line.highlighted not in (None, at)
                chart.add_mark(line.family, point.x, point.y, point.tooltip, outlined, offset)
        if label_highlighted:
            points = [line.points[line.highlighted or 0] for line in lines]
            chart.label_points([line.name for line in lines], [(p.x, p.y) for p in points], colours)
        else:
            _label_ends(chart, lines, colours)
        return chart.to_svg()


def _text_width(texts: Iterable[str]) -> float:
    """The approximate width of the longest text."""
    return 7.4 * max(map(len, texts))


def _label_ends(chart: _Chart, lines: Sequence[Line], colours: Sequence[str]) -> None:
    """Put a label right of the chart for each line, joined to the line's last point by a thin line."""
    ends = [(line.points[-1].x, line.points[-1].y) for line in lines]
    _, bottom, _, height = chart.axes.bbox.bounds
    preferred = chart.axes.transData.transform(ends)[:, 1] - bottom
    for line, end, y, colour in zip(lines, ends, spread_heights(preferred, 4, height - 4, 15), colours, strict=True):
        chart.axes.annotate(
            line.name, end, (chart.axes.bbox.width + 14, y), textcoords="axes pixels", color=colour, va="center",
            arrowprops={"arrowstyle": "-", "linewidth": 0.75, "color": QUIET, "shrinkA": 0, "shrinkB": 6},
        )  # fmt: skip


def draw_dot_rows(label: str, rows: Sequence[Row], axis: Axis, level: Level | None = None) -> Markup:
    """A row of marks for each recipe along one axis; a level is a vertical line through all rows."""
    dots = [dot for row in rows for dot in row.dots]
    centres = [dot.value for dot in dots] + ([level.value] if level else [])
    left, top = min(200.0, 12 + _text_width([row.name for row in rows])), 22.0 if level else 8.0
    with _new_chart(label, top + ROW_HEIGHT * len(rows) + BOTTOM, left=left, top=top) as chart:
        chart.set_axis("x", axis, axis_limits(axis, centres, [end for dot in dots for end in (dot.low, dot.high)]))
        chart.axes.set_ylim(len(rows) - 0.5, -0.5)
        chart.axes.set_yticks(range(len(rows)), [row.name for row in rows], color=INK, fontsize=12)
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
            shift = 0.14 if len(row.dots) > 1 else 0.0  # moves the two intervals of a row apart
            for index, dot in enumerate(row.dots):
                y = at - shift + 2 * shift * index / max(1, len(row.dots) - 1)
                chart.add_interval(row.family, y, dot.low, dot.high, "x")
                chart.add_mark(row.family, dot.value, y, dot.tooltip, dot.outlined)
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
        tooltips: the text of each cell.
        columns: the order of the columns.
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
    with _new_chart(label, ROW_HEIGHT * len(rows) + BOTTOM + 2, left=left, right=right, top=2, width=width) as chart:
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
