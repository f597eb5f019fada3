from __future__ import annotations

from pathlib import Path

from normtune.runtime.files import write_json
from normtune.studies.page.results import Results, Setting
from normtune.studies.page.strata import strata_tables
from tests.support.study_results import FakeStudy


def test_a_row_holds_the_counts_and_the_means_of_a_value(tmp_path: Path) -> None:
    made = FakeStudy(losses=2)
    for seed in (0, 1):
        made.add_cell("nano", "ln", "slake", {"slake": "in"}, grids=["methods"], seed=seed)
    for row, value in zip(made.tables["evaluations"], (0.4, 0.6), strict=True):
        metric = {"value": value, "low": value - 0.1, "high": value + 0.1}
        one_image = {"value": value, "low": None, "high": None}  # of one image
        strata = {
            "kind": {"open": {"rows": 9, "images": 3, "metrics": {"global_exact": metric}}},
            "modality": {
                "ct": {"rows": 1200, "images": 5, "metrics": {"global_exact": metric}},
                "mri": {"rows": 2, "images": 1, "metrics": {"global_exact": one_image}},
            },
        }
        write_json(tmp_path / row["folder"] / "metrics.json", {"strata": strata})
    setting = Setting("methods", "nano", "slake")
    (table,) = strata_tables(Results(made.build_results()), setting, tmp_path)
    assert [cell.text for cell in table.header] == ["modality", "questions", "images", "ln"]
    assert [[cell.text for cell in row] for row in table.rows] == [
        ["ct", "1,200", "5", "50.0"],
        ["mri", "2", "1", "50.0"],
    ]
    assert [row[-1].ends for row in table.rows] == ["40.0 to 60.0", ""] and "2 seeds" in table.caption
    assert list(strata_tables(Results(made.build_results()), setting, tmp_path / "elsewhere")) == []
