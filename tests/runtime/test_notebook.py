"""Results as data frames, tables and axes, and the progress bar."""

from __future__ import annotations

import sys

import pytest

from normtune.errors import InputError
from normtune.runtime.notebook import MAX_HTML_ROWS, Rows, axes_or_new, html_table, in_notebook
from normtune.runtime.progress import ProgressBar, progress_bar


def test_rows_are_a_data_frame_and_a_table() -> None:
    rows = Rows([{"name": "ln & bias", "value": 0.123456, "count": 12345}])
    assert rows.to_pandas()["count"].tolist() == [12345]
    html = rows._repr_html_()
    assert "ln &amp; bias" in html and ">0.1235<" in html and ">12,345<" in html


def test_a_long_table_says_how_many_rows_are_cut() -> None:
    rows = [{"n": number} for number in range(MAX_HTML_ROWS + 7)]
    assert html_table(rows).count("<tr>") == MAX_HTML_ROWS + 1 and html_table(rows).endswith("and 7 more rows</p>")
    assert "more rows" not in html_table(rows[:MAX_HTML_ROWS]) and "<tbody></tbody>" in html_table([])


def test_without_pandas_the_error_names_the_package_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(InputError, match=r"pip install normtune\[notebook\]"):
        Rows([{"a": 1}]).to_pandas()


def test_given_axes_are_drawn_on() -> None:
    axes = axes_or_new(None)
    assert axes_or_new(axes) is axes and axes_or_new(None) is not axes


def test_a_progress_bar_draws_only_when_something_happens(capsys: pytest.CaptureFixture[str]) -> None:
    assert not in_notebook()
    with progress_bar("answering", quiet=False):
        pass
    with progress_bar("answering", quiet=True) as tick:
        assert tick is None
    assert capsys.readouterr() == ("", "")
    bar = ProgressBar("training")
    bar.update(1, 2)
    bar.update(2, 2, "loss 0.5")
    bar.close()
    printed = capsys.readouterr().err
    assert "training" in printed and "2/2" in printed and "loss 0.5" in printed
