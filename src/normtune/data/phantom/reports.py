"""Short reports on a scene: the kind of image, its findings, an absent finding, and an impression."""

from __future__ import annotations

import random

from normtune.data.phantom.scene import PROFILES, Finding, HospitalName, Scene
from normtune.data.phantom.wording import NUMBER_WORDS, finding_term, location_term


def write_report(scene: Scene, hospital: HospitalName) -> str:
    """Write two to five sentences, all true for the scene; they depend only on the scene and the hospital."""
    wording = PROFILES[hospital].wording
    rng = random.Random(f"report-{wording}-{scene.seed}")
    return _report_a(scene, rng) if wording == "a" else _report_b(scene, rng)


def _report_a(scene: Scene, rng: random.Random) -> str:
    """A writes the kind of image first, then the findings, then the impression."""
    sentences = [_opening(scene, rng)]
    sentences += [_finding_sentence(finding, rng) for finding in scene.findings]
    if len(scene.findings) < 2:
        sentences.append(rng.choice(_negative_sentences(scene)))
    if scene.region == "abdomen" and rng.random() < 0.4:
        sentences.append("One kidney is seen." if scene.missing_kidney else "Two kidneys are seen.")
    if scene.device:
        sentences.append(f"A {scene.device} is in place.")
    names = [_impression_name(finding) for finding in scene.findings]
    sentences.append(f"Impression: {' and '.join(names) or 'normal ' + scene.region}.")
    return " ".join(sentences)


def _opening(scene: Scene, rng: random.Random) -> str:
    if scene.modality == "x-ray":
        return rng.choice(("Chest x-ray, frontal view.", "Frontal radiograph of the thorax."))
    part = {"head": ("head", "skull"), "chest": ("chest", "thorax"), "abdomen": ("abdomen", "abdominal cavity")}
    where = rng.choice(part[scene.region])
    if scene.modality == "ct":
        return f"{rng.choice(('Computed tomography', 'CT'))} of the {where}, {scene.plane} section."
    shade = "bright" if scene.weighting == "t2" else "dark"
    image = rng.choice(("Magnetic resonance image", "MRI"))
    return f"{image} of the {where}, {scene.plane} section, {scene.weighting} weighted with {shade} fluid."


def _finding_sentence(finding: Finding, rng: random.Random) -> str:
    where = location_term(finding.organ, finding.side, finding.zone, "a")
    side = f"the {finding.side} side"
    if finding.kind == "nodule":
        if finding.count == 1:
            return f"One round opacity is seen in the {where}."
        return f"{NUMBER_WORDS[finding.count].capitalize()} nodules are seen in the {where}."
    choices = {
        "mass": (f"There is a mass in the {where}.", f"A large mass is seen in the {where}."),
        "pneumonia": (f"Patchy consolidation is seen in the {where}.",),
        "effusion": (f"{finding.size.capitalize()} amount of pleural fluid on {side}.",),
        "pneumothorax": (
            f"Air surrounds the collapsed lung on {side}.",
            f"{finding.size.capitalize()} pneumothorax on {side}.",
        ),
        "cardiomegaly": ("The heart is enlarged.", "Enlarged heart shadow."),
        "fracture": (f"The {where} is broken.", f"There is a broken collarbone on {side}."),
        "hemorrhage": (f"There is bleeding in the {where}.",),
        "edema": (f"Swelling of the {where} is seen.",),
        "tumor": (f"A ring shaped tumor is seen in the {where}.",),
        "infarct": (f"There is a stroke of the {where}.",),
        "hydrocephalus": ("The ventricles are enlarged.", "Enlarged ventricles are seen."),
        "cyst": (f"A cyst filled with fluid is seen in the {where}.",),
        "stone": (f"There is a stone in the {where}.",),
        "splenomegaly": ("The spleen is enlarged.", "Enlarged spleen."),
        "ascites": ("Free fluid surrounds the organs.", "There is free fluid."),
    }
    return rng.choice(choices.get(finding.kind, (f"There is a {finding.kind} in the {where}.",)))


def _negative_sentences(scene: Scene) -> list[str]:
    """Sentences about absent findings; only those that are true for the scene."""
    kinds = {finding.kind for finding in scene.findings}
    # sentence -> the findings with which it would be false
    choices = {
        "chest": {
            "The heart is not enlarged.": {"cardiomegaly"},
            "No pleural fluid.": {"effusion"},
            "No consolidation or tumor.": {"pneumonia", "mass", "lung edema"},
            "The lungs are clear.": {
                *("nodule", "mass", "pneumonia", "effusion", "pneumothorax"),
                *("lung cyst", "lung edema"),
            },
        },
        "abdomen": {
            "The spleen is not enlarged.": {"splenomegaly"},
            "No free fluid.": {"ascites"},
            "No tumor of the liver.": {"mass"},
        },
        "head": {
            "The ventricles are normal.": {"hydrocephalus"},
            "No bleeding.": {"hemorrhage"},
            "No mass or swelling.": {"tumor", "edema", "brain cyst", "skull tumor"},
        },
    }
    return [sentence for sentence, excluded in choices[scene.region].items() if not excluded & kinds] or [
        "The rest is normal."
    ]


def _impression_name(finding: Finding) -> str:
    name = finding_term(finding.kind, finding.organ, "a")
    return f"{finding.side} {name}" if finding.side else name


def _report_b(scene: Scene, rng: random.Random) -> str:
    """B writes the impression first, then the location of each finding, then the kind of image."""
    names = [finding_term(finding.kind, finding.organ, "b") for finding in scene.findings]
    sentences = [f"Impression: {', '.join(names) or 'normal'}."]
    for finding, name in zip(scene.findings, names, strict=True):
        if finding.side or finding.zone:
            where = location_term(finding.organ, finding.side, finding.zone, "b")
            size = f"{finding.size} " if finding.size else ""
            number = f"{NUMBER_WORDS[finding.count]} " if finding.count > 1 else ""
            sentences.append(f"{number}{size}{name} is seen in the {where}.".capitalize())
    if scene.region == "abdomen" and rng.random() < 0.4:
        sentences.append("One kidney." if scene.missing_kidney else "Two kidneys.")
    if scene.device:
        sentences.append(f"A {scene.device} is seen.")
    section = "" if scene.plane == "frontal" else f"{scene.plane} "
    image = {"x-ray": "Radiograph", "ct": "Computed tomography", "mri": "Magnetic resonance"}[scene.modality]
    where = {"chest": "thorax", "abdomen": "abdominal cavity", "head": "skull"}[scene.region]
    weighted = f", {scene.weighting} weighted" if scene.weighting else ""
    sentences.append(f"{section}{image} of the {where}{weighted}.".capitalize())
    return " ".join(sentences)
