"""Tables as plain text and as Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def text_table(rows: Iterable[Sequence[str]], align: str = "lr") -> list[str]:
    """The lines of a table with aligned columns, two blanks apart.

    Args:
        rows: the cells of each row; all rows have the same number of cells. The first row may be the header.
        align: l (left) or r (right) for each column; the last letter counts for all further columns.
    """
    rows = list(rows)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    sides = align.ljust(len(widths), align[-1])
    return [
        "  ".join(
            cell.ljust(width) if side == "l" else cell.rjust(width)
            for cell, width, side in zip(row, widths, sides, strict=False)
        ).rstrip()
        for row in rows
    ]


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]], align: str = "lr") -> list[str]:
    """The lines of a Markdown table, aligned as in `text_table`; bars are escaped, line ends replaced by blanks."""
    sides = align.ljust(len(header), align[-1])
    lines = [
        "| " + " | ".join(" ".join(cell.split()).replace("|", "\\|") for cell in row) + " |" for row in (header, *rows)
    ]
    rule = "|" + "".join("---|" if side == "l" else "--:|" for side in sides[: len(header)])
    return [lines[0], rule, *lines[1:]]
