"""Colours and shapes of marks: one for each family of methods, the same in all figures and themes.

The hues differ for the common kinds of colour blindness (after Okabe and Ito 2008) and have a contrast of at
least 3:1 against the page. Each family also has its own shape, so that no figure depends on colour only.
"""

from __future__ import annotations

import re

from normtune.studies.page.axes import Scale
from normtune.studies.page.html import Html, tag

COLOURS = {  # family: colour in the light theme, in the dark theme
    "ln": ("#0a5fa5", "#5fb0f0"),
    "full": ("#c24a00", "#ff8f52"),
    "lora": ("#00795a", "#3cc79c"),
    "attention": ("#a33c7c", "#e48fc2"),
    "ffn": ("#8c6a00", "#e0b84a"),
    "prefix": ("#2c8db8", "#9fdcf5"),
    "other": ("#75604f", "#c4ac97"),
    "mixed": ("#3b3b40", "#d8d8dc"),
    "frozen": ("#77777d", "#97979e"),
}
FAMILY_LABELS = {  # family: its name in the legend
    "ln": "norms",
    "full": "full",
    "lora": "LoRA",
    "attention": "attention",
    "ffn": "feed-forward",
    "prefix": "prefix, P-Tuning",
    "other": "IA3, adapter, bias",
    "mixed": "several methods",
    "frozen": "frozen base",
}
# Methods that share a family; any other method is a family of its own.
_FAMILY_OF = {"ptuning": "prefix", "ia3": "other", "adapter": "other", "bias": "other"}
_METHOD = re.compile(r"[a-z_0-9]+")


def parts_of(resolved: str) -> dict[str, str]:
    """The methods of each part of a resolved recipe: `vision=frozen,language=lora(r=4)` as a dict by part."""
    return dict(re.findall(r"([a-z]+)\??=((?:[^,(]|\([^)]*\))*)", resolved))


def recipe_family(resolved: str) -> str:
    """The family of a resolved recipe's method; `mixed` if it has methods of several families."""
    methods = {
        _METHOD.match(method.strip()).group()  # type: ignore[union-attr]
        for text in parts_of(resolved).values()
        for method in text.split("+")
        if _METHOD.match(method.strip())
    } - {"frozen"}
    families = {_FAMILY_OF.get(method, method) for method in methods}
    if not families:
        return "frozen"
    family_name = families.pop() if len(families) == 1 else "mixed"
    return family_name if family_name in COLOURS else "other"


def css_variables(theme: int) -> str:
    """The colours of the light (0) or dark (1) theme as CSS declarations."""
    return "".join(f"--{name}:{pair[theme]};" for name, pair in COLOURS.items())


def css_classes() -> str:
    """A CSS class that sets the colour of each family."""
    return "".join(f".c-{name}{{color:var(--{name})}}" for name in COLOURS)


def draw_marker(family: str, x: float, y: float, *, outlined: bool = False, size: float = 4.6) -> Html:
    """The mark of a family: its shape around (x, y) in its colour."""
    paint = {"class_": f"c-{family} {'hollow' if outlined else 'solid'}"}
    if family == "ln" or family == "frozen":
        return tag("circle", cx=x, cy=y, r=size, **paint)
    corners = {
        "full": ((-1, -1), (1, -1), (1, 1), (-1, 1)),
        "lora": ((0, -1.25), (1.2, 0.95), (-1.2, 0.95)),
        "attention": ((0, -1.4), (1.4, 0), (0, 1.4), (-1.4, 0)),
        "ffn": ((0, 1.25), (1.2, -0.95), (-1.2, -0.95)),
        "prefix": ((-1.25, 0), (0.95, -1.2), (0.95, 1.2)),
        "other": ((1.25, 0), (-0.95, -1.2), (-0.95, 1.2)),
        "mixed": ((-0.6, -1.2), (0.6, -1.2), (1.2, 0), (0.6, 1.2), (-0.6, 1.2), (-1.2, 0)),
    }[family]
    points = " ".join(f"{x + size * dx * 0.95:.1f},{y + size * dy * 0.95:.1f}" for dx, dy in corners)
    return tag("polygon", points=points, **paint)


def draw_interval(family: str, scale: Scale, across_at: float, low: float, high: float, *, upright: bool) -> Html:
    """A line from the low to the high end of an interval, with an arrowhead where the scale cuts it off.

    Args:
        scale: the scale of the values.
        across_at: the line's position on the other axis, in pixels.
        upright: whether the scale is vertical.
    """
    ends = scale(low), scale(high)
    parts = [_interval_line(upright, across_at, ends)]
    if low < scale.low:
        parts.append(_arrowhead(upright, across_at, ends[0], -1 if scale.end > scale.start else 1))
    if high > scale.high:
        parts.append(_arrowhead(upright, across_at, ends[1], 1 if scale.end > scale.start else -1))
    return tag("g", *parts, class_=f"c-{family} interval")


def _interval_line(upright: bool, at: float, ends: tuple[float, float]) -> Html:
    """A vertical (upright) or horizontal line between two pixel positions."""
    if upright:
        return tag("line", x1=at, x2=at, y1=ends[0], y2=ends[1])
    return tag("line", x1=ends[0], x2=ends[1], y1=at, y2=at)


def _arrowhead(upright: bool, at: float, tip: float, direction: int) -> Html:
    """An open arrowhead with its tip at `tip`; it points to larger (1) or smaller (-1) pixel positions."""
    back = tip - 5 * direction
    corners = [(back, at - 3.5), (tip, at), (back, at + 3.5)]
    return tag(
        "polyline",
        points=" ".join(f"{y:.1f},{x:.1f}" if upright else f"{x:.1f},{y:.1f}" for x, y in corners),
        fill="none",
    )
