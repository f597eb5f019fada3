"""The content of a phantom image: a `Scene`, sampled from a seed, determines all answers about the image."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Literal

from normtune.errors import InputError, did_you_mean

Hospital = Literal["a", "b"]
HospitalName = Literal["a", "b", "acquisition", "wording", "knowledge"]
Region = Literal["chest", "abdomen", "head"]
Modality = Literal["x-ray", "ct", "mri"]
Plane = Literal["frontal", "axial", "coronal", "sagittal"]
Weighting = Literal["", "t1", "t2"]
Device = Literal["", "pacemaker", "catheter"]
Side = Literal["", "left", "right"]  # the patient's; the patient's right is at the left of the image


@dataclass(frozen=True)
class Profile:
    """Which hospital's scenes, images and words a hospital has; with `new_findings`, A has none of its findings."""

    scenes: Hospital = "a"
    acquisition: Hospital = "a"
    wording: Hospital = "a"
    new_findings: bool = False


# Hospital A; hospital B, which differs in everything; and hospitals that differ from A in one thing each.
PROFILES: dict[HospitalName, Profile] = {
    "a": Profile(),
    "b": Profile("b", "b", "b"),
    "acquisition": Profile(acquisition="b"),
    "wording": Profile(wording="b"),
    "knowledge": Profile(new_findings=True),
}
# The organs that each view shows. Other organs are not drawn.
ORGANS: dict[tuple[Region, Plane], tuple[str, ...]] = {
    ("chest", "frontal"): ("lung", "heart"),
    ("chest", "axial"): ("lung", "heart"),
    ("chest", "coronal"): ("lung", "heart", "liver", "stomach"),
    ("abdomen", "axial"): ("liver", "spleen", "kidney", "stomach"),
    ("abdomen", "coronal"): ("lung", "liver", "spleen", "kidney", "stomach"),
    ("head", "axial"): ("brain",),
    ("head", "sagittal"): ("brain", "cerebellum"),
}


@dataclass(frozen=True)
class Finding:
    """One abnormality. Attributes that do not apply are empty."""

    kind: str
    organ: str
    side: Side = ""
    zone: str = ""  # upper, middle or lower in a lung; the lobe in the brain
    size: Literal["", "small", "large"] = ""
    count: int = 1  # number of nodules


@dataclass(frozen=True)
class Scene:
    """The complete content of one image; `seed` also determines the shapes of the anatomy."""

    seed: int
    region: Region
    modality: Modality
    weighting: Weighting
    plane: Plane
    organs: tuple[str, ...]
    findings: tuple[Finding, ...]
    missing_kidney: Side = ""
    device: Device = ""

    @property
    def look(self) -> str:
        """Key of the grey values in `TISSUE`: x-ray, ct, t1 or t2."""
        return self.weighting or self.modality

    def finding(self, kind: str) -> Finding | None:
        """The finding of this kind, if the scene has one."""
        return next((finding for finding in self.findings if finding.kind == kind), None)


@dataclass(frozen=True)
class FindingKind:
    """One kind of finding: its frequency at the two hospitals, and the attributes that it has."""

    kind: str
    organs: tuple[str, ...]  # in which it can occur
    weight: dict[Hospital, float]  # relative frequency
    sided: bool = True
    zoned: bool = False
    sized: bool = False
    counted: bool = False


def _make_kind(kind: str, organs: str, a: float, b: float, **traits: bool) -> FindingKind:
    return FindingKind(kind, tuple(organs.split()), {"a": a, "b": b}, **traits)


_NODULE = _make_kind("nodule", "lung", 3, 1.5, zoned=True, counted=True)
_LUNG_MASS = _make_kind("mass", "lung", 2, 1.5, zoned=True)
_PNEUMONIA = _make_kind("pneumonia", "lung", 2, 2, zoned=True)
_EFFUSION = _make_kind("effusion", "lung", 2.5, 1.5, sized=True)
_PNEUMOTHORAX = _make_kind("pneumothorax", "lung", 0.7, 2.5, sized=True)
_HEMORRHAGE = _make_kind("hemorrhage", "brain", 3, 1.5, zoned=True)
_EDEMA = _make_kind("edema", "brain", 2.5, 1.5, zoned=True)
_TUMOR = _make_kind("tumor", "brain", 2.5, 2, zoned=True)
_ABDOMEN = (
    _make_kind("mass", "liver", 2.5, 1.5, sided=False),
    _make_kind("cyst", "liver kidney", 3, 2),
    _make_kind("splenomegaly", "spleen", 2, 1.5, sided=False),
    _make_kind("ascites", "abdomen", 0.7, 2.5, sided=False),
)
_CORONAL_CHEST = (_NODULE, _LUNG_MASS, _PNEUMONIA, _EFFUSION)

# The findings that each view can show.
KINDS: dict[tuple[Region, Plane], tuple[FindingKind, ...]] = {
    ("chest", "frontal"): (
        *_CORONAL_CHEST,
        _PNEUMOTHORAX,
        _make_kind("cardiomegaly", "heart", 2.5, 2, sided=False),
        _make_kind("fracture", "clavicle", 0.5, 2),
    ),
    ("chest", "axial"): (
        _make_kind("nodule", "lung", 3, 1.5, counted=True),
        _make_kind("mass", "lung", 2, 1.5),
        _make_kind("pneumonia", "lung", 2, 2),
        _EFFUSION,
        _PNEUMOTHORAX,
    ),
    ("chest", "coronal"): _CORONAL_CHEST,
    ("abdomen", "axial"): _ABDOMEN,
    ("abdomen", "coronal"): _ABDOMEN,
    ("head", "axial"): (
        _HEMORRHAGE,
        _EDEMA,
        _TUMOR,
        _make_kind("infarct", "brain", 0.5, 2.5, zoned=True),
        _make_kind("hydrocephalus", "brain", 2, 1.5, sided=False),
    ),
    ("head", "sagittal"): tuple(
        _make_kind(k.kind, "brain", k.weight["a"], k.weight["b"], sided=False, zoned=True)
        for k in (_HEMORRHAGE, _EDEMA, _TUMOR)
    ),
}
_STONE = _make_kind("stone", "kidney", 2, 2)

# Findings of the profile `knowledge`, which a model trained on A has never seen. Each is named in words of A.
_LUNG_CYST = _make_kind("lung cyst", "lung", 1, 1, zoned=True)
_LUNG_EDEMA = _make_kind("lung edema", "lung", 1, 1, sided=False)
_NEW_IN_ABDOMEN = (
    _make_kind("kidney tumor", "kidney", 1, 1),
    _make_kind("liver hemorrhage", "liver", 1, 1, sided=False),
)
_NEW_KINDS: dict[tuple[Region, Plane], tuple[FindingKind, ...]] = {
    ("chest", "frontal"): (_LUNG_CYST, _LUNG_EDEMA),
    ("chest", "axial"): (_make_kind("lung cyst", "lung", 1, 1), _LUNG_EDEMA),
    ("chest", "coronal"): (_LUNG_CYST, _LUNG_EDEMA),
    ("abdomen", "axial"): _NEW_IN_ABDOMEN,
    ("abdomen", "coronal"): _NEW_IN_ABDOMEN,
    ("head", "axial"): (_make_kind("brain cyst", "brain", 1, 1, zoned=True), _make_kind("skull tumor", "skull", 1, 1)),
    ("head", "sagittal"): (
        _make_kind("brain cyst", "brain", 1, 1, sided=False, zoned=True),
        _make_kind("skull tumor", "skull", 1, 1, sided=False),
    ),
}
NEW_FINDINGS = frozenset(kind.kind for kinds in _NEW_KINDS.values() for kind in kinds)

# The views, with their share of the images of each hospital.
_VIEWS: tuple[tuple[Region, Modality, Plane, dict[Hospital, float]], ...] = (
    ("chest", "x-ray", "frontal", {"a": 0.27, "b": 0.27}),
    ("chest", "ct", "axial", {"a": 0.07, "b": 0.09}),
    ("chest", "ct", "coronal", {"a": 0.06, "b": 0.04}),
    ("abdomen", "ct", "axial", {"a": 0.08, "b": 0.08}),
    ("abdomen", "mri", "axial", {"a": 0.08, "b": 0.08}),
    ("abdomen", "ct", "coronal", {"a": 0.06, "b": 0.06}),
    ("abdomen", "mri", "coronal", {"a": 0.07, "b": 0.06}),
    ("head", "ct", "axial", {"a": 0.10, "b": 0.11}),
    ("head", "mri", "axial", {"a": 0.12, "b": 0.13}),
    ("head", "mri", "sagittal", {"a": 0.09, "b": 0.08}),
)
LUNG_ZONES = ("upper", "middle", "lower")
LOBES = ("frontal", "parietal", "occipital")


def check_hospital(hospital: str) -> HospitalName:
    """`hospital` in lower case; an `InputError` if there is none with this name."""
    for name in PROFILES:
        if hospital.lower() == name:
            return name
    choices = ", ".join(PROFILES)
    raise InputError(f"no phantom hospital '{hospital}'{did_you_mean(hospital, PROFILES)} Choose one of {choices}.")


def possible_kinds(scene: Scene, hospital: HospitalName) -> tuple[FindingKind, ...]:
    """The findings that this scene's view can show, present or not. Only abdominal CT can show stones."""
    if PROFILES[hospital].new_findings:
        return _NEW_KINDS[scene.region, scene.plane]
    kinds = KINDS[scene.region, scene.plane]
    return (*kinds, _STONE) if scene.region == "abdomen" and scene.modality == "ct" else kinds


def sample_scene(seed: int, hospital: HospitalName) -> Scene:
    """Sample a scene: 30% are normal, 45% have one finding, 25% have two of different kinds.

    The hospitals "acquisition" and "wording" have the scenes of A. The scenes of "knowledge" have as many findings, but
    other ones; the rest is equal, because findings are sampled last.
    """
    like = PROFILES[hospital].scenes
    rng = random.Random(f"scene-{like}-{seed}")
    region, modality, plane, _ = rng.choices(_VIEWS, [view[3][like] for view in _VIEWS])[0]
    weightings: tuple[Weighting, ...] = ("t1", "t2")
    weighting: Weighting = rng.choice(weightings) if modality == "mri" else ""
    missing: Side = rng.choice(("left", "right")) if region == "abdomen" and rng.random() < 0.35 else ""
    devices: tuple[Device, ...] = ("pacemaker", "catheter")
    device: Device = rng.choice(devices) if modality == "x-ray" and rng.random() < 0.4 else ""
    empty = Scene(seed, region, modality, weighting, plane, ORGANS[region, plane], (), missing, device)
    findings: list[Finding] = []
    for _ in range(rng.choices((0, 1, 2), (0.30, 0.45, 0.25))[0]):
        used_kinds = {finding.kind for finding in findings}
        kinds = [kind for kind in possible_kinds(empty, hospital) if kind.kind not in used_kinds]
        kind = rng.choices(kinds, [kind.weight[like] for kind in kinds])[0]
        findings.append(_sample_finding(kind, findings, missing, rng))
    order = [kind.kind for kind in possible_kinds(empty, hospital)]
    findings.sort(key=lambda finding: order.index(finding.kind))
    return Scene(seed, region, modality, weighting, plane, empty.organs, tuple(findings), missing, device)


def _sample_finding(kind: FindingKind, others: list[Finding], missing: Side, rng: random.Random) -> Finding:
    """Sample the attributes of a finding: on another side than the other findings, if possible.

    A finding is never in a missing kidney.
    """
    organ = rng.choice(kind.organs)
    both_sides: tuple[Side, ...] = ("left", "right")
    possible = [side for side in both_sides if organ != "kidney" or side != missing]
    used_sides = {other.side for other in others}
    sides = [side for side in possible if side not in used_sides] or possible
    side: Side = rng.choice(sides) if kind.sided and organ != "liver" else ""
    count = rng.choice((1, 2, 3)) if kind.counted else 1
    zone = ""
    if kind.zoned and count == 1:
        zones = LOBES if organ == "brain" else LUNG_ZONES
        zone = rng.choice([name for name in zones if side or name not in {other.zone for other in others}])
    return Finding(kind.kind, organ, side, zone, rng.choice(("small", "large")) if kind.sized else "", count)
