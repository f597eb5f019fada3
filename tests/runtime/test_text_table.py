from __future__ import annotations

from normtune.runtime.text_table import markdown_table, text_table

ROWS = [["recipe", "rows", "note"], ["ln", "7", ""], ["a-long-name", "1,061", "an odd | one\nhere"]]


def test_columns_are_aligned_and_lines_have_no_blanks_at_their_ends() -> None:
    assert text_table([*ROWS[:2], ["a-long-name", "1,061", "last"]], "lrl") == [
        "recipe        rows  note",
        "ln               7",
        "a-long-name  1,061  last",
    ]


def test_the_last_letter_counts_for_all_further_columns() -> None:
    assert text_table([["a", "b", "c"], ["dd", "ee", "ff"]], "lr") == ["a    b   c", "dd  ee  ff"]
    assert text_table([["a", "b"]], "lrrr") == ["a  b"]
    assert text_table([]) == []


def test_markdown_escapes_bars_and_line_ends() -> None:
    assert markdown_table(ROWS[0], ROWS[1:]) == [
        "| recipe | rows | note |",
        "|---|--:|--:|",
        "| ln | 7 |  |",
        "| a-long-name | 1,061 | an odd \\| one here |",
    ]
    assert markdown_table(["", ""], [["base", "nano"]], "l")[1] == "|---|---|"
