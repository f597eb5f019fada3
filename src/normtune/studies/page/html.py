"""HTML and SVG elements as strings; text is escaped exactly once."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape

Attribute = str | float | int | bool | None
# HTML elements without an end tag
VOID_ELEMENTS = frozenset({"meta", "link", "br", "input", "img", "hr", "col"})


class Html(str):
    """A string that is markup already and must not be escaped again."""

    __slots__ = ()


Child = str | None  # Html is inserted unchanged, any other string is escaped, None is left out


def tag(name: str, /, *children: Child, **attributes: Attribute) -> Html:
    """An HTML or SVG element.

    Args:
        name: the element's name.
        children: its content; see `Child`.
        attributes: `class_` is written as class, `stroke_width` as stroke-width. True writes the name only;
            False and None leave the attribute out.
    """
    opened = name + "".join(
        f" {_attribute(key)}" if value is True else f' {_attribute(key)}="{escape(_text(value))}"'
        for key, value in attributes.items()
        if value is not None and value is not False
    )
    if name in VOID_ELEMENTS:
        return Html(f"<{opened}>")
    return Html(f"<{opened}>{join_children(children)}</{name}>")


def join_children(children: Iterable[Child]) -> Html:
    """The children one after another; see `Child`."""
    return Html("".join(c if isinstance(c, Html) else escape(c, quote=False) for c in children if c is not None))


def _attribute(key: str) -> str:
    """An attribute's name as HTML writes it."""
    return key.rstrip("_").replace("_", "-")


def _text(value: Attribute) -> str:
    """An attribute's value as text; floats have at most two decimals."""
    if isinstance(value, float):
        return f"{value:.2f}".rstrip("0").rstrip(".")
    return str(value)
