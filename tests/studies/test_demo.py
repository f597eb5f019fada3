"""The demo's two tables, of rows that were not trained for it."""

from __future__ import annotations

from typing import Any

from normtune.studies.demo import QUESTIONS, REPORTS, table_markdown


def row(name: str, metrics: dict[str, float], training: dict[str, Any] | None = None) -> dict[str, Any]:
    found = {key: {"value": value, "low": value / 2, "high": value * 2} for key, value in metrics.items()}
    return {"name": name, "training": training, "evaluation": {"metrics": found}}


TRAINED = {"trainable": 7936, "share": 0.00291, "seconds": 12.4, "peak_memory_bytes": 2**29}


def test_questions_are_shown_in_per_cent() -> None:
    table = table_markdown(
        [row("ln", {"closed_label": 0.4, "open_exact": 0.2, "global_exact": 0.3}, TRAINED)]
    )
    assert table.splitlines()[-1] == (
        "| ln | 7,936 | 0.291 | 12 | 512 | 40.0 [20.0, 80.0] | 20.0 [10.0, 40.0] | 30.0 [15.0, 60.0] |"
    )


def test_reports_are_shown_by_whichever_meteor_there_is_and_cider_from_0_to_10() -> None:
    metrics = {"bleu_1/none": 0.4, "bleu_4/none": 0.1, "rouge_l/none": 0.3, "cider_d/none": 1.5}
    metrics |= {"meteor_exact_stem/none": 0.2, "findings_rules_f1_micro_14": 0.5}
    told = table_markdown([row("report-frozen", metrics)], REPORTS).splitlines()
    assert told[0].endswith("| BLEU-1 | BLEU-4 | ROUGE-L | METEOR | CIDEr-D | findings F1 |")
    assert told[2].startswith("| frozen | 0 | 0 | 0 | – | 40.0 [20.0, 80.0] | 10.0 [5.0, 20.0] |")
    assert told[2].endswith("| 20.0 [10.0, 40.0] | 1.50 [0.75, 3.00] | 50.0 [25.0, 100.0] |")


def test_cells_of_questions_and_of_reports_have_names_of_their_own() -> None:
    names = [job.cell_name(recipe) for job in (QUESTIONS, REPORTS) for recipe in job.recipes]
    assert len(set(names)) == len(names)
