"""A drawing by matplotlib that becomes inline SVG for the light and the dark theme.

Colours are CSS variables of the page's style sheet, and text is text in the page's font. The same data always gives
the same bytes.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal
from xml.etree import ElementTree

from markupsafe import Markup

from normtune.studies.page.palette import COLOURS, FAMILIES, THEME

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.transforms import BboxBase

WIDTH = 400.0  # width of a chart, in pixels of the SVG's viewBox
PADDING = 0.06  # the margin at both ends of an axis, as a fraction of it
BOTTOM = 46.0  # the margin below a chart, for the ticks and the title of its axis
INK, QUIET, GRID, PAGE = (THEME[name][0] for name in ("ink", "quiet", "grid", "page"))
MONOSPACE = "monospace"  # the font of names of recipes: `l` and `I` differ
_DEFAULT_RULES = (  # rules of matplotlib's that the page's style sheet has, or that are SVG's defaults
    "font-family", "font-size: 11.5px", "stroke-linejoin", "stroke-linecap", "stroke-dashoffset", "text-anchor: start",
)  # fmt: skip
Style = Literal["solid", "hollow", "small"]  # how a mark is drawn
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
# The ticks of a logarithmic axis as multiples of powers of ten, by the most decades that the axis has.
_LOG_STEPS = ((0.8, (1, 2, 3, 5, 7)), (1.1, (1, 2, 5)), (2.2, (1, 3)))
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
class Level:
    """A value drawn as a line across the whole chart, with its interval as a band: the frozen base."""

    name: str
    value: float
    low: float
    high: float


def axis_limits(axis: Axis, centres: Iterable[float], ends: Iterable[float]) -> tuple[float, float]:
    """The ends of an axis that shows all values, and the ends of their intervals unless they are much wider.

    An interval over two seeds may be ten times as wide as all differences between recipes; an axis that
    showed it whole would hide the differences. Linear axes are therefore extended by at most the span of the
    values on each side.
    """
    centres = [value for value in centres if math.isfinite(value) and (value > 0 or not axis.log)]
    assert centres, "an axis needs a value"
    low, high = min(centres), max(centres)
    if axis.log:
        low, high = (low / 2, high * 2) if high / low < 1.5 else (low, high)
        margin = (high / low) ** PADDING
        return low / margin, high * margin
    # never 0, so that equal values have an axis too
    span = max(high - low, axis.min_span, 0.02 * max(abs(high), abs(low)), 1e-9)
    ends = [value for value in ends if math.isfinite(value)]
    low = max(min([low, *ends]), low - span)
    high = min(max([high, *ends]), high + span)
    if high - low < span:
        low, high = low - span / 2, high + span / 2
    margin = PADDING * (high - low)
    low, high = max(low - margin, axis.bounds[0]), min(high + margin, axis.bounds[1])
    return (min(0.0, low), max(0.0, high)) if axis.from_zero else (low, high)


@contextmanager
def new_drawing(
    label: str, height: float, *, left: float = 40, right: float = 14, top: float = 30, width: float = WIDTH
) -> Iterator[Drawing]:
    """An empty drawing with margins in pixels. Inside the block, matplotlib has the settings of the page's charts."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_SETTINGS):
        figure = Figure(figsize=(width / 72, height / 72), dpi=72)
        figure.patch.set_visible(False)
        inner = (left / width, BOTTOM / height, 1 - (left + right) / width, 1 - (top + BOTTOM) / height)
        axes = figure.add_axes(inner)
        axes.patch.set_visible(False)
        yield Drawing(label, figure, axes, width, height)


class Drawing:
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
            steps = next((steps for most, steps in _LOG_STEPS if decades < most), (1,))
            matplotlib_axis.set_major_locator(LogLocator(subs=steps, numticks=8))
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
        self, family: str, x: float, y: float, tooltip: str, style: Style = "solid", offset: float = 0.0
    ) -> None:
        """Draw the mark of a family, moved sideways by `offset` pixels."""
        colour = COLOURS[family][0]
        paint: dict[str, Any] = {
            "solid": {"facecolor": colour, "edgecolor": PAGE, "linewidth": 0.75, "s": 72},
            "hollow": {"facecolor": PAGE, "edgecolor": colour, "linewidth": 1.75, "s": 64},
            "small": {"facecolor": PAGE, "edgecolor": colour, "linewidth": 1, "s": 20},
        }[style]
        mark = self.axes.scatter(x, y, marker=FAMILIES[family].marker, zorder=4, transform=self.moved(offset), **paint)
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
            level.name, (1, level.value), (-2, 5), ("axes fraction", "data"), "offset points",
            ha="right", va="bottom", color=QUIET, fontsize=11.5, zorder=5,
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
                family=MONOSPACE,
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
    if "Mono" in attributes.get("style", ""):
        new.set("class", "name")
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
