"""The study's file: its fields, and errors that name the line and the field."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from normtune.studies.spec import read_study
from tests.support.base_models import input_error

GOOD = """\
study: small
models: {nano: {home: phantom-a}}
datasets:
  phantom-a: {data: "phantom-a:2/0/2"}
  phantom-b: {data: "phantom-b:4/2/2"}
grids:
  main:
    recipes: [frozen, ln, full]
    train: phantom-b
    budget: {epochs: 1}
"""
DOCS = Path(__file__).parents[2] / "docs" / "study.md"
TRAIN = "    train: phantom-b\n"


def write_study(folder: Path, text: str) -> Path:
    path = folder / "study.yaml"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("old", "new", "line", "expected"),
    [
        ("recipes:", "recipies:", 8, "grids.main.recipies: unknown, did you mean 'recipes'?"),
        ("home:", "hom:", 2, "models.nano.hom: unknown, did you mean 'home'?"),
        ("data: \"phantom-b", "dat: \"phantom-b", 5, "datasets.phantom-b.dat: unknown, did you mean 'data'?"),
        ("{epochs: 1}", "{epoch: 1}", 10, "grids.main.budget.epoch: unknown, did you mean 'epochs'?"),
        ("frozen, ln", "frozen, lm", 8, "grids.main.recipes.1: unknown method 'lm', did you mean 'ln'?"),
        ("train: phantom-b", "train: phantom-c", 9, "grids.main.train.0: no data set 'phantom-c', did"),
        ("home: phantom-a", "home: fantom-a", 2, "models.nano.home: no data set 'fantom-a', did you mean"),
        ("{epochs: 1}", "{epochs: 1, pairs: 3}", 10, "grids.main.budget: give one of epochs, pairs"),
        ("{epochs: 1}", "{epochs: 1, patience: 3}", 10, "grids.main.budget: patience: these need until: plateau"),
        ("{epochs: 1}", "{until: plateau, validate_every: 0}", 10, "grids.main.budget.validate_every: give a number"),
        ("{epochs: 1}", "{epochs: -1}", 10, "grids.main.budget.epochs: input should be greater"),
        ("train: phantom-b", "train: [phantom-b, phantom-b]", 9, "grids.main.train: 'phantom-b' appears"),
        ("full]", "all=ln]", 8, "grids.main.recipes: 'ln' and 'all=ln' are the same recipe"),
        ("full]", '"*-*-lm"]', 8, "grids.main.recipes.2: no preset matches '*-*-lm'"),
        ("study: small\n", "study: a/b\n", 1, "study: a name may have only letters"),
        ("study: small\n", "", 1, "study: is missing"),
        ("main:", "search:", 7, "grids.search: this name is reserved"),
        (TRAIN, "    seeds: [0, x]\n" + TRAIN, 9, "grids.main.seeds.1: input should be"),
        (TRAIN, "    learning_rates: serch\n" + TRAIN, 9, "grids.main.learning_rates"),
        (TRAIN, "    shares: [200]\n" + TRAIN, 9, "grids.main.shares.0: input should"),
        ('4/2/2"', '4/2/2", folds: 2', 5, "datasets.phantom-b.folds: input should be greater than or equal to 3"),
        ('4/2/2"', '4/2/2", folds: 3, fold: 0', 5, "datasets.phantom-b: folds makes new splits: remove fold"),
        ('a:2/0/2"', 'a:2/0/2", folds: 3', 2, "models.nano.home: forgetting is measured on one test split"),
        (TRAIN, TRAIN + "    train: phantom-a\n", 10, "'train' appears twice"),
        ("train: phantom-b", "train: [phantom-b", 10, "not valid YAML"),
        ("    budget", "compare: {against: lora-8}\n#", 10, "compare.against: no recipe 'lora-8'"),
    ],
)  # fmt: skip
def test_an_error_names_its_line_and_field(tmp_path: Path, old: str, new: str, line: int, expected: str) -> None:
    assert old in GOOD
    path = write_study(tmp_path, GOOD.replace(old, new, 1))
    message = input_error(lambda: read_study(path))
    assert expected in message and f"{path}, line {line}:" in message


def test_a_search_is_refused_with_folds(tmp_path: Path) -> None:
    text = GOOD.replace('4/2/2"', '4/2/2", folds: 3').replace(TRAIN, "    learning_rates: search\n" + TRAIN)
    message = input_error(lambda: read_study(write_study(tmp_path, text)))
    assert "line 9: grids.main.learning_rates: a search would see rows that other folds test on" in message


def test_all_errors_are_reported_at_once(tmp_path: Path) -> None:
    text = GOOD.replace("frozen, ln", "frozen, lm").replace("train: phantom-b", "train: phantom-c")
    assert input_error(lambda: read_study(write_study(tmp_path, text))).count("line ") == 2


def test_defaults_and_single_values_instead_of_lists(tmp_path: Path) -> None:
    study = read_study(write_study(tmp_path, GOOD))
    grid = study.grids["main"]
    assert (grid.train, grid.seeds, grid.shares, grid.learning_rates) == (["phantom-b"], [0], [100], "default")
    assert study.model("nano").path == "nano"
    assert study.recipes_of(grid) == {"frozen": "all=frozen", "ln": "all=ln", "full": "all=full"}


def test_a_root_is_set_by_the_data_sets_name(tmp_path: Path) -> None:
    path = write_study(tmp_path, GOOD)
    assert read_study(path, ["phantom-b=some/where"]).datasets["phantom-b"].root == Path("some/where")
    assert "did you mean 'phantom-b'?" in input_error(lambda: read_study(path, ["phantom-bb=x"]))
    assert "write NAME=DIR" in input_error(lambda: read_study(path, ["phantom-b"]))


def test_a_wildcard_names_the_presets_that_match_it(tmp_path: Path) -> None:
    study = read_study(write_study(tmp_path, GOOD.replace("full]", '"frozen-*-prefix"]')))
    names = list(study.recipes_of(study.grids["main"]))
    assert names[2:] == ["frozen-frozen-prefix", "frozen-full-prefix", "frozen-prefix-prefix"]


def test_the_file_in_the_docs_is_valid(tmp_path: Path) -> None:
    (text,) = re.findall(r"```yaml\n(.*?)```", DOCS.read_text(encoding="utf-8"), re.DOTALL)
    assert set(read_study(write_study(tmp_path, text)).grids) == {"methods", "curves"}
