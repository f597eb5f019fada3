from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from normtune.data.records import Example, Kind
from normtune.data.registry import open_dataset
from normtune.metrics.answers import score_vqa
from normtune.metrics.reports import score_report
from normtune.metrics.strata import FIELDS, NOT_GIVEN, members, strata, strata_of, strata_text
from normtune.metrics.table import HEADLINES, metric_table, summarize_metrics
from tests.support.dataset_samples import (
    slake_row,
    vqa_rad_row,
    write_image,
    write_jsonl,
    write_slake,
    write_vqa_rad,
)


def example(id: str, image: str, answer: str, kind: Kind = "open", **meta: str) -> Example:
    return Example(id, (image,), "?", answer, kind, "test", meta)


ROWS = [
    example("a", "1", "lung", organ="Lung", question_type="PRES, ABN", language="en"),
    example("b", "1", "heart", organ="Heart", question_type="ABN", language="en"),
    example("c", "2", "yes", "closed", organ="Lung", question_type="PRES", language="en"),
    example("d", "3", "no", "closed", question_type="", language="en"),
]
SAID = {"a": "lung", "b": "liver", "c": "yes", "d": "yes"}
TABLE = metric_table(ROWS, SAID, "vqa")


def test_each_stratum_is_scored_by_its_own_rows() -> None:
    found = strata(ROWS, TABLE)
    assert {field: {v: one["rows"] for v, one in parts.items()} for field, parts in found.items()} == {
        "kind": {"closed": 2, "open": 2},
        "question_type": {"ABN": 2, "PRES": 2, NOT_GIVEN: 1},
        "organ": {"Lung": 2, "Heart": 1, NOT_GIVEN: 1},
    }
    lung = found["organ"]["Lung"]
    assert (lung["rows"], lung["images"]) == (2, 2)
    assert lung["metrics"]["global_exact"] | {"rows": 2, "images": 2} == {
        "value": 1.0,
        "low": 1.0,
        "high": 1.0,
        "rows": 2,
        "images": 2,
    }
    assert (lung["metrics"]["closed_label"]["rows"], lung["metrics"]["open_exact"]["rows"]) == (1, 1)
    assert "closed_label" not in found["organ"]["Heart"]["metrics"]
    assert found["question_type"]["PRES"]["metrics"]["global_exact"]["value"] == 1.0
    assert found["question_type"]["ABN"]["metrics"]["global_exact"]["value"] == 0.5
    assert json.loads(json.dumps(found)) == found


def test_of_one_image_no_interval_is_told() -> None:
    found = strata(ROWS, TABLE)
    opened = found["kind"]["open"]["metrics"]["global_exact"]  # a and b, both of image 1
    assert (opened["value"], opened["low"], opened["high"], opened["images"]) == (0.5, None, None, 1)
    closed = found["kind"]["closed"]["metrics"]["global_exact"]
    assert (closed["low"], closed["high"]) == (0.0, 1.0)


@given(st.lists(st.tuples(st.sampled_from("pqr"), st.sampled_from(["", "x", "y", "x, y"])), max_size=12))
def test_fields_of_one_value_organ_part_the_rows_and_the_largest_comes_first(
    named: list[tuple[str, str]],
) -> None:
    rows = [example(str(n), "1", "a", organ=organ, type=kind) for n, (organ, kind) in enumerate(named)]
    found = members(rows)
    assert set(found) <= {"organ", "question_type"}
    assert ("organ" in found) == (len({organ for organ, _ in named}) > 1)
    sizes = [len(part) for part in found.get("organ", {}).values()]
    assert sum(sizes) in (0, len(rows)) and sizes == sorted(sizes, reverse=True)
    for row in rows:
        types = [value for value, part in found.get("question_type", {}).items() if row in part]
        assert not types or types == [NOT_GIVEN] or len(types) == len(row.meta["type"].split(","))


def test_a_stratum_of_reports_scores_as_its_rows_do_alone() -> None:
    texts = ["The heart is enlarged.", "No effusion is seen.", "Clear lungs.", "Small left effusion."]
    rows = [
        Example(str(n), (str(n),), "", text, "report", "test", {"modality": "CT" if n < 2 else "MR"})
        for n, text in enumerate(texts)
    ]
    said = {"0": "The heart is small.", "1": "No effusion.", "2": "Clear.", "3": "No effusion."}
    found = strata(rows, metric_table(rows, said, ["none", "r2gen-iu"]))
    alone = score_report(rows[:2], {id: said[id] for id in "01"}, normalisations=["none"])
    assert set(found) == {"modality"}
    for name in ("bleu_4/none", "rouge_l/none", "findings_rules_f1_micro_14"):
        one, other = found["modality"]["CT"]["metrics"][name], alone[name]
        assert (one["value"], one["low"], one["high"]) == pytest.approx((other.value, other.low, other.high))
    assert set(found["modality"]["CT"]["metrics"]) <= set(HEADLINES)


def test_the_table_of_rows_summarises_to_the_tasks_own_metrics() -> None:
    assert summarize_metrics(TABLE, ROWS) == score_vqa(ROWS, SAID)
    reports = [Example(str(n), (str(n),), "", f"No effusion {n}.", "report", "test") for n in range(3)]
    said = {"0": "No effusion.", "1": "Effusion 1.", "2": "x"}
    table = metric_table(reports, said, ["none", "r2gen-iu"])
    assert summarize_metrics(table, reports) == score_report(reports, said)


def test_the_readers_name_strata(tmp_path: Path) -> None:
    for name in ("slake", "vqa-rad", "medpix"):
        (tmp_path / name).mkdir()
    rows = [slake_row(1, 1), slake_row(2, 2)]
    write_slake(tmp_path / "slake", train=rows, validate=rows, test=rows)
    write_vqa_rad(tmp_path / "vqa-rad", [vqa_rad_row(1, "a.jpg", question_type="PRES,ABN")])
    write_image(tmp_path / "medpix" / "images" / "a.png")
    row = {"id": "a", "image": "images/a.png", "report": "Clear.", "type": "CT", "plane": "Axial"}
    write_jsonl(tmp_path / "medpix" / "train.jsonl", row | {"location": "Head", "modality": "CT head"})
    named = {
        name: strata_of(open_dataset(name, tmp_path / name).examples[0])
        for name in ("slake", "vqa-rad", "medpix")
    }
    assert named["slake"] == {
        "question_type": rows[0]["content_type"],
        "organ": rows[0]["location"],
        "modality": rows[0]["modality"],
        "language": "en",
    }
    assert named["vqa-rad"]["question_type"] == "PRES, ABN" and named["vqa-rad"]["organ"]
    assert named["medpix"] == {"organ": "Head", "modality": "CT", "plane": "Axial", "language": "en"}
    phantom = open_dataset("phantom-a:4").examples[0]
    assert strata_of(phantom) == {
        "question_type": phantom.meta["type"],
        "organ": phantom.meta["organ"],
        "modality": phantom.meta["modality"],
    }
    assert all(set(values) <= set(FIELDS) for values in named.values())


def test_the_text_shows_the_largest_strata_and_counts_the_rest() -> None:
    rows = [example(f"{n}", f"{n}", "a", organ=f"organ {n:02d}") for n in range(11)]
    text = strata_text(strata(rows, metric_table(rows, {row.id: "a" for row in rows}, "vqa")))
    lines = text.splitlines()
    assert lines[0].split() == ["by", "organ", "rows", "images", "global_exact"]
    assert lines[1].split() == ["organ", "00", "1", "1", "100.0"]
    assert len(lines) == 10 and lines[-1] == "  and 3 more, in metrics.json"
    starts = {line.rstrip().rfind(" 1 ") for line in lines[1:9]}
    assert len(starts) == 1, "columns are aligned"
    assert strata_text({}) == ""
    assert "50.0\n" in strata_text(strata(ROWS, TABLE)) and "[0.0, 100.0]" in strata_text(strata(ROWS, TABLE))
