"""A radiology report's text -> its sections, and the part of them that a model is to write.

The rules are those of MIMIC-CXR's own code (github.com/MIT-LCP/mimic-cxr, txt/section_parser.py), written
anew: a section begins on a line of one blank, capitals and a colon; its name is brought to one of a few; of
several sections of one name the last that is not empty counts. Two things differ: misspelt names are matched
by closeness instead of a table, and the 54 studies for which that code holds rules of their own are read as
all others are.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from difflib import get_close_matches
from typing import Literal

Sections = Literal["findings", "impression", "both"]
_HEADING = re.compile(r"\n ([A-Z ()/,-]+):\s")
_PARAGRAPH = "\n \n"
_TARGETS = ("impression", "findings")
_MAIN = ("impression", "findings", "history", "comparison", "addendum")
_SPELT = ("impression", "findings", "comparison", "indication")  # names that are misspelt in the release
_CLOSE = 0.85  # below: notification is not indication
_NAMES = {
    "clinical history": "history",
    "clinical indication": "indication",
    "clinical information": "history",
    "comparisons": "comparison",
    "conclusion": "impression",
    "exam": "examination",
    "finding": "findings",
    "patient history": "history",
    "pfi": "history",
    "reason for exam": "indication",
    "reason for examination": "indication",
    "recommendation": "recommendations",
    "recommendation(s)": "recommendations",
    "reference exam": "comparison",
    "type of examination": "examination",
    "wetread": "wet read",
}
# A heading that names the views of a chest film stands over what is seen on them.
_VIEWS = re.compile(
    r"chest|portable|(pa|ap) and lat|lateral and (pa|ap)|frontal (and|view|upright|semi-upright)"
    r"|(pa|ap|one|lateral) view|two views|bone window|ribs"
)


def section_name(heading: str) -> str:
    """The one name of a section: `IMPRESSON`, `CONCLUSION` and `FINDINGS AND IMPRESSION` are `impression`."""
    name = heading.strip().lower()
    if name in _NAMES:
        return _NAMES[name]
    for main in _MAIN:
        if main in name:
            return main
    if _VIEWS.search(name):
        return "findings"
    close = get_close_matches(name, _SPELT, n=1, cutoff=_CLOSE)
    return close[0] if close else name


def split_sections(text: str) -> list[tuple[str, str]]:
    """(name, text as it stands) of each section of a report, in order; names may come again.

    What precedes the first heading is the `preamble`; a report without headings is one `full report`. Empty
    findings and impressions are dropped: a title such as "CHEST, PA AND LATERAL:" is no section. Where
    neither is left, what follows the first blank line of the last section is the `last_paragraph`.
    """
    headings = []
    start = 0
    while heading := _HEADING.search(text, start):
        headings.append(heading)
        # the rest of a heading's line is its section's, whatever it looks like
        line_end = text.find("\n", heading.end())
        start = heading.end() if line_end < 0 else line_end
    if not headings:
        found = [("full report", text)]
    else:
        ends = [heading.start() for heading in headings[1:]] + [len(text)]
        found = [("preamble", text[: headings[0].start(1)])]
        found += [
            (section_name(heading.group(1)), text[heading.end() : end])
            for heading, end in zip(headings, ends, strict=True)
        ]
    found = [(name, body) for name, body in found if name not in _TARGETS or body.strip()]
    if not any(name in _TARGETS for name, _ in found):
        name, body = found[-1]
        head, blank, rest = body.partition(_PARAGRAPH)
        if blank:
            found[-1:] = [(name, head), ("last_paragraph", rest)]
    return found


def report_sections(text: str) -> dict[str, str]:
    """Name -> text of a report's sections, each as one line; the last of a name counts."""
    return {name: " ".join(body.split()) for name, body in split_sections(text)}


def target(findings: str, impression: str, sections: Sections) -> str:
    """What a model is to write. `both` is findings, then impression, or the one that there is."""
    match sections:
        case "findings":
            return findings
        case "impression":
            return impression
    return " ".join(part for part in (findings, impression) if part)


def called(sections: Sections) -> str:
    """How a problem names the target that a report lacks."""
    return "findings or impression section" if sections == "both" else f"{sections} section"


_FRONTAL = ("FRONTAL", "PA", "AP")  # PA before AP: it is the better film where a study has both
_LATERAL = ("LATERAL", "LL", "XTABLE LATERAL")


def two_views(images: Sequence[tuple[str, str]]) -> tuple[str, ...]:
    """(view, key) of a study's images -> at most two keys, frontal first, then lateral.

    Views are named as the files name them: Frontal and Lateral, or DICOM's ViewPosition (PA, AP, LATERAL, LL,
    also with more words after). Of several frontal or lateral images the first counts. A study without a
    frontal image shows its lateral one; where no view is named, its first image.
    """
    frontal = next((key for want in _FRONTAL for view, key in images if _is(view, want)), None)
    lateral = next((key for want in _LATERAL for view, key in images if _is(view, want)), None)
    chosen = tuple(key for key in (frontal, lateral) if key is not None)
    return chosen or tuple(key for _, key in images[:1])


def _is(view: str, want: str) -> bool:
    words = view.strip().upper()
    return words == want or words.startswith(f"{want} ")
