from __future__ import annotations

import re
from collections import Counter, defaultdict

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from normtune.data.phantom import Scene, ask_questions, phantom_dataset, sample_scene, write_report
from normtune.data.phantom.scene import Hospital
from normtune.data.phantom.wording import TERMS, finding_term

seeds, hospitals = st.integers(0, 10**6), st.sampled_from(["a", "b"])
Words = dict[str, set[str]]


def words(text: str) -> set[str]:
    return set(re.findall(r"[a-z0-9-]+", text.lower()))


@pytest.fixture(scope="module")
def vocabulary_of_a() -> Words:
    """The words that hospital A uses over its first 2000 scenes."""
    vocabulary: Words = {"question": set(), "answer": set()}
    for seed in range(2000):
        scene = sample_scene(seed, "a")
        for question in ask_questions(scene, "a"):
            vocabulary["question"] |= words(question.question)
            vocabulary["answer"] |= words(question.answer)
        vocabulary["answer"] |= words(write_report(scene, "a"))
    return vocabulary


@settings(max_examples=100)
@given(seeds, hospitals)
def test_each_scene_gets_8_to_14_different_questions(seed: int, hospital: Hospital) -> None:
    scene = sample_scene(seed, hospital)
    questions = ask_questions(scene, hospital)
    assert 8 <= len(questions) <= 14
    assert len({q.question for q in questions}) == len(questions)
    assert questions == ask_questions(scene, hospital)
    for question in questions:
        assert (question.kind == "closed") == (question.answer in ("yes", "no"))
        assert "{" not in question.question
        assert question.question[0].isupper()
        assert question.question.endswith("?")
        assert question.meta == {"type": question.meta["type"], "modality": scene.modality, "organ": scene.region}


@settings(max_examples=150)
@given(seeds)
def test_hospital_b_uses_only_words_of_hospital_a(vocabulary_of_a: Words, seed: int) -> None:
    scene = sample_scene(seed, "b")
    for question in ask_questions(scene, "b"):
        assert words(question.question) <= vocabulary_of_a["question"]
        assert words(question.answer) <= vocabulary_of_a["answer"]
    assert words(write_report(scene, "b")) <= vocabulary_of_a["answer"]


@settings(max_examples=150)
@given(seeds, hospitals)
def test_answers_follow_from_the_scene(seed: int, hospital: Hospital) -> None:
    scene = sample_scene(seed, hospital)
    terms = TERMS[hospital]
    names = [finding_term(f.kind, f.organ, hospital) for f in scene.findings]
    sides = {terms[f.side] for f in scene.findings if f.side}
    for question in ask_questions(scene, hospital):
        match question.meta["type"]:
            case "modality":
                assert question.answer == terms[scene.modality]
            case "region":
                assert question.answer == terms[scene.region]
            case "plane":
                assert question.answer == terms[scene.plane]
            case "diseases":
                assert question.answer == (", ".join(names) or terms["none"])
            case "abnormal":
                assert question.answer == ("yes" if names else "no")
            case "normal":
                assert question.answer == ("no" if names else "yes")
            case "side":
                assert question.answer in sides
            case "count_kidneys":
                assert question.answer == terms["1" if scene.missing_kidney else "2"]
            case "count_kinds":
                assert question.answer == terms[str(len(names))]
            case "contains":
                (organ,) = {o for o in ORGAN_WORDS if f" {o}" in f" {question.question.lower()}"}
                assert question.answer == ("yes" if organ in DRAWN[scene.region, scene.plane] else "no")
            case "device":
                assert question.answer == scene.device


ORGAN_WORDS = {"lung", "heart", "liver", "spleen", "kidney", "stomach", "brain", "cerebellum"}
# What a person sees in the images, written independently of the code that draws them.
DRAWN = {
    ("chest", "frontal"): {"lung", "heart"},
    ("chest", "axial"): {"lung", "heart"},
    ("chest", "coronal"): {"lung", "heart", "liver", "stomach"},
    ("abdomen", "axial"): {"liver", "spleen", "kidney", "stomach"},
    ("abdomen", "coronal"): {"lung", "liver", "spleen", "kidney", "stomach"},
    ("head", "axial"): {"brain"},
    ("head", "sagittal"): {"brain", "cerebellum"},
}


def yes_shares(hospital: Hospital) -> dict[str, float]:
    """Closed family -> its share of "yes" over 1500 scenes."""
    answers: dict[str, Counter[str]] = defaultdict(Counter)
    for seed in range(1500):
        for question in ask_questions(sample_scene(seed, hospital), hospital):
            if question.kind == "closed":
                answers[question.meta["type"]][question.answer] += 1
                answers["all"][question.answer] += 1
    return {family: count["yes"] / count.total() for family, count in answers.items() if count.total() > 200}


@pytest.mark.parametrize("hospital", ["a", "b"])
def test_closed_questions_are_balanced(hospital: Hospital) -> None:
    shares = yes_shares(hospital)
    assert abs(shares.pop("all") - 0.5) < 0.03
    assert {family: share for family, share in shares.items() if not 0.4 < share < 0.62} == {}
    assert len(shares) >= 9


def test_the_wording_of_hospital_b_does_not_give_the_answer_away() -> None:
    """Answers each question with its most frequent training answer, without the image."""
    data = phantom_dataset("b", images={"train": 600, "test": 300})
    answers: dict[str, Counter[str]] = defaultdict(Counter)
    for example in data.split("train"):
        answers[example.question][example.answer] += 1
    right: Counter[str] = Counter()
    for example in data.split("test"):
        guess = answers[example.question].most_common(1)
        right[example.kind] += bool(guess) and guess[0][0] == example.answer
    kinds = Counter(example.kind for example in data.split("test"))
    assert right["closed"] / kinds["closed"] < 0.6
    assert right["open"] / kinds["open"] < 0.5


@settings(max_examples=100)
@given(seeds, hospitals)
def test_a_report_names_every_finding_and_no_other(seed: int, hospital: Hospital) -> None:
    scene = sample_scene(seed, hospital)
    text = write_report(scene, hospital)
    assert write_report(scene, hospital) == text
    impression = re.search(r"Impression: ([^.]*)\.", text)
    assert impression is not None
    for finding in scene.findings:
        assert finding_term(finding.kind, finding.organ, hospital) in impression[1]
    assert ("normal" in impression[1]) == (not scene.findings)
    assert 2 <= text.count(".") <= 8
    assert _contradictions(scene, text) == []


def _contradictions(scene: Scene, text: str) -> list[str]:
    denied = {
        "not enlarged": {"cardiomegaly", "splenomegaly"},
        "No pleural fluid": {"effusion"},
        "No consolidation": {"pneumonia", "mass"},
        "lungs are clear": {"nodule", "mass", "pneumonia", "effusion", "pneumothorax"},
        "No free fluid": {"ascites"},
        "ventricles are normal": {"hydrocephalus"},
        "No bleeding": {"hemorrhage"},
        "No mass or swelling": {"tumor", "edema"},
    }
    kinds = {finding.kind for finding in scene.findings}
    return [words for words, excluded in denied.items() if words in text and excluded & kinds]
