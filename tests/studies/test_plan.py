"""Cells and their keys: every option that decides a result is in the key, and no other."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from normtune.data.registry import open_configured
from normtune.studies.folds import with_split_files, write_split_files
from normtune.studies.listing import PairCounts
from normtune.studies.plan import Cell, Plan, plan
from normtune.studies.spec import read_study
from tests.studies.test_spec import GOOD, write_study
from tests.support.base_models import input_error


def make_plan(folder: Path, *changes: tuple[str, str]) -> Plan:
    text = GOOD
    for old, new in changes:
        assert old in text
        text = text.replace(old, new, 1)
    return plan(read_study(write_study(folder, text)))


def cells_by_recipe(planned: Plan) -> dict[str, Cell]:
    return {cell.recipe: cell for cell in planned.cells}


def test_keys_never_change_because_results_are_stored_under_them(tmp_path: Path) -> None:
    cells = cells_by_recipe(make_plan(tmp_path))
    assert {recipe: cell.key for recipe, cell in cells.items()} == KEYS
    assert {evaluation.dataset: evaluation.role for evaluation in cells["ln"].evaluations} == {
        "phantom-b": "in",
        "phantom-a": "home",
    }
    assert {evaluation.dataset: evaluation.role for evaluation in cells["frozen"].evaluations} == {
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
        ("grids:", "train: {choice_target: text}\ngrids:"),
        ('"phantom-b:4/2/2"', '"phantom-b:4/2/2", choice_prompt: mmmu'),
        ("home: phantom-a", "home: phantom-a, dtype: bfloat16"),
        ("home: phantom-a", "home: phantom-a, path: other"),
    ],
)
def test_options_that_decide_a_result_change_the_key(tmp_path: Path, old: str, new: str) -> None:
    assert cells_by_recipe(make_plan(tmp_path, (old, new)))["ln"].key != KEYS["ln"]


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
        ("    budget", "    learning_rates: [0.03]\n    budget"),  # the default rate
    ],
)
def test_other_options_do_not_change_the_key(tmp_path: Path, old: str, new: str) -> None:
    assert cells_by_recipe(make_plan(tmp_path, (old, new)))["ln"].key == KEYS["ln"]


FOLDS = ('4/2/2"', '4/2/2", folds: 3')


def test_each_fold_is_a_cell_wherever_the_folder_is(tmp_path: Path) -> None:
    planned = make_plan(tmp_path, FOLDS)
    cells = [cell for cell in planned.cells if cell.recipe == "ln"]
    assert [cell.fold for cell in cells] == [0, 1, 2] and len({cell.key for cell in planned.cells}) == 7
    for cell in cells:
        assert cell.train is not None and cell.train.fold == cell.fold and f"fold {cell.fold}" in str(cell)
        tested = [(e.role, e.config.split, e.config.fold) for e in cell.evaluations]
        assert tested == [("in", "test", cell.fold), ("home", "test", None)]
    (base,) = (cell for cell in planned.cells if cell.recipe == "frozen")
    assert base.key == KEYS["frozen"] and len({evaluation.folder for evaluation in base.evaluations}) == 4
    study = read_study(tmp_path / "study.yaml")
    for folder in ("here", "there"):
        moved = plan(with_split_files(study, tmp_path / folder))
        assert [cell.key for cell in moved.cells] == [cell.key for cell in planned.cells]
        assert [e.folder for cell in moved.cells for e in cell.evaluations] == [
            e.folder for cell in planned.cells for e in cell.evaluations
        ]
        train = moved.cells[-1].train
        assert train is not None and train.splits is not None and train.splits.parent == tmp_path / folder / "splits"
    for other in (4, "3, split_seed: 1"):
        changed = make_plan(tmp_path, ('4/2/2"', f'4/2/2", folds: {other}'))
        assert not {cell.key for cell in changed.cells if cell.train} & {cell.key for cell in planned.cells}


def test_a_file_of_splits_is_in_the_key_by_its_contents(tmp_path: Path) -> None:
    def key(name: str, text: str) -> str:
        (tmp_path / name).write_text(text)
        return cells_by_recipe(make_plan(tmp_path, ('4/2/2"', f'4/2/2", splits: {tmp_path / name}')))["ln"].key

    assert key("one.json", "{}") == key("other.json", "{}") != key("one.json", "[]")
    (tmp_path / "one.json").unlink()
    message = input_error(lambda: plan(read_study(tmp_path / "study.yaml")))
    assert "cannot read" in message and "normtune split" in message


def test_the_rows_of_folds_are_counted_before_they_are_made(tmp_path: Path) -> None:
    planned = make_plan(tmp_path, FOLDS)
    study = read_study(tmp_path / "study.yaml")
    counts, rows = PairCounts(study), len(open_configured(study.datasets["phantom-b"]).examples)
    (cell, *_) = (cell for cell in planned.cells if cell.recipe == "ln")
    assert counts.training_pairs(cell) == round(rows / 3)


def test_split_files_are_kept_until_the_rows_change(tmp_path: Path) -> None:
    study = read_study(write_study(tmp_path, GOOD.replace(*FOLDS)))
    write_split_files(study, tmp_path)
    (file,) = (tmp_path / "splits").iterdir()
    made = json.loads(file.read_text())
    assert made["folds"] == 3 and set(made["splits"].values()) == {0, 1, 2}
    file.write_text(json.dumps(made))
    write_split_files(study, tmp_path)
    assert file.read_text() == json.dumps(made)  # the same rows
    file.write_text(json.dumps(made | {"digest": "of other rows", "splits": {"x": 0}}))
    write_split_files(study, tmp_path)
    assert json.loads(file.read_text()) == made


def test_a_plateau_validates_with_the_same_cap_for_all_recipes(tmp_path: Path) -> None:
    planned = make_plan(tmp_path, ("{epochs: 1}", "{until: plateau, max_epochs: 7, metric: loss}"))
    for recipe in ("ln", "full"):
        cell = cells_by_recipe(planned)[recipe]
        assert cell.train is not None and cell.key not in KEYS.values()
        options = ("validate_every", "validation_split", "validation_limit", "patience", "metric_for_best")
        assert [getattr(cell.train, name) for name in options] == ["epoch", "validate", 200, 5, "loss"]
        assert cell.budget is not None and cell.budget["max_epochs"] == 7
    longer = make_plan(tmp_path, ("{epochs: 1}", "{until: plateau, max_epochs: 8, metric: loss}"))
    assert cells_by_recipe(longer)["ln"].key != cells_by_recipe(planned)["ln"].key


def test_grids_with_the_same_training_share_a_cell_with_all_evaluations(tmp_path: Path) -> None:
    other = "  other: {recipes: ln, train: phantom-b, evaluate: phantom-a, seeds: [0, 1], budget: {epochs: 1}}\n"
    planned = make_plan(tmp_path, ("{epochs: 1}\n", "{epochs: 1}\n" + other), (": {home: phantom-a}", ": {}"))
    assert len(planned.cells) == 4
    shared = next(cell for cell in planned.cells if cell.key == KEYS["ln"])
    assert shared.grids == ("main", "other")
    assert [(evaluation.dataset, evaluation.role) for evaluation in shared.evaluations] == [
        ("phantom-b", "in"),
        ("phantom-a", "out"),
    ]


def test_a_search_uses_the_validation_split_and_runs_before_its_cells(tmp_path: Path) -> None:
    planned = make_plan(tmp_path, ("    budget", "    learning_rates: search\n    seeds: [0, 1]\n    budget"))
    assert planned.waiting == 4 and len(planned.searches) == 2
    assert {cell.recipe for cell in planned.cells if cell.grids != ("search",)} == {"frozen"}
    assert [cell.rates for cell in planned.searches[0].cells] == [{"ln": 0.01}, {"ln": 0.03}, {"ln": 0.1}]
    assert [cell.rates["full"] for cell in planned.searches[1].cells] == [1e-4, 3e-4, 1e-3]
    for search in planned.searches:
        for cell in search.cells:
            assert [(evaluation.role, evaluation.config.split) for evaluation in cell.evaluations] == [
                ("validate", "validate")
            ]
    study = read_study(tmp_path / "study.yaml")
    second_plan = plan(study, {planned.searches[0].id: {"ln": 0.1}, planned.searches[1].id: {"full": 1e-3}})
    ln_cells = [cell for cell in second_plan.cells if cell.recipe == "ln" and "main" in cell.grids]
    assert second_plan.waiting == 0 and [cell.rates["ln"] for cell in ln_cells] == [0.1, 0.1]
    assert ln_cells[0].grids == ("main", "search")  # the winning trial is also the grid's cell of the same seed
    assert ln_cells[0].rate_source == "search"


def test_a_grid_may_have_trials_of_its_own_length(tmp_path: Path) -> None:
    planned = make_plan(
        tmp_path,
        ("    budget", "    learning_rates: search\n    search_budget: {pairs: 7}\n    budget"),
        ("grids:", "search: {budget: {pairs: 5}}\ngrids:"),
    )
    assert {cell.budget["pairs"] for search in planned.searches for cell in search.cells if cell.budget} == {7}


def test_a_search_gives_mixed_methods_the_same_rate(tmp_path: Path) -> None:
    planned = make_plan(tmp_path, ("full]", "ln-bias]\n    learning_rates: search"))
    trials = [cell.rates for search in planned.searches for cell in search.cells if cell.recipe == "ln-bias"]
    assert trials == [{"ln": rate, "bias": rate} for rate in (0.01, 0.03, 0.1)]


KEYS = {"frozen": "a6067a69b77e8c1c", "ln": "cdb31673a081280c", "full": "261873d9c90d53d2"}


def test_a_data_set_says_how_its_choices_are_read_and_scored(tmp_path: Path) -> None:
    options = '"phantom-b:4/2/2", choice_prompt: mmmu, choice_scoring: all, choice_rotations: true'
    cell = cells_by_recipe(make_plan(tmp_path, ('"phantom-b:4/2/2"', options)))["ln"]
    assert cell.train is not None and cell.train.choice_prompt == "mmmu"
    config = cell.evaluations[0].config
    assert (config.choice_prompt, config.choice_scoring, config.choice_rotations) == ("mmmu", "all", True)
