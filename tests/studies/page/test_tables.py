from __future__ import annotations

from typing import Any

import pytest

from normtune.studies.page.results import Results
from normtune.studies.page.tables import Table, describe_parts, models_table, setting_table
from tests.support.study_results import fake_results


@pytest.fixture(scope="module")
def results() -> dict[str, Any]:
    return fake_results(recipes=["frozen", "ln", "full", "prefix"], losses=2)


def rows_of(table: Table) -> dict[str, list[str]]:
    """The texts of each row's cells, by the text of the row's first cell."""
    return {row[0].text: [cell.text for cell in row[1:]] for row in table.rows}


def test_a_row_holds_parts_costs_and_the_mean_of_its_seeds(results: dict[str, Any]) -> None:
    study = Results(results)
    setting = next(s for s in study.settings() if (s.grid, s.trained_on) == ("methods", "slake"))
    table = setting_table(study, setting)
    rows = rows_of(table)
    assert table.header[0].text == "recipe" and table.base
    assert list(rows) == ["frozen base", "ln", "full", "prefix"]
    assert rows["prefix"][0] == "3" and rows["prefix"][-1] == "prefix: encoder, decoder" and rows["ln"][-1] == "ln"
    assert [name for name, _ in table.groups][1] == "slake, 96 images"
    (mean,) = (
        r["mean"]
        for r in results["seeds"]
        if (r["grid"], r["model"], r["trained_on"], r["recipe"], r["dataset"], r["metric"])
        == ("methods", "nano", "slake", "ln", "slake", "closed_label")
    )
    assert rows["ln"][1] == f"{100 * mean:.1f}"


def test_a_score_has_an_arrow_only_if_its_corrected_test_is_significant(results: dict[str, Any]) -> None:
    study = Results(results)
    for setting in study.settings():
        significant = sum(
            row["p_holm"] < 0.05
            for row in results["tests"]
            if (row["grid"], row["model"], row["trained_on"]) == (setting.grid, setting.model, setting.trained_on)
            and row["dataset"] in {*study.datasets(setting, "in"), *study.datasets(setting, "out")}
        )
        marks = sum(cell.mark is not None for row in setting_table(study, setting).rows for cell in row)
        assert marks <= significant and (marks > 0) == (significant > 0)


def test_the_models_table_needs_several_models(results: dict[str, Any]) -> None:
    table = models_table(Results(results))
    assert table is not None and {"nano", "large"} <= {cell.text for cell in table.header}
    small = {**results, "cells": [cell for cell in results["cells"] if cell["model"] == "nano"]}
    assert models_table(Results(small)) is None


def test_methods_are_grouped_by_part() -> None:
    assert describe_parts({"vision": "ln", "language": "ln"}) == "ln"
    assert describe_parts({"vision": "frozen", "language": "lora(r=4,alpha=32)[2:]+ln"}) == "lora[2:]+ln: language"
    assert describe_parts({"vision": "ln", "language": "prefix(n=4)"}) == "ln: vision; prefix: language"
    assert describe_parts({"vision": "frozen"}) == "nothing"
