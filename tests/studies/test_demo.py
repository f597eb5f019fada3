"""The demo's two tables, made from rows that were written for the test."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from normtune.studies import demo
from normtune.studies.demo import QUESTIONS, REPORTS, table_markdown


def make_row(name: str, metrics: dict[str, float], training: dict[str, Any] | None = None) -> dict[str, Any]:
    """A row of `run_cells` with the given metrics."""
    values = {key: {"value": value, "low": value / 2, "high": value * 2} for key, value in metrics.items()}
    return {"name": name, "training": training, "evaluation": {"metrics": values}}


TRAINED = {"trainable": 7936, "share": 0.00291, "seconds": 12.4, "peak_memory_bytes": 2**29, "passes": 4.0}
TRAINED["peak_above_base_bytes"] = 2**26


def test_scores_of_questions_are_in_percent() -> None:
    table = table_markdown([make_row("ln", {"closed_label": 0.4, "open_exact": 0.2, "global_exact": 0.3}, TRAINED)])
    assert table.splitlines()[-1] == (
        "| ln | 7,936 | 0.291 | 4 | 12 | 512 | 64 | 40.0 [20.0, 80.0] | 20.0 [10.0, 40.0] | 30.0 [15.0, 60.0] |"
    )


def test_reports_show_the_available_meteor_and_cider_from_0_to_10() -> None:
    metrics = {"bleu_1/none": 0.4, "bleu_4/none": 0.1, "rouge_l/none": 0.3, "cider_d/none": 1.5}
    metrics |= {"meteor_exact_stem/none": 0.2, "findings_rules_f1_micro_14": 0.5}
    lines = table_markdown([make_row("report-frozen", metrics)], REPORTS).splitlines()
    assert lines[0].endswith("| BLEU-1 | BLEU-4 | ROUGE-L | METEOR (nltk) | CIDEr-D | findings F1 |")
    assert lines[2].startswith("| frozen | 0 | 0 | 0 | 0 | – | – | 40.0 [20.0, 80.0] | 10.0 [5.0, 20.0] |")
    assert lines[2].endswith("| 20.0 [10.0, 40.0] | 1.50 [0.75, 3.00] | 50.0 [25.0, 100.0] |")


def test_reports_are_trained_until_a_plateau_and_questions_for_fixed_passes() -> None:
    cells = [demo._make_cell(task, "ln", 10, 0).train for task in (REPORTS, QUESTIONS)]
    assert all(cells)
    assert [(cell.validate_every, cell.patience) for cell in cells if cell] == [("6", 3), (None, None)]


def test_cell_names_are_unique_over_both_tasks() -> None:
    names = [task.cell_name(recipe) for task in (QUESTIONS, REPORTS) for recipe in task.recipes]
    assert len(set(names)) == len(names)


def test_links_of_an_earlier_run_are_replaced(tmp_path: Path) -> None:
    for name in ("first", "second"):
        (tmp_path / "cells" / name).mkdir(parents=True)
    link = tmp_path / "adapters" / "ln"
    (link / "old").mkdir(parents=True)  # version 0.1 wrote a folder here
    for name in ("first", "second"):
        demo._link(link, str(tmp_path / "cells" / name))
        assert link.resolve() == (tmp_path / "cells" / name).resolve() and not link.readlink().is_absolute()
