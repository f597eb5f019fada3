"""`findings_rules`: extracts the 14 CheXpert findings from a chest X-ray report with phrases and scope rules.

This labeller is an alternative to CheXbert that needs no weights. It has a table of phrases, and rules for
negation and uncertainty like those of NegEx (Chapman et al. 2001) and of CheXpert's labeller (Irvin et al.
2019). Its categories and their order of precedence are those of CheXpert's labeller. Its results differ from
both, so its scores have their own name; docs/metrics.md compares it with labels written by hand. It reads
only English reports of chest X-rays.

Decisions that could have been made differently:

- "infiltrate", "airspace disease" and scars are Lung Opacity; a finding does not imply its parent.
- A granuloma is not a Lung Lesion; a nodule is one, calcified or not.
- A blunted costophrenic angle is not a Pleural Effusion; a compression or wedge deformity is not a Fracture.
- Lines, tubes, leads, wires, valves and implants are Support Devices; clips, sutures and stray metal are not.
- "likely", "probable" and "consistent with" make a finding positive; "may", "possible", "suggests",
  "borderline", "a or b" and "less likely but possible" make it uncertain; "no definite", "no large", "unlikely"
  and "less likely" make it negative.
- No Finding is positive if no other finding except Support Devices is positive or uncertain.
"""

from __future__ import annotations

import re
from typing import Literal

Status = Literal["positive", "uncertain", "negative", "absent"]

# Phrases of each finding. In a phrase, `*` matches any ending, `...` matches up to four words, `(a|b)`
# matches either, and `(a)?` is optional.
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
    "Edema": ("edema", "(heart|cardiac) failure", "chf", "(vascular|pulmonary|venous) (congestion|engorgement)"),
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
        "sternotomy xxxx",  # OpenI's redaction replaces "wires"
        "(valve|valvular) (replacement|prosthesis|repair)",
        "(prosthetic|artificial|mechanical) ... valve",
        "(spinal|cervical|orthopedic|surgical|fixation|metallic) ... (fusion|plate*|rod*|screw*)",
        "(arthroplasty|balloon pump|filter)",
    ),
}
# Text that matches these phrases is removed before the search for findings.
EXCLUDED_PHRASES: tuple[str, ...] = (
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
# The findings of CheXpert's competition.
FIVE_FINDINGS: tuple[str, ...] = ("Cardiomegaly", "Edema", "Consolidation", "Atelectasis", "Pleural Effusion")

# Cues within one clause. A "before" cue precedes the finding that it changes, an "after" cue follows it.
# `_NO_DENIAL` matches phrases that contain "no" but deny no finding.
_NO_DENIAL = r"no (?:significant |interval |definite |appreciable |substantial |other )*(?:change|increase|worsening)"
_DENIED_BEFORE = (
    r"\b(?:no|without|denies|absen(?:t|ce of)|negative for|(?:free|clear) of|lack of|never|neither|nor"
    r"|\w+n't(?! (?:be )?(?:exclude|rule))|(?:unlikely|(?<!or )(?<!or, )less likely)"
    r"(?: to (?:be|represent|reflect))?(?! than)"
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
    r"|(?:is|are|was|were) no longer|unlikely(?! to (?:be|represent|reflect))|disappeared"
    # "opacity, less likely pneumonia" denies the pneumonia alone
    r"|(?<!or )less likely(?=\W*$| (?:than|given|in|at|on|considered|based|because|due|for|with)\b)"
    r"|\w+n't (?:seen|identified|present|evident|visuali[sz]ed|demonstrated|appreciated|visible)"
    r"|have resolved|resolved|unremarkable)\b"
)
_OPEN_BEFORE = (
    r"\b(?:may|might|could|possibl[ey]|question(?:able|ed)?(?: of)?|suspect(?:ed)?"
    r"|suspicio(?:us|n) (?:for|of)|concern(?:ing)?(?: for)?|suggest\w*|equivocal|borderline"
    r"|(?:can ?not|can't|not|difficult to) (?:be )?(?:exclude|rule)\w*|or,? less likely|perhaps"
    r"|indeterminate|uncertain)\b"
)
_OPEN_AFTER = (
    r"\b(?:(?:can ?not|can't|not|difficult to) be (?:completely |entirely )?(?:excluded|ruled out)|not excluded"
    r"|(?:is|are|was) (?:possible|suspected|questioned|questionable|suggested|uncertain)|borderline"
    r"|(?:is|are) considered)\b"
)
# Ends the scope of a denial: findings after this are not denied.
_STOP = re.compile(
    r"\b(?:but|however|although|though|except|aside from|apart from|other than|yet|while"
    r"|with(?! evidence)|which|there (?:is|are|has|have)|secondary to|due to)\b"
    r"|(?:,\s+(?!(?:or|nor|and)\b)|\band the\s+)(?:[\w-]+\s+){1,5}?(?:is|are|remains?|appears?)\b"
    r"(?! (?:not |again )?(?:seen|identified|noted|present|evident|demonstrated|visualized|appreciated"
    r"|visible))"
)
_SENTENCE = re.compile(r"[.!?](?=\s|$|[A-Za-z])|[;\n]")
_CLAUSE = re.compile(r"\b(?:but|however|although|though|whereas)\b|:")
# Structured reports write "Pneumothorax: none" and "HEART: enlarged": the colon ends no clause there.
_ANSWERED = re.compile(
    r"^(?:.*:)?\s*(?P<name>[^:]+?)\s*(?::|\s-)\s*"
    r"(?:none|no|nil|absent|negative|without|not)\b(?! (?:\w+ )?(?:chang|increas|worsen|exclu))(?P<rest>.*)$"
)
_ORGAN = re.compile(r"^(?:.*:)?\s*((?:the )?(?:heart|cardi\w+|mediastin\w+)(?: \w+){0,2}):\s*(?=\w)")
# "pneumonia is less likely but possible" leaves it open, although "but" ends the clause
_HEDGED = re.compile(
    r"\bless likely,? (?:but|though|although|however),?(?: \w+){0,3}? "
    r"(?:possible|possibility|(?:can ?not|can't|not|difficult to) (?:be )?(?:\w+ly )?(?:exclude|rule)\w*)"
)
_OR = r"(?:or|versus|vs|and/or)"  # between two findings, it makes both uncertain
_OR_AFTER = re.compile(rf"^(?:\s+(?!may|might|could|which|that|is|are|represent)[\w/-]+){{0,3}}?\s+{_OR}\b")
_OR_BEFORE = re.compile(rf"\b{_OR}(?:\s+[\w-]+){{0,3}}\s*$")


def _pattern(phrase: str) -> str:
    """Translate a phrase of the tables into a regular expression."""
    # `...` as up to four words, none of which changes the subject
    gap = r"(?:\W+(?!(?:normal|and|with|but|aorta|aortic)\b)[\w/-]+){0,4}?"
    words = re.escape(phrase).replace(r"\ ", " ")
    words = words.replace(r"\(", "(?:").replace(r"\)\?", ")?").replace(r"\)", ")").replace(r"\|", "|")
    words = words.replace(r"\*", r"[\w-]*").replace(r"\-", "[- ]?")
    words = words.replace(r" \.\.\. ", rf"{gap}\W+")
    words = re.sub(r" (\(\?:[^()]*\)\?)", r"(?:\\W+\1)?", words)
    return rf"\b{words.replace(' ', '[ -]+')}\b"


_MENTIONS = {name: re.compile("|".join(map(_pattern, phrases))) for name, phrases in PHRASES.items()}
_ELSEWHERE = re.compile("|".join(map(_pattern, EXCLUDED_PHRASES)))
_CUES = [re.compile(cue) for cue in (_NO_DENIAL, _DENIED_BEFORE, _DENIED_AFTER, _OPEN_BEFORE, _OPEN_AFTER)]
_ORDER: tuple[Status, ...] = ("positive", "uncertain", "negative", "absent")  # the first one that occurs is reported


def extract_findings(report: str) -> dict[str, Status]:
    """Label a report with the status of each of the 14 findings; `absent` means that it is not mentioned."""
    mentions: dict[str, set[Status]] = {name: {"absent"} for name in PHRASES}
    for clause in _split_clauses(report.lower()):
        for name, pattern in _MENTIONS.items():
            mentions[name].update(_status(clause, at.start(), at.end()) for at in pattern.finditer(clause))
    # A finding with several mentions gets the status that comes first in `_ORDER`.
    statuses: dict[str, Status] = {
        name: next(status for status in _ORDER if status in mentioned) for name, mentioned in mentions.items()
    }
    pathology = [status for name, status in statuses.items() if name != "Support Devices"]
    is_clear = not any(status in ("positive", "uncertain") for status in pathology)
    return {**statuses, "No Finding": "positive" if is_clear else "absent"}


def _split_clauses(report: str) -> list[str]:
    """Split a report into clauses, without conditional clauses ("if ...") and without `EXCLUDED_PHRASES`."""
    report = report.replace("\N{RIGHT SINGLE QUOTATION MARK}", "'")
    sentences = (" ".join(sentence.split()) for sentence in _SENTENCE.split(report))
    sentences = (_ORGAN.sub(r"\1 ", _ANSWERED.sub(r"no \g<name>: no\g<rest>", sentence)) for sentence in sentences)
    sentences = (_HEDGED.sub("cannot be excluded", sentence) for sentence in sentences)
    clauses = (clause.strip() for sentence in sentences for clause in _CLAUSE.split(sentence))
    return [_ELSEWHERE.sub(" ", clause) for clause in clauses if clause and not clause.startswith("if ")]


def _status(clause: str, start: int, end: int) -> Status:
    """Determine the status that a clause gives to the finding mentioned at [start, end).

    Denial has precedence over uncertainty: "no evidence of possible pneumonia" is negative.
    """
    no_denial, denied_before, denied_after, open_before, open_after = _CUES
    before, after = clause[:end], clause[end:]  # a mention such as "heart is not enlarged" contains its cue
    # Blank out "no change" and the like, and keep the length so that positions stay valid.
    masked = no_denial.sub(lambda match: " " * len(match[0]), before)
    for cue in denied_before.finditer(masked):
        if not _STOP.search(clause[cue.end() : end]):
            return "negative"
    if denied_after.search(_until_stop(after)):
        return "negative"
    open_choice = _OR_AFTER.search(after) or _OR_BEFORE.search(clause[:start])
    if open_choice or open_before.search(before) or open_after.search(_until_stop(after)):
        return "uncertain"
    return "positive"


def _until_stop(text: str) -> str:
    """Return the text up to the first end of a scope."""
    stop = _STOP.search(text)
    return text[: stop.start()] if stop else text
