"""Questions with known answers about a scene, in the style of SLAKE (Liu 2021) and VQA-RAD (Lau 2018).

Yes/no questions are drawn so that each family that both hospitals ask is answered "yes" about as often as
"no": what is asked about without being there is drawn with the frequency of what is there.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from normtune.data.phantom.acquisition import acquisition
from normtune.data.phantom.scene import ORGANS, Finding, FindingKind, Hospital, Scene, kinds_of
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

FEWEST, MOST = 8, 14  # questions an image


class Question(NamedTuple):
    """`meta` holds the question's family as "type", and the image's "modality" and "organ"."""

    question: str
    answer: str
    kind: Kind
    meta: dict[str, str]


@dataclass(frozen=True)
class _Asker:
    """One scene at one hospital, and the dice that choose among wordings."""

    scene: Scene
    hospital: Hospital
    rng: random.Random

    def ask(self, family: str, answer: str | bool, **words: str) -> Question:
        words.setdefault("noun", self.rng.choice(NOUNS[self.hospital][self.scene.modality]))
        text = self.rng.choice(TEMPLATES[family][self.hospital]).format(**words)
        closed = isinstance(answer, bool)
        spoken = ("yes" if answer else "no") if closed else str(answer)
        meta = {"type": family, "modality": self.scene.modality, "organ": self.scene.region}
        return Question(text, spoken, "closed" if closed else "open", meta)

    def term(self, concept: str) -> str:
        return TERMS[self.hospital][concept]

    def name(self, finding: Finding | FindingKind) -> str:
        organ = finding.organ if isinstance(finding, Finding) else finding.organs[0]
        return finding_term(finding.kind, organ, self.hospital)

    def has(self, *kinds: str) -> bool:
        return any(finding.kind in kinds for finding in self.scene.findings)


def questions(scene: Scene, hospital: Hospital) -> list[Question]:
    """8 to 14 questions about one scene, no wording twice; a function of the scene and the hospital alone."""
    asker = _Asker(scene, hospital, random.Random(f"questions-{hospital}-{scene.seed}"))
    chosen: dict[str, Question] = {}
    reserve: dict[str, Question] = {}
    for family, share in _SHARES.items():
        for question in family(asker):
            kept = chosen if asker.rng.random() < share[hospital] else reserve
            kept.setdefault(question.question, question)
    for family in (_presence, _balanced):  # always asked: thinning them by chance is done inside
        for question in family(asker):
            chosen.setdefault(question.question, question)
    spare = [question for text, question in reserve.items() if text not in chosen]
    asker.rng.shuffle(spare)
    found = list(chosen.values())
    found += spare[: max(0, FEWEST - len(found))]
    asker.rng.shuffle(found)
    return found[:MOST]


def _modality(a: _Asker) -> Iterator[Question]:
    yield a.ask("modality", a.term(a.scene.modality))


def _modality_is(a: _Asker) -> Iterator[Question]:
    asked = _truth_or_other(a, a.scene.modality, ["x-ray", "ct", "mri"])
    article = "an" if asked in ("x-ray", "mri") else "a"
    yield a.ask("modality_is", asked == a.scene.modality, article=article, modality=a.term(asked))


def _truth_or_other(a: _Asker, truth: str, values: list[str]) -> str:
    """The truth half of the time, else another value: with equally frequent values, half are true."""
    return truth if a.rng.random() < 0.5 else a.rng.choice([value for value in values if value != truth])


def _weighting(a: _Asker) -> Iterator[Question]:
    if a.scene.weighting:
        yield a.ask("weighting", a.term(a.scene.weighting))


def _region(a: _Asker) -> Iterator[Question]:
    yield a.ask("region", a.term(a.scene.region))


def _region_is(a: _Asker) -> Iterator[Question]:
    asked = _truth_or_other(a, a.scene.region, ["chest", "abdomen", "head"])
    yield a.ask("region_is", asked == a.scene.region, region=a.term(asked))


def _plane(a: _Asker) -> Iterator[Question]:
    if a.scene.plane != "frontal":
        yield a.ask("plane", a.term(a.scene.plane))


def _plane_is(a: _Asker) -> Iterator[Question]:
    """Sagittal sections are rarer than the others, so they are asked about less where they are not."""
    if a.scene.plane == "frontal":
        return
    asked: str = a.scene.plane
    if a.rng.random() < 0.5:
        others = {"axial": 0.5, "coronal": 0.4, "sagittal": 0.2}
        del others[asked]
        asked = a.rng.choices(list(others), list(others.values()))[0]
    yield a.ask("plane_is", asked == a.scene.plane, plane=a.term(asked))


def _contains(a: _Asker) -> Iterator[Question]:
    """One organ that is there or one that is not; a missing kidney leaves the other one."""
    present = list(a.scene.organs)
    absent = sorted({organ for organs in ORGANS.values() for organ in organs} - set(present))
    asked = a.rng.choice(present if a.rng.random() < 0.5 else absent)
    yield a.ask("contains", asked in present, organ=asked)


def _largest(a: _Asker) -> Iterator[Question]:
    yield a.ask("largest", LARGEST[a.scene.region], inside=INSIDE[a.scene.region])


def _diseases(a: _Asker) -> Iterator[Question]:
    yield a.ask("diseases", ", ".join(map(a.name, a.scene.findings)) or a.term("none"))


def _sides(a: _Asker) -> Iterator[Question]:
    for finding in a.scene.findings:
        if finding.side:
            yield a.ask("side", a.term(finding.side), finding=a.name(finding))


def _side_is(a: _Asker) -> Iterator[Question]:
    for finding in a.scene.findings:
        if finding.side:
            asked = a.rng.choice(("left", "right"))
            words = {"finding": a.name(finding), "side": a.term(asked)}
            yield a.ask("side_is", asked == finding.side, **words)


def _locations(a: _Asker) -> Iterator[Question]:
    findings = [f for f in a.scene.findings if f.side or f.zone or f.kind in ("mass", "cyst")]
    for finding in findings:
        where = location_term(finding.organ, finding.side, finding.zone, a.hospital)
        if len(a.scene.findings) == 1 and a.rng.random() < 0.6:
            yield a.ask("location_only", where)
        else:
            yield a.ask("location", where, finding=a.name(finding))


def _organ_abnormal(a: _Asker) -> Iterator[Question]:
    organs = {finding.organ for finding in a.scene.findings}
    if len(organs) == 1 and not organs & {"brain", "abdomen"}:
        yield a.ask("organ_abnormal", organs.pop())


def _counts(a: _Asker) -> Iterator[Question]:
    nodules = a.scene.finding("nodule")
    if a.scene.region == "chest" and (nodules or a.rng.random() < 0.2):
        yield a.ask("count_nodules", a.term(str(nodules.count if nodules else 0)))
    if a.scene.region == "abdomen":
        yield a.ask("count_kidneys", a.term("1" if a.scene.missing_kidney else "2"))
    if a.rng.random() < 0.4:
        yield a.ask("count_kinds", a.term(str(len(a.scene.findings))))


def _sizes(a: _Asker) -> Iterator[Question]:
    for finding in a.scene.findings:
        if finding.size:
            yield a.ask("size", a.term(finding.size), finding=a.name(finding))


def _colors(a: _Asker) -> Iterator[Question]:
    """The shade of the lung, of the fluid in the ventricles or of the skull, as displayed."""
    if a.scene.region == "chest":
        part, bright = "lung", False
    elif a.scene.region == "head":
        part = a.rng.choice(("skull", "fluid"))
        bright = a.scene.modality == "ct" if part == "skull" else a.scene.weighting == "t2"
    else:
        return
    inverted = acquisition(a.scene, a.hospital).inverted
    yield a.ask("color", a.term("white" if bright != inverted else "black"), part=part)


def _devices(a: _Asker) -> Iterator[Question]:
    if a.scene.modality != "x-ray":
        return
    if a.scene.device and a.rng.random() < 0.5:
        yield a.ask("device", a.scene.device)
    # Asked of the device that is there, and as often where it is not.
    asked = a.scene.device or (a.rng.choice(("pacemaker", "catheter")) if a.rng.random() < 0.5 else "")
    if asked:
        yield a.ask("device_is", asked == a.scene.device, device=asked)
    if a.scene.device and a.rng.random() < 0.25:
        yield a.ask("device_is", False, device="catheter" if a.scene.device == "pacemaker" else "pacemaker")


def _function(a: _Asker) -> Iterator[Question]:
    yield a.ask("function", FUNCTIONS[a.scene.region])


def _presence(a: _Asker) -> Iterator[Question]:
    """Each finding that is there, and about as many of those that are not."""
    present = {finding.kind: finding for finding in a.scene.findings}
    for finding in present.values():
        yield _is_there(a, finding, True)
    absent = [kind for kind in kinds_of(a.scene) if kind.kind not in present]
    weights = [kind.weight[a.hospital] for kind in absent]
    if absent:
        yield _is_there(a, a.rng.choices(absent, weights)[0], False)


_ALONE = {
    "cardiomegaly": "heart",
    "splenomegaly": "spleen",
    "hydrocephalus": "ventricles",
    "fracture": "clavicle",
    "pneumothorax": "collapse",
    "ascites": "free",
}


def _is_there(a: _Asker, finding: Finding | FindingKind, truth: bool) -> Question:
    """Presence by name or, at A, at times by what it looks like ("Is the heart enlarged?")."""
    if a.hospital == "a" and finding.kind in _ALONE and a.rng.random() < 0.4:
        return a.ask(_ALONE[finding.kind], truth)
    return a.ask("presence", truth, finding=_with_article(a.name(finding), a.hospital))


def _with_article(name: str, hospital: Hospital) -> str:
    """A asks after "a nodule" and "pneumonia", B leaves articles out."""
    counted = ("nodule", "mass", "fracture", "cyst", "stone", "infarct", "pleural effusion", "brain tumor")
    if hospital == "b" or name not in counted:
        return name
    return f"an {name}" if name == "infarct" else f"a {name}"


def _balanced(a: _Asker) -> Iterator[Question]:
    """Yes/no questions whose truth is not even by nature: the commoner answer is asked about less often."""
    normal = not a.scene.findings
    if a.rng.random() < (0.9 if normal else 0.39):
        family = a.rng.choice(("normal", "abnormal"))
        yield a.ask(family, normal == (family == "normal"))
    if a.scene.region != "head" and a.rng.random() < 0.7:
        organ = a.rng.choice(("lung", "heart") if a.scene.plane == "frontal" else (LARGEST[a.scene.region],))
        healthy = all(finding.organ != organ for finding in a.scene.findings)
        commoner = healthy != (organ == "lung")
        if not commoner or a.rng.random() < (0.25 if organ == "heart" else 0.7):
            family = a.rng.choice(("healthy", "unhealthy"))
            yield a.ask(family, healthy == (family == "healthy"), organ=organ)
    if a.hospital == "b" or a.rng.random() < 0.6:
        return
    if a.scene.region == "chest":
        if a.rng.random() < 0.5:
            yield a.ask("any_round", a.has("nodule"))
        else:
            # With a finding, ask about its side or the other; the healthy side is the commoner.
            kinds = ("nodule", "mass", "pneumonia", "effusion")
            sides = {finding.side for finding in a.scene.findings if finding.kind in kinds}
            side = a.rng.choice(sorted(sides) or ["left", "right"])
            yield a.ask("any_opacity", side in sides, side=side)
    elif a.scene.region == "head":
        yield a.ask("any_lesion", a.has("hemorrhage", "edema", "tumor", "infarct"))
    else:
        yield a.ask("any_tumor", a.has("mass", "cyst", "stone"))


Family = Callable[[_Asker], Iterator[Question]]
# The share of images that are asked each family: A asks more of modality and organ, B more of the findings.
_SHARES: dict[Family, dict[Hospital, float]] = {
    _modality: {"a": 0.55, "b": 0.40},
    _modality_is: {"a": 0.55, "b": 0.35},
    _weighting: {"a": 0.60, "b": 0.50},
    _region: {"a": 0.45, "b": 0.35},
    _region_is: {"a": 0.45, "b": 0.30},
    _plane: {"a": 0.55, "b": 0.40},
    _plane_is: {"a": 0.50, "b": 0.30},
    _contains: {"a": 0.80, "b": 0.50},
    _largest: {"a": 0.40, "b": 0.30},
    _diseases: {"a": 0.85, "b": 0.95},
    _sides: {"a": 0.70, "b": 0.85},
    _side_is: {"a": 0.55, "b": 0.60},
    _locations: {"a": 0.80, "b": 0.95},
    _organ_abnormal: {"a": 0.40, "b": 0.50},
    _counts: {"a": 0.60, "b": 0.70},
    _sizes: {"a": 0.60, "b": 0.80},
    _colors: {"a": 0.50, "b": 0.60},
    _devices: {"a": 0.60, "b": 0.50},
    _function: {"a": 0.12, "b": 0.05},
}
