"""Cells and their keys: what decides a result is in the key, and nothing else is."""

from __future__ import annotations

from pathlib import Path

import pytest

from normtune.studies.plan import Cell, Plan, Sizes, plan
from normtune.studies.spec import read_study
from tests.studies.test_spec import GOOD, written


def planned(folder: Path, *changes: tuple[str, str]) -> Plan:
    text = GOOD
    for old, new in changes:
        assert old in text
        text = text.replace(old, new, 1)
    return plan(read_study(written(folder, text)))


def named(found: Plan) -> dict[str, Cell]:
    return {cell.recipe: cell for cell in found.cells}


def test_the_keys_of_a_file_stay_as_they_are_since_results_lie_under_them(tmp_path: Path) -> None:
    cells = named(planned(tmp_path))
    assert {recipe: cell.key for recipe, cell in cells.items()} == KEYS
    assert {one.dataset: one.role for one in cells["ln"].evaluations} == {
        "phantom-b": "in",
        "phantom-a": "home",
    }
    assert {one.dataset: one.role for one in cells["frozen"].evaluations} == {
        "phantom-b": "zero-shot",
        "phantom-a": "home",
    }


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("    budget", "    seeds: [1]\n    budget"),
        ("    budget", "    shares: [50]\n    budget"),
        ("    budget", "    learning_rates: [0.5]\n    budget"),
        ("epochs: 1", "epochs: 2"),
        ("phantom-b:4/2/2", "phantom-b:5/2/2"),
        ("grids:", "train: {batch: 3}\ngrids:"),
        ("home: phantom-a", "home: phantom-a, dtype: bfloat16"),
        ("home: phantom-a", "home: phantom-a, path: other"),
    ],
)
def test_what_decides_a_result_is_in_the_key(tmp_path: Path, old: str, new: str) -> None:
    assert named(planned(tmp_path, (old, new)))["ln"].key != KEYS["ln"]


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"phantom-b:4/2/2"', '"phantom-b:4/2/2", root: anywhere'),
        ("study: small", "study: other"),
        ("main:", "again:"),
        ("frozen, ln, full", "full, ln"),
        ("home: phantom-a", "home: phantom-b"),
        ("home: phantom-a", "home: phantom-a, device: cpu"),
        ("grids:", "train: {memory: tight}\ngrids:"),
        ("    budget", "    evaluate: phantom-a\n    budget"),
        ("    budget", "    learning_rates: [0.03]\n    budget"),  # the default, named
    ],
)
def test_what_decides_no_result_is_not_in_the_key(tmp_path: Path, old: str, new: str) -> None:
    assert named(planned(tmp_path, (old, new)))["ln"].key == KEYS["ln"]


def test_grids_that_ask_for_one_training_share_its_cell_and_add_their_evaluations(tmp_path: Path) -> None:
    other = (
        "  other: {recipes: ln, train: phantom-b, evaluate: phantom-a, seeds: [0, 1], budget: {epochs: 1}}\n"
    )
    found = planned(tmp_path, ("{epochs: 1}\n", "{epochs: 1}\n" + other), (": {home: phantom-a}", ": {}"))
    assert len(found.cells) == 4
    shared = next(cell for cell in found.cells if cell.key == KEYS["ln"])
    assert shared.grids == ("main", "other")
    assert [(one.dataset, one.role) for one in shared.evaluations] == [
        ("phantom-b", "in"),
        ("phantom-a", "out"),
    ]


def test_a_search_is_run_on_the_validation_split_before_the_cells_that_wait_for_it(tmp_path: Path) -> None:
    found = planned(tmp_path, ("    budget", "    learning_rates: search\n    seeds: [0, 1]\n    budget"))
    assert found.waiting == 4 and len(found.trials) == 2
    assert {cell.recipe for cell in found.cells if cell.grids != ("search",)} == {"frozen"}
    assert [cell.rates for cell in found.trials[0].cells] == [{"ln": 0.01}, {"ln": 0.03}, {"ln": 0.1}]
    assert [cell.rates["full"] for cell in found.trials[1].cells] == [1e-4, 3e-4, 1e-3]
    for trial in found.trials:
        for cell in trial.cells:
            assert [(one.role, one.config.split) for one in cell.evaluations] == [("validate", "validate")]
    study = read_study(tmp_path / "study.yaml")
    after = plan(study, {found.trials[0].id: 0.1, found.trials[1].id: 1e-3})
    ln = [cell for cell in after.cells if cell.recipe == "ln" and "main" in cell.grids]
    assert after.waiting == 0 and [cell.rates["ln"] for cell in ln] == [0.1, 0.1]
    assert ln[0].grids == ("main", "search")  # the trial that won is the cell of its seed
    assert ln[0].rate_source == "search"


def test_recipes_that_mix_methods_keep_the_defaults_of_each(tmp_path: Path) -> None:
    found = planned(tmp_path, ("full]", "ln-bias]\n    learning_rates: search"))
    assert named(found)["ln-bias"].rates == {"ln": 0.03, "bias": 0.1}


def test_pairs_are_counted_before_anything_runs(tmp_path: Path) -> None:
    found = planned(tmp_path)
    sizes = Sizes(read_study(tmp_path / "study.yaml"))
    from normtune.data.registry import open_configured

    data = open_configured(sizes.study.datasets["phantom-b"])
    home = open_configured(sizes.study.datasets["phantom-a"])
    cells = named(found)
    assert sizes.training(cells["ln"]) == len(data.split("train"))
    assert sizes.training(cells["frozen"]) == 0
    assert sizes.answering(cells["ln"]) == len(data.split("test")) + len(home.split("test"))


KEYS = {"frozen": "a6067a69b77e8c1c", "ln": "cdb31673a081280c", "full": "261873d9c90d53d2"}
