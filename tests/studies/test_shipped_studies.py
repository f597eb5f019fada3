"""The shipped studies can be read and planned without their data, and their grids have the paper's sizes."""

from __future__ import annotations

from collections import Counter
from functools import cache
from pathlib import Path

import pytest

from normtune.methods.adapt import adapt
from normtune.studies.listing import PairCounts
from normtune.studies.plan import Plan, plan
from normtune.studies.spec import SEARCH, Study, read_study
from tests.support.architectures import build_on_meta

STUDIES = Path(__file__).parents[2] / "studies"


@cache
def read_shipped(name: str) -> tuple[Study, Plan]:
    """A shipped study and its plan, with the middle trial of each search as the chosen rate."""
    study = read_study(STUDIES / f"{name}.yaml")
    unsearched = plan(study)
    search_rates = {search.id: search.cells[1].rates for search in unsearched.searches}
    return study, plan(study, search_rates)


def cells_per_grid(planned: Plan) -> Counter[str]:
    """The number of cells of each grid."""
    return Counter(grid for cell in planned.cells for grid in cell.grids)


def test_every_shipped_study_is_tested_here() -> None:
    assert {path.stem for path in STUDIES.glob("*.yaml")} == {
        "quick",
        "real-nano",
        "tiny-budget",
        "paper-small",
        "paper-large",
        "when-norms",
    }


def test_quick_needs_no_data_and_few_pairs() -> None:
    study, planned = read_shipped("quick")
    counts = PairCounts(study)
    assert planned.waiting == 0 and len(planned.cells) <= 40
    assert sum(counts.training_pairs(cell) or 10**9 for cell in planned.cells if cell.train) < 200_000
    assert cells_per_grid(planned)["methods"] == 1 + 8 * 2


def test_real_nano_has_five_seeds_transfer_and_home_and_trains_until_a_plateau() -> None:
    study, planned = read_shipped("real-nano")
    cells = cells_per_grid(planned)
    assert (
        cells["slake"] == cells["vqa-rad"] == cells["phantom-b"] == 1 + 3 * 5
    )  # the base once, five seeds of each recipe
    assert {study.grids[name].budget.until for name in ("slake", "vqa-rad", "phantom-b")} == {"plateau"}
    for cell in planned.cells:
        assert {evaluation.config.split for evaluation in cell.evaluations if evaluation.role != "validate"} <= {"test"}
        roles = {(evaluation.dataset, evaluation.role) for evaluation in cell.evaluations}
        if {"slake", "vqa-rad"} & {*cell.grids} and cell.train is not None:
            other = {"slake": "vqa-rad", "vqa-rad": "slake"}[str(cell.trained_on)]
            assert {(cell.trained_on, "in"), (other, "out"), ("phantom-a", "home")} <= roles
        if cell.trained_on == "vqa-rad":
            assert cell.train is not None and cell.train.image_disjoint


def test_when_norms_compares_ln_and_full_at_each_strength_shift_and_number_of_images() -> None:
    study, planned = read_shipped("when-norms")
    shifts, seeds = 3, 3
    cells = cells_per_grid(planned)
    # each base once; ln and full on each shift with each seed
    assert cells["strength"] == 4 + 4 * 2 * shifts * seeds
    assert cells["size"] == 1 + 2 * shifts * seeds
    assert cells["images-20"] == cells["images-320"] == 1 + 2 * shifts * seeds
    assert cells["recipes"] == 1 + 6 * shifts * seeds
    assert {cell.share * 320 for cell in planned.cells if cell.train is not None and set(cell.grids) != {SEARCH}} == {
        20.0,
        80.0,
        320.0,
    }
    for cell in planned.cells:
        if "recipes" in cell.grids and cell.train is not None:
            roles = {(evaluation.dataset, evaluation.role) for evaluation in cell.evaluations}
            others = {(name, "in" if name == cell.trained_on else "out") for name in study.grids["recipes"].train}
            assert roles == others | {("phantom-a", "home")}


@pytest.mark.parametrize(
    ("recipe", "trainable"), [("ln", 153_600), ("frozen-lora4-lora4", 589_824), ("frozen-frozen-prefix", 14_772_480)]
)
def test_paper_small_trains_as_many_parameters_as_the_paper(recipe: str, trainable: int) -> None:
    _, planned = read_shipped("paper-small")
    cell = next(cell for cell in planned.cells if cell.recipe == recipe and set(cell.grids) - {SEARCH})
    assert adapt(build_on_meta("miss_base"), cell.recipe_text).trainable == trainable


def test_paper_small_is_vit_x_encoder_x_decoder() -> None:
    study, planned = read_shipped("paper-small")
    rows = Counter(name.rpartition("-")[2] for name in study.recipes_of(study.grids["parts"]))
    assert rows == {**dict.fromkeys(("ln", "attention", "ffn", "lora4", "lora8", "ia3"), 7), "prefix": 6, "ptuning": 6}
    assert planned.waiting == 0
    assert (
        cells_per_grid(planned)["alone"] == 1 + 8 * 2 * 3 and cells_per_grid(planned)["parts"] == sum(rows.values()) * 2
    )


# of the paper's 368,640 values, 6,144 belong to image encoder layers that LLaVA never uses: they are left out
@pytest.mark.parametrize(("recipe", "trainable"), [("ln", 368_640 - 6_144), ("ln-language", 266_240)])
def test_paper_large_trains_as_many_parameters_as_the_paper(recipe: str, trainable: int) -> None:
    _, planned = read_shipped("paper-large")
    cell = next(cell for cell in planned.cells if cell.recipe == recipe and "methods" in cell.grids)
    assert adapt(build_on_meta("llava_med"), cell.recipe_text).trainable == trainable
    assert cell.train is not None and cell.train.dtype == "bfloat16"
