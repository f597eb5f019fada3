from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from normtune.data.records import Example, Kind
from normtune.data.registry import open_dataset
from normtune.metrics.answers import score_vqa
from normtune.metrics.reports import report_table, summarise_reports, text_pairs
from normtune.metrics.statistics.intervals import mean_interval
from normtune.metrics.strata import NOT_GIVEN, STRATUM_FIELDS, group_by_stratum, score_strata, strata_of, strata_text
from normtune.metrics.table import HEADLINE_METRICS, metric_table, summarize_metrics
from tests.support.dataset_samples import slake_row, vqa_rad_row, write_image, write_jsonl, write_slake, write_vqa_rad


def example(id: str, image: str, answer: str, kind: Kind = "open", **meta: str) -> Example:
    return Example(id, (image,), "?", answer, kind, "test", meta)


ROWS = [
    example("a", "1", "lung", organ="Lung", question_type="PRES, ABN", language="en"),
    example("b", "1", "heart", organ="Heart", question_type="ABN", language="en"),
    example("c", "2", "yes", "closed", organ="Lung", question_type="PRES", language="en"),
    example("d", "3", "no", "closed", question_type="", language="en"),
]
PREDICTIONS = {"a": "lung", "b": "liver", "c": "yes", "d": "yes"}
TABLE = metric_table(ROWS, PREDICTIONS, "vqa")


def test_each_stratum_is_scored_on_its_rows() -> None:
    strata = score_strata(ROWS, TABLE)
    assert {field: {v: stratum["rows"] for v, stratum in values.items()} for field, values in strata.items()} == {
        "kind": {"closed": 2, "open": 2},
        "question_type": {"ABN": 2, "PRES": 2, NOT_GIVEN: 1},
        "organ": {"Lung": 2, "Heart": 1, NOT_GIVEN: 1},
    }
    lung = strata["organ"]["Lung"]
    assert (lung["rows"], lung["images"]) == (2, 2)
    assert lung["metrics"]["global_exact"] | {"rows": 2, "images": 2} == {
        "value": 1.0,
        "low": mean_interval(np.ones(2), np.ones(2), np.ones(2)).low,
        "high": 1.0,
        "rows": 2,
        "images": 2,
    }
    assert (lung["metrics"]["closed_label"]["rows"], lung["metrics"]["open_exact"]["rows"]) == (1, 1)
    assert "closed_label" not in strata["organ"]["Heart"]["metrics"]
    assert strata["question_type"]["PRES"]["metrics"]["global_exact"]["value"] == 1.0
    assert strata["question_type"]["ABN"]["metrics"]["global_exact"]["value"] == 0.5
    assert json.loads(json.dumps(strata)) == strata


def test_a_stratum_of_one_image_has_no_interval() -> None:
    strata = score_strata(ROWS, TABLE)
    opened = strata["kind"]["open"]["metrics"]["global_exact"]  # a and b, both of image 1
    assert (opened["value"], opened["low"], opened["high"], opened["images"]) == (0.5, None, None, 1)
    closed = strata["kind"]["closed"]["metrics"]["global_exact"]
    assert 0 < closed["low"] < 0.5 < closed["high"] < 1


@given(st.lists(st.tuples(st.sampled_from("pqr"), st.sampled_from(["", "x", "y", "x, y"])), max_size=12))
def test_fields_with_one_value_are_omitted_and_the_largest_value_comes_first(named: list[tuple[str, str]]) -> None:
    rows = [example(str(n), "1", "a", organ=organ, type=kind) for n, (organ, kind) in enumerate(named)]
    groups = group_by_stratum(rows)
    assert set(groups) <= {"organ", "question_type"}
    assert ("organ" in groups) == (len({organ for organ, _ in named}) > 1)
    sizes = [len(rows_of_value) for rows_of_value in groups.get("organ", {}).values()]
    assert sum(sizes) in (0, len(rows)) and sizes == sorted(sizes, reverse=True)
    for row in rows:
        types = [value for value, rows_of_value in groups.get("question_type", {}).items() if row in rows_of_value]
        assert not types or types == [NOT_GIVEN] or len(types) == len(row.meta["type"].split(","))


def test_a_stratum_of_reports_scores_like_a_separate_evaluation() -> None:
    texts = ["The heart is enlarged.", "No effusion is seen.", "Clear lungs.", "Small left effusion."]
    rows = [
        Example(str(n), (str(n),), "", text, "report", "test", {"modality": "CT" if n < 2 else "MR"})
        for n, text in enumerate(texts)
    ]
    predictions = {"0": "The heart is small.", "1": "No effusion.", "2": "Clear.", "3": "No effusion."}
    strata = score_strata(rows, metric_table(rows, predictions, ["none", "r2gen-iu"]))
    pairs = text_pairs(rows[:2], {id: predictions[id] for id in "01"})
    separate = summarise_reports(report_table(pairs, normalisations=["none"]), rows[:2])
    assert set(strata) == {"modality"}
    for name in ("bleu_4/none", "rouge_l/none", "findings_rules_f1_micro_14"):
        stratum_metric, metric = strata["modality"]["CT"]["metrics"][name], separate[name]
        assert (stratum_metric["value"], stratum_metric["low"], stratum_metric["high"]) == pytest.approx(
            (metric.value, metric.low, metric.high)
        )
    assert set(strata["modality"]["CT"]["metrics"]) <= set(HEADLINE_METRICS)


def test_the_metric_table_summarises_to_the_metrics_of_the_task() -> None:
    assert summarize_metrics(TABLE, ROWS) == score_vqa(ROWS, PREDICTIONS)
    reports = [Example(str(n), (str(n),), "", f"No effusion {n}.", "report", "test") for n in range(3)]
    predictions = {"0": "No effusion.", "1": "Effusion 1.", "2": "x"}
    table = metric_table(reports, predictions, ["none", "r2gen-iu"])
    assert summarize_metrics(table, reports) == summarise_reports(table, reports)


def test_datasets_provide_strata(tmp_path: Path) -> None:
    for name in ("slake", "vqa-rad", "medpix"):
        (tmp_path / name).mkdir()
    rows = [slake_row(1, 1), slake_row(2, 2)]
    write_slake(tmp_path / "slake", train=rows, validate=rows, test=rows)
    write_vqa_rad(tmp_path / "vqa-rad", [vqa_rad_row(1, "a.jpg", question_type="PRES,ABN")])
    write_image(tmp_path / "medpix" / "images" / "a.png")
    row = {"id": "a", "image": "images/a.png", "report": "Clear.", "type": "CT", "plane": "Axial"}
    write_jsonl(tmp_path / "medpix" / "train.jsonl", row | {"location": "Head", "modality": "CT head"})
    named = {
        name: strata_of(open_dataset(name, tmp_path / name).examples[0]) for name in ("slake", "vqa-rad", "medpix")
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
    assert all(set(values) <= set(STRATUM_FIELDS) for values in named.values())


def test_the_text_lists_the_largest_strata_and_counts_the_others() -> None:
    rows = [example(f"{n}", f"{n}", "a", organ=f"organ {n:02d}") for n in range(11)]
    text = strata_text(score_strata(rows, metric_table(rows, {row.id: "a" for row in rows}, "vqa")))
    lines = text.splitlines()
    assert lines[0].split() == ["by", "organ", "rows", "images", "global_exact"]
    assert lines[1].split() == ["organ", "00", "1", "1", "100.0"]
    assert len(lines) == 10 and lines[-1] == "  and 3 more, in metrics.json"
    starts = {line.rstrip().rfind(" 1 ") for line in lines[1:9]}
    assert len(starts) == 1, "columns are aligned"
    assert strata_text({}) == ""
    assert "50.0\n" in strata_text(score_strata(ROWS, TABLE)) and "[0.2, 99.8]" in strata_text(
        score_strata(ROWS, TABLE)
    )
