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
from normtune.data.records import Dataset, Example
from normtune.errors import InputError
from normtune.evaluation.config import CONTROLS
from normtune.evaluation.evaluate import Evaluation, evaluate, metrics_text
from normtune.evaluation.image_reliance import (
    GREY,
    control_dataset,
    controls_of,
    image_reliance,
    noise,
    swapped_images,
)
from normtune.evaluation.results import read_run
from normtune.metrics.table import metric_table
from normtune.models.family import Family
from normtune.models.image_cache import ImageCache
from normtune.models.types import Answer, Pixels
from tests.support.fake_family import FakeFamily, fake_dataset


class Looking(FakeFamily):
    """Answers with the mean grey level that it sees, or without looking with one word."""

    def __init__(self, blind: str | None = None) -> None:
        super().__init__({})
        self.blind = blind

    def preprocess_image(self, image: Image.Image) -> Pixels:
        import torch

        return {"mean": torch.tensor(np.asarray(image).mean())}

    def generate_answers(
        self,
        groups: Sequence[Group],
        pixels: Sequence[Sequence[Pixels]],
        *,
        max_new_tokens: int = 16,
        beams: int = 1,
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
    return evaluate(cast(Family, family), dataset, dataset.examples, out, **options)


# --- The images ---------------------------------------------------------------------------------------------


def test_controls_are_named_with_commas_and_a_wrong_name_is_told() -> None:
    assert controls_of("other, blank,other") == ("other", "blank") and controls_of(None) == ()
    with pytest.raises(InputError, match="no control image 'nois', did you mean 'noise'"):
        controls_of("blank,nois")


def test_blank_is_one_grey_of_the_images_size() -> None:
    dataset = fake_dataset(EXAMPLES, lambda key: Image.new("RGB", (int(key), 30), (int(key),) * 3))
    blank = control_dataset(dataset, EXAMPLES, "blank")
    for key in ("20", "90"):
        image = blank.open_image(key)
        assert image.size == (int(key), 30) and image.getcolors() == [(int(key) * 30, (GREY, GREY, GREY))]
    assert blank.name == dataset.name and blank.examples is dataset.examples


@given(st.integers(1, 300), st.integers(1, 300), st.text(min_size=1))
def test_noise_is_of_the_images_size_and_of_its_key_alone(width: int, height: int, key: str) -> None:
    image = noise((width, height), key)
    assert (image.size, image.mode) == ((width, height), "RGB")
    assert image.tobytes() == noise((width, height), key).tobytes()
    values = np.asarray(image)
    assert (values == values[..., :1]).all(), "grey"


def test_noise_differs_between_images_and_outlives_scaling() -> None:
    one, other = (np.asarray(noise((1024, 700), key).resize((96, 96)), dtype=float) for key in ("a", "b"))
    assert np.abs(one - other).mean() > 30
    assert one.std() > 40, "uniform values have 74; noise by the pixel would keep 7"


def with_patients(patients: list[int], views: int = 1) -> list[Example]:
    def keys(study: int) -> tuple[str, ...]:
        return tuple(f"{study}.{view}" for view in range(views))

    return [
        Example(f"r{study}", keys(study), "", "x", "report", "test", {"patient": str(patient)})
        for study, patient in enumerate(patients)
    ]


@given(st.lists(st.integers(0, 4), min_size=2, max_size=12), st.integers(1, 3), st.integers())
def test_nobody_is_shown_an_image_of_their_own(patients: list[int], views: int, seed: int) -> None:
    examples = with_patients(patients, views)
    if len(set(patients)) < 2:
        with pytest.raises(InputError, match=r"of one patient.*Leave 'other' out"):
            swapped_images(examples)
        return
    found = swapped_images(examples)
    assert found.keys() == {key for example in examples for key in example.images}
    owner = {
        key: patient for example, patient in zip(examples, patients, strict=True) for key in example.images
    }
    assert all(owner[key] != owner[shown] for key, shown in found.items())
    for example in examples:  # views stay together and in their places
        shown = [found[key].split(".") for key in example.images]
        assert len({study for study, _ in shown}) == 1
        assert [view for _, view in shown] == [str(view) for view in range(views)]
    if 2 * max(Counter(patients).values()) <= len(patients):
        assert sorted(found.values()) == sorted(found), "each is shown once"
    assert swapped_images(random.Random(seed).sample(examples, len(examples))) == found


def test_a_study_of_fewer_views_shows_its_last_again() -> None:
    one = Example("a", ("a0", "a1"), "", "x", "report", "test")
    other = Example("b", ("b0",), "", "x", "report", "test")
    assert swapped_images([one, other]) == {"a0": "b0", "a1": "b0", "b0": "a0"}


# --- The table ----------------------------------------------------------------------------------------------


def test_the_table_is_that_of_hand_worked_figures() -> None:
    """Four images with two rows each: all right; without the image those of two images are wrong."""
    rows = [Example(f"{i}{n}", (f"{i}",), "?", "lung", "open", "test") for i in range(4) for n in "ab"]
    right = metric_table(rows, {row.id: "lung" for row in rows}, "vqa")
    half = metric_table(rows, {row.id: "lung" if row.id < "2" else "heart" for row in rows}, "vqa")
    nothing = metric_table(rows, {row.id: "heart" for row in rows}, "vqa")
    found = image_reliance(rows, right, {"blank": half, "other": right})
    one = found["blank"]["metrics"]["global_exact"]
    assert one["real"] == {"value": 1.0, "low": 1.0, "high": 1.0} and one["replaced"]["value"] == 0.5
    assert (one["difference"]["value"], one["earned"]["value"]) == (0.5, 0.5)
    assert (one["difference"]["low"], one["difference"]["high"]) == (0.0, 1.0)
    assert one["difference"]["p"] == 0.5  # two images differ: 2 of 4 patterns
    assert (one["rows"], one["images"]) == (8, 4)
    kept = found["other"]["metrics"]["global_exact"]
    assert (kept["difference"]["value"], kept["difference"]["p"], kept["earned"]["value"]) == (0.0, 1.0, 0.0)
    assert {name for about in found.values() for name in about["metrics"]} == {
        "global_exact",
        "open_exact",
        "open_recall",
    }
    misled = image_reliance(rows, half, {"noise": right})["noise"]["metrics"]["global_exact"]
    assert misled["difference"]["value"] == -0.5 and misled["earned"]["value"] == -1.0
    assert (
        image_reliance(rows, nothing, {"noise": right})["noise"]["metrics"]["global_exact"]["earned"] is None
    )


def test_p_values_are_corrected_for_all_controls_and_metrics() -> None:
    rows = [Example(f"{i}", (f"{i}",), "?", "lung", "open", "test") for i in range(10)]
    right = metric_table(rows, {row.id: "lung" for row in rows}, "vqa")
    wrong = metric_table(rows, {row.id: "heart" for row in rows}, "vqa")
    alone = image_reliance(rows, right, {"blank": wrong})["blank"]["metrics"]["open_exact"]["difference"]
    three = image_reliance(rows, right, dict.fromkeys(CONTROLS, wrong))["blank"]["metrics"]["open_exact"]
    assert alone["p"] == 2 / 2**10 and alone["p_holm"] == pytest.approx(3 * alone["p"])
    assert three["difference"]["p_holm"] == pytest.approx(9 * alone["p"])


# --- Evaluations --------------------------------------------------------------------------------------------


def test_an_evaluation_asks_the_same_of_every_control(tmp_path: Path) -> None:
    ticks: list[tuple[int, int]] = []
    found = run(
        Looking(),
        fake_dataset(EXAMPLES),
        tmp_path,
        controls="blank,noise,other",
        batch_pairs=10,
        progress=lambda done, total: ticks.append((done, total)),
    )
    shown = swapped_images(EXAMPLES)
    assert {p.id: p.text for p in found.predictions} == {e.id: e.answer for e in EXAMPLES}
    assert {p.text for p in found.controls["blank"]} == {f"level {GREY}"}
    assert {p.id: p.text for p in found.controls["other"]} == {
        e.id: f"level {shown[e.images[0]]}" for e in EXAMPLES
    }
    assert len({p.text for p in found.controls["noise"]}) > 10
    assert ticks[-1] == (160, 160) and [done for done, _ in ticks] == sorted({done for done, _ in ticks})
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["settings"]["controls"] == list(CONTROLS) == list(metrics["reliance"])
    for about in metrics["reliance"].values():
        one = about["metrics"]["global_exact"]
        assert one["real"]["value"] == one["difference"]["value"] == one["earned"]["value"] == 1.0
        assert one["replaced"]["value"] == 0.0 and one["difference"]["p_holm"] < 0.01
    rows = [json.loads(line) for line in (tmp_path / "predictions-other.jsonl").read_text().splitlines()]
    assert [row["prediction"] for row in rows] == [p.text for p in found.controls["other"]]
    assert [row["images"] for row in rows] == [list(e.images) for e in EXAMPLES]
    assert len(read_run(tmp_path)[0]) == 40, "the run reads back as one without controls"
    assert "100.0 [100.0, 100.0]" in metrics_text({**metrics, "out": "run"})


def test_who_does_not_look_earns_nothing_and_files_of_an_earlier_run_go(tmp_path: Path) -> None:
    dataset = fake_dataset(EXAMPLES)
    found = run(Looking("level 50"), dataset, tmp_path, controls="noise,blank")
    for about in found.scores.reliance.values():
        one = about["metrics"]["global_exact"]
        assert (one["real"]["value"], one["difference"]["value"], one["earned"]["value"]) == (0.05, 0.0, 0.0)
        assert one["difference"]["p"] == 1.0
    assert {path.name for path in tmp_path.glob("predictions*")} == {
        "predictions.jsonl",
        "predictions-noise.jsonl",
        "predictions-blank.jsonl",
    }
    assert run(Looking("level 50"), dataset, tmp_path).scores.reliance == {}
    assert [path.name for path in tmp_path.glob("predictions*")] == ["predictions.jsonl"]
    assert "reliance" not in json.loads((tmp_path / "metrics.json").read_text())


def test_reports_are_scored_without_their_images_too(tmp_path: Path) -> None:
    reports = [Example(f"r{n}", (f"{n}0", f"{n}5"), "", f"level {n}0", "report", "test") for n in range(2, 8)]
    found = run(Looking(), fake_dataset(reports), tmp_path, controls="other")
    about = found.scores.reliance["other"]["metrics"]
    assert set(about) == {"rouge_l/none", "bleu_4/none", "cider_d/none"}
    rouge = about["rouge_l/none"]
    assert rouge["real"]["value"] == 1.0 and 0 < rouge["earned"]["value"] < 1, "the word 'level' stays right"


def test_reports_of_the_chest_get_a_table_by_finding(tmp_path: Path) -> None:
    chest = [Example("a", ("10",), "", "The heart is enlarged. No effusion.", "report", "test")]
    run(Looking("The heart is enlarged. Pleural effusion."), fake_dataset(chest), tmp_path)
    table = json.loads((tmp_path / "metrics.json").read_text())["findings"]["findings_rules"]
    assert table["Cardiomegaly"]["f1"] == 1.0
    assert table["Pleural Effusion"] == {
        "precision": 0.0,
        "recall": 0.0,
        "f1": 0.0,
        "predictions": 1,
        "references": 0,
    }
    run(Looking("level 10"), fake_dataset(EXAMPLES), tmp_path)
    assert "findings" not in json.loads((tmp_path / "metrics.json").read_text())


def test_where_there_is_no_other_image_nothing_is_answered(tmp_path: Path) -> None:
    dataset = fake_dataset(EXAMPLES[:2])
    with pytest.raises(InputError, match="no other can be shown"):
        run(Looking(), dataset, tmp_path / "run", controls="other")
    assert not (tmp_path / "run").exists()


def test_a_cache_of_control_images_holds_none_of_the_real_ones() -> None:
    dataset = fake_dataset(EXAMPLES)
    family = Looking()
    cache = ImageCache(cast(Family, family), dataset)
    assert cache("50")["mean"] == 50
    found = run(family, dataset, controls="blank", images=cache)
    assert {p.text for p in found.controls["blank"]} == {f"level {GREY}"}
    assert cache("50")["mean"] == 50
