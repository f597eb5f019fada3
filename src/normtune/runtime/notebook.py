"""How results appear in Python sessions: as data frames, HTML tables and matplotlib axes.

pandas and matplotlib are imported when they are used.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from html import escape
from json import dumps, loads
from typing import TYPE_CHECKING, Any

from normtune.errors import InputError

if TYPE_CHECKING:
    import pandas
    from matplotlib.axes import Axes

MAX_HTML_ROWS = 20  # a longer table is cut, and says so


class Result:
    """A dataclass that functions return and commands print: as JSON values, as text, or as HTML in Jupyter."""

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON values; paths become text."""
        return loads(dumps(asdict(self), default=str))  # type: ignore[call-overload]

    def _repr_html_(self) -> str:
        return html_text(str(self))


class Rows(list[dict[str, Any]]):
    """Rows of a table: a list of dicts, which Jupyter shows as a table."""

    def to_pandas(self) -> pandas.DataFrame:
        """Return the rows as a data frame."""
        return data_frame(self)

    def _repr_html_(self) -> str:
        return html_table(self)


def data_frame(rows: Iterable[Mapping[str, Any]]) -> pandas.DataFrame:
    """Make a data frame with one row for each mapping; an `InputError` if pandas is not installed."""
    try:
        import pandas
    except ModuleNotFoundError as error:
        raise InputError("to_pandas() needs pandas, which is not installed: pip install normtune[notebook].") from error
    return pandas.DataFrame(list(rows))


def html_table(rows: Sequence[Mapping[str, Any]], caption: str = "") -> str:
    """Format rows with equal keys as an HTML table; numbers are aligned to the right."""
    head = "".join(f"<th>{escape(str(name))}</th>" for name in (rows[0] if rows else ()))
    body = "".join(f"<tr>{''.join(map(_html_cell, row.values()))}</tr>" for row in rows[:MAX_HTML_ROWS])
    more = f"<p>and {len(rows) - MAX_HTML_ROWS:,} more rows</p>" if len(rows) > MAX_HTML_ROWS else ""
    title = f"<caption style='text-align:left'>{escape(caption)}</caption>" if caption else ""
    return f"<table>{title}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>{more}"


def _html_cell(value: Any) -> str:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    text = f"{value:,.4g}" if isinstance(value, float) else f"{value:,}" if is_number else str(value)
    return f"<td style='text-align:{'right' if is_number else 'left'}'>{escape(text)}</td>"


def html_text(text: str) -> str:
    """Format text in a fixed-width font, such as an aligned table of the command line."""
    return f"<pre>{escape(text)}</pre>"


def axes_or_new(ax: Axes | None) -> Axes:
    """Return `ax`, or the axes of a new figure if it is None."""
    if ax is not None:
        return ax
    from matplotlib import pyplot

    return pyplot.subplots(layout="constrained")[1]


def in_notebook() -> bool:
    """Whether this process is a Jupyter kernel, which displays HTML."""
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    return hasattr(shell, "kernel")
