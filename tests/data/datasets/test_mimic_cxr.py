from __future__ import annotations

from pathlib import Path

import pytest

from normtune.data.datasets import mimic_cxr
from normtune.errors import InputError
from tests.support.report_samples import DICOM, r2gen_entry, write_csv, write_mimic, write_r2gen

STUDY = "files/p10/p10000032/s50414267"
SPLIT = ("dicom_id", "study_id", "subject_id", "split")


def read_error(root: Path) -> str:
    with pytest.raises(InputError) as caught:
        mimic_cxr.read(root)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("packed", ["", ".gz"])
@pytest.mark.parametrize("reports", ["", "mimic-cxr-reports"])
def test_a_study_is_its_report_with_frontal_and_lateral_view(tmp_path: Path, packed: str, reports: str) -> None:
    dataset = mimic_cxr.read(write_mimic(tmp_path, packed, reports))
    (study,) = dataset.examples
    assert (study.id, study.split, study.kind) == ("mimic-cxr-s50414267", "train", "report")
    assert study.images == (f"{STUDY}/02{DICOM[2:]}.jpg", f"{STUDY}/00{DICOM[2:]}.jpg")  # PA before AP
    assert study.answer == "The lungs are clear. The heart is of normal size."
    assert study.meta == {"language": "en", "patient": "10000032", "chexpert": "Edema -1, No Finding 1"}
    assert dataset.open_image(study.images[0]).size == (4, 4)
    assert dataset.licence.startswith("PhysioNet Credentialed Health Data License 1.5.0")


def test_studies_without_the_section_or_the_report_are_skipped_and_listed(tmp_path: Path) -> None:
    dataset = mimic_cxr.read(write_mimic(tmp_path))
    assert [(p.row, p.what) for p in dataset.problems] == [
        ("5", "findings section is empty"),
        ("6", "its report file is missing"),
        ("6", "findings section is empty"),
    ]
    assert [e.id for e in dataset.skipped] == ["mimic-cxr-s50578979", "mimic-cxr-s51029426"]
    assert "1 further images of studies with several views are not read" in dataset.notes
    both = mimic_cxr.read(tmp_path, sections="both").examples
    assert [e.split for e in both] == ["train", "validate"]
    assert both[0].answer == "The lungs are clear. The heart is of normal size. No acute process."


def test_no_text_of_a_report_enters_a_problem_or_a_note(tmp_path: Path) -> None:
    dataset = mimic_cxr.read(write_mimic(tmp_path))
    message = " ".join([*map(str, dataset.problems), *dataset.notes]).lower()
    assert not any(word in message for word in ("lungs", "cough", "heart", "acute"))


def test_without_metadata_a_study_has_its_first_image_only(tmp_path: Path) -> None:
    root = write_mimic(tmp_path)
    (root / "mimic-cxr-2.0.0-metadata.csv").unlink()
    (root / "mimic-cxr-2.0.0-chexpert.csv").unlink()
    dataset = mimic_cxr.read(root)
    assert dataset.examples[0].images == (f"{STUDY}/00{DICOM[2:]}.jpg",)
    assert [p.file for p in dataset.problems[:2]] == ["mimic-cxr-2.0.0-metadata.csv", "mimic-cxr-2.0.0-chexpert.csv"]


def test_text_only_keeps_rows_with_missing_images(tmp_path: Path) -> None:
    root = write_mimic(tmp_path)
    for image in root.rglob("*.jpg"):
        image.unlink()
    assert "add --text-only" in read_error(root)
    assert len(mimic_cxr.read(root, text_only=True).examples) == 1


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (("../../x", "50414267", "10000032", "train"), "dicom_id is not a MIMIC-CXR id"),
        ((DICOM, "s50414267", "10000032", "train"), "study_id is not a MIMIC-CXR id"),
        ((DICOM, "50414267", "10000032", "test"), "its study is also under another patient or split"),
        ((DICOM, "50414267", "10000033", "train"), "its study is also under another patient or split"),
        ((DICOM, "50414267", "10000032"), "3 cells for 4 columns"),
    ],
)
def test_errors_name_a_bad_row_of_the_split_file(tmp_path: Path, row: tuple[str, ...], message: str) -> None:
    root = write_mimic(tmp_path)
    write_csv(root / "mimic-cxr-2.0.0-split.csv", SPLIT, (DICOM, "50414267", "10000032", "train"), row)
    assert read_error(root).startswith("mimic-cxr-2.0.0-split.csv, row 3: ")
    assert message in read_error(root)


def test_an_unknown_split_is_refused(tmp_path: Path) -> None:
    root = write_mimic(tmp_path)
    write_csv(root / "mimic-cxr-2.0.0-split.csv", SPLIT, (DICOM, "50414267", "10000032", "tarin"))
    assert "row 2: split 'tarin' is unknown, did you mean 'train'?" in read_error(root)


def test_images_without_reports_and_a_folder_of_another_layout_are_refused(tmp_path: Path) -> None:
    root = write_mimic(tmp_path / "jpg")
    for report in root.rglob("*.txt"):
        report.unlink()
    assert "holds no reports: looked for files/p10/p10000032/s50414267.txt" in read_error(root)
    assert "holds neither mimic-cxr-2.0.0-split.csv (the JPG release) nor R2Gen's" in read_error(tmp_path)


def test_errors_name_a_damaged_archive(tmp_path: Path) -> None:
    root = write_mimic(tmp_path, ".gz")
    file = root / "mimic-cxr-2.0.0-split.csv.gz"
    whole = file.read_bytes()
    for data in (b"", whole[:-9], b"x" + whole[1:], whole[:12] + b"\xff" * 20):
        file.write_bytes(data)
        assert "mimic-cxr-2.0.0-split.csv" in read_error(root)


def test_r2gens_annotation_file_is_read_too(tmp_path: Path) -> None:
    name = "p10/p10000032/s50414267/02aa804e.jpg"
    row = r2gen_entry("02aa804e", "train", [name], study_id=50414267, subject_id=10000032)
    row["report"] = "Clear\n lungs."
    dataset = mimic_cxr.read(write_r2gen(tmp_path, train=[row], val=[], test=[]))
    (example,) = dataset.examples
    assert (example.id, example.images, example.answer) == ("mimic-cxr-02aa804e", (name,), "Clear lungs.")
    assert example.meta["patient"] == "10000032"
    assert dataset.problems == []
