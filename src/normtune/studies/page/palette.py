"""Colours and shapes of recipes: one a family of methods, the same in every figure, for both themes.

The hues keep apart for the common kinds of colour blindness (after Okabe and Ito 2008), darkened or lightened
to at least 3:1 against the page; a shape says the same a second time.
"""

from __future__ import annotations

import re

from normtune.studies.page.axes import Scale
from normtune.studies.page.html import Html, tag

COLOURS = {  # family: on light, on dark
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
TOLD = {  # the family's name in the legend
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
_FAMILY_OF = {"ptuning": "prefix", "ia3": "other", "adapter": "other", "bias": "other"}
_METHOD = re.compile(r"[a-z_0-9]+")


def parts_of(resolved: str) -> dict[str, str]:
    """Each part's methods of a resolved recipe, as written: `vision=frozen,language=lora(r=4)` by part."""
    return dict(re.findall(r"([a-z]+)\??=((?:[^,(]|\([^)]*\))*)", resolved))


def family(resolved: str) -> str:
    """The family of a resolved recipe: that of its method, `mixed` where it has several."""
    methods = {
        _METHOD.match(method.strip()).group()  # type: ignore[union-attr]
        for text in parts_of(resolved).values()
        for method in text.split("+")
        if _METHOD.match(method.strip())
    } - {"frozen"}
    families = {_FAMILY_OF.get(method, method) for method in methods}
    if not families:
        return "frozen"
    found = families.pop() if len(families) == 1 else "mixed"
    return found if found in COLOURS else "other"


def variables(theme: int) -> str:
    """The colours as CSS declarations, of the light (0) or dark (1) theme."""
    return "".join(f"--{name}:{pair[theme]};" for name, pair in COLOURS.items())


def classes() -> str:
    """A CSS class for each family."""
    return "".join(f".c-{name}{{color:var(--{name})}}" for name in COLOURS)


def marker(kind: str, x: float, y: float, *, hollow: bool = False, size: float = 4.6) -> Html:
    """The family's mark: a shape around (x, y) in the family's colour."""
    paint = {"class_": f"c-{kind} {'hollow' if hollow else 'solid'}"}
    if kind == "ln" or kind == "frozen":
        return tag("circle", cx=x, cy=y, r=size, **paint)
    corners = {
        "full": ((-1, -1), (1, -1), (1, 1), (-1, 1)),
        "lora": ((0, -1.25), (1.2, 0.95), (-1.2, 0.95)),
        "attention": ((0, -1.4), (1.4, 0), (0, 1.4), (-1.4, 0)),
        "ffn": ((0, 1.25), (1.2, -0.95), (-1.2, -0.95)),
        "prefix": ((-1.25, 0), (0.95, -1.2), (0.95, 1.2)),
        "other": ((1.25, 0), (-0.95, -1.2), (-0.95, 1.2)),
        "mixed": ((-0.6, -1.2), (0.6, -1.2), (1.2, 0), (0.6, 1.2), (-0.6, 1.2), (-1.2, 0)),
    }[kind]
    points = " ".join(f"{x + size * dx * 0.95:.1f},{y + size * dy * 0.95:.1f}" for dx, dy in corners)
    return tag("polygon", points=points, **paint)


def interval(kind: str, along: Scale, at: float, low: float, high: float, *, upright: bool) -> Html:
    """The line of an interval, upright or level, with an arrow where the scale cuts it."""
    ends = along(low), along(high)
    parts = [_line(upright, at, ends)]
    if low < along.low:
        parts.append(_arrow(upright, at, ends[0], -1 if along.end > along.start else 1))
    if high > along.high:
        parts.append(_arrow(upright, at, ends[1], 1 if along.end > along.start else -1))
    return tag("g", *parts, class_=f"c-{kind} interval")


def _line(upright: bool, at: float, ends: tuple[float, float]) -> Html:
    if upright:
        return tag("line", x1=at, x2=at, y1=ends[0], y2=ends[1])
    return tag("line", x1=ends[0], x2=ends[1], y1=at, y2=at)


def _arrow(upright: bool, at: float, tip: float, way: int) -> Html:
    """An open arrowhead at `tip` that points to larger (1) or smaller (-1) pixels."""
    back = tip - 5 * way
    corners = [(back, at - 3.5), (tip, at), (back, at + 3.5)]
    return tag(
        "polyline",
        points=" ".join(f"{y:.1f},{x:.1f}" if upright else f"{x:.1f},{y:.1f}" for x, y in corners),
        fill="none",
    )
