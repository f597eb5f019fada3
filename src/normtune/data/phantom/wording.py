"""The words of each hospital, and its question templates from questions.yaml.

B's questions use only words that also occur in A's questions, and B's answers and reports only words of A's
answers and reports, but with other meanings. The names of findings that A never has are made of such words too.
The reason: tuning norms cannot create the embedding of a word that was never trained.
"""

from __future__ import annotations

from importlib.resources import files

import yaml

from normtune.data.phantom.scene import Hospital

Terms = dict[str, str]

# Concept -> its word in questions and answers at hospital A and at B.
_TERMS = {
    "x-ray": ("x-ray", "radiograph"),
    "ct": ("ct", "computed tomography"),
    "mri": ("mri", "magnetic resonance"),
    "t1": ("t1", "t1 weighted"),
    "t2": ("t2", "t2 weighted"),
    "chest": ("chest", "thorax"),
    "abdomen": ("abdomen", "abdominal cavity"),
    "head": ("head", "skull"),
    "axial": ("transverse plane", "axial"),
    "coronal": ("coronal plane", "coronal"),
    "sagittal": ("sagittal plane", "sagittal"),
    "nodule": ("nodule", "round opacity"),
    "lung mass": ("mass", "tumor"),
    "liver mass": ("mass", "tumor"),
    "pneumonia": ("pneumonia", "consolidation"),
    "effusion": ("pleural effusion", "fluid"),
    "pneumothorax": ("pneumothorax", "collapsed lung"),
    "cardiomegaly": ("cardiomegaly", "enlarged heart"),
    "fracture": ("fracture", "broken collarbone"),
    "hemorrhage": ("hemorrhage", "bleeding"),
    "edema": ("brain edema", "swelling"),
    "tumor": ("brain tumor", "mass"),
    "infarct": ("infarct", "stroke"),
    "hydrocephalus": ("hydrocephalus", "enlarged ventricles"),
    "cyst": ("cyst", "cyst"),
    "stone": ("stone", "stone"),
    "splenomegaly": ("splenomegaly", "enlarged spleen"),
    "ascites": ("ascites", "free fluid"),
    "lung cyst": ("lung cyst", "lung cyst"),
    "lung edema": ("lung edema", "lung edema"),
    "kidney tumor": ("kidney tumor", "kidney tumor"),
    "liver hemorrhage": ("liver hemorrhage", "liver hemorrhage"),
    "brain cyst": ("brain cyst", "brain cyst"),
    "skull tumor": ("skull tumor", "skull tumor"),
    "none": ("none", "normal"),
    "left": ("left", "left side"),
    "right": ("right", "right side"),
    "small": ("small", "small"),
    "large": ("large", "large"),
    "black": ("black", "dark"),
    "white": ("white", "bright"),
    "0": ("0", "none"),
    "1": ("1", "one"),
    "2": ("2", "two"),
    "3": ("3", "three"),
}
TERMS: dict[Hospital, Terms] = {
    "a": {concept: words[0] for concept, words in _TERMS.items()},
    "b": {concept: words[1] for concept, words in _TERMS.items()},
}
NUMBER_WORDS = ("none", "one", "two", "three")

# Names of the whole image, for questions that do not ask for the modality.
NOUNS: dict[Hospital, dict[str, tuple[str, ...]]] = {
    "a": {
        "x-ray": ("image", "image", "picture", "x-ray", "radiograph", "film"),
        "ct": ("image", "image", "picture", "ct scan", "computed tomography"),
        "mri": ("image", "image", "picture", "mri", "magnetic resonance image"),
    },
    "b": dict.fromkeys(("x-ray", "ct", "mri"), ("scan", "study")),
}

# Family -> hospital -> wordings of its question.
TEMPLATES: dict[str, dict[Hospital, list[str]]] = yaml.safe_load(
    files("normtune.data.phantom").joinpath("questions.yaml").read_text(encoding="utf-8")
)
FUNCTIONS = {"chest": "breathe", "abdomen": "digest food", "head": "control the body"}
INSIDE = {"chest": "thorax", "abdomen": "abdominal cavity", "head": "skull"}
LARGEST = {"chest": "lung", "abdomen": "liver", "head": "brain"}


def finding_term(kind: str, organ: str, hospital: Hospital) -> str:
    """The hospital's word for a finding; the word for a mass depends on its organ."""
    return TERMS[hospital][f"{organ} mass" if kind == "mass" else kind]


def location_term(organ: str, side: str, zone: str, hospital: Hospital) -> str:
    """A location: "upper right lung" at A, "right lung, upper" at B; or only the organ."""
    near, far = (zone, side) if organ == "brain" else (side, zone)
    organ = "lobe" if organ == "brain" and zone else organ
    if hospital == "a":
        return " ".join(word for word in (far, near, organ) if word)
    return ", ".join(word for word in (f"{near} {organ}".strip(), far) if word)
