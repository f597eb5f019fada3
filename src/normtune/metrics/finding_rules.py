"""`findings_rules`: the 14 CheXpert findings in a chest X-ray report, by phrases and scope rules.

A transparent extractor for where CheXbert's weights are not to be had: a table of phrases, and rules of
negation and uncertainty in the manner of NegEx (Chapman et al. 2001) and of CheXpert's labeller (Irvin et
al. 2019), whose categories and order of precedence it follows. It is neither of them: its scores go by its
own name, and docs/metrics.md says how it does against labels written by hand. It reads English reports of
chest X-rays alone.

What is counted where it could be done otherwise:

- "infiltrate", "airspace disease" and scars are Lung Opacity; a finding does not imply its parent.
- A granuloma is no Lung Lesion; a nodule is one, calcified or not.
- A blunted costophrenic angle is no Pleural Effusion; a compression or wedge deformity is no Fracture.
- Lines, tubes, leads, wires, valves and implants are Support Devices; clips, sutures and stray metal are not.
- "likely", "probable" and "consistent with" assert; "may", "possible", "suggests", "borderline" and "a or b"
  leave open; "no definite" and "no large" deny.
- No Finding is given where no other finding but Support Devices is positive or uncertain.
"""

from __future__ import annotations

import re
from typing import Literal

Status = Literal["positive", "uncertain", "negative", "absent"]

# `*` stands for any ending, `...` for up to four words, `(a|b)` for either, `(a)?` for one that may lack.
PHRASES: dict[str, tuple[str, ...]] = {
    "Enlarged Cardiomediastinum": (
        "(cardiomediastin*|mediastin*|cardiomediastinal silhouette) ... (enlarge*|widen*|prominen*|large)",
        "(enlarge*|wide*|prominen*) (of the)? ... (cardiomediastin*|mediastin*)",
    ),
    "Cardiomegaly": (
        "cardiomegaly",
        "(heart|cardiac|cardiopericardial silhouette) ... (enlarged|enlargement|large|increased)",
        "(enlarged|enlargement of|large) (the)? (heart|cardiac|cardiopericardial)",
        "borderline (heart|cardiac) size",
        "heart size ... borderline",
    ),
    "Lung Opacity": (
        "opaci*",
        "infiltrat*",
        "(airspace|air space|air-space|parenchymal|interstitial lung) (disease|process)",
        "(patchy|streaky|linear|hazy|focal|increased|airspace|interstitial|basilar|ill-defined) densit*",
        "(prominen*|increased|coarse*|thicken*|chronic) ... (interstiti*|reticul*)",
        "(interstiti*|reticul*) ... (prominen*|increase*|coarse*|thicken*|change*|pattern|abnormalit*)",
        "haz(y|iness)",
        "scar*",
        "fibro(sis|tic)",
    ),
    "Lung Lesion": (
        "nodul*",
        "mass",
        "masses",
        "(cavitary|lung|pulmonary|parenchymal|cavitating) lesion*",
        "(carcinoma|neoplas*|tumor*|malignan*|metasta*)",
    ),
    "Edema": (
        "edema",
        "(heart|cardiac) failure",
        "chf",
        "(vascular|pulmonary|venous) (congestion|engorgement)",
    ),
    "Consolidation": ("consolidat*",),
    "Pneumonia": ("pneumonia*", "bronchopneumonia*", "infectious (process|infiltrate|etiology)", "infection"),
    "Atelectasis": ("atelecta*", "(lung|lobe|lobar) collapse", "collapse of the ... (lung|lobe)"),
    "Pneumothorax": ("pneumothora*", "hydropneumothora*"),
    "Pleural Effusion": ("effusion*", "pleural fluid", "hydropneumothora*", "hydrothora*"),
    "Pleural Other": (
        "pleural ... (thickening|scar*|plaque*|calcification*)",
        "(thickening|scarring|calcification*) of the ... pleura",
        "(fibrothorax|pleural fibrosis|pleural-parenchymal scar*|pleuroparenchymal scar*)",
        "apical (cap|caps|thickening)",
    ),
    "Fracture": ("fracture*",),
    "Support Devices": (
        "(catheter*|picc|pacemaker*|pacer|defibrillator*|aicd|icd|stent*|stimulator*|cannula|prosthe*)",
        "(port-a-cath|mediport|port|chemoport|infuse-a-port)",
        "(tube|tubes|tubing|tracheostomy|drain|drains|lead|leads|wire|wires|cerclage|hardware|device*)",
        "(central|venous|subclavian|jugular|ij|picc|arterial|dialysis) ... (line|lines)",
        "sternotomy xxxx",  # the wires, as OpenI's redaction leaves them
        "(valve|valvular) (replacement|prosthesis|repair)",
        "(prosthetic|artificial|mechanical) ... valve",
        "(spinal|cervical|orthopedic|surgical|fixation|metallic) ... (fusion|plate*|rod*|screw*)",
        "(arthroplasty|balloon pump|filter)",
    ),
}
# Struck out before the phrases are looked for.
ELSEWHERE: tuple[str, ...] = (
    "(pericardial|joint) effusion*",
    "(breast|thyroid|liver|abdominal|soft tissue) (mass|masses|nodule|nodules|edema)",
    "(bone|bony|sclerotic|lytic|osseous|skeletal) (mass|lesion|lesions|density|densities|metasta*)",
    "(granulomatous|prior|old|remote|histoplasm*|tubercul*|fungal) ... infection",
    "(surgical|skin) scar*",
    "(nipple|skin) ... nodul*",
    "(mass|masses) effect",
    "pneumonia vaccin*",
    "lead (shield|apron)",
    "eustachian tube*",
    "without mass effect",
)
FINDINGS: tuple[str, ...] = (*PHRASES, "No Finding")
FIVE: tuple[str, ...] = ("Cardiomegaly", "Edema", "Consolidation", "Atelectasis", "Pleural Effusion")

# Cues in one clause; "before" ones reach forward to the finding, "after" ones back to it.
_NO_DENIAL = (
    r"no (?:significant |interval |definite |appreciable |substantial |other )*(?:change|increase|worsening)"
)
_DENIED_BEFORE = (
    r"\b(?:no|without|denies|absen(?:t|ce of)|negative for|(?:free|clear) of|lack of|never|neither|nor"
    r"|rather than|resolution of|resolved|removal of|removed|ruled? out"
    r"|not(?! (?:be )?(?:exclude|completely|entirely))"
    r"|nonenlarged|exclud(?:es|ing))\b"
)
_DENIED_AFTER = (
    r"\b(?:(?:is|are|was|were|has|have|been)(?: been| again| also)?"
    r" (?:not\b(?! (?:be )?exclu)(?! \w+ (?:on|in) (?:the )?pr)|absent|resolved|removed|cleared|excluded"
    r"|ruled out)|not (?:seen|identified|present|evident|visualized|demonstrated|appreciated)\b"
    r"(?! (?:on|in) (?:the )?pr)"  # "not seen on prior exams" is new, not absent
    r"|(?:is|are|appears?|remains?|look|within) (?:grossly |otherwise )?"
    r"(?:normal|unremarkable|within (?:normal|limits))"
    r"|have resolved|resolved|unremarkable)\b"
)
_OPEN_BEFORE = (
    r"\b(?:may|might|could|possibl[ey]|question(?:able|ed)?(?: of)?|suspect(?:ed)?"
    r"|suspicio(?:us|n) (?:for|of)|concern(?:ing)?(?: for)?|suggest\w*|equivocal|borderline"
    r"|(?:can ?not|not|difficult to) (?:be )?(?:exclude|rule)\w*|perhaps|indeterminate|uncertain)\b"
)
_OPEN_AFTER = (
    r"\b(?:(?:can ?not|not|difficult to) be (?:completely |entirely )?(?:excluded|ruled out)|not excluded"
    r"|(?:is|are|was) (?:possible|suspected|questioned|questionable|suggested|uncertain)|borderline"
    r"|(?:is|are) considered)\b"
)
# Where a denial that began before stops.
_STOP = re.compile(
    r"\b(?:but|however|although|though|except|aside from|apart from|other than|yet|while"
    r"|with(?! evidence)|which|there (?:is|are|has|have)|secondary to|due to)\b"
    r"|(?:,\s+(?!(?:or|nor|and)\b)|\band the\s+)(?:[\w-]+\s+){1,5}?(?:is|are|remains?|appears?)\b"
    r"(?! (?:not |again )?(?:seen|identified|noted|present|evident|demonstrated|visualized|appreciated"
    r"|visible))"
)
_SENTENCE = re.compile(r"[.!?](?=\s|$|[A-Za-z])|[;\n]")
_CLAUSE = re.compile(r"\b(?:but|however|although|though|whereas)\b|:")
_OR = r"(?:or|versus|vs|and/or)"  # between two findings it leaves both open
_OR_AFTER = re.compile(rf"^(?:\s+(?!may|might|could|which|that|is|are|represent)[\w/-]+){{0,3}}?\s+{_OR}\b")
_OR_BEFORE = re.compile(rf"\b{_OR}(?:\s+[\w-]+){{0,3}}\s*$")


def _pattern(phrase: str) -> str:
    """A phrase of the tables as a regular expression."""
    gap = r"(?:\W+(?!(?:normal|and|with|but|aorta|aortic)\b)[\w/-]+){0,4}?"
    words = re.escape(phrase).replace(r"\ ", " ")
    words = words.replace(r"\(", "(?:").replace(r"\)\?", ")?").replace(r"\)", ")").replace(r"\|", "|")
    words = words.replace(r"\*", r"[\w-]*").replace(r"\-", "[- ]?")
    words = words.replace(r" \.\.\. ", rf"{gap}\W+")
    words = re.sub(r" (\(\?:[^()]*\)\?)", r"(?:\\W+\1)?", words)
    return rf"\b{words.replace(' ', '[ -]+')}\b"


_MENTIONS = {name: re.compile("|".join(map(_pattern, phrases))) for name, phrases in PHRASES.items()}
_ELSEWHERE = re.compile("|".join(map(_pattern, ELSEWHERE)))
_CUES = [re.compile(cue) for cue in (_NO_DENIAL, _DENIED_BEFORE, _DENIED_AFTER, _OPEN_BEFORE, _OPEN_AFTER)]
_ORDER: tuple[Status, ...] = ("positive", "uncertain", "negative", "absent")  # the first that is found wins


def findings(report: str) -> dict[str, Status]:
    """The status of each of the 14 findings in a report; `absent` where it is not mentioned."""
    found: dict[str, set[Status]] = {name: {"absent"} for name in PHRASES}
    for clause in _clauses(report.lower()):
        for name, mention in _MENTIONS.items():
            found[name].update(_status(clause, at.start(), at.end()) for at in mention.finditer(clause))
    statuses: dict[str, Status] = {
        name: next(status for status in _ORDER if status in seen) for name, seen in found.items()
    }
    told = [status for name, status in statuses.items() if name != "Support Devices"]
    clear = not any(status in ("positive", "uncertain") for status in told)
    return {**statuses, "No Finding": "positive" if clear else "absent"}


def _clauses(report: str) -> list[str]:
    sentences = (" ".join(sentence.split()) for sentence in _SENTENCE.split(report))
    clauses = (clause.strip() for sentence in sentences for clause in _CLAUSE.split(sentence))
    return [_ELSEWHERE.sub(" ", clause) for clause in clauses if clause and not clause.startswith("if ")]


def _status(clause: str, start: int, end: int) -> Status:
    """What a clause says of the finding mentioned at [start, end)."""
    pseudo, denied_before, denied_after, open_before, open_after = _CUES
    before, after = clause[:end], clause[end:]  # a mention such as "heart is not enlarged" holds its own cue
    hidden = pseudo.sub(lambda found: " " * len(found[0]), before)
    for cue in denied_before.finditer(hidden):
        if not _STOP.search(clause[cue.end() : end]):
            return "negative"
    if denied_after.search(_until_stop(after)):
        return "negative"
    open_choice = _OR_AFTER.search(after) or _OR_BEFORE.search(clause[:start])
    if open_choice or open_before.search(before) or open_after.search(_until_stop(after)):
        return "uncertain"
    return "positive"


def _until_stop(text: str) -> str:
    stop = _STOP.search(text)
    return text[: stop.start()] if stop else text
