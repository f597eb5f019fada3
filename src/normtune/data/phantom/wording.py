"""The words and question templates of each hospital. `questions.py` fills in the `{...}`.

B's questions use only words that also occur in A's questions, and B's answers and reports only words of A's
answers and reports, but with other meanings. The reason: tuning norms cannot create the embedding of a word
that was never trained.
"""

from __future__ import annotations

from normtune.data.phantom.scene import Hospital

Terms = dict[str, str]

# Hospital -> concept -> the hospital's word for it, in questions and answers.
TERMS: dict[Hospital, Terms] = {
    "a": {
        "x-ray": "x-ray",
        "ct": "ct",
        "mri": "mri",
        "t1": "t1",
        "t2": "t2",
        "chest": "chest",
        "abdomen": "abdomen",
        "head": "head",
        "axial": "transverse plane",
        "coronal": "coronal plane",
        "sagittal": "sagittal plane",
        "nodule": "nodule",
        "lung mass": "mass",
        "liver mass": "mass",
        "pneumonia": "pneumonia",
        "effusion": "pleural effusion",
        "pneumothorax": "pneumothorax",
        "cardiomegaly": "cardiomegaly",
        "fracture": "fracture",
        "hemorrhage": "hemorrhage",
        "edema": "brain edema",
        "tumor": "brain tumor",
        "infarct": "infarct",
        "hydrocephalus": "hydrocephalus",
        "cyst": "cyst",
        "stone": "stone",
        "splenomegaly": "splenomegaly",
        "ascites": "ascites",
        "none": "none",
        "left": "left",
        "right": "right",
        "small": "small",
        "large": "large",
        "black": "black",
        "white": "white",
        "0": "0",
        "1": "1",
        "2": "2",
        "3": "3",
    },
    "b": {
        "x-ray": "radiograph",
        "ct": "computed tomography",
        "mri": "magnetic resonance",
        "t1": "t1 weighted",
        "t2": "t2 weighted",
        "chest": "thorax",
        "abdomen": "abdominal cavity",
        "head": "skull",
        "axial": "axial",
        "coronal": "coronal",
        "sagittal": "sagittal",
        "nodule": "round opacity",
        "lung mass": "tumor",
        "liver mass": "tumor",
        "pneumonia": "consolidation",
        "effusion": "fluid",
        "pneumothorax": "collapsed lung",
        "cardiomegaly": "enlarged heart",
        "fracture": "broken collarbone",
        "hemorrhage": "bleeding",
        "edema": "swelling",
        "tumor": "mass",
        "infarct": "stroke",
        "hydrocephalus": "enlarged ventricles",
        "cyst": "cyst",
        "stone": "stone",
        "splenomegaly": "enlarged spleen",
        "ascites": "free fluid",
        "none": "normal",
        "left": "left side",
        "right": "right side",
        "small": "small",
        "large": "large",
        "black": "dark",
        "white": "bright",
        "0": "none",
        "1": "one",
        "2": "two",
        "3": "three",
    },
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
TEMPLATES: dict[str, dict[Hospital, tuple[str, ...]]] = {
    "modality": {
        "a": (
            "What modality is used to take this image?",
            "What imaging modality was used?",
            "How was this image taken?",
            "What type of medical image is this?",
            "What kind of scan is this study?",
        ),
        "b": ("What kind of image was taken?", "Which imaging was used in this study?"),
    },
    "modality_is": {
        "a": (
            "Is this {article} {modality}?",
            "Is this image taken via {modality}?",
            "Is this {article} {modality} scan?",
        ),
        "b": ("Was {modality} used to take this?", "Is the modality {modality}?"),
    },
    "weighting": {
        "a": (
            "What is the mr weighting in this image?",
            "What type of mri is shown in this image?",
            "Is this a t1 weighted or t2 weighted image?",
            "Which kind of weighting is this image generated with, t1 or t2?",
        ),
        "b": ("Which weighting was used?", "With which weighting is this scan taken?"),
    },
    "region": {
        "a": (
            "Which part of the body does this {noun} belong to?",
            "What part of the body is being imaged?",
            "Where does the {noun} show in the body?",
            "Which region of the body is shown?",
        ),
        "b": ("What body region was imaged?", "Which part is shown in this {noun}?"),
    },
    "region_is": {
        "a": (
            "Is this a study of the {region}?",
            "Do the organs in the {noun} exist in the {region}?",
            "Does this {noun} show the {region}?",
        ),
        "b": ("Was the {region} imaged?", "Is this part of the body the {region}?"),
    },
    "plane": {
        "a": (
            "What is the scanning plane of this {noun}?",
            "In what plane is this {noun} scanned?",
            "What scanning plane does this image belong to?",
            "Is this an axial, coronal or sagittal image?",
        ),
        "b": ("Which plane is shown?", "How is this {noun} scanned?"),
    },
    "plane_is": {
        "a": ("Is this a {plane}?", "Is this {noun} scanned in a {plane}?", "Is this taken in the {plane}?"),
        "b": ("Is the section {plane}?", "Was this scanned in the {plane} plane?"),
    },
    "contains": {
        "a": (
            "Does the picture contain the {organ}?",
            "Is there a {organ} in the {noun}?",
            "Does the {organ} appear in the {noun}?",
            "Can the {organ} be seen in this section?",
        ),
        "b": ("Is the {organ} seen?", "Does this {noun} contain the {organ}?"),
    },
    "largest": {
        "a": (
            "What is the largest organ in the picture?",
            "What is the main organ in the {noun}?",
            "What is the biggest organ shown?",
            "What is the largest organ of the {inside}?",
        ),
        "b": ("Which organ is the biggest?", "What main organ does the {noun} show?"),
    },
    "diseases": {
        "a": (
            "What diseases are included in the picture?",
            "What is the abnormality in this {noun}?",
            "What disease does the patient have?",
            "What is wrong in this {noun}?",
            "What pathology is shown?",
        ),
        "b": ("What is abnormal in this {noun}?", "Which pathology does the patient show?"),
    },
    "abnormal": {
        "a": (
            "Are there abnormalities in this {noun}?",
            "Does this {noun} look abnormal?",
            "Does the patient have any abnormalities?",
            "Is anything wrong in this {noun}?",
        ),
        "b": ("Is any disease shown?", "Does the patient look abnormal?"),
    },
    "normal": {
        "a": ("Is this {noun} normal?", "Does this {noun} look normal?", "Is this a normal study?"),
        "b": ("Does the patient look healthy?", "Was the study normal?"),
    },
    "healthy": {
        "a": ("Is the {organ} healthy?", "Does the {organ} look normal?", "Is the {organ} normal in this {noun}?"),
        "b": ("Does the {organ} appear healthy?",),
    },
    "unhealthy": {
        "a": ("Is the {organ} abnormal?", "Does the {organ} look abnormal?"),
        "b": ("Is anything wrong in the {organ}?",),
    },
    "presence": {
        "a": (
            "Is there {finding} in the {noun}?",
            "Can {finding} be observed in the picture?",
            "Is there evidence of {finding}?",
            "Does the patient have {finding}?",
            "Is {finding} present?",
            "Does the {noun} show {finding}?",
        ),
        "b": ("Is any {finding} seen?", "Does this look like {finding}?"),
    },
    "side": {
        "a": (
            "On which side is the {finding}?",
            "Which side is the {finding} on, left or right?",
            "Is the {finding} on the left or right?",
        ),
        "b": ("Which side of the body has the {finding}?", "On what side is the {finding} seen?"),
    },
    "side_is": {
        "a": (
            "Is the {finding} on the {side} side?",
            "Is there {finding} on the {side}?",
            "Is the {finding} located on the patient's {side} side?",
        ),
        "b": ("Does the {side} show the {finding}?",),
    },
    "location": {
        "a": (
            "Where is the {finding} located?",
            "Where is the {finding} in this {noun}?",
            "What is the location of the {finding}?",
        ),
        "b": ("In which part is the {finding}?", "Where does the {noun} show the {finding}?"),
    },
    "location_only": {
        "a": (
            "Where is/are the abnormality located?",
            "Where is the abnormality in this {noun}?",
            "Where are the abnormalities in this {noun}?",
        ),
        "b": ("What part is abnormal?", "Where is the disease?"),
    },
    "organ_abnormal": {
        "a": ("Which organ is abnormal?", "What organ is involved?", "Which organ looks like it has the disease?"),
        "b": ("Which organ has the pathology?",),
    },
    "count_nodules": {
        "a": (
            "How many nodules are there in the lung?",
            "What is the number of nodules in this {noun}?",
            "How many nodules can be seen?",
        ),
        "b": ("What number of round opacities is seen?",),
    },
    "count_kidneys": {
        "a": (
            "How many kidneys in this {noun}?",
            "How many kidneys are there in this {noun}?",
            "How many kidneys are shown?",
        ),
        "b": ("What number of kidneys is seen?",),
    },
    "count_kinds": {
        "a": (
            "How many kinds of abnormalities are there in this {noun}?",
            "What is the number of diseases in this {noun}?",
        ),
        "b": ("How many diseases does the patient have?",),
    },
    "size": {
        "a": ("Is the {finding} small or large?", "What is the size of the {finding}?", "How large is the {finding}?"),
        "b": ("Which size is the {finding}?",),
    },
    "color": {
        "a": (
            "What color is the {part} in the picture?",
            "What color does the {part} show in the picture?",
            "What is the color of the {part} in this {noun}?",
        ),
        "b": ("How does the {part} appear?", "What color has the {part}?"),
    },
    "device": {
        "a": ("What device is shown in this {noun}?", "Which device does the patient have?"),
        "b": ("What device can be seen?",),
    },
    "device_is": {
        "a": ("Is there a {device}?", "Does the patient have a {device}?", "Can a {device} be seen in the {noun}?"),
        "b": ("Is a {device} shown?",),
    },
    "function": {
        "a": ("What is the function of the main organ in this picture?", "What is the main organ used for?"),
        "b": ("What is the largest organ used for?",),
    },
    # Only A asks these. They use rare words, with other meanings than at B.
    "any_opacity": {"a": ("Is there any opacity or consolidation in the {side} lung?",), "b": ()},
    "any_round": {"a": ("Are there round opacities in the lungs?", "Is a round opacity seen in the lungs?"), "b": ()},
    "any_lesion": {
        "a": ("Is there any bleeding, swelling or stroke in the brain?", "Is a mass or swelling seen?"),
        "b": (),
    },
    "any_tumor": {"a": ("Is there any tumor or cyst?", "Does a tumor or stone appear?"), "b": ()},
    "heart": {"a": ("Is the heart enlarged?", "Is the heart larger than normal?"), "b": ()},
    "spleen": {"a": ("Is the spleen enlarged?", "Is the spleen larger than normal?"), "b": ()},
    "ventricles": {"a": ("Are the ventricles enlarged?", "Are the ventricles larger than normal?"), "b": ()},
    "clavicle": {"a": ("Is the collarbone broken?", "Is the clavicle intact, or is it a broken collarbone?"), "b": ()},
    "collapse": {"a": ("Is the lung collapsed?", "Has a lung collapsed?"), "b": ()},
    "free": {"a": ("Is there free fluid in the abdomen?", "Is any free fluid seen?"), "b": ()},
}

FUNCTIONS = {"chest": "breathe", "abdomen": "digest food", "head": "control the body"}
INSIDE = {"chest": "thorax", "abdomen": "abdominal cavity", "head": "skull"}
LARGEST = {"chest": "lung", "abdomen": "liver", "head": "brain"}


def finding_term(kind: str, organ: str, hospital: Hospital) -> str:
    """The hospital's word for a finding; the word for a mass depends on its organ."""
    return TERMS[hospital][f"{organ} mass" if kind == "mass" else kind]


def location_term(organ: str, side: str, zone: str, hospital: Hospital) -> str:
    """A location: "upper right lung" at A, "right lung, upper" at B; or only the organ."""
    if organ == "brain":
        organ = "lobe" if zone else organ
        if hospital == "a":
            return " ".join(word for word in (side, zone, organ) if word)
        return ", ".join(word for word in (f"{zone} {organ}".strip(), side) if word)
    if hospital == "a":
        return " ".join(word for word in (zone, side, organ) if word)
    return ", ".join(word for word in (f"{side} {organ}".strip(), zone) if word)
