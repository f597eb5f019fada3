"""What a phantom shows: a `Scene` is sampled from a seed, and all answers about its image follow from it."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Literal, get_args

from normtune.errors import InputError, did_you_mean

Hospital = Literal["a", "b"]
Region = Literal["chest", "abdomen", "head"]
Modality = Literal["x-ray", "ct", "mri"]
Plane = Literal["frontal", "axial", "coronal", "sagittal"]
Weighting = Literal["", "t1", "t2"]
Device = Literal["", "pacemaker", "catheter"]
Side = Literal["", "left", "right"]  # the patient's; the patient's right is at the left of the image

# The organs that a view shows; what is not listed is not drawn.
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
    """One abnormality. `zone` is upper/middle/lower in a lung, a lobe's name in the brain, else empty."""

    kind: str
    organ: str
    side: Side = ""
    zone: str = ""
    size: Literal["", "small", "large"] = ""
    count: int = 1


@dataclass(frozen=True)
class Scene:
    """All that is known of one image before it is drawn; `seed` also fixes the shapes of the anatomy."""

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
        """The grey map: x-ray, ct, t1 or t2."""
        return self.weighting or self.modality

    def finding(self, kind: str) -> Finding | None:
        return next((finding for finding in self.findings if finding.kind == kind), None)


@dataclass(frozen=True)
class FindingKind:
    """How often hospitals A and B see a finding, and the attributes it may take."""

    kind: str
    organs: tuple[str, ...]
    weight: dict[Hospital, float]
    sided: bool = True
    zoned: bool = False
    sized: bool = False
    counted: bool = False


def _kind(kind: str, organs: str, a: float, b: float, **traits: bool) -> FindingKind:
    return FindingKind(kind, tuple(organs.split()), {"a": a, "b": b}, **traits)


_NODULE = _kind("nodule", "lung", 3, 1.5, zoned=True, counted=True)
_LUNG_MASS = _kind("mass", "lung", 2, 1.5, zoned=True)
_PNEUMONIA = _kind("pneumonia", "lung", 2, 2, zoned=True)
_EFFUSION = _kind("effusion", "lung", 2.5, 1.5, sized=True)
_PNEUMOTHORAX = _kind("pneumothorax", "lung", 0.7, 2.5, sized=True)
_HEMORRHAGE = _kind("hemorrhage", "brain", 3, 1.5, zoned=True)
_EDEMA = _kind("edema", "brain", 2.5, 1.5, zoned=True)
_TUMOR = _kind("tumor", "brain", 2.5, 2, zoned=True)
_ABDOMEN = (
    _kind("mass", "liver", 2.5, 1.5, sided=False),
    _kind("cyst", "liver kidney", 3, 2),
    _kind("splenomegaly", "spleen", 2, 1.5, sided=False),
    _kind("ascites", "abdomen", 0.7, 2.5, sided=False),
)
_CORONAL_CHEST = (_NODULE, _LUNG_MASS, _PNEUMONIA, _EFFUSION)

# The findings that a view can show.
KINDS: dict[tuple[Region, Plane], tuple[FindingKind, ...]] = {
    ("chest", "frontal"): (
        *_CORONAL_CHEST,
        _PNEUMOTHORAX,
        _kind("cardiomegaly", "heart", 2.5, 2, sided=False),
        _kind("fracture", "clavicle", 0.5, 2),
    ),
    ("chest", "axial"): (
        _kind("nodule", "lung", 3, 1.5, counted=True),
        _kind("mass", "lung", 2, 1.5),
        _kind("pneumonia", "lung", 2, 2),
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
        _kind("infarct", "brain", 0.5, 2.5, zoned=True),
        _kind("hydrocephalus", "brain", 2, 1.5, sided=False),
    ),
    ("head", "sagittal"): tuple(
        _kind(k.kind, "brain", k.weight["a"], k.weight["b"], sided=False, zoned=True)
        for k in (_HEMORRHAGE, _EDEMA, _TUMOR)
    ),
}
_STONE = _kind("stone", "kidney", 2, 2)

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


def check_hospital(hospital: str) -> Hospital:
    """`hospital` in lower case.

    Raises:
        InputError: it is neither "a" nor "b".
    """
    known: tuple[Hospital, ...] = get_args(Hospital)
    for name in known:
        if hospital.lower() == name:
            return name
    raise InputError(f"no phantom hospital '{hospital}'{did_you_mean(hospital, known)} Choose a or b.")


def kinds_of(scene: Scene) -> tuple[FindingKind, ...]:
    """The findings that this scene's view could show, present or not."""
    kinds = KINDS[scene.region, scene.plane]
    return (*kinds, _STONE) if scene.region == "abdomen" and scene.modality == "ct" else kinds


def sample_scene(seed: int, hospital: Hospital) -> Scene:
    """Draw a scene: about 30% normal, 45% with one finding, 25% with two of different kinds and sides."""
    rng = random.Random(f"scene-{hospital}-{seed}")
    region, modality, plane, _ = rng.choices(_VIEWS, [view[3][hospital] for view in _VIEWS])[0]
    weightings: tuple[Weighting, ...] = ("t1", "t2")
    weighting: Weighting = rng.choice(weightings) if modality == "mri" else ""
    missing: Side = rng.choice(("left", "right")) if region == "abdomen" and rng.random() < 0.35 else ""
    devices: tuple[Device, ...] = ("pacemaker", "catheter")
    device: Device = rng.choice(devices) if modality == "x-ray" and rng.random() < 0.4 else ""
    bare = Scene(seed, region, modality, weighting, plane, ORGANS[region, plane], (), missing, device)
    findings: list[Finding] = []
    for _ in range(rng.choices((0, 1, 2), (0.30, 0.45, 0.25))[0]):
        taken = {finding.kind for finding in findings}
        kinds = [kind for kind in kinds_of(bare) if kind.kind not in taken]
        kind = rng.choices(kinds, [kind.weight[hospital] for kind in kinds])[0]
        findings.append(_draw(kind, findings, missing, rng))
    order = [kind.kind for kind in kinds_of(bare)]
    findings.sort(key=lambda finding: order.index(finding.kind))
    return Scene(seed, region, modality, weighting, plane, bare.organs, tuple(findings), missing, device)


def _draw(kind: FindingKind, others: list[Finding], missing: Side, rng: random.Random) -> Finding:
    """Attributes for one finding: away from the side of the others, and not in a kidney that is missing."""
    organ = rng.choice(kind.organs)
    both: tuple[Side, ...] = ("left", "right")
    possible = [side for side in both if organ != "kidney" or side != missing]
    taken = {other.side for other in others}
    sides = [side for side in possible if side not in taken] or possible
    side: Side = rng.choice(sides) if kind.sided and organ != "liver" else ""
    count = rng.choice((1, 2, 3)) if kind.counted else 1
    zone = ""
    if kind.zoned and count == 1:
        zones = LOBES if organ == "brain" else LUNG_ZONES
        zone = rng.choice([name for name in zones if side or name not in {other.zone for other in others}])
    return Finding(kind.kind, organ, side, zone, rng.choice(("small", "large")) if kind.sized else "", count)
