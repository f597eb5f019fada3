from __future__ import annotations

import pytest
from jinja2 import UndefinedError

from normtune.runtime.templates import render_template


def test_a_variable_that_is_missing_is_an_error() -> None:
    with pytest.raises(UndefinedError, match="notice"):
        render_template("adapters/model_card.md.j2", facts=[], metrics=[])


def test_only_html_is_escaped() -> None:
    card = render_template("adapters/model_card.md.j2", notice="a & b", facts=[], metrics=[], privacy=None)
    assert "For a & b." in card
