"""Splits a radiology report into sections, and selects those that a model is to generate.

The rules are those of MIMIC-CXR's own code (github.com/MIT-LCP/mimic-cxr, txt/section_parser.py),
reimplemented:

- A section begins on a line of one blank, capitals and a colon, such as " FINDINGS: ".
- Its name is mapped to one of a few standard names.
- If several sections have the same name, the last one that is not empty counts.

There are two differences. Misspelt names are matched by similarity instead of a table, and the 54 studies
with special rules in that code are read like all others.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from difflib import get_close_matches
from typing import Literal

Sections = Literal["findings", "impression", "both"]
_HEADING = re.compile(r"\n ([A-Z ()/,-]+):\s")
_PARAGRAPH = "\n \n"  # a blank line
_TARGETS = ("impression", "findings")  # the sections that a model can be trained on
# A heading that contains one of these words has that name; the first match counts.
_MAIN = ("impression", "findings", "history", "comparison", "addendum")
_OFTEN_MISSPELT = ("impression", "findings", "comparison", "indication")  # in the release
_SIMILARITY = 0.85  # difflib's ratio; at lower values "notification" would match "indication"
_NAMES = {  # heading in lower case -> standard name
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
# A heading that names the views of a chest film is a heading of findings.
_VIEWS = re.compile(
    r"chest|portable|(pa|ap) and lat|lateral and (pa|ap)|frontal (and|view|upright|semi-upright)"
    r"|(pa|ap|one|lateral) view|two views|bone window|ribs"
)


def section_name(heading: str) -> str:
    """The standard name of a section.

    Example: `IMPRESSON`, `CONCLUSION` and `FINDINGS AND IMPRESSION` are all `impression`.
    """
    name = heading.strip().lower()
    if name in _NAMES:
        return _NAMES[name]
    for main in _MAIN:
        if main in name:
            return main
    if _VIEWS.search(name):
        return "findings"
    close = get_close_matches(name, _OFTEN_MISSPELT, n=1, cutoff=_SIMILARITY)
    return close[0] if close else name


def split_sections(text: str) -> list[tuple[str, str]]:
    """Split a report into sections.

    The text before the first heading is the `preamble`. A report without headings is one `full report`. Empty
    findings and impressions are dropped, as a title such as "CHEST, PA AND LATERAL:" is not a section. If the
    report then has neither, the text after the first blank line of the last section is the `last_paragraph`.

    Returns:
        (standard name, unchanged text) of each section, in order. A name may occur several times.
    """
    headings = []
    start = 0
    while heading := _HEADING.search(text, start):
        headings.append(heading)
        # The rest of the heading's line belongs to its section, even if it looks like a heading.
        line_end = text.find("\n", heading.end())
        start = heading.end() if line_end < 0 else line_end
    if not headings:
        sections = [("full report", text)]
    else:
        ends = [heading.start() for heading in headings[1:]] + [len(text)]
        sections = [("preamble", text[: headings[0].start(1)])]
        sections += [
            (section_name(heading.group(1)), text[heading.end() : end])
            for heading, end in zip(headings, ends, strict=True)
        ]
    sections = [(name, body) for name, body in sections if name not in _TARGETS or body.strip()]
    if not any(name in _TARGETS for name, _ in sections):
        name, body = sections[-1]
        head, blank, rest = body.partition(_PARAGRAPH)
        if blank:
            sections[-1:] = [(name, head), ("last_paragraph", rest)]
    return sections


def report_sections(text: str) -> dict[str, str]:
    """Standard name -> text of each section on one line. If a name occurs several times, its last section counts."""
    return {name: " ".join(body.split()) for name, body in split_sections(text)}


def target_text(findings: str, impression: str, sections: Sections) -> str:
    """The text that a model is to generate. `both`: the findings, then the impression, if present."""
    match sections:
        case "findings":
            return findings
        case "impression":
            return impression
    return " ".join(part for part in (findings, impression) if part)


def section_label(sections: Sections) -> str:
    """Name of the target text in a message about a report without it."""
    return "findings or impression section" if sections == "both" else f"{sections} section"


_FRONTAL = ("FRONTAL", "PA", "AP")  # PA before AP: if a study has both, PA is the better film
_LATERAL = ("LATERAL", "LL", "XTABLE LATERAL")


def select_views(images: Sequence[tuple[str, str]]) -> tuple[str, ...]:
    """Select at most one frontal and one lateral image of a study.

    A study without a frontal image is represented by its lateral one. If no image is of a known view, its
    first image is selected.

    Args:
        images: (view, key) of each image. A view is Frontal or Lateral, or DICOM's ViewPosition (PA, AP,
            LATERAL, LL), possibly followed by more words.

    Returns:
        The keys, frontal first; the first image of each view.
    """
    frontal = next((key for name in _FRONTAL for view, key in images if _is_view(view, name)), None)
    lateral = next((key for name in _LATERAL for view, key in images if _is_view(view, name)), None)
    selected = tuple(key for key in (frontal, lateral) if key is not None)
    return selected or tuple(key for _, key in images[:1])


def _is_view(view: str, name: str) -> bool:
    words = view.strip().upper()
    return words == name or words.startswith(f"{name} ")
