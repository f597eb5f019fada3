from __future__ import annotations

import re
from typing import Any

import pytest

from normtune.studies.page.results import Results
from normtune.studies.page.tables import models_table, paired_table, setting_table, short_methods
from tests.support.study_results import made_results


@pytest.fixture(scope="module")
def results() -> dict[str, Any]:
    return made_results(recipes=["frozen", "ln", "full", "prefix"], losses=2)


def rows_of(table: str) -> dict[str, list[str]]:
    """Each row's cells as text, by its first cell."""
    found = {}
    for row in re.findall(r"<tr[^>]*>(.*?)</tr>", table):
        cells = [
            re.sub(r"<[^>]+>", " ", cell).split() for cell in re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row)
        ]
        found[" ".join(cells[0])] = [" ".join(cell) for cell in cells[1:]]
    return found


def test_a_row_holds_parts_costs_and_the_mean_of_its_seeds(results: dict[str, Any]) -> None:
    study = Results(results)
    setting = next(s for s in study.settings() if (s.grid, s.trained_on) == ("methods", "slake"))
    rows = rows_of(setting_table(study, setting))
    assert list(rows)[1:] == ["recipe", "frozen base", "ln", "full", "prefix"]
    assert rows["prefix"][:4] == ["frozen", "prefix", "prefix", "1.2%"]
    (mean,) = (
        r["mean"]
        for r in results["seeds"]
        if (r["grid"], r["model"], r["trained_on"], r["recipe"], r["dataset"], r["metric"])
        == ("methods", "nano", "slake", "ln", "slake", "closed_label")
    )
    assert rows["ln"][6].startswith(f"{100 * mean:.1f} ")


def test_a_mark_stands_only_where_the_corrected_test_is_clear(results: dict[str, Any]) -> None:
    study = Results(results)
    for setting in study.settings():
        clear = sum(
            row["p_holm"] < 0.05
            for row in results["tests"]
            if (row["grid"], row["model"], row["trained_on"])
            == (setting.grid, setting.model, setting.trained_on)
            and row["dataset"] in {*study.datasets(setting, "in"), *study.datasets(setting, "out")}
        )
        marks = setting_table(study, setting).count('class="mark"')
        assert marks <= clear and (marks > 0) == (clear > 0)


def test_models_stand_side_by_side_only_where_there_are_several(results: dict[str, Any]) -> None:
    table = models_table(Results(results))
    assert table is not None and "nano" in table and "large" in table
    small = {**results, "cells": [cell for cell in results["cells"] if cell["model"] == "nano"]}
    assert models_table(Results(small)) is None


def test_every_paired_test_is_listed(results: dict[str, Any]) -> None:
    table = paired_table(Results(results))
    assert table is not None
    assert table.count("<tr>") == len(results["tests"]) + 1
    assert paired_table(Results({})) is None


def test_methods_are_told_by_their_size() -> None:
    assert short_methods("lora(r=4,alpha=32,dropout=0.1)[2:]+ln") == "lora r=4 [2:] + ln"
    assert short_methods("lora(alpha=32)") == "lora r=8"
    assert short_methods("prefix(n=4)") == "prefix n=4"
    assert short_methods("full") == "full"
    assert short_methods("ln(bias=0)+ffn") == "ln gains + ffn"
