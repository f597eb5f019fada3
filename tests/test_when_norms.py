"""The statistics of `benchmarks/when_norms.py`, and the conclusions of docs/when-norms.md."""

from __future__ import annotations

import importlib
import json
import re
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from normtune.metrics.statistics.comparisons import SeedScores, compare_recipes
from normtune.metrics.statistics.intervals import influence_of_mean
from tests.support.tolerance import approx

ROOT = Path(__file__).parent.parent
COUNTS = np.array([4.0, 6.0, 5.0, 7.0, 3.0, 8.0, 5.0, 4.0, 6.0, 9.0] * 6)


@pytest.fixture
def when_norms(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module("when_norms")


def scores(module: ModuleType, accuracy: float, seed: int, models: int = 3) -> object:
    """Simulated answers of one recipe."""
    right = np.random.default_rng(seed).binomial(COUNTS.astype(int), accuracy, (models, len(COUNTS))).astype(float)
    values = SeedScores(right.sum(axis=1) / COUNTS.sum(), influence_of_mean(right, COUNTS), models == 1)
    return module.Scores(values, COUNTS, ())


def test_the_contrast_of_two_recipes_is_their_comparison(when_norms: ModuleType) -> None:
    first, second = scores(when_norms, 0.5, 1), scores(when_norms, 0.6, 2)
    contrast = when_norms.contrast([(1, second), (-1, first)])
    expected = compare_recipes(first.seeds, second.seeds, COUNTS)
    for name in ("difference", "low", "high", "p", "error", "df"):
        assert contrast[name] == approx(getattr(expected, name)), name


def test_the_interval_of_a_share_has_the_shares_that_are_not_rejected(when_norms: ModuleType) -> None:
    frozen, part, whole = (scores(when_norms, *args) for args in ((0.2, 1, 1), (0.5, 2), (0.7, 3)))
    row = when_norms.reached_share(frozen, part, whole)
    values = [float(recipe.seeds.values.mean()) for recipe in (frozen, part, whole)]
    assert row["share"] == approx((values[1] - values[0]) / (values[2] - values[0]))
    assert row["gain"] == approx(values[2] - values[0])
    assert 0.2 < row["low"] < row["share"] < row["high"] < 1
    step = 0.005  # of the grid in which the ends are searched
    for end, outside in ((row["low"], row["low"] - step), (row["high"], row["high"] + step)):
        assert when_norms.contains_share(frozen, part, whole, end)
        assert not when_norms.contains_share(frozen, part, whole, outside)


def test_there_is_no_share_of_a_gain_that_is_not_significant(when_norms: ModuleType) -> None:
    frozen, part, whole = (scores(when_norms, *args) for args in ((0.5, 1, 1), (0.5, 2), (0.5, 3)))
    row = when_norms.reached_share(frozen, part, whole)
    assert (row["share"], row["low"], row["high"]) == (None, None, None)
    assert row["gain_low"] <= 0 <= row["gain_high"]


def test_a_few_simulations_cover_the_true_share(when_norms: ModuleType) -> None:
    for row in when_norms.coverage_rows(60):
        assert row["coverage"] > 0.8
        assert 0 <= row["significant"] <= 1


@pytest.fixture
def when_norms_page(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(ROOT / "scripts")
    return importlib.import_module("when_norms_page")


@pytest.mark.parametrize(
    ("tests", "expected"),
    [
        ([(0.02, 0.01), (0.03, 0.04)], "holds"),
        ([(0.02, 0.01), (0.03, 0.2)], "undecided"),
        ([(0.02, 0.01), (-0.03, 0.01)], "does not hold"),
        ([], "not measured"),
    ],
)
def test_a_claim_holds_only_if_each_of_its_tests_supports_it(
    when_norms_page: ModuleType, tests: list[tuple[float, float]], expected: str
) -> None:
    assert when_norms_page.verdict([{"difference": value, "p_holm": p} for value, p in tests]) == expected


def test_every_sentence_of_the_conclusions_has_a_number_with_its_interval(when_norms_page: ModuleType) -> None:
    page = when_norms_page.page(json.loads((ROOT / "benchmarks" / "when_norms.json").read_text(encoding="utf-8")))
    conclusions = page.partition("## What holds and what does not")[2].partition("Negative results")[0]
    lines = [line for line in conclusions.splitlines() if line.strip()]
    assert len(lines) >= 10
    for index, line in enumerate(lines):
        is_heading = index + 1 < len(lines) and lines[index + 1].startswith("    ") and not line.startswith("    ")
        assert is_heading or re.search(r"\d \[|% \[|points \[", line), line


def test_a_record_without_some_settings_says_so(when_norms_page: ModuleType) -> None:
    record = json.loads((ROOT / "benchmarks" / "when_norms.json").read_text(encoding="utf-8"))
    record["rows"] = [row for row in record["rows"] if row.get("model") != "pico" and row["experiment"] != "mixture"]
    page = when_norms_page.page(record)
    assert "settings are not finished" in page
    assert "On hospital B, which has both shifts" not in page
