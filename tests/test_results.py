from __future__ import annotations

import json
from pathlib import Path

import pytest

from normtune.data.records import Example, Kind
from normtune.errors import InputError
from normtune.metrics.vqa import Prediction, score_vqa
from normtune.results import compare, read_run, split_hash, write_results
from tests.fake_family import fake_dataset


def example(number: int, answer: str = "lung", kind: Kind = "open") -> Example:
    return Example(f"q{number}", (f"{number // 2}",), "which\u2028organ?", answer, kind, "test")


EXAMPLES = [example(n) for n in range(8)] + [example(n, "yes", "closed") for n in range(8, 12)]


def write(
    out: Path, right: set[int], examples: list[Example] | None = None, normalisation: str = "vqa"
) -> Path:
    examples = examples or EXAMPLES
    predictions = [
        Prediction(e.id, e.answer if int(e.id[1:]) in right else "wrong", -0.1) for e in reversed(examples)
    ]
    metrics = score_vqa(examples, predictions, normalisation=normalisation)
    write_results(out, fake_dataset(examples), examples, predictions, metrics, normalisation=normalisation)
    return out


def test_a_run_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    examples, texts, metrics = read_run(write(tmp_path, {0, 1}))
    assert examples == [Example(e.id, e.images, e.question, e.answer, e.kind, "") for e in EXAMPLES]
    assert texts["q0"] == "lung" and texts["q5"] == "wrong"
    assert metrics["split_hash"] == split_hash([e.id for e in EXAMPLES])


def test_the_hash_knows_rows_and_not_their_order() -> None:
    assert split_hash(["b", "a"]) == split_hash(["a", "b"]) != split_hash(["a", "c"])
    # printf 'a\nb' | sha256sum
    assert split_hash(["b", "a"]) == "7e18f737311b2dc3b2f269dd78396b0351f14fb66efa879f768cb23181883c78"


def test_compare_pairs_rows_by_id(tmp_path: Path) -> None:
    first = write(tmp_path / "a", {0, 1, 8})
    second = write(tmp_path / "b", {0, 1, 2, 3, 4, 5, 8, 9})
    found = compare(first, second)
    opened = found["open_exact"]
    assert (opened.first, opened.second, opened.difference) == (2 / 8, 6 / 8, 0.5)
    assert (opened.rows, opened.images, opened.p) == (8, 4, 0.5)  # two images differ: 2 of 4 patterns
    assert opened.p_holm == 1.0 and opened.low <= 0.5 <= opened.high
    assert found["closed_label"].difference == 0.25
    back = compare(second, first)["open_exact"]
    assert (back.difference, back.p) == (-0.5, opened.p)


def test_reports_are_compared_by_report_metrics(tmp_path: Path) -> None:
    reports = [
        Example(f"r{n}", (f"{n}",), "", f"No effusion in case {n}. Heart is normal.", "report", "test")
        for n in range(4)
    ]

    def run(name: str, said: dict[int, str]) -> Path:
        predictions = [Prediction(e.id, said.get(n, e.answer)) for n, e in enumerate(reports)]
        out = tmp_path / name
        write_results(out, fake_dataset(reports), reports, predictions, {}, normalisation=["none"])
        return out

    found = compare(run("a", {0: "x", 1: "y", 2: "No effusion."}), run("b", {3: "z"}))
    bleu = found["bleu_1/none"]
    assert bleu.second > bleu.first > 0 and bleu.difference == pytest.approx(bleu.second - bleu.first)
    assert bleu.rows == bleu.images == 4 and bleu.low <= bleu.difference <= bleu.high
    rouge = found["rouge_l/none"]
    assert (rouge.second, rouge.p) == (0.75, 10 / 16)  # of +1, +1, +d, -1 ten of 16 swaps reach 1 + d
    assert "global_exact" not in found


def test_compare_refuses_other_rows(tmp_path: Path) -> None:
    first, second = write(tmp_path / "a", {0}), write(tmp_path / "b", {0}, EXAMPLES[:-1])
    with pytest.raises(InputError, match="different rows: 1 stand in one alone, first 'q11'"):
        compare(first, second)


def test_compare_refuses_other_references(tmp_path: Path) -> None:
    first = write(tmp_path / "a", {0})
    second = write(tmp_path / "b", {0}, [example(0, "heart"), *EXAMPLES[1:]])
    with pytest.raises(InputError, match="differ in 1 references, first 'q0'"):
        compare(first, second)


def test_compare_refuses_other_normalisations(tmp_path: Path) -> None:
    first, second = write(tmp_path / "a", {0}), write(tmp_path / "b", {0}, normalisation="none")
    with pytest.raises(InputError, match="different normalisations"):
        compare(first, second)


def test_a_damaged_row_is_named(tmp_path: Path) -> None:
    path = write(tmp_path, {0}) / "predictions.jsonl"
    path.write_text(path.read_text().replace('"reference": "lung"', '"ref": "lung"', 1))
    with pytest.raises(InputError, match="line 1: not a prediction row"):
        read_run(tmp_path)


def test_rows_taken_away_are_noticed(tmp_path: Path) -> None:
    path = write(tmp_path, {0}) / "predictions.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[1:]))
    with pytest.raises(InputError, match=r"does not hold the rows|not a prediction row"):
        read_run(tmp_path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    (write(tmp_path, {0}) / "predictions.jsonl").unlink()
    with pytest.raises(InputError, match=r"predictions\.jsonl is missing"):
        read_run(tmp_path)
    with pytest.raises(InputError, match=r"metrics\.json is missing"):
        read_run(tmp_path / "elsewhere")


def test_no_half_written_file_is_left(tmp_path: Path) -> None:
    names = {path.name for path in write(tmp_path, {0}).iterdir()}
    assert names == {"predictions.jsonl", "manifest.json", "metrics.json"}
    assert json.loads((tmp_path / "metrics.json").read_text())["intervals"].startswith("95%")
