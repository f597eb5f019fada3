"""The studies that ship are read and planned, without their data, to the counts of the paper's grids."""

from __future__ import annotations

from collections import Counter
from functools import cache
from pathlib import Path

import pytest

from normtune.methods.adapt import adapt
from normtune.studies.plan import Plan, Sizes, plan
from normtune.studies.spec import SEARCH, Study, read_study
from tests.support.architectures import shape

STUDIES = Path(__file__).parents[2] / "studies"


@cache
def shipped(name: str) -> tuple[Study, Plan]:
    study = read_study(STUDIES / f"{name}.yaml")
    first = plan(study)
    middle = {trial.id: next(iter(trial.cells[1].rates.values())) for trial in first.trials}
    return study, plan(study, middle)


def counted(found: Plan) -> Counter[str]:
    return Counter(grid for cell in found.cells for grid in cell.grids)


def test_every_study_that_ships_is_known_here() -> None:
    assert {path.stem for path in STUDIES.glob("*.yaml")} == {
        "quick",
        "real-nano",
        "paper-small",
        "paper-large",
    }


def test_quick_needs_no_data_and_few_pairs() -> None:
    study, found = shipped("quick")
    sizes = Sizes(study)
    assert found.waiting == 0 and len(found.cells) <= 40
    assert sum(sizes.training(cell) or 10**9 for cell in found.cells if cell.train) < 200_000
    assert counted(found)["methods"] == 1 + 8 * 2


def test_real_nano_has_three_seeds_transfer_five_shares_and_the_bases_own_task() -> None:
    _, found = shipped("real-nano")
    assert counted(found)["methods"] == 1 + 7 * 2 * 3
    assert counted(found)["curves"] == 1 + 2 * 5 * 3
    assert counted(found)["norms"] == 1 + 7 * 3
    for cell in found.cells:
        assert {one.config.split for one in cell.evaluations if one.role != "validate"} <= {"test"}
        roles = {(one.dataset, one.role) for one in cell.evaluations}
        if "methods" in cell.grids and cell.train is not None:
            other = {"slake": "vqa-rad", "vqa-rad": "slake"}[str(cell.trained_on)]
            assert {(cell.trained_on, "in"), (other, "out"), ("phantom-a", "home")} <= roles
        if cell.trained_on == "vqa-rad":
            assert cell.train is not None and cell.train.image_disjoint
    assert {cell.share for cell in found.cells if "curves" in cell.grids} == {0.01, 0.05, 0.1, 0.5, 1.0}


@pytest.mark.parametrize(
    ("recipe", "trainable"),
    [
        ("ln", 153_600),
        ("frozen-lora4-lora4", 589_824),
        ("frozen-frozen-prefix", 14_772_480),
    ],
)
def test_the_small_models_grid_trains_what_the_paper_counts(recipe: str, trainable: int) -> None:
    _, found = shipped("paper-small")
    cell = next(cell for cell in found.cells if cell.recipe == recipe and set(cell.grids) - {SEARCH})
    assert adapt(shape("miss_base"), cell.recipe_text).trainable == trainable


def test_the_small_models_grid_is_vit_x_encoder_x_decoder() -> None:
    study, found = shipped("paper-small")
    rows = Counter(name.rpartition("-")[2] for name in study.recipes_of(study.grids["parts"]))
    assert rows == {
        **dict.fromkeys(("ln", "attention", "ffn", "lora4", "lora8", "ia3"), 7),
        "prefix": 6,
        "ptuning": 6,
    }
    assert found.waiting == 0
    assert counted(found)["alone"] == 1 + 8 * 2 * 3 and counted(found)["parts"] == sum(rows.values()) * 2


@pytest.mark.parametrize(("recipe", "trainable"), [("ln", 368_640), ("ln-language", 266_240)])
def test_the_large_models_grid_trains_what_the_paper_counts(recipe: str, trainable: int) -> None:
    _, found = shipped("paper-large")
    cell = next(cell for cell in found.cells if cell.recipe == recipe and "methods" in cell.grids)
    assert adapt(shape("llava_med"), cell.recipe_text).trainable == trainable
    assert cell.train is not None and cell.train.dtype == "bfloat16"
