"""Questions with known answers about a scene, in the style of SLAKE (Liu 2021) and VQA-RAD (Lau 2018).

A family is one kind of question, such as "modality" or "presence", with several wordings.

Yes/no questions are sampled so that each family which both hospitals ask is answered "yes" about as often as
"no": a finding that is absent is asked about with the frequency with which it is present in other scenes.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

from normtune.data.phantom.acquisition import sample_acquisition
from normtune.data.phantom.scene import (
    NEW_FINDINGS,
    ORGANS,
    PROFILES,
    Finding,
    FindingKind,
    Hospital,
    HospitalName,
    Scene,
    possible_kinds,
)
from normtune.data.phantom.wording import (
    FUNCTIONS,
    INSIDE,
    LARGEST,
    NOUNS,
    TEMPLATES,
    TERMS,
    finding_term,
    location_term,
)
from normtune.data.records import Kind

MIN_QUESTIONS, MAX_QUESTIONS = 8, 14  # number of questions of one image
# The answers of these families do not depend on the findings; a hospital with new findings does not ask them.
_NOT_ABOUT_FINDINGS = {
    *("modality", "modality_is", "weighting", "region", "region_is", "plane", "plane_is", "contains", "largest"),
    *("color", "device", "device_is", "function", "count_kidneys"),
}


class Question(NamedTuple):
    """A question; `meta` holds its family as "type", and the image's "modality" and "organ"."""

    question: str
    answer: str
    kind: Kind
    meta: dict[str, str]


@dataclass(frozen=True)
class _Asker:
    """Writes questions about one scene in the wording of one hospital; `rng` selects among wordings."""

    scene: Scene
    hospital: HospitalName
    rng: random.Random

    @property
    def wording(self) -> Hospital:
        return PROFILES[self.hospital].wording

    def ask(self, family: str, answer: str | bool, **words: str) -> Question:
        """Write a question of a family, with `words` in its template; a bool answer becomes yes or no."""
        words.setdefault("noun", self.rng.choice(NOUNS[self.wording][self.scene.modality]))
        question = self.rng.choice(TEMPLATES[family][self.wording]).format(**words)
        closed = isinstance(answer, bool)
        text = ("yes" if answer else "no") if closed else str(answer)
        meta = {"type": family, "modality": self.scene.modality, "organ": self.scene.region}
        return Question(question, text, "closed" if closed else "open", meta)

    def term(self, concept: str) -> str:
        """The hospital's word for a concept."""
        return TERMS[self.wording][concept]

    def name(self, finding: Finding | FindingKind) -> str:
        """The hospital's word for a finding."""
        organ = finding.organ if isinstance(finding, Finding) else finding.organs[0]
        return finding_term(finding.kind, organ, self.wording)

    def has(self, *kinds: str) -> bool:
        return any(finding.kind in kinds for finding in self.scene.findings)


def ask_questions(scene: Scene, hospital: HospitalName) -> list[Question]:
    """Write 8 to 14 different questions about one scene; they depend only on the scene and the hospital.

    The hospital "knowledge" asks about findings only, fewer questions if the scene has none.
    """
    wording = PROFILES[hospital].wording
    asker = _Asker(scene, hospital, random.Random(f"questions-{wording}-{scene.seed}"))
    questions: dict[str, Question] = {}
    reserve: dict[str, Question] = {}  # not selected; used if there are fewer than MIN_QUESTIONS
    for family, share in _FAMILY_SHARES.items():
        for question in family(asker):
            if PROFILES[hospital].new_findings and question.meta["type"] in _NOT_ABOUT_FINDINGS:
                continue
            target = questions if asker.rng.random() < share[wording] else reserve
            target.setdefault(question.question, question)
    for family in (_presence, _balanced):  # always called: they select at random themselves
        for question in family(asker):
            questions.setdefault(question.question, question)
    extra = [question for text, question in reserve.items() if text not in questions]
    asker.rng.shuffle(extra)
    selected = list(questions.values())
    selected += extra[: max(0, MIN_QUESTIONS - len(selected))]
    asker.rng.shuffle(selected)
    return selected[:MAX_QUESTIONS]


def _attribute(name: str, asker: _Asker) -> Iterator[Question]:
    """Ask for an attribute of the scene; the family has its name. "frontal" is no plane of a section."""
    if (value := getattr(asker.scene, name)) not in ("", "frontal"):
        yield asker.ask(name, asker.term(value))


def _finding_attribute(name: str, asker: _Asker) -> Iterator[Question]:
    """Ask for an attribute of each finding that has it; the family has its name."""
    for finding in asker.scene.findings:
        if value := getattr(finding, name):
            yield asker.ask(name, asker.term(value), finding=asker.name(finding))


def _modality_is(asker: _Asker) -> Iterator[Question]:
    modality = _true_or_other(asker, asker.scene.modality, ["x-ray", "ct", "mri"])
    article = "an" if modality in ("x-ray", "mri") else "a"
    yield asker.ask("modality_is", modality == asker.scene.modality, article=article, modality=asker.term(modality))


def _true_or_other(asker: _Asker, truth: str, values: list[str]) -> str:
    """The true value half of the time, else another one, so that half of the yes/no answers are yes."""
    return truth if asker.rng.random() < 0.5 else asker.rng.choice([value for value in values if value != truth])


def _region_is(asker: _Asker) -> Iterator[Question]:
    region = _true_or_other(asker, asker.scene.region, ["chest", "abdomen", "head"])
    yield asker.ask("region_is", region == asker.scene.region, region=asker.term(region))


def _plane_is(asker: _Asker) -> Iterator[Question]:
    """Sagittal sections are rare, so that "Is it sagittal?" is rarely asked about other sections."""
    if asker.scene.plane == "frontal":
        return
    plane: str = asker.scene.plane
    if asker.rng.random() < 0.5:
        others = {"axial": 0.5, "coronal": 0.4, "sagittal": 0.2}
        del others[plane]
        plane = asker.rng.choices(list(others), list(others.values()))[0]
    yield asker.ask("plane_is", plane == asker.scene.plane, plane=asker.term(plane))


def _contains(asker: _Asker) -> Iterator[Question]:
    """Ask for an organ that is present or one that is not. With one kidney missing, the kidney is present."""
    present = list(asker.scene.organs)
    absent = sorted({organ for organs in ORGANS.values() for organ in organs} - set(present))
    name = asker.rng.choice(present if asker.rng.random() < 0.5 else absent)
    yield asker.ask("contains", name in present, organ=name)


def _largest(asker: _Asker) -> Iterator[Question]:
    yield asker.ask("largest", LARGEST[asker.scene.region], inside=INSIDE[asker.scene.region])


def _diseases(asker: _Asker) -> Iterator[Question]:
    yield asker.ask("diseases", ", ".join(map(asker.name, asker.scene.findings)) or asker.term("none"))


def _side_is(asker: _Asker) -> Iterator[Question]:
    for finding in asker.scene.findings:
        if finding.side:
            side = asker.rng.choice(("left", "right"))
            words = {"finding": asker.name(finding), "side": asker.term(side)}
            yield asker.ask("side_is", side == finding.side, **words)


def _locations(asker: _Asker) -> Iterator[Question]:
    findings = [f for f in asker.scene.findings if f.side or f.zone or f.kind in ("mass", "cyst")]
    for finding in findings:
        where = location_term(finding.organ, finding.side, finding.zone, asker.wording)
        if len(asker.scene.findings) == 1 and asker.rng.random() < 0.6:
            yield asker.ask("location_only", where)
        else:
            yield asker.ask("location", where, finding=asker.name(finding))


def _organ_abnormal(asker: _Asker) -> Iterator[Question]:
    organs = {finding.organ for finding in asker.scene.findings}
    if len(organs) == 1 and not organs & {"brain", "abdomen"}:
        yield asker.ask("organ_abnormal", organs.pop())


def _counts(asker: _Asker) -> Iterator[Question]:
    nodules = asker.scene.finding("nodule")
    if asker.scene.region == "chest" and (nodules or asker.rng.random() < 0.2):
        yield asker.ask("count_nodules", asker.term(str(nodules.count if nodules else 0)))
    if asker.scene.region == "abdomen":
        yield asker.ask("count_kidneys", asker.term("1" if asker.scene.missing_kidney else "2"))
    if asker.rng.random() < 0.4:
        yield asker.ask("count_kinds", asker.term(str(len(asker.scene.findings))))


def _colors(asker: _Asker) -> Iterator[Question]:
    """The displayed shade of the lung, of the fluid in the ventricles or of the skull."""
    if asker.scene.region == "chest":
        part, bright = "lung", False
    elif asker.scene.region == "head":
        part = asker.rng.choice(("skull", "fluid"))
        bright = asker.scene.modality == "ct" if part == "skull" else asker.scene.weighting == "t2"
    else:
        return
    inverted = sample_acquisition(asker.scene, asker.hospital).inverted
    yield asker.ask("color", asker.term("white" if bright != inverted else "black"), part=part)


def _devices(asker: _Asker) -> Iterator[Question]:
    if asker.scene.modality != "x-ray":
        return
    if asker.scene.device and asker.rng.random() < 0.5:
        yield asker.ask("device", asker.scene.device)
    # Ask about the present device; without one, ask about a random device half of the time.
    device = asker.scene.device or (asker.rng.choice(("pacemaker", "catheter")) if asker.rng.random() < 0.5 else "")
    if device:
        yield asker.ask("device_is", device == asker.scene.device, device=device)
    if asker.scene.device and asker.rng.random() < 0.25:
        yield asker.ask("device_is", False, device="catheter" if asker.scene.device == "pacemaker" else "pacemaker")


def _function(asker: _Asker) -> Iterator[Question]:
    yield asker.ask("function", FUNCTIONS[asker.scene.region])


def _presence(asker: _Asker) -> Iterator[Question]:
    """Ask for each finding that is present, and for one that is not."""
    present = {finding.kind: finding for finding in asker.scene.findings}
    for finding in present.values():
        yield _is_there(asker, finding, True)
    absent = [kind for kind in possible_kinds(asker.scene, asker.hospital) if kind.kind not in present]
    weights = [kind.weight[PROFILES[asker.hospital].scenes] for kind in absent]
    if absent:
        yield _is_there(asker, asker.rng.choices(absent, weights)[0], False)


# Finding -> family that asks for its sign, as in "Is the heart enlarged?" for cardiomegaly.
_FAMILY_OF_SIGN = {
    "cardiomegaly": "heart",
    "splenomegaly": "spleen",
    "hydrocephalus": "ventricles",
    "fracture": "clavicle",
    "pneumothorax": "collapse",
    "ascites": "free",
}


def _is_there(asker: _Asker, finding: Finding | FindingKind, truth: bool) -> Question:
    """Ask whether a finding is present, by its name or (only A) by its sign: "Is the heart enlarged?"."""
    if asker.wording == "a" and finding.kind in _FAMILY_OF_SIGN and asker.rng.random() < 0.4:
        return asker.ask(_FAMILY_OF_SIGN[finding.kind], truth)
    return asker.ask("presence", truth, finding=_with_article(asker.name(finding), asker.wording))


def _with_article(name: str, hospital: Hospital) -> str:
    """A writes "a nodule" and "pneumonia"; B writes no articles."""
    counted = ("nodule", "mass", "fracture", "cyst", "stone", "infarct", "pleural effusion", "tumor")
    if hospital == "b" or not name.endswith(counted):
        return name
    return f"an {name}" if name == "infarct" else f"a {name}"


def _balanced(asker: _Asker) -> Iterator[Question]:
    """Yes/no questions with uneven answers: scenes with the more frequent answer are asked less often."""
    normal = not asker.scene.findings
    if asker.rng.random() < (0.9 if normal else 0.39):
        family = asker.rng.choice(("normal", "abnormal"))
        yield asker.ask(family, normal == (family == "normal"))
    if asker.scene.region != "head" and asker.rng.random() < 0.7:
        organ = asker.rng.choice(
            ("lung", "heart") if asker.scene.plane == "frontal" else (LARGEST[asker.scene.region],)
        )
        healthy = all(finding.organ != organ for finding in asker.scene.findings)
        is_common_answer = healthy != (organ == "lung")
        if not is_common_answer or asker.rng.random() < (0.25 if organ == "heart" else 0.7):
            family = asker.rng.choice(("healthy", "unhealthy"))
            yield asker.ask(family, healthy == (family == "healthy"), organ=organ)
    if asker.wording == "b" or asker.has(*NEW_FINDINGS) or asker.rng.random() < 0.6:
        return
    if asker.scene.region == "chest":
        if asker.rng.random() < 0.5:
            yield asker.ask("any_round", asker.has("nodule"))
        else:
            # With a finding, ask about its side, else about a random side: yes and no are about even.
            kinds = ("nodule", "mass", "pneumonia", "effusion")
            sides = {finding.side for finding in asker.scene.findings if finding.kind in kinds}
            side = asker.rng.choice(sorted(sides) or ["left", "right"])
            yield asker.ask("any_opacity", side in sides, side=side)
    elif asker.scene.region == "head":
        yield asker.ask("any_lesion", asker.has("hemorrhage", "edema", "tumor", "infarct"))
    else:
        yield asker.ask("any_tumor", asker.has("mass", "cyst", "stone"))


Family = Callable[[_Asker], Iterator[Question]]
# Share of images for which each family is asked: A asks more about modality and organ, B more about findings.
_FAMILY_SHARES: dict[Family, dict[Hospital, float]] = {
    partial(_attribute, "modality"): {"a": 0.55, "b": 0.40},
    _modality_is: {"a": 0.55, "b": 0.35},
    partial(_attribute, "weighting"): {"a": 0.60, "b": 0.50},
    partial(_attribute, "region"): {"a": 0.45, "b": 0.35},
    _region_is: {"a": 0.45, "b": 0.30},
    partial(_attribute, "plane"): {"a": 0.55, "b": 0.40},
    _plane_is: {"a": 0.50, "b": 0.30},
    _contains: {"a": 0.80, "b": 0.50},
    _largest: {"a": 0.40, "b": 0.30},
    _diseases: {"a": 0.85, "b": 0.95},
    partial(_finding_attribute, "side"): {"a": 0.70, "b": 0.85},
    _side_is: {"a": 0.55, "b": 0.60},
    _locations: {"a": 0.80, "b": 0.95},
    _organ_abnormal: {"a": 0.40, "b": 0.50},
    _counts: {"a": 0.60, "b": 0.70},
    partial(_finding_attribute, "size"): {"a": 0.60, "b": 0.80},
    _colors: {"a": 0.50, "b": 0.60},
    _devices: {"a": 0.60, "b": 0.50},
    _function: {"a": 0.12, "b": 0.05},
}
