from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from normtune.data.groups import Group
from normtune.data.records import Dataset, Example, Split
from normtune.errors import InputError
from normtune.evaluation.config import CONTROLS, EvaluateConfig
from normtune.evaluation.evaluate import evaluate
from normtune.evaluation.image_reliance import (
    GREY,
    control_dataset,
    image_reliance,
    noise_image,
    parse_controls,
    reliance_text,
    swapped_images,
)
from normtune.evaluation.results import Evaluation, read_evaluation
from normtune.metrics.table import metric_table
from normtune.models.family import Family
from normtune.models.image_cache import ImageCache
from normtune.models.types import Answer, Pixels
from normtune.runtime.number_format import format_interval
from tests.support.fake_family import FakeFamily, fake_dataset


class Looking(FakeFamily):
    """Answers with the mean grey level of the image, or always with the same text if `blind` is given."""

    def __init__(self, blind: str | None = None) -> None:
        super().__init__({})
        self.blind = blind

    def preprocess_image(self, image: Image.Image) -> Pixels:
        import torch

        return {"mean": torch.tensor(np.asarray(image).mean())}

    def generate_answers(
        self, groups: Sequence[Group], pixels: Sequence[Sequence[Pixels]], *, max_new_tokens: int = 16, beams: int = 1
    ) -> list[list[Answer]]:
        return [
            [Answer(self.blind or f"level {images[0]['mean']:.0f}", -0.5) for _ in group.segments]
            for group, images in zip(groups, pixels, strict=True)
        ]


EXAMPLES = [
    Example(f"{level}-{n}", (str(level),), f"Which level, {n}?", f"level {level}", "open", "test")
    for level in range(20, 220, 10)
    for n in range(2)
]


def run(family: FakeFamily, dataset: Dataset, out: Path | None = None, **options: Any) -> Evaluation:
    progress = options.pop("progress", None)
    config = EvaluateConfig(model="fake", data="fake", out=out, **options)
    return evaluate(cast(Family, family), Split(dataset, dataset.examples), config, progress=progress)


# --- The images ---------------------------------------------------------------------------------------------


def test_controls_are_separated_by_commas_and_unknown_names_are_refused() -> None:
    assert parse_controls("other, blank,other") == ("other", "blank") and parse_controls(None) == ()
    with pytest.raises(InputError, match="unknown control image 'nois', did you mean 'noise'"):
        parse_controls("blank,nois")


def test_blank_is_grey_and_has_the_size_of_the_image() -> None:
    dataset = fake_dataset(EXAMPLES, lambda key: Image.new("RGB", (int(key), 30), (int(key),) * 3))
    blank = control_dataset(dataset, EXAMPLES, "blank")
    for key in ("20", "90"):
        image = blank.open_image(key)
        assert image.size == (int(key), 30) and image.getcolors() == [(int(key) * 30, (GREY, GREY, GREY))]
    assert blank.name == dataset.name and blank.examples is dataset.examples


@given(st.integers(1, 300), st.integers(1, 300), st.text(min_size=1))
def test_noise_depends_only_on_size_and_key(width: int, height: int, key: str) -> None:
    image = noise_image((width, height), key)
    assert (image.size, image.mode) == ((width, height), "RGB")
    assert image.tobytes() == noise_image((width, height), key).tobytes()
    values = np.asarray(image)
    assert (values == values[..., :1]).all(), "grey"


def test_noise_differs_between_images_and_survives_scaling() -> None:
    first, second = (np.asarray(noise_image((1024, 700), key).resize((96, 96)), dtype=float) for key in ("a", "b"))
    assert np.abs(first - second).mean() > 30
    assert first.std() > 40, "uniform values have 74; noise per pixel would have 7 after scaling"


def with_patients(patients: list[int], views: int = 1) -> list[Example]:
    def keys(study: int) -> tuple[str, ...]:
        return tuple(f"{study}.{view}" for view in range(views))

    return [
        Example(f"r{study}", keys(study), "", "x", "report", "test", {"patient": str(patient)})
        for study, patient in enumerate(patients)
    ]


@given(st.lists(st.integers(0, 4), min_size=2, max_size=12), st.integers(1, 3), st.integers())
def test_no_patient_gets_an_image_of_the_same_patient(patients: list[int], views: int, seed: int) -> None:
    examples = with_patients(patients, views)
    if len(set(patients)) < 2:
        with pytest.raises(InputError, match=r"of one patient.*Remove 'other'"):
            swapped_images(examples)
        return
    swapped = swapped_images(examples)
    assert swapped.keys() == {key for example in examples for key in example.images}
    owner = {key: patient for example, patient in zip(examples, patients, strict=True) for key in example.images}
    assert all(owner[key] != owner[replacement] for key, replacement in swapped.items())
    for example in examples:  # views of a study are replaced by views of one study, in order
        replacement = [swapped[key].split(".") for key in example.images]
        assert len({study for study, _ in replacement}) == 1
        assert [view for _, view in replacement] == [str(view) for view in range(views)]
    if 2 * max(Counter(patients).values()) <= len(patients):
        assert sorted(swapped.values()) == sorted(swapped), "each image is used once"
    assert swapped_images(random.Random(seed).sample(examples, len(examples))) == swapped


def test_a_study_with_fewer_views_repeats_its_last_view() -> None:
    two_views = Example("a", ("a0", "a1"), "", "x", "report", "test")
    one_view = Example("b", ("b0",), "", "x", "report", "test")
    assert swapped_images([two_views, one_view]) == {"a0": "b0", "a1": "b0", "b0": "a0"}


# --- The table ----------------------------------------------------------------------------------------------


def test_the_result_equals_values_computed_by_hand() -> None:
    """Four images with two rows each: all are right; with control images, those of two images are wrong."""
    rows = [Example(f"{i}{n}", (f"{i}",), "?", "lung", "open", "test") for i in range(4) for n in "ab"]
    all_right = metric_table(rows, {row.id: "lung" for row in rows}, "vqa")
    half_right = metric_table(rows, {row.id: "lung" if row.id < "2" else "heart" for row in rows}, "vqa")
    all_wrong = metric_table(rows, {row.id: "heart" for row in rows}, "vqa")
    reliance = image_reliance(rows, all_right, {"blank": half_right, "other": all_right})
    blank = reliance["blank"]["metrics"]["global_exact"]
    assert (
        blank["real"]["value"] == blank["real"]["high"] == 1.0
        and 0 < blank["real"]["low"] < 1
        and blank["replaced"]["value"] == 0.5
    )
    assert (blank["difference"]["value"], blank["earned"]["value"]) == (0.5, 0.5)
    half_width = 3.182446305284263 * (1 / 12) ** 0.5  # differences 0, 0, 1, 1: variance 1/3 over 4 images
    assert blank["difference"]["low"] == pytest.approx(0.5 - half_width) and blank["difference"]["high"] == 1.0
    assert blank["difference"]["p"] == 0.5  # two images differ: 2 of 4 patterns
    assert (blank["rows"], blank["images"]) == (8, 4)
    other = reliance["other"]["metrics"]["global_exact"]
    assert (other["difference"]["value"], other["difference"]["p"], other["earned"]["value"]) == (0.0, 1.0, 0.0)
    assert {name for control in reliance.values() for name in control["metrics"]} == {
        "global_exact",
        "open_exact",
        "open_recall",
    }
    noise = image_reliance(rows, half_right, {"noise": all_right})["noise"]["metrics"]["global_exact"]
    assert noise["difference"]["value"] == -0.5 and noise["earned"]["value"] == -1.0
    assert image_reliance(rows, all_wrong, {"noise": all_right})["noise"]["metrics"]["global_exact"]["earned"] is None


def test_patients_are_not_called_images() -> None:
    rows = [Example(f"{i}", (f"{i}",), "?", "lung", "open", "test", {"patient": f"p{i // 2}"}) for i in range(8)]
    right, wrong = (metric_table(rows, {row.id: text for row in rows}, "vqa") for text in ("lung", "heart"))
    reliance = image_reliance(rows, right, {"blank": wrong})
    metric = reliance["blank"]["metrics"]["global_exact"]
    assert (metric["rows"], metric["images"], metric["patients"]) == (8, 8, 4)
    assert metric["difference"]["method"] == "exact swaps of 4 patients"
    assert "real - replaced, by patient" in reliance_text(reliance)


def test_p_values_are_corrected_for_all_controls_and_metrics() -> None:
    rows = [Example(f"{i}", (f"{i}",), "?", "lung", "open", "test") for i in range(10)]
    right = metric_table(rows, {row.id: "lung" for row in rows}, "vqa")
    wrong = metric_table(rows, {row.id: "heart" for row in rows}, "vqa")
    one_control = image_reliance(rows, right, {"blank": wrong})["blank"]["metrics"]["open_exact"]["difference"]
    three_controls = image_reliance(rows, right, dict.fromkeys(CONTROLS, wrong))["blank"]["metrics"]["open_exact"]
    assert one_control["p"] == 2 / 2**10 and one_control["p_holm"] == pytest.approx(3 * one_control["p"])
    assert three_controls["difference"]["p_holm"] == pytest.approx(9 * one_control["p"])


# --- Evaluations --------------------------------------------------------------------------------------------


def test_an_evaluation_answers_the_questions_with_every_control(tmp_path: Path) -> None:
    ticks: list[tuple[int, int]] = []
    evaluation = run(
        Looking(),
        fake_dataset(EXAMPLES),
        tmp_path,
        controls="blank,noise,other",
        batch=10,
        progress=lambda done, total: ticks.append((done, total)),
    )
    swapped = swapped_images(EXAMPLES)
    assert {p.id: p.text for p in evaluation.predictions} == {e.id: e.answer for e in EXAMPLES}
    assert {p.text for p in evaluation.controls["blank"]} == {f"level {GREY}"}
    assert {p.id: p.text for p in evaluation.controls["other"]} == {
        e.id: f"level {swapped[e.images[0]]}" for e in EXAMPLES
    }
    assert len({p.text for p in evaluation.controls["noise"]}) > 10
    assert ticks[-1] == (160, 160) and [done for done, _ in ticks] == sorted({done for done, _ in ticks})
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["settings"]["controls"] == list(CONTROLS) == list(metrics["reliance"])
    for control in metrics["reliance"].values():
        metric = control["metrics"]["global_exact"]
        assert metric["real"]["value"] == metric["difference"]["value"] == metric["earned"]["value"] == 1.0
        assert metric["replaced"]["value"] == 0.0 and metric["difference"]["p_holm"] < 0.01
    grounding = metrics["grounding"]
    assert grounding["visual_reliance_score"]["value"] == grounding["image_sensitivity"]["value"] == 1.0
    assert "Visual Reliance Score 100.0 [" in str(evaluation)
    rows = [json.loads(line) for line in (tmp_path / "predictions-other.jsonl").read_text().splitlines()]
    assert [row["prediction"] for row in rows] == [p.text for p in evaluation.controls["other"]]
    assert [row["images"] for row in rows] == [list(e.images) for e in EXAMPLES]
    assert len(read_evaluation(tmp_path).examples) == 40, "the run reads back like a run without controls"
    assert format_interval(metrics["metrics"]["global_exact"], digits=2) in str(evaluation)


def test_a_model_that_ignores_images_has_no_contribution_and_old_files_are_deleted(tmp_path: Path) -> None:
    dataset = fake_dataset(EXAMPLES)
    blind = run(Looking("level 50"), dataset, controls="other").record["grounding"]
    assert blind["visual_reliance_score"]["value"] == blind["image_sensitivity"]["value"] == 0.0
    evaluation = run(Looking("level 50"), dataset, tmp_path, controls="noise,blank")
    for control in evaluation.record["reliance"].values():
        metric = control["metrics"]["global_exact"]
        assert (metric["real"]["value"], metric["difference"]["value"], metric["earned"]["value"]) == (0.05, 0.0, 0.0)
        assert metric["difference"]["p"] == 1.0
    assert {path.name for path in tmp_path.glob("predictions*")} == {
        "predictions.jsonl",
        "predictions-noise.jsonl",
        "predictions-blank.jsonl",
    }
    assert "reliance" not in run(Looking("level 50"), dataset, tmp_path).record
    assert [path.name for path in tmp_path.glob("predictions*")] == ["predictions.jsonl"]
    assert "reliance" not in json.loads((tmp_path / "metrics.json").read_text())


def test_reports_are_scored_with_control_images_too(tmp_path: Path) -> None:
    reports = [Example(f"r{n}", (f"{n}0", f"{n}5"), "", f"level {n}0", "report", "test") for n in range(2, 8)]
    evaluation = run(Looking(), fake_dataset(reports), tmp_path, controls="other")
    metrics = evaluation.record["reliance"]["other"]["metrics"]
    assert set(metrics) == {"rouge_l/none", "bleu_4/none", "cider_d/none"}
    rouge = metrics["rouge_l/none"]
    assert rouge["real"]["value"] == 1.0 and 0 < rouge["earned"]["value"] < 1, "the word 'level' stays right"


def test_chest_reports_have_a_table_of_findings(tmp_path: Path) -> None:
    chest = [Example("a", ("10",), "", "The heart is enlarged. No effusion.", "report", "test")]
    run(Looking("The heart is enlarged. Pleural effusion."), fake_dataset(chest), tmp_path)
    table = json.loads((tmp_path / "metrics.json").read_text())["findings"]["findings_rules"]
    assert table["Cardiomegaly"]["f1"] == 1.0
    assert table["Pleural Effusion"] == {"precision": 0.0, "recall": 0.0, "f1": 0.0, "predictions": 1, "references": 0}
    run(Looking("level 10"), fake_dataset(EXAMPLES), tmp_path)
    assert "findings" not in json.loads((tmp_path / "metrics.json").read_text())


def test_nothing_is_answered_if_there_is_no_other_image(tmp_path: Path) -> None:
    dataset = fake_dataset(EXAMPLES[:2])
    with pytest.raises(InputError, match="no image of another patient"):
        run(Looking(), dataset, tmp_path / "run", controls="other")
    assert not (tmp_path / "run").exists()


def test_the_cache_of_control_images_is_separate_from_that_of_real_images() -> None:
    dataset = fake_dataset(EXAMPLES)
    family = Looking()
    cache = ImageCache(cast(Family, family), dataset)
    assert cache("50")["mean"] == 50
    blank = cache.for_dataset(control_dataset(dataset, EXAMPLES, "blank"))
    assert blank("50")["mean"] == GREY
    assert cache("50")["mean"] == 50
