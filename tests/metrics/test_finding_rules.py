from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from normtune.metrics.finding_rules import FINDINGS, FIVE_FINDINGS, PHRASES, extract_findings

CASES: dict[str, dict[str, str]] = {
    "The heart is normal in size. The lungs are clear.": {},
    "There is a left base opacity.": {"Lung Opacity": "positive"},
    "No pneumothorax, pleural effusion, or focal airspace disease.": {
        "Pneumothorax": "negative",
        "Pleural Effusion": "negative",
        "Lung Opacity": "negative",
    },
    "No pneumothorax, the heart is enlarged.": {"Pneumothorax": "negative", "Cardiomegaly": "positive"},
    "No effusion but mild cardiomegaly.": {"Pleural Effusion": "negative", "Cardiomegaly": "positive"},
    "The heart is not enlarged.": {"Cardiomegaly": "negative"},
    "Heart size is mildly enlarged.": {"Cardiomegaly": "positive"},
    "The heart is borderline enlarged.": {"Cardiomegaly": "uncertain"},
    "There is cardiomegaly and the lungs are unremarkable.": {"Cardiomegaly": "positive"},
    "Enlarged cardiomediastinal silhouette.": {"Enlarged Cardiomediastinum": "positive"},
    "No change in the left pleural effusion.": {"Pleural Effusion": "positive"},
    "The effusion has resolved.": {"Pleural Effusion": "negative"},
    "Pleural effusion and pneumothorax are not seen.": {"Pleural Effusion": "negative", "Pneumothorax": "negative"},
    "A nodule, not seen on prior exams.": {"Lung Lesion": "positive"},
    "Pneumonia cannot be excluded.": {"Pneumonia": "uncertain"},
    "Opacity which may represent pneumonia.": {"Lung Opacity": "positive", "Pneumonia": "uncertain"},
    "Streaky opacities, atelectasis versus infiltrate.": {"Lung Opacity": "positive", "Atelectasis": "uncertain"},
    "If there is concern for fracture, repeat.": {},
    "Old healed rib fractures.": {"Fracture": "positive"},
    "Calcified granuloma.": {},
    "Breast mass. Pericardial effusion. Sclerotic lesions.": {},
    "Right PICC line tip in the SVC.": {"Support Devices": "positive"},
    "Interval removal of right PICC.": {"Support Devices": "negative"},
    "Trachea is midline.": {},
    "Pulmonary vascular congestion.": {"Edema": "positive"},
    "Biapical pleural thickening.": {"Pleural Other": "positive"},
    "Lungs are clear.There is a small pneumothorax": {"Pneumothorax": "positive"},
    "Consolidation.\nNo consolidation elsewhere.": {"Consolidation": "positive"},
    # structured reports
    "Pneumothorax: None. Pleural effusion: absent. Edema: not seen": {
        "Pneumothorax": "negative",
        "Pleural Effusion": "negative",
        "Edema": "negative",
    },
    "FINDINGS: Consolidation: negative\nFracture - none": {"Consolidation": "negative", "Fracture": "negative"},
    "Pneumothorax: no pneumothorax.": {"Pneumothorax": "negative"},
    "Pneumothorax: small, left.": {"Pneumothorax": "positive"},
    "Pleural effusion: no significant change.": {"Pleural Effusion": "positive"},
    "HEART: enlarged. LUNGS: Clear.": {"Cardiomegaly": "positive"},
    "Heart: normal. Lungs: bibasilar opacities.": {"Lung Opacity": "positive"},
    # denials in other words
    "The effusion is no longer seen.": {"Pleural Effusion": "negative"},
    "Pneumonia is considered unlikely.": {"Pneumonia": "negative"},
    "The opacity is unlikely to be pneumonia.": {"Lung Opacity": "positive", "Pneumonia": "negative"},
    "Pneumonia is less likely.": {"Pneumonia": "negative"},
    "Opacity, atelectasis, less likely pneumonia": {
        "Lung Opacity": "positive",
        "Atelectasis": "positive",
        "Pneumonia": "negative",
    },
    "Edema is less likely than atelectasis.": {"Edema": "negative", "Atelectasis": "positive"},
    "Pneumonia is less likely but possible.": {"Pneumonia": "uncertain"},
    "Pneumonia is less likely, but cannot be completely excluded.": {"Pneumonia": "uncertain"},
    "Atelectasis or, less likely, pneumonia.": {"Atelectasis": "uncertain", "Pneumonia": "uncertain"},
    "The pneumothorax has disappeared.": {"Pneumothorax": "negative"},
    "I don\u2019t see a pneumothorax. Consolidation wasn't seen.": {
        "Pneumothorax": "negative",
        "Consolidation": "negative",
    },
    "Pneumonia can't be excluded.": {"Pneumonia": "uncertain"},
}


@pytest.mark.parametrize(("report", "expected"), CASES.items())
def test_findings_of_an_example_sentence(report: str, expected: dict[str, str]) -> None:
    statuses = {name: status for name, status in extract_findings(report).items() if status != "absent"}
    statuses.pop("No Finding", None)
    assert statuses == expected


def test_no_finding_ignores_support_devices() -> None:
    assert extract_findings("Lungs are clear. PICC in place.")["No Finding"] == "positive"
    assert extract_findings("Possible pneumonia.")["No Finding"] == "absent"
    assert extract_findings("")["No Finding"] == "positive"


def test_the_findings_are_chexperts_fourteen() -> None:
    assert len(FINDINGS) == 14 and set(FIVE_FINDINGS) < set(FINDINGS) and FINDINGS[-1] == "No Finding"


@pytest.mark.parametrize("name", PHRASES)
def test_every_finding_can_be_positive_negative_and_uncertain(name: str) -> None:
    """Each finding is mentioned by a simple phrase."""
    phrase = {
        "Enlarged Cardiomediastinum": "mediastinal widening",
        "Lung Lesion": "mass",
        "Lung Opacity": "infiltrate",
        "Pleural Other": "pleural thickening",
        "Support Devices": "catheter",
    }.get(name, name.lower())
    assert extract_findings(f"There is {phrase}.")[name] == "positive"
    assert extract_findings(f"There is no {phrase}.")[name] == "negative"
    assert extract_findings(f"There is possible {phrase}.")[name] == "uncertain"


WORDS = ["no", "effusion", ",", "or", ".", "mass", "is", "not", "seen", "may", "if"]


@given(st.lists(st.sampled_from(WORDS), max_size=20))
def test_any_text_gets_a_status_for_every_finding(words: list[str]) -> None:
    statuses = extract_findings(" ".join(words))
    assert tuple(statuses) == FINDINGS
    assert set(statuses.values()) <= {"positive", "uncertain", "negative", "absent"}
