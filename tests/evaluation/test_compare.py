from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from normtune.errors import InputError
from normtune.evaluation.compare import compare, compare_runs, comparison_markdown, comparison_text
from normtune.metrics.statistics import holm
from tests.support.evaluation_runs import QUESTIONS, answered, question, reported


def test_compare_pairs_rows_by_id(tmp_path: Path) -> None:
    first = answered(tmp_path / "a", {0, 1, 8})
    second = answered(tmp_path / "b", {0, 1, 2, 3, 4, 5, 8, 9})
    found = compare(first, second)
    opened = found["open_exact"]
    assert (opened.first, opened.second, opened.difference) == (2 / 8, 6 / 8, 0.5)
    assert (opened.rows, opened.images, opened.p) == (8, 4, 0.5)  # two images differ: 2 of 4 patterns
    assert opened.p_holm == 1.0 and opened.low <= 0.5 <= opened.high
    assert found["closed_label"].difference == 0.25
    back = compare(second, first)["open_exact"]
    assert (back.difference, back.p) == (-0.5, opened.p)


def test_reports_are_compared_by_report_metrics(tmp_path: Path) -> None:
    found = compare(
        reported(tmp_path / "a", {0: "x", 1: "y", 2: "No effusion."}), reported(tmp_path / "b", {3: "z"})
    )
    bleu = found["bleu_1/none"]
    assert bleu.second > bleu.first > 0 and bleu.difference == pytest.approx(bleu.second - bleu.first)
    assert bleu.rows == bleu.images == 4 and bleu.low <= bleu.difference <= bleu.high
    rouge = found["rouge_l/none"]
    assert (rouge.second, rouge.p) == (0.75, 10 / 16)  # of +1, +1, +d, -1 ten of 16 swaps reach 1 + d
    assert "global_exact" not in found


def test_several_runs_are_corrected_for_all_their_comparisons(tmp_path: Path) -> None:
    many = [question(n) for n in range(60)]
    runs = [answered(tmp_path / name, set(range(n)), many) for name, n in (("a", 4), ("b", 30), ("c", 56))]
    found = compare_runs(runs)
    assert list(found.differences) == ["b", "c"] and found.baseline.name == "a"
    every = {(run, name): one for run, table in found.differences.items() for name, one in table.items()}
    assert found.comparisons == len(every) == 2 * len(compare(runs[0], runs[1]))
    assert {key: one.p_holm for key, one in every.items()} == holm({key: one.p for key, one in every.items()})
    alone = compare(runs[0], runs[2])["global_exact"]
    assert every["c", "global_exact"].p == alone.p and every["c", "global_exact"].p_holm > alone.p_holm


def test_the_tables_hold_every_difference(tmp_path: Path) -> None:
    runs = [answered(tmp_path / "a|1", {0}), answered(tmp_path / "b", {0, 2}), answered(tmp_path / "c", {1})]
    found = compare_runs(runs).to_json()
    json.dumps(found)
    text, markdown = comparison_text(found), comparison_markdown(found)
    assert "baseline: a|1" in text and "corrected for all" in text
    for run, metrics in found["differences"].items():
        for name in metrics:
            assert any(line.split()[:2] == [run, name] for line in text.splitlines())
            assert f"| {run} | {name} | " in markdown
    rows = [line for line in markdown.splitlines() if line.startswith("|")]
    assert len({row.count("|") for row in rows}) == 1 and "a\\|1" in markdown


def test_runs_are_named_by_the_shortest_end_that_tells_them_apart(tmp_path: Path) -> None:
    runs = [answered(tmp_path / path, {0}) for path in ("x/ln/scores", "x/full/scores", "y/other")]
    found = compare_runs(runs)
    assert [found.baseline.name, *found.differences] == ["ln/scores", "full/scores", "other"]


def test_other_rows_are_refused_with_how_many_and_where(tmp_path: Path) -> None:
    first = answered(tmp_path / "a", {0})
    second = answered(tmp_path / "b", {0}, [*QUESTIONS[2:], question(40)])
    with pytest.raises(InputError) as error:
        compare(first, second)
    assert f"2 stand in {first} alone, first 'q0'; 1 stand in {second} alone, first 'q40'" in str(error.value)


@pytest.mark.parametrize(
    ("field", "value", "told"),
    [
        ("answer", "heart", "1 references, first that of 'q0'"),
        ("question", "where?", "1 questions, first that of 'q0'"),
        ("images", ("7",), "1 images, first that of 'q0'"),
        ("kind", "closed", "1 kinds of question, first that of 'q0'"),
    ],
)
def test_rows_that_changed_under_their_ids_are_refused(
    tmp_path: Path, field: str, value: Any, told: str
) -> None:
    first = answered(tmp_path / "a", {1})
    second = answered(tmp_path / "b", {1}, [replace(QUESTIONS[0], **{field: value}), *QUESTIONS[1:]])
    with pytest.raises(InputError, match=told):
        compare(first, second)


def test_other_normalisations_are_refused(tmp_path: Path) -> None:
    first = answered(tmp_path / "a", {0})
    second = answered(tmp_path / "b", {0}, normalisation="none")
    with pytest.raises(InputError, match="different normalisations: vqa and none"):
        compare(first, second)


def test_a_manifest_of_other_rows_is_refused(tmp_path: Path) -> None:
    first, second = answered(tmp_path / "a", {0}), answered(tmp_path / "b", {0})
    other = answered(tmp_path / "c", {0}, QUESTIONS[1:])
    shutil.copy(other / "manifest.json", second / "manifest.json")
    with pytest.raises(InputError, match=r"b/manifest\.json is not of the predictions beside it"):
        compare(first, second)
    manifest = json.loads((first / "manifest.json").read_text())
    (second / "manifest.json").write_text(json.dumps(manifest | {"ids": manifest["ids"][1:]}))
    with pytest.raises(InputError, match="its ids do not have its hash"):
        compare(first, second)


def test_one_run_or_one_twice_is_refused(tmp_path: Path) -> None:
    run = answered(tmp_path / "a", {0})
    with pytest.raises(InputError, match="Name two result folders"):
        compare_runs([run])
    with pytest.raises(InputError, match="named twice"):
        compare_runs([run, tmp_path / "." / "a"])
