"""Hospitals that differ from A in one thing: the others stay as they are, and so do the datasets A and B."""

from __future__ import annotations

import hashlib
import re
from dataclasses import replace

import numpy as np
import pytest

from normtune import open_dataset
from normtune.data.phantom import (
    HospitalName,
    ask_questions,
    phantom_dataset,
    render,
    sample_acquisition,
    sample_scene,
    write_report,
)
from normtune.data.phantom.scene import NEW_FINDINGS

SEEDS = range(400)


@pytest.mark.parametrize(
    ("hospital", "digest"),
    [
        ("a", "371c6b239d14c3d4d0b1c8bc454d27434179230ce88aba4ba48d0936cb3af70c"),
        ("b", "33106dae07df86f9f58b6433c434bbd8251965a6d3279d4511becfe58a4aed6c"),
    ],
)
def test_scenes_acquisitions_and_texts_of_a_and_b_are_those_of_version_0_1(hospital: HospitalName, digest: str) -> None:
    text = hashlib.sha256()
    for example in phantom_dataset(hospital, {"train": 60, "validate": 2, "test": 20}, task="all").examples:
        text.update(repr((example.id, example.images, example.question, example.answer, example.kind)).encode())
        text.update(repr((example.split, sorted(example.meta.items()))).encode())
    for scene in (sample_scene(seed, hospital) for seed in SEEDS):
        text.update(repr((scene, sample_acquisition(scene, hospital))).encode())
    assert text.hexdigest() == digest


def test_the_hospital_acquisition_has_scenes_and_questions_of_a_and_images_in_the_style_of_b() -> None:
    changed = set()
    for scene in (sample_scene(seed, "a") for seed in SEEDS):
        assert sample_scene(scene.seed, "acquisition") == scene
        assert sample_acquisition(scene, "acquisition") == sample_acquisition(scene, "b")
        assert write_report(scene, "acquisition") == write_report(scene, "a")
        questions, of_a = ask_questions(scene, "acquisition"), ask_questions(scene, "a")
        assert [question.question for question in questions] == [question.question for question in of_a]
        changed |= {q.meta["type"] for q, other in zip(questions, of_a, strict=True) if q.answer != other.answer}
    assert changed == {"color"}  # the displayed shade, which inversion changes
    scene = sample_scene(7, "a")
    assert (render(scene, "acquisition") == render(scene, "b")).all()
    assert (render(scene, "acquisition") != render(scene, "a")).any()


def test_the_hospital_wording_has_scenes_and_images_of_a_and_texts_of_b() -> None:
    for seed in SEEDS[::20]:
        scene = sample_scene(seed, "a")
        assert sample_scene(seed, "wording") == scene
        assert sample_acquisition(scene, "wording") == sample_acquisition(scene, "a")
        assert (render(scene, "wording") == render(scene, "a")).all()
        assert write_report(scene, "wording") == write_report(scene, "b")
        texts, of_a = ({q.question for q in ask_questions(scene, name)} for name in ("wording", "a"))
        assert not texts & of_a
    # The findings of scenes are as frequent as at A, so that absent findings are asked about as often as present ones.
    presence = [
        question.answer == "yes"
        for seed in SEEDS
        for question in ask_questions(sample_scene(seed, "wording"), "wording")
        if question.meta["type"] == "presence"
    ]
    assert 0.4 < np.mean(presence) < 0.62


def test_the_hospital_knowledge_has_new_findings_in_the_scenes_and_images_of_a() -> None:
    kinds = set()
    for seed in SEEDS:
        scene, of_a = sample_scene(seed, "knowledge"), sample_scene(seed, "a")
        assert replace(scene, findings=()) == replace(of_a, findings=())
        assert len(scene.findings) == len(of_a.findings)
        assert sample_acquisition(scene, "knowledge") == sample_acquisition(of_a, "a")
        kinds |= {finding.kind for finding in scene.findings}
        assert not {finding.kind for finding in of_a.findings} & NEW_FINDINGS
    assert kinds == NEW_FINDINGS
    assert len(kinds) == 6


def test_new_findings_are_named_in_words_of_a_and_asked_about_by_no_other_hospital() -> None:
    words: dict[tuple[str, str], set[str]] = {}
    for name in ("a", "b", "acquisition", "wording", "knowledge"):
        for seed in range(1500):
            scene = sample_scene(seed, name)
            texts = [("answer", write_report(scene, name))]
            for question in ask_questions(scene, name):
                texts += [("question", question.question), ("answer", question.answer)]
            for kind, text in texts:
                words.setdefault((name, kind), set()).update(re.findall(r"[a-z0-9-]+", text.lower()))
                assert name == "knowledge" or not any(finding in text.lower() for finding in NEW_FINDINGS), text
    for kind in ("question", "answer"):
        assert words["knowledge", kind] <= words["a", kind]
        assert words["acquisition", kind] == words["a", kind]
        assert words["wording", kind] <= words["a", kind]


def test_answers_about_new_findings_are_balanced_and_follow_from_the_scene() -> None:
    answers = []
    for scene in (sample_scene(seed, "knowledge") for seed in range(800)):
        names = [finding.kind for finding in scene.findings]
        for question in ask_questions(scene, "knowledge"):
            asked = next((kind for kind in NEW_FINDINGS if kind in question.question), None)
            if asked and question.meta["type"] == "presence":
                assert (question.answer == "yes") == (asked in names)
                answers.append(question.answer == "yes")
    assert 0.4 < np.mean(answers) < 0.62


def test_new_findings_can_be_seen() -> None:
    """Images with and without the findings differ by far more than noise."""
    seen = set()
    for scene in (sample_scene(seed, "knowledge") for seed in SEEDS):
        if len(scene.findings) == 1 and scene.findings[0].kind in NEW_FINDINGS:
            images = [
                render(drawn, "knowledge", rng=np.random.default_rng(0)).astype(int)
                for drawn in (scene, replace(scene, findings=()))
            ]
            assert (abs(images[0] - images[1]) > 25).sum() > 40, scene
            seen.add((scene.findings[0].kind, scene.plane))
    assert len(seen) >= 12


def test_each_hospital_is_a_dataset_with_its_own_image_keys() -> None:
    for name in ("acquisition", "wording", "knowledge"):
        dataset = open_dataset(f"phantom-{name}:3/1/2")
        assert dataset.name == f"phantom-{name}"
        assert dataset.train[0].id == f"{name}-000000-00"
        assert len({example.images for example in dataset.examples}) == 6
        assert dataset.open_image(f"{name}-000005").size == (96, 96)
