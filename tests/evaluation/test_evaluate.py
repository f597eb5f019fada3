from __future__ import annotations

import json
import math
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from PIL import Image

from normtune.data.records import Dataset, Example, Kind, Split
from normtune.errors import InputError
from normtune.evaluation.config import EvaluateConfig
from normtune.evaluation.evaluate import answer_all, evaluate, score_closed_candidates
from normtune.evaluation.results import Evaluation, read_evaluation, split_hash
from normtune.models.family import Family
from normtune.models.types import Answer
from tests.support.fake_family import CountingImages, FakeFamily, fake_dataset
from tests.support.tolerance import approx


def example(id: str, image: str, answer: str, kind: Kind = "open") -> Example:
    return Example(id, (image,), f"question {id}", answer, kind, "test")


EXAMPLES = [
    example("q1", "10", "Yes", "closed"),
    example("q2", "20", "lung"),
    example("q3", "10", "left lung"),
    example("q4", "30", "No", "closed"),
    example("q5", "10", "heart"),
]
ANSWERS = {"q1": "yes", "q2": "lung", "q3": "lung", "q4": "yes", "q5": "liver"}


def run(family: FakeFamily, dataset: Dataset, out: Path | None = None, **options: Any) -> Evaluation:
    progress = options.pop("progress", None)
    config = EvaluateConfig.checked(model="fake", data="fake", out=out, **options)
    return evaluate(cast(Family, family), Split(dataset, dataset.examples), config, progress=progress)


def test_answers_are_joined_by_id_and_scored() -> None:
    evaluation = run(FakeFamily(ANSWERS), fake_dataset(EXAMPLES))
    assert [(p.id, p.text, p.score) for p in evaluation.predictions] == [(i, a, -0.5) for i, a in ANSWERS.items()]
    assert evaluation.metrics["closed_label"].value == 0.5
    assert evaluation.metrics["open_exact"].value == pytest.approx(1 / 3)
    assert evaluation.metrics["open_recall"].value == pytest.approx(0.5)
    assert evaluation.record["pairs_per_second"] == pytest.approx(5 / evaluation.seconds)
    assert evaluation.record["peak_memory_bytes"] > 0
    assert evaluation.record["signs_ignored"] == 0


def test_answers_that_are_right_without_their_signs_are_counted() -> None:
    examples = [
        Example("1", ("1",), "Which?", "HER2+", "open", "test"),
        Example("2", ("1",), "?", "yes", "closed", "test"),
    ]
    evaluation = run(FakeFamily({"1": "her2-", "2": "Yes."}), fake_dataset(examples))
    assert evaluation.metrics["global_exact"].value == 1.0 and evaluation.record["signs_ignored"] == 1
    assert "1 row is right only because the normalisation drops signs" in str(evaluation)


def test_answers_at_the_token_limit_are_counted(tmp_path: Path) -> None:
    class Cut(FakeFamily):
        def generate_answers(self, groups: Any, *_: Any, **__: Any) -> list[list[Answer]]:
            return [[Answer("yes", -0.5, "length" if s.id == "q2" else "stop") for s in g.segments] for g in groups]

        def generation_settings(self) -> dict[str, Any]:
            return {"repetition_penalty": 1.05}

    evaluation = run(
        Cut(ANSWERS, lambda id, word: 0.0), fake_dataset(EXAMPLES, CountingImages()), tmp_path, candidates="yes/no"
    )
    rows = [json.loads(line) for line in (tmp_path / "predictions.jsonl").read_text().splitlines()]
    closed = [None, "length", "stop", None, "stop"]  # chosen from candidates, and so not generated
    assert [row["finish_reason"] for row in rows] == closed
    result = json.loads((tmp_path / "metrics.json").read_text())
    assert result["limit_reached"]["value"] == approx(1 / 3) and result["limit_reached"]["rows"] == 3
    assert result["settings"]["generation"] == {"repetition_penalty": 1.05}
    assert "33.3% of the generated answers end at the limit of 16 tokens" in str(evaluation)
    assert "limit_reached" not in result["metrics"]


@pytest.mark.parametrize("batch", [1, 2, 64])
def test_each_image_is_opened_once(batch: int) -> None:
    images, family = CountingImages(), FakeFamily(ANSWERS)
    evaluation = run(family, fake_dataset(EXAMPLES, images), batch=batch)
    assert sorted(images.opened) == ["10", "20", "30"]
    segments = [segment for groups in family.batches for group in groups for segment in group.segments]
    assert sorted(segment.id for segment in segments) == sorted(ANSWERS)
    assert evaluation.metrics["global_exact"].value == pytest.approx(2 / 5)


@pytest.mark.parametrize("cap", [None, 1, 2])
def test_the_questions_of_an_image_are_answered_in_groups_of_at_most_cap(cap: int | None) -> None:
    family = FakeFamily(ANSWERS)
    answer_all(cast(Family, family), fake_dataset(EXAMPLES), EXAMPLES, cap=cap)
    sizes = [len(group.segments) for groups in family.batches for group in groups]
    assert sum(sizes) == 5 and max(sizes) == (cap or 3)


def test_predictions_manifest_and_metrics_are_written(tmp_path: Path) -> None:
    evaluation = run(FakeFamily(ANSWERS), fake_dataset(EXAMPLES), tmp_path / "run", beams=3)
    rows = [json.loads(line) for line in (tmp_path / "run/predictions.jsonl").read_text().splitlines()]
    assert rows[2] == {
        "id": "q3",
        "images": ["10"],
        "kind": "open",
        "question": "question q3",
        "reference": "left lung",
        "prediction": "lung",
        "score": -0.5,
        "finish_reason": "stop",
        "strata": {},
    }
    manifest = json.loads((tmp_path / "run/manifest.json").read_text())
    assert manifest == {"split_hash": split_hash(list(ANSWERS)), "ids": sorted(ANSWERS)}
    metrics = json.loads((tmp_path / "run/metrics.json").read_text())
    assert metrics["metrics"]["closed_label"]["value"] == evaluation.metrics["closed_label"].value
    assert (metrics["base"], metrics["adapter"], metrics["licence"]) == ("fake", None, "CC0")
    assert metrics["notice"] == "research use, not for diagnosis"
    assert (metrics["rows"], metrics["images"], metrics["splits"]) == (5, 3, ["test"])
    assert metrics["settings"]["beams"] == 3 and metrics["versions"]["torch"] == version("torch")
    assert metrics["split_hash"] == manifest["split_hash"]
    assert evaluation.to_dict() == {**metrics, "out": str(tmp_path / "run")}
    text = str(evaluation)
    assert "closed_label" in text and "50.00" in text and "not for diagnosis" in text


def test_an_evaluation_in_memory_is_saved_later(tmp_path: Path) -> None:
    evaluation = run(FakeFamily(ANSWERS), fake_dataset(EXAMPLES))
    assert evaluation.out is None and "Written" not in str(evaluation)
    evaluation.save(tmp_path / "run")
    saved = read_evaluation(tmp_path / "run")
    assert saved.texts == ANSWERS and saved.record == evaluation.record
    assert saved.predictions == evaluation.predictions


def test_an_evaluation_is_shown_as_a_data_frame_and_a_plot() -> None:
    evaluation = run(FakeFamily(ANSWERS), fake_dataset(EXAMPLES))
    frame = evaluation.to_pandas().set_index("metric")
    assert frame.loc["closed_label", "value"] == 0.5 and frame.loc["closed_label", "rows"] == 2
    predictions = evaluation.predictions.to_pandas()
    assert list(predictions["prediction"]) == list(ANSWERS.values())
    assert "question q3" in evaluation.predictions._repr_html_() and "<pre>fake" in evaluation._repr_html_()
    axes = evaluation.plot()
    assert [label.get_text() for label in axes.get_yticklabels()] == list(reversed(evaluation.metrics))


def test_candidates_answer_the_closed_questions() -> None:
    """q1 prefers yes by 3 nats, q4 prefers no by 1. Scores are log-softmaxes; open answers are generated."""
    sums = {("q1", "yes"): -1.0, ("q1", "no"): -4.0, ("q4", "yes"): -3.0, ("q4", "no"): -2.0}
    family = FakeFamily(ANSWERS, lambda id, word: sums[id, word])
    ticks: list[tuple[int, int]] = []
    evaluation = run(
        family, fake_dataset(EXAMPLES), candidates="yes/no", progress=lambda done, total: ticks.append((done, total))
    )
    by_id = {p.id: p for p in evaluation.predictions}
    assert (by_id["q1"].text, by_id["q4"].text, by_id["q2"].text) == ("yes", "no", "lung")
    assert by_id["q1"].score == approx(-math.log(1 + math.exp(-3)))
    assert evaluation.metrics["closed_label"].value == 1.0
    assert ticks == [(3, 5), (5, 5)]


def test_of_equally_probable_candidates_the_first_is_taken() -> None:
    family = FakeFamily(ANSWERS, lambda id, word: -1.0)
    dataset = fake_dataset(EXAMPLES)
    predictions = score_closed_candidates(cast(Family, family), dataset, [EXAMPLES[0]], ("no", "yes"))
    assert predictions[0].text == "no"


def test_candidates_of_one_image_share_a_group_and_fit_the_batch() -> None:
    family = FakeFamily(ANSWERS, lambda id, word: float(len(word)))
    dataset = fake_dataset(EXAMPLES)
    score_closed_candidates(cast(Family, family), dataset, EXAMPLES, ("yes", "no"), batch_pairs=4, cap=2)
    assert all(sum(len(group.segments) for group in batch) <= 4 for batch in family.batches)
    assert family.batches[0][0].segments[1].id == "q1=no"


def test_reports_have_a_different_length_and_prompt() -> None:
    report = Example("r", ("10", "20"), "", "The lungs are clear.", "report", "test")
    family = FakeFamily({"r": "clear lungs"})
    predictions = answer_all(cast(Family, family), fake_dataset([report]), [report], max_new_tokens=128)
    assert family.tokenized == [("r", True)] and family.settings == [(128, 1)]
    assert predictions[0].text == "clear lungs"


def test_reports_are_scored_with_report_metrics(tmp_path: Path) -> None:
    texts = {"a": "The heart is enlarged. No effusion.", "b": "Small left effusion."}
    reports = [Example(id, ("10", "20"), "", text, "report", "test") for id, text in texts.items()]
    predictions = {"a": texts["a"], "b": "No effusion."}
    evaluation = run(FakeFamily(predictions), fake_dataset(reports), tmp_path)
    assert {"bleu_4/none", "rouge_l/r2gen-iu", "findings_rules_f1_micro_14"} <= set(evaluation.metrics)
    assert not {"global_exact", "open_exact"} & set(evaluation.metrics)
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["normalisation"] == ["none", "r2gen-iu"]
    assert metrics["metrics"]["bleu_4/none"]["value"] == evaluation.metrics["bleu_4/none"].value


def test_a_damaged_image_is_named() -> None:
    def broken(key: str) -> Image.Image:
        if key == "20":
            raise Image.UnidentifiedImageError("cannot identify image file")
        return Image.new("RGB", (2, 2), (int(key),) * 3)

    with pytest.raises(InputError, match=r"cannot read image 20 of dataset fake .* remove its rows"):
        run(FakeFamily(ANSWERS), fake_dataset(EXAMPLES, broken))


def test_a_memory_error_names_the_option_to_lower() -> None:
    class Full(FakeFamily):
        def generate_answers(self, *_: Any, **__: Any) -> list[list[Answer]]:
            raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(InputError, match=r"out of memory with 7 questions at once\. Lower --batch"):
        run(Full(ANSWERS), fake_dataset(EXAMPLES), batch=7)


def test_a_score_that_is_nan_is_omitted(tmp_path: Path) -> None:
    class Unsure(FakeFamily):
        def generate_answers(self, groups: Any, *_: Any, **__: Any) -> list[list[Answer]]:
            return [[Answer("yes", math.nan) for _ in group.segments] for group in groups]

    run(Unsure(ANSWERS), fake_dataset(EXAMPLES), tmp_path)
    assert "NaN" not in (tmp_path / "predictions.jsonl").read_text()


@pytest.mark.parametrize(
    ("examples", "options", "message"),
    [
        ([], {}, "nothing to evaluate"),
        ([EXAMPLES[0], EXAMPLES[0]], {}, "1 ids occur more than once in the examples, first 'q1'"),
        ([EXAMPLES[0], Example("r", ("10",), "", "x", "report", "test")], {}, "one task at a time"),
        (EXAMPLES, {"candidates": "yes"}, "give two or more"),
        (EXAMPLES, {"normalisation": "vqaa"}, "--normalisation: .* 'vqaa'"),
    ],
)
def test_bad_input_is_reported_before_anything_is_answered(
    examples: list[Example], options: dict[str, Any], message: str
) -> None:
    family = FakeFamily(ANSWERS)
    with pytest.raises(InputError, match=message):
        run(family, fake_dataset(examples), **options)
    assert family.batches == []


def test_an_unwritable_folder_is_reported_before_anything_is_answered(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    family = FakeFamily(ANSWERS)
    with pytest.raises(InputError, match="Choose another --out"):
        run(family, fake_dataset(EXAMPLES), tmp_path / "file" / "run")
    assert family.batches == []


# --- Confidence ---------------------------------------------------------------------------------------------


def test_the_confidence_of_answers_is_in_the_record_and_the_text(tmp_path: Path) -> None:
    evaluation = run(FakeFamily(ANSWERS), fake_dataset(EXAMPLES), tmp_path)
    report = evaluation.record["confidence"]
    assert list(report) == ["all", "closed", "open"] and report["all"]["rows"] == 5
    assert report["all"]["mean_confidence"] == approx(math.exp(-0.5))
    assert "confidence (closed): mean 60.7, right 50.0, ECE 10.7 [" in str(evaluation)
    assert "abstention" not in evaluation.record and "abstain_below" not in evaluation.record["settings"]
    assert evaluation.plot_reliability().get_xlabel() == "confidence x 100"


def test_answers_below_the_threshold_are_marked_and_counted_and_scores_stay(tmp_path: Path) -> None:
    class Unsure(FakeFamily):
        def generate_answers(self, groups: Any, *_: Any, **__: Any) -> list[list[Answer]]:
            return [
                [Answer(self.answers[s.id], -2.0 if s.id in ("q3", "q5") else -0.1) for s in g.segments] for g in groups
            ]

    dataset = fake_dataset(EXAMPLES)
    evaluation = run(Unsure(ANSWERS), dataset, tmp_path, abstain_below=0.5)
    rows = [json.loads(line) for line in (tmp_path / "predictions.jsonl").read_text().splitlines()]
    assert [row["id"] for row in rows if row.get("abstained")] == ["q3", "q5"]
    assert read_evaluation(tmp_path).predictions == evaluation.predictions
    abstention = evaluation.record["abstention"]
    assert abstention["abstained"] == 2 and abstention["right_if_answered"]["value"] == approx(2 / 3)
    assert evaluation.metrics == run(Unsure(ANSWERS), dataset).metrics
    assert evaluation.record["settings"]["abstain_below"] == 0.5
    assert "abstained from 2 answers with a confidence below 0.5; right among the others: 66.7 [" in str(evaluation)


CLOSED = [example(f"c{n}", str(n), "yes" if n % 3 else "no", "closed") for n in range(40)]


def closed_split(name: str, rows: list[Example]) -> Dataset:
    return fake_dataset([Example(e.id, e.images, e.question, e.answer, e.kind, name) for e in rows])


def test_sets_are_calibrated_on_another_evaluation(tmp_path: Path) -> None:
    family = FakeFamily({}, lambda id, word: -0.2 if word == "yes" else -1.7)
    run(family, closed_split("validate", CLOSED[:20]), tmp_path / "val", split="validate", candidates="yes/no")
    evaluation = run(
        family, closed_split("test", CLOSED[20:]), tmp_path / "test", candidates="yes/no", conformal=tmp_path / "val"
    )
    rows = [json.loads(line) for line in (tmp_path / "test/predictions.jsonl").read_text().splitlines()]
    assert rows[0]["candidates"]["yes"] == approx(1 / (1 + math.exp(-1.5)))
    sets = evaluation.record["conformal"]
    assert (sets["calibration"]["images"], sets["test"]["images"]) == (20, 20)
    assert sets["levels"]["0.9"]["coverage"]["value"] == 1.0 and sets["levels"]["0.9"]["mean_size"] == 2
    assert "conformal sets at 90%: 100.0 [" in str(evaluation)
    assert read_evaluation(tmp_path / "test").predictions == evaluation.predictions


@pytest.mark.parametrize(
    ("options", "rows", "message"),
    [
        ({"candidates": "no/yes"}, CLOSED[20:], "with the candidates yes/no, this evaluation has no/yes"),
        ({"candidates": "yes/no"}, CLOSED[15:], "has 5 of the evaluated images, first '15'"),
        ({"candidates": "yes/no", "adapter": Path("other")}, CLOSED[20:], "with the adapter None"),
    ],
)
def test_calibration_of_another_model_or_the_same_images_is_refused(
    options: dict[str, Any], rows: list[Example], message: str, tmp_path: Path
) -> None:
    family = FakeFamily({}, lambda id, word: 0.0)
    run(family, closed_split("validate", CLOSED[:20]), tmp_path / "val", split="validate", candidates="yes/no")
    before = len(family.batches)
    with pytest.raises(InputError, match=message):
        run(family, closed_split("test", rows), conformal=tmp_path / "val", **options)
    assert len(family.batches) == before, "before the model answers"
