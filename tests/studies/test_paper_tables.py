from __future__ import annotations

import pytest

from normtune.studies.paper_tables import Table, all_tables, latex, markdown
from normtune.studies.spec import Study
from tests.support.study_results import FakeStudy


@pytest.fixture(scope="module")
def study() -> Study:
    return Study.model_validate(
        {
            "study": "s",
            "models": {"nano": {"path": "nano"}},
            "datasets": {"slake": {"data": "phantom-a"}},
            "grids": {"methods": {"recipes": ["ln", "full"], "train": "slake", "budget": {"epochs": 1}}},
        }
    )


def make_tables(study: Study, seeds: int, margin: float | None = None) -> dict[str, Table]:
    """The tables of two recipes on one data set by the beginning of their captions after the grid."""
    made = FakeStudy(losses=2)
    for recipe in ("ln", "full"):
        for seed in range(seeds):
            made.add_cell("nano", recipe, "slake", {"slake": "in"}, grids=["methods"], seed=seed)
    for cell in made.tables["cells"]:
        cell |= {"trainable": 7770, "train_pairs_per_second": 90.0, "passes": 2 + cell["seed"]}
    names = ("scores", "costs", "tests")
    return dict(zip(names, all_tables(study, made.build_results(margin=margin)), strict=True))


def test_every_table_counts_images_and_seeds(study: Study) -> None:
    tables = make_tables(study, seeds=3)
    assert tables["scores"].caption.endswith("on slake, 96 images") and tables["scores"].rows[0][2] == "3"
    assert tables["costs"].head == ["recipe", "seeds", "trainable", "%", "peak MiB", "passes", "seconds", "pairs/s"]
    assert tables["costs"].rows[0][:3] == ["ln", "3", "7,770"] and tables["costs"].rows[0][5] == "3.0"
    assert tables["tests"].head[-2:] == ["images", "seeds"] and tables["tests"].rows[0][-2:] == ["96", "3"]


@pytest.mark.parametrize(("seeds", "question"), [(1, "trained models"), (3, "recipes")])
def test_a_test_says_what_it_compares(study: Study, seeds: int, question: str) -> None:
    tests = make_tables(study, seeds)["tests"]
    assert {row[2] for row in tests.rows} == {question} and "margin" not in tests.head


def test_a_margin_adds_the_tests_of_equivalence(study: Study) -> None:
    tests = make_tables(study, 3, margin=0.2)["tests"]
    columns = [tests.head.index(name) for name in ("margin", "equivalent", "no worse")]
    assert [tests.rows[0][column] for column in columns] == ["20.0", "yes", "yes"]


def test_markdown_and_latex_have_the_same_cells(study: Study) -> None:
    made = FakeStudy(losses=2)
    made.add_cell("nano", "ln", "slake", {"slake": "in"}, grids=["methods"])
    made.tables["cells"][0] |= {"trainable": 7770, "train_pairs_per_second": 90.0}
    tables = made.build_results()
    rows = next(iter(all_tables(study, tables))).rows
    for cell in rows[0]:
        assert cell in markdown(study, tables) and cell in latex(study, tables)
