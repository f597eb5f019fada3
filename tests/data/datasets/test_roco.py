from __future__ import annotations

from pathlib import Path

import pytest

from normtune.data.datasets import roco
from normtune.errors import InputError
from tests.support.dataset_samples import write_image
from tests.support.report_samples import write_csv, write_roco


def read_error(root: Path) -> str:
    with pytest.raises(InputError) as caught:
        roco.read(root)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_captions_of_the_repository_are_reports_of_one_image(tmp_path: Path) -> None:
    dataset = roco.read(write_roco(tmp_path))
    train, validate, test = dataset.examples
    assert (train.id, train.kind, train.question) == ("roco-ROCO_00002", "report", "")
    assert train.answer == "A made caption, of two lines."
    assert train.images == ("data/train/radiology/images/ROCO_00002.jpg",)
    assert validate.images == ("data/validation/radiology/images/PMC20_made-g001.jpg",)
    assert [e.split for e in (train, validate, test)] == ["train", "validate", "test"]
    assert [e.meta["licence"] for e in (train, test)] == ["CC BY", "NO-CC CODE"]
    assert dataset.open_image(test.images[0]).size == (4, 4)
    assert [str(p) for p in dataset.problems] == [
        "data/test/radiology/captions.txt: 1 images are from articles without a Creative Commons licence. "
        "Kept. Look at meta['licence'] before you pass any on."
    ]


def test_a_byte_order_mark_is_not_part_of_the_first_id(tmp_path: Path) -> None:
    captions = write_roco(tmp_path) / "data/train/radiology/captions.txt"
    captions.write_bytes(b"\xef\xbb\xbf" + captions.read_bytes())
    assert roco.read(tmp_path).examples[0].id == "roco-ROCO_00002"


def test_kaggles_copy_is_read(tmp_path: Path) -> None:
    for split, short in (("train", "train"), ("validation", "val"), ("test", "test")):
        row = (f"ROCO_{split}", f"PMC_{split}.jpg", "Made, with a comma.")
        write_csv(tmp_path / split / f"radiology{short}data.csv", ("id", "name", "caption"), row)
        write_image(tmp_path / split / "radiology" / "images" / f"PMC_{split}.jpg")
    examples = roco.read(tmp_path).examples
    assert [e.split for e in examples] == ["train", "validate", "test"]
    assert examples[1].images == ("validation/radiology/images/PMC_validation.jpg",)
    assert examples[1].answer == "Made, with a comma."


def test_roco_v2_is_read(tmp_path: Path) -> None:
    for split in ("train", "valid", "test"):
        id = f"ROCOv2_2023_{split}_000001"
        write_csv(tmp_path / f"{split}_captions.csv", ("ID", "Caption"), (id, "Made."))
        write_image(tmp_path / split / f"{id}.jpg")
    examples = roco.read(tmp_path).examples
    assert [e.split for e in examples] == ["train", "validate", "test"]
    assert examples[1].images == ("valid/ROCOv2_2023_valid_000001.jpg",)


def test_missing_images_are_listed_by_the_name_of_their_id(tmp_path: Path) -> None:
    root = write_roco(tmp_path)
    (root / "data/validation/radiology/images/PMC20_made-g001.jpg").unlink()
    dataset = roco.read(root)
    assert [e.split for e in dataset.examples] == ["train", "test"]
    assert "data/validation/radiology/images/ROCO_00020.jpg" in [p.file for p in dataset.problems]
    assert len(roco.read(root, text_only=True).examples) == 3


def test_errors_name_the_file_and_row_of_bad_captions(tmp_path: Path) -> None:
    root = write_roco(tmp_path)
    file = root / "data/train/radiology/captions.txt"
    file.write_text("no tab\n")
    assert "data/train/radiology/captions.txt, row 1: no id and tab before the caption" in read_error(root)
    file.write_text("ROCO_1\tOne.\n\nROCO_1\tAgain.\n")
    assert "captions.txt, row 3: its id is already used by row 1 of data/train/radiology/captions.txt" in read_error(
        root
    )
    file.write_text("../../../../../x\tOne.\n")
    assert "row 1: the image's path is outside the dataset's folder" in read_error(root)


def test_a_missing_column_and_a_folder_of_another_layout_are_refused(tmp_path: Path) -> None:
    assert "holds neither data/train/radiology/captions.txt (ROCO), nor" in read_error(tmp_path)
    write_csv(tmp_path / "train_captions.csv", ("ID", "Text"), ("a", "b"))
    assert "train_captions.csv, row 1: no column Caption; its columns are ID, Text." in read_error(tmp_path)
