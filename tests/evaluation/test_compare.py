from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from normtune.data.records import Prediction, Split
from normtune.errors import InputError
from normtune.evaluation.compare import MetricDifference, compare, parse_groups
from normtune.evaluation.results import Evaluation, Predictions, make_record
from normtune.metrics.answers import score_vqa
from normtune.metrics.statistics.comparisons import holm_correction
from tests.support.evaluation_runs import QUESTIONS, make_question, write_report_run, write_vqa_run
from tests.support.fake_family import fake_dataset


def differences_of(first: Path, second: Path) -> dict[str, MetricDifference]:
    (differences,) = compare([first, second]).differences.values()
    return differences


def test_compare_pairs_rows_by_id(tmp_path: Path) -> None:
    first = write_vqa_run(tmp_path / "a", {0, 1, 8})
    second = write_vqa_run(tmp_path / "b", {0, 1, 2, 3, 4, 5, 8, 9})
    differences = differences_of(first, second)
    open_exact = differences["open_exact"]
    assert (open_exact.first, open_exact.second, open_exact.difference) == (2 / 8, 6 / 8, 0.5)
    assert (open_exact.rows, open_exact.images, open_exact.p) == (8, 4, 0.5)  # two images differ: 2 of 4 patterns
    assert open_exact.p_holm == 1.0 and open_exact.low <= 0.5 <= open_exact.high
    assert differences["closed_label"].difference == 0.25
    reversed_open_exact = differences_of(second, first)["open_exact"]
    assert (reversed_open_exact.difference, reversed_open_exact.p) == (-0.5, open_exact.p)


def test_reports_are_compared_by_report_metrics(tmp_path: Path) -> None:
    differences = differences_of(
        write_report_run(tmp_path / "a", {0: "x", 1: "y", 2: "No effusion."}),
        write_report_run(tmp_path / "b", {3: "z"}),
    )
    bleu = differences["bleu_1/none"]
    assert bleu.second > bleu.first > 0 and bleu.difference == pytest.approx(bleu.second - bleu.first)
    assert bleu.rows == bleu.images == 4 and bleu.low <= bleu.difference <= bleu.high
    rouge = differences["rouge_l/none"]
    assert (rouge.second, rouge.p) == (0.75, 10 / 16)  # of +1, +1, +d, -1 ten of 16 swaps reach 1 + d
    assert "global_exact" not in differences


def test_p_values_are_corrected_for_the_comparisons_of_all_runs(tmp_path: Path) -> None:
    many = [make_question(n) for n in range(60)]
    runs = [write_vqa_run(tmp_path / name, set(range(n)), many) for name, n in (("a", 4), ("b", 30), ("c", 56))]
    comparison = compare(runs)
    assert list(comparison.differences) == ["b", "c"] and comparison.baseline.name == "a"
    all_differences = {
        (run, name): difference
        for run, metrics in comparison.differences.items()
        for name, difference in metrics.items()
    }
    assert comparison.comparisons == len(all_differences) == 2 * len(differences_of(runs[0], runs[1]))
    assert {key: difference.p_holm for key, difference in all_differences.items()} == holm_correction(
        {key: difference.p for key, difference in all_differences.items()}
    )
    pair_only = differences_of(runs[0], runs[2])["global_exact"]
    assert (
        all_differences["c", "global_exact"].p == pair_only.p
        and all_differences["c", "global_exact"].p_holm > pair_only.p_holm
    )


def test_the_tables_list_every_difference(tmp_path: Path) -> None:
    runs = [
        write_vqa_run(tmp_path / "a|1", {0}),
        write_vqa_run(tmp_path / "b", {0, 2}),
        write_vqa_run(tmp_path / "c", {1}),
    ]
    result = compare(runs)
    json.dumps(result.to_dict())
    text, markdown = str(result), result.markdown()
    assert "baseline: a|1" in text and "corrected for all" in text
    for run, metrics in result.to_dict()["differences"].items():
        for name in metrics:
            assert any(line.split()[:2] == [run, name] for line in text.splitlines())
            assert f"| {run} | {name} | " in markdown
    rows = [line for line in markdown.splitlines() if line.startswith("|")]
    assert len({row.count("|") for row in rows}) == 1 and "a\\|1" in markdown


def test_runs_are_named_by_the_shortest_unique_end_of_their_path(tmp_path: Path) -> None:
    runs = [write_vqa_run(tmp_path / path, {0}) for path in ("x/ln/scores", "x/full/scores", "y/other")]
    comparison = compare(runs)
    assert [comparison.baseline.name, *comparison.differences] == ["ln/scores", "full/scores", "other"]


def test_a_link_to_a_run_gives_the_run_its_name(tmp_path: Path) -> None:
    runs = [write_vqa_run(tmp_path / name / "scores", {0}) for name in ("a", "b")]
    links = [tmp_path / name for name in ("frozen", "ln")]
    for link, run in zip(links, runs, strict=True):
        link.symlink_to(run)
    comparison = compare(links)
    assert comparison.baseline.name == "frozen" and list(comparison.differences) == ["ln"]


def test_runs_with_different_rows_are_refused(tmp_path: Path) -> None:
    first = write_vqa_run(tmp_path / "a", {0})
    second = write_vqa_run(tmp_path / "b", {0}, [*QUESTIONS[2:], make_question(40)])
    with pytest.raises(InputError) as error:
        differences_of(first, second)
    assert f"2 are only in {first}, first 'q0'; 1 are only in {second}, first 'q40'" in str(error.value)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("answer", "heart", "1 references, first that of 'q0'"),
        ("question", "where?", "1 questions, first that of 'q0'"),
        ("images", ("7",), "1 images, first that of 'q0'"),
        ("kind", "closed", "1 kinds of question, first that of 'q0'"),
    ],
)
def test_rows_with_the_same_id_and_different_content_are_refused(
    tmp_path: Path, field: str, value: Any, message: str
) -> None:
    first = write_vqa_run(tmp_path / "a", {1})
    second = write_vqa_run(tmp_path / "b", {1}, [replace(QUESTIONS[0], **{field: value}), *QUESTIONS[1:]])
    with pytest.raises(InputError, match=message):
        differences_of(first, second)


def test_runs_with_different_normalisations_are_refused(tmp_path: Path) -> None:
    first = write_vqa_run(tmp_path / "a", {0})
    second = write_vqa_run(tmp_path / "b", {0}, normalisation="none")
    with pytest.raises(InputError, match="different normalisations: vqa and none"):
        differences_of(first, second)


def test_a_manifest_of_another_run_is_refused(tmp_path: Path) -> None:
    first, second = write_vqa_run(tmp_path / "a", {0}), write_vqa_run(tmp_path / "b", {0})
    other = write_vqa_run(tmp_path / "c", {0}, QUESTIONS[1:])
    shutil.copy(other / "manifest.json", second / "manifest.json")
    with pytest.raises(InputError, match=r"b/manifest\.json does not match predictions\.jsonl"):
        differences_of(first, second)
    manifest = json.loads((first / "manifest.json").read_text())
    (second / "manifest.json").write_text(json.dumps(manifest | {"ids": manifest["ids"][1:]}))
    with pytest.raises(InputError, match="its ids do not match its hash"):
        differences_of(first, second)


def test_a_single_run_or_a_repeated_run_is_refused(tmp_path: Path) -> None:
    run = write_vqa_run(tmp_path / "a", {0})
    with pytest.raises(InputError, match="Name two or more result folders"):
        compare([run])
    with pytest.raises(InputError, match="named twice"):
        compare([run, tmp_path / "." / "a"])


def test_a_comparison_takes_names_and_evaluations_in_memory(tmp_path: Path) -> None:
    folder = write_vqa_run(tmp_path / "a", {0})
    split = Split(fake_dataset(QUESTIONS), QUESTIONS)
    predictions = Predictions(QUESTIONS, [Prediction(e.id, e.answer) for e in QUESTIONS])
    record = make_record(split, score_vqa(QUESTIONS, predictions), normalisation="vqa", base="nano", adapter="runs/ln")
    in_memory = Evaluation(split, predictions, record)
    assert list(compare([folder, in_memory]).differences) == ["ln"]
    comparison = compare({"before": folder, "after": in_memory})
    assert comparison.baseline.name == "before" and comparison.differences["after"]["open_exact"].second == 1.0
    frame = comparison.to_pandas()
    assert set(frame["run"]) == {"after"} and len(frame) == comparison.comparisons
    assert [text.get_text() for text in comparison.plot().get_legend().get_texts()] == ["after"]
    assert "<pre>fake" in comparison._repr_html_()
    with pytest.raises(InputError, match="named twice"):
        compare([in_memory, in_memory])


def test_the_seeds_of_recipes_are_compared_as_recipes(tmp_path: Path) -> None:
    for seed in range(3):
        write_vqa_run(tmp_path / f"ln-{seed}", set(range(len(QUESTIONS))))
        write_vqa_run(tmp_path / f"lora-{seed}", set(range(seed + 1)))
    groups = parse_groups([f"lora={tmp_path}/lora-?", f"ln={tmp_path}/ln-0,{tmp_path}/ln-1,{tmp_path}/ln-2"])
    assert isinstance(groups, dict) and [len(folders) for folders in groups.values()] == [3, 3]
    comparison = compare(groups, margin=2)
    metric = comparison.differences["ln"]["global_exact"]
    assert (metric.question, metric.seeds, metric.second) == ("recipes", 3, 1.0)
    text = str(comparison)
    assert "seeds: lora 3, ln 3" in text and "these recipes differ, for new seeds" in text and "margin 2" in text
    assert len(comparison.to_dict()["runs"]["ln"]) == 3
    two = compare({name: folders[:2] for name, folders in groups.items()})
    assert two.differences["ln"]["global_exact"].question == "trained models"
    assert "Recipes are compared from 3 seeds" in str(two)


def test_names_of_recipes_are_checked(tmp_path: Path) -> None:
    (tmp_path / "lr=1").mkdir()
    assert parse_groups(["a", str(tmp_path / "lr=1")]) == ["a", str(tmp_path / "lr=1")], "a folder with ="
    with pytest.raises(InputError, match="write each recipe once"):
        parse_groups(["a=x", "a=y"])
    with pytest.raises(InputError, match="no folder matches"):
        parse_groups([f"a={tmp_path}/none-*", "b=y"])
    with pytest.raises(InputError, match="'a' has no results"):
        compare({"a": [], "b": ["x"]})
