"""HTML and SVG as strings that are escaped once: an element of the text and elements given to it."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape

Attribute = str | float | int | bool | None
VOID = frozenset({"meta", "link", "br", "input", "img", "hr", "col"})  # elements of HTML without an end tag


class Html(str):
    """Text that is markup already."""

    __slots__ = ()


Child = str | None  # Html is taken as it is, any other string is escaped, None is left out


def tag(name: str, /, *children: Child, **attributes: Attribute) -> Html:
    """An element. Attributes: `class_` is class, `stroke_width` stroke-width; False and None are left out."""
    opened = name + "".join(
        f" {_attribute(key)}" if value is True else f' {_attribute(key)}="{escape(_text(value))}"'
        for key, value in attributes.items()
        if value is not None and value is not False
    )
    if name in VOID:
        return Html(f"<{opened}>")
    return Html(f"<{opened}>{joined(children)}</{name}>")


def joined(children: Iterable[Child]) -> Html:
    """The children one after another."""
    return Html(
        "".join(c if isinstance(c, Html) else escape(c, quote=False) for c in children if c is not None)
    )


def _attribute(key: str) -> str:
    return key.rstrip("_").replace("_", "-")


def _text(value: Attribute) -> str:
    if isinstance(value, float):
        return f"{value:.2f}".rstrip("0").rstrip(".")
    return str(value)
