from __future__ import annotations

from pathlib import Path

import pytest

from normtune.data.datasets import medpix
from normtune.errors import InputError
from tests.support.dataset_samples import write_jsonl
from tests.support.report_samples import medpix_row, write_medpix

ROW = medpix_row("MPX1_synpic1")


def read_error(root: Path) -> str:
    with pytest.raises(InputError) as caught:
        medpix.read(root)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_row_is_a_report_with_modality_organ_and_case(tmp_path: Path) -> None:
    root = write_medpix(tmp_path, train=[ROW], dev=[medpix_row("MPX2_s2")], test=[medpix_row("MPX3_s3", plane=None)])
    dataset = medpix.read(root)
    first, _, third = dataset.examples
    assert (first.id, first.images, first.kind) == ("medpix-MPX1_synpic1", ("images/MPX1_synpic1.jpg",), "report")
    assert first.answer == "A made finding of MPX1_synpic1."
    assert first.meta == {
        "language": "en",
        "modality": "CT",
        "organ": "Chest, Pulmonary",
        "plane": "Axial",
        "protocol": "CT - noncontrast",
        "case": "MPX1",
    }
    assert "plane" not in third.meta
    assert [e.split for e in dataset.examples] == ["train", "validate", "test"]
    assert dataset.licence == "none found: never redistribute"
    assert dataset.problems == []


def test_a_case_in_two_splits_a_missing_file_and_a_missing_image_are_listed(tmp_path: Path) -> None:
    root = write_medpix(tmp_path, train=[ROW, medpix_row("MPX2_s1")], test=[medpix_row("MPX1_s9")])
    (root / "images/MPX2_s1.jpg").unlink()
    assert [(p.file, p.what) for p in medpix.read(root).problems] == [
        ("dev.jsonl", "file is missing"),
        ("images/MPX2_s1.jpg", "image is missing"),
        ("test.jsonl", "its case is in another split too"),
    ]
    assert len(medpix.read(root, text_only=True).examples) == 3


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ('{"id": ', "not valid JSON"),
        ([1], "not a JSON object"),
        ({"id": "a", "image": "b.jpg"}, "no report"),
        (ROW, "its id is already used by row 1 of train.jsonl"),
        (medpix_row("MPX2_s1", image="../x.jpg"), "the image's path is outside the dataset's folder"),
        (ROW | {"id": 5}, "its id is empty"),
    ],
)
def test_errors_name_the_file_and_row_of_a_bad_line(tmp_path: Path, row: object, message: str) -> None:
    root = write_medpix(tmp_path, train=[ROW])
    write_jsonl(root / "train.jsonl", ROW, row)
    assert read_error(root).startswith("train.jsonl, row 2: ")
    assert message in read_error(root)


def test_a_folder_of_another_layout_is_refused_with_the_expected_files(tmp_path: Path) -> None:
    assert "holds none of train.jsonl, dev.jsonl, test.jsonl: not MedPix's folder" in read_error(tmp_path)
