from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from normtune.data.phantom import Scene, ask_questions, phantom_dataset, render, sample_acquisition, sample_scene
from normtune.data.phantom.acquisition import _DRAW
from normtune.data.phantom.canvas import Canvas
from normtune.data.phantom.scene import KINDS, ORGANS
from normtune.errors import InputError

seeds, hospitals = st.integers(0, 10**6), st.sampled_from(["a", "b"])


@settings(max_examples=40)
@given(seeds, hospitals)
def test_an_image_depends_only_on_its_seed(seed: int, hospital: str) -> None:
    scene = sample_scene(seed, hospital)
    assert sample_scene(seed, hospital) == scene
    picture = render(scene, hospital)
    assert picture.shape == (96, 96)
    assert picture.dtype == np.uint8
    assert (render(scene, hospital) == picture).all()
    assert picture.std() > 10  # the image is not blank
    assert (render(sample_scene(seed + 1, hospital), hospital) != picture).any()


@settings(max_examples=60)
@given(seeds, hospitals)
def test_a_scene_contains_only_what_its_view_can_show(seed: int, hospital: str) -> None:
    scene = sample_scene(seed, hospital)
    assert scene.organs == ORGANS[scene.region, scene.plane]
    known = {kind.kind for kind in KINDS[scene.region, scene.plane]} | {"stone"}
    kinds = [finding.kind for finding in scene.findings]
    assert set(kinds) <= known
    assert len(set(kinds)) == len(kinds) <= 2
    sides = [finding.side for finding in scene.findings if finding.side and finding.organ != "kidney"]
    assert len(set(sides)) == len(sides)
    assert all(f.side != scene.missing_kidney for f in scene.findings if f.organ == "kidney")
    assert bool(scene.weighting) == (scene.modality == "mri")


@pytest.mark.parametrize("size", [32, 224])
def test_all_sizes_show_the_same_anatomy(size: int) -> None:
    scene = sample_scene(7, "a")
    small, large = render(scene, "a", 32).astype(float), render(scene, "a", size).astype(float)
    step = size // 32
    means = large.reshape(32, step, 32, step).mean((1, 3))
    assert np.corrcoef(small.ravel(), means.ravel())[0, 1] > 0.9


def changed_by(scene: Scene, other: Scene) -> tuple[NDArray[np.integer], NDArray[np.integer]]:
    """Rows and columns of the pixels in which two scenes with the same anatomy differ, without noise."""
    pictures = []
    for drawn in (scene, other):
        canvas = Canvas(96, np.random.default_rng((scene.seed, 0)))
        _DRAW[scene.region, scene.plane](canvas, drawn)
        pictures.append(canvas.value)
    return np.nonzero(abs(pictures[0] - pictures[1]) > 0.1)


def scenes_with_one_finding() -> list[Scene]:
    scenes = (sample_scene(seed, "a") for seed in range(1200))
    return [scene for scene in scenes if len(scene.findings) == 1]


def test_findings_are_drawn_on_the_mirrored_side_of_the_image() -> None:
    checked = set()
    for scene in scenes_with_one_finding():
        (finding,) = scene.findings
        if finding.side:
            _, columns = changed_by(scene, replace(scene, findings=()))
            assert len(columns), finding
            assert ("left" if columns.mean() > 48 else "right") == finding.side, finding
            checked.add((finding.kind, scene.region, scene.plane))
    assert len(checked) >= 18


def test_zones_and_lobes_are_drawn_in_their_order() -> None:
    heights: dict[tuple[str, str, str], list[float]] = {}
    for scene in scenes_with_one_finding():
        (finding,) = scene.findings
        if finding.zone:
            rows, columns = changed_by(scene, replace(scene, findings=()))
            place = columns if scene.plane == "sagittal" else rows  # the face of a sagittal head is at the left
            heights.setdefault((scene.region, scene.plane, finding.zone), []).append(float(place.mean()))
    middle = {key: np.median(values) for key, values in heights.items()}
    for view, zones in (
        (("chest", "frontal"), ("upper", "middle", "lower")),
        (("chest", "coronal"), ("upper", "middle", "lower")),
        (("head", "axial"), ("frontal", "parietal", "occipital")),
        (("head", "sagittal"), ("frontal", "parietal", "occipital")),
    ):
        places = [middle[*view, zone] for zone in zones]
        assert places == sorted(places), view
        assert min(np.diff(places)) > 5, view


def test_every_finding_device_and_missing_kidney_can_be_seen() -> None:
    checked = set()
    for scene in (sample_scene(seed, "a") for seed in range(600)):
        for change in ({"findings": ()}, {"device": ""}, {"missing_kidney": ""}):
            other = replace(scene, **change)
            if other != scene and len(scene.findings) < 2:
                rows, columns = changed_by(scene, other)
                assert len(rows) >= 6, (scene, change)
                checked.update([*(f.kind for f in scene.findings), scene.device, bool(scene.missing_kidney)])
                if "missing_kidney" in change:
                    assert ("left" if columns.mean() > 48 else "right") == scene.missing_kidney
    assert {"pacemaker", "catheter", True, "cardiomegaly", "splenomegaly", "ascites", "hydrocephalus"} <= checked


def test_a_larger_size_of_effusion_covers_more() -> None:
    scene = next(s for s in scenes_with_one_finding() if s.findings[0].kind == "effusion")
    areas = []
    for size in ("small", "large"):
        sized = replace(scene, findings=(replace(scene.findings[0], size=size),))
        areas.append(len(changed_by(sized, replace(scene, findings=()))[0]))
    assert areas[1] > 1.5 * areas[0]


def test_the_answer_about_the_lungs_colour_is_that_displayed() -> None:
    answers = set()
    for scene in (sample_scene(seed, "b") for seed in range(400)):
        if (scene.region, scene.plane) != ("chest", "frontal") or scene.findings:
            continue
        picture = render(scene, "b").astype(float)
        lung, belly = picture[36:52, 22:32].mean(), picture[80:90, 40:56].mean()
        for question in ask_questions(scene, "b"):
            if question.meta["type"] == "color":
                assert question.answer == ("bright" if lung > belly else "dark")
                answers.add(question.answer)
    assert answers == {"bright", "dark"}


def test_the_hospitals_differ_in_contrast_noise_and_inversion() -> None:
    a, b = ([sample_acquisition(sample_scene(s, h), h) for s in range(300)] for h in ("a", "b"))
    assert max(settings.noise for settings in a) < min(settings.noise for settings in b)
    assert max(settings.white - settings.black for settings in b) < min(
        settings.white - settings.black for settings in a
    )
    assert sum(settings.inverted for settings in a) < 30 < 60 < sum(settings.inverted for settings in b)


def test_a_dataset_is_split_by_image_and_a_larger_one_begins_with_a_smaller_one() -> None:
    small, large = (phantom_dataset("b", images=5), phantom_dataset("b", images={"train": 9, "validate": 3, "test": 4}))
    assert [len({e.images for e in small.split(s)}) for s in ("train", "validate", "test")] == [5, 1, 1]
    for split in ("train", "validate", "test"):
        few, many = small.split(split), large.split(split)
        assert [(e.question, e.answer) for e in few] == [(e.question, e.answer) for e in many[: len(few)]]
        assert small.open_image(few[0].images[0]).tobytes() == large.open_image(many[0].images[0]).tobytes()
    keys = [{e.images[0] for e in large.split(split)} for split in ("train", "validate", "test")]
    assert sum(map(len, keys)) == len(set.union(*keys)) == 16


def test_dataset_seeds_share_no_image_and_the_default_sizes_are_300_60_and_120() -> None:
    first = phantom_dataset("a", images=3)
    other = phantom_dataset("a", images=3, seed=1)
    assert first.open_image("a-000000").tobytes() != other.open_image("a-000000").tobytes()
    default = phantom_dataset("a", task="report")
    assert [len(default.split(s)) for s in ("train", "validate", "test")] == [300, 60, 120]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hospital": "c"}, "no phantom hospital 'c'"),
        ({"hospital": "a", "size": 16}, "phantom size 16 is out of range"),
        ({"hospital": "a", "task": "vqq"}, "phantom task 'vqq' is unknown"),
        ({"hospital": "a", "images": {"validation": 3}}, "Splits are train, validate and test"),
        ({"hospital": "a", "images": {"train": -1}}, "'train: -1' is not possible"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        phantom_dataset(**options)
    with pytest.raises(InputError, match=r"holds no image 'a-9'\. Keys run to a-000002"):
        phantom_dataset("a", images=1).open_image("a-9")
