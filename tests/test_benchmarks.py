"""What the docs and the defaults take from benchmarks is what the committed files hold."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from normtune.config import LEARNING_RATES
from normtune.recipe import METHODS

ROOT = Path(__file__).parent.parent
BENCHMARKS = ROOT / "benchmarks"
SCRIPTS = [
    path for path in sorted(BENCHMARKS.glob("*.py")) if "ArgumentParser" in path.read_text(encoding="utf-8")
]


def found(name: str) -> dict[str, Any]:
    held: dict[str, Any] = json.loads((BENCHMARKS / name).read_text(encoding="utf-8"))
    assert held["versions"]["torch"] and held["machine"]["cores"], (
        f"{name} says what it was measured with and on"
    )
    return held


def readme() -> str:
    return (ROOT / "README.md").read_text(encoding="utf-8")


def test_default_learning_rates_are_the_best_of_the_sweep() -> None:
    sweep = found("learning_rates.json")
    assert sweep["best"] == LEARNING_RATES
    for method, rate in sweep["best"].items():
        own = [row for row in sweep["rows"] if row["method"] == method]
        assert max(row["accuracy"] for row in own) == next(
            row["accuracy"] for row in own if row["lr"] == rate
        )


def test_every_method_has_a_learning_rate() -> None:
    assert set(LEARNING_RATES) == set(METHODS) - {"frozen"}


@pytest.mark.parametrize(
    "table", ["demo/table.md", "real_data.md", "throughput_llava_slake.md", "throughput_miss_slake.md"]
)
def test_the_readme_shows_the_committed_tables(table: str) -> None:
    assert (BENCHMARKS / table).read_text(encoding="utf-8") in readme()


def test_the_readme_tells_the_committed_figures_of_bf16() -> None:
    rows = {(row["method"], row["lr"]): row for row in found("bf16_norms.json")["rows"]}
    for method in ("normtune ln", "peft LN_TUNING"):
        row = rows[method, 1e-4]
        assert f"{row['moved']:,} of {row['values']:,}" in readme()


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_every_benchmark_starts(script: Path) -> None:
    done = subprocess.run([sys.executable, str(script), "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and "--out" in done.stdout, done.stderr
