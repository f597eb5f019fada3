from __future__ import annotations

from pathlib import Path

from normtune.data.registry import open_configured
from normtune.studies.listing import PairCounts, format_listing, list_cells
from normtune.studies.spec import read_study
from tests.studies.test_plan import cells_by_recipe, make_plan


def test_pairs_are_counted_before_a_run(tmp_path: Path) -> None:
    planned = make_plan(tmp_path)
    counts = PairCounts(read_study(tmp_path / "study.yaml"))
    data = open_configured(counts.study.datasets["phantom-b"])
    home_data = open_configured(counts.study.datasets["phantom-a"])
    cells = cells_by_recipe(planned)
    assert counts.training_pairs(cells["ln"]) == len(data.split("train"))
    assert counts.training_pairs(cells["frozen"]) == 0
    assert counts.answered_pairs(cells["ln"]) == len(data.split("test")) + len(home_data.split("test"))


def test_the_listing_has_a_line_for_each_cell_and_the_sums(tmp_path: Path) -> None:
    planned = make_plan(tmp_path)
    listing = list_cells(planned, PairCounts(read_study(tmp_path / "study.yaml")), tmp_path / "out")
    lines = format_listing(listing).splitlines()
    assert [line.split()[0] for line in lines[:-1]] == [cell.key for cell in planned.cells]
    assert lines[-1].startswith(
        f"{len(planned.cells)} cells, {len(planned.cells)} to run: about {listing['pairs']:,} pairs"
    )
