from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from normtune.data.reading.radiology import report_sections, section_name, split_sections, target_text
from tests.support.report_samples import REPORT


def test_a_report_is_cut_at_its_headings() -> None:
    assert report_sections(REPORT) == {
        "preamble": "FINAL REPORT",
        "examination": "CHEST (PA AND LAT)",
        "indication": "___ year old with made-up cough.",
        "comparison": "None.",
        "findings": "The lungs are clear. The heart is of normal size.",
        "impression": "No acute process.",
    }


@pytest.mark.parametrize(
    ("heading", "name"),
    [
        ("FINDINGS AND IMPRESSION", "impression"),
        ("FINDINGS/IMPRESSION", "impression"),
        ("CONCLUSION", "impression"),
        ("IMPERSSION", "impression"),
        ("FINIDNGS", "findings"),
        ("FINDING", "findings"),
        ("REFERENCE FINDINGS", "findings"),
        ("PA AND LATERAL VIEWS OF THE CHEST", "findings"),
        ("FRONTAL AND LATERAL RADIOGRAPH", "findings"),
        ("COMPARISONS", "comparison"),
        ("COMPARISION", "comparison"),
        ("CLINICAL HISTORY", "history"),
        ("PFI", "history"),
        ("REASON FOR EXAM", "indication"),
        ("IDICATION", "indication"),
        ("EXAM", "examination"),
        ("NOTIFICATION", "notification"),
        ("TECHNIQUE", "technique"),
        ("RECOMMENDATION(S)", "recommendations"),
        ("WET READ", "wet read"),
    ],
)
def test_headings_are_mapped_to_standard_names(heading: str, name: str) -> None:
    assert section_name(heading) == name


def test_the_last_filled_section_of_a_name_counts() -> None:
    text = "\n CHEST, PA AND LATERAL:\n \n INDICATION: Cough.\n \n FINDINGS: First.\n \n FINDINGS: Second.\n"
    assert [name for name, _ in split_sections(text)] == ["preamble", "indication", "findings", "findings"]
    assert report_sections(text)["findings"] == "Second."


def test_a_heading_in_the_same_line_as_another_is_text() -> None:
    assert report_sections("\n FINDINGS: Clear. IMPRESSION: Normal.\n")["findings"] == "Clear. IMPRESSION: Normal."


def test_headings_need_a_line_of_their_own_and_capitals() -> None:
    assert [name for name, _ in split_sections("\n Findings: Clear.\nIMPRESSION: Normal.\n")] == ["full report"]


def test_without_findings_or_impression_the_text_after_a_blank_line_is_the_last_paragraph() -> None:
    text = "\n INDICATION: Cough.\n \n The lungs are clear.\n \n No effusion.\n"
    sections = report_sections(text)
    assert sections["indication"] == "Cough."
    assert sections["last_paragraph"] == "The lungs are clear. No effusion."
    assert "last_paragraph" not in report_sections("\n FINDINGS: Clear.\n \n No effusion.\n")


def test_the_target_text_is_one_section_or_both_in_order() -> None:
    assert [target_text("F.", "I.", s) for s in ("findings", "impression", "both")] == ["F.", "I.", "F. I."]
    assert [target_text("", "I.", s) for s in ("findings", "both")] == ["", "I."]


bodies = st.text(alphabet="abc .,\n", min_size=1, max_size=30).filter(lambda body: body.strip())


@given(st.text(alphabet="AB :\n\t -/aé", max_size=80))
def test_sections_contain_every_word_of_the_text_and_no_other(text: str) -> None:
    sections = split_sections(text)
    assert all(body in text for _, body in sections)
    headings = len(sections) - 1
    assert headings <= text.count(":") + 1
    if not any(line.startswith(" ") and ":" in line for line in text.split("\n")[1:]):
        assert "".join("".join(body for _, body in sections).split()) == "".join(text.split())


@given(bodies, bodies)
def test_findings_and_impression_are_read_back_unchanged(findings: str, impression: str) -> None:
    text = f"\n INDICATION: x.\n \n FINDINGS: {findings}\n \n IMPRESSION: {impression}\n"
    sections = report_sections(text)
    assert sections["findings"] == " ".join(findings.split())
    assert sections["impression"] == " ".join(impression.split())
