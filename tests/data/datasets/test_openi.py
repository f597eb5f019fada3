from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from normtune.data.datasets import openi
from normtune.errors import InputError
from tests.support.report_samples import (
    openi_xml,
    r2gen_entry,
    write_csv,
    write_kaggle_openi,
    write_r2gen,
    write_xml_openi,
)
from tests.support.tolerance import sampling_error

VIEWS = ("CXR1_IM-0001/0.png", "CXR1_IM-0001/1.png")


def read_error(root: Path, **options: str) -> str:
    with pytest.raises(InputError) as caught:
        openi.read(root, **options)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
    return str(caught.value)


def write_sample(root: Path, images: str = "images") -> Path:
    train = [r2gen_entry("CXR1_IM-0001", "train", VIEWS), r2gen_entry("CXR2_IM-0002", "train", VIEWS)]
    val = [r2gen_entry("CXR3_3_IM-0003", "val", ("CXR3_3_IM-0003/0.png", "CXR3_3_IM-0003/1.png"))]
    return write_r2gen(root, images, train=train, val=val, test=[])


def test_r2gens_studies_have_two_views_and_its_split(tmp_path: Path) -> None:
    dataset = openi.read(write_sample(tmp_path))
    first = dataset.examples[0]
    assert (first.id, first.images, first.kind) == ("openi-CXR1_IM-0001", VIEWS, "report")
    assert (first.question, first.answer) == ("", "Made findings of CXR1_IM-0001.")
    assert [e.split for e in dataset.examples] == ["train", "train", "validate"]
    assert dataset.open_image(VIEWS[1]).size == (4, 4)
    assert dataset.problems == []
    assert "CC BY-NC-ND 4.0" in dataset.licence


def test_missing_images_are_listed_and_text_only_keeps_their_rows(tmp_path: Path) -> None:
    write_sample(tmp_path, images="")
    assert read_error(tmp_path).endswith("To read the text without the images, add --text-only.")
    dataset = openi.read(tmp_path, text_only=True)
    assert len(dataset.examples) == 3
    assert len(dataset.problems) == 4
    assert str(dataset.problems[0]) == (
        "images/CXR1_IM-0001/0.png: image is missing. Rows kept for their text: 2. Put the image there."
    )
    with pytest.raises(InputError, match=r"CXR1_IM-0001/0\.png: no such image file"):
        dataset.open_image(VIEWS[0])


def test_a_study_with_a_missing_view_is_skipped(tmp_path: Path) -> None:
    write_sample(tmp_path)
    (tmp_path / "images" / VIEWS[1]).unlink()
    dataset = openi.read(tmp_path)
    assert [e.id for e in dataset.examples] == ["openi-CXR3_3_IM-0003"]
    assert len(dataset.skipped) == 2


def test_an_empty_report_is_skipped_and_listed(tmp_path: Path) -> None:
    good, empty = (r2gen_entry("CXR1_IM-1", "train", VIEWS), r2gen_entry("CXR2_IM-2", "train", VIEWS, report=" "))
    dataset = openi.read(write_r2gen(tmp_path, train=[good, empty], val=[], test=[]))
    assert [str(p) for p in dataset.problems] == [
        "annotation.json, row train 2: findings section is empty. Row skipped. Fill it in to use the row."
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_path": ["../../secret.png", "b.png"]}, "the image's path is outside the dataset's folder"),
        ({"image_path": ["/etc/passwd", "b.png"]}, "the image's path is outside the dataset's folder"),
        ({"id": "CXR1_IM-0001"}, "its id is already used by row train 1 of annotation.json"),
        ({"id": ""}, "its id is not text"),
    ],
)
def test_errors_name_the_file_and_row_of_a_bad_entry(tmp_path: Path, change: dict[str, object], message: str) -> None:
    rows = [r2gen_entry("CXR1_IM-0001", "train", VIEWS), r2gen_entry("CXR2_IM-2", "train", VIEWS) | change]
    write_r2gen(tmp_path, "", train=rows, val=[], test=[])
    assert read_error(tmp_path).startswith("annotation.json, row train 2: ")
    assert message in read_error(tmp_path)


def test_other_layouts_of_annotation_json_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "annotation.json"
    for content in ([], {"train": {}}, {}, {"images": 1}):
        file.write_text(json.dumps(content))
        assert "has no lists train, val and test" in read_error(tmp_path)
    file.write_text(json.dumps({"train": [{"id": "a", "report": "x"}]}))
    assert "annotation.json, row train 1: no image_path." in read_error(tmp_path)
    file.write_text(json.dumps({"trian": [r2gen_entry("a", "train", VIEWS)]}))
    assert "split 'trian' is unknown, did you mean 'train'? Known splits: train, validate, test." in read_error(
        tmp_path
    )
    file.write_text('{"train": [')
    assert "not valid JSON" in read_error(tmp_path)


def test_r2gens_file_has_no_impression(tmp_path: Path) -> None:
    assert "has only the findings. Use --sections findings" in read_error(write_sample(tmp_path), sections="impression")


def test_kaggles_pair_gives_frontal_then_lateral_and_either_section(tmp_path: Path) -> None:
    root = write_kaggle_openi(tmp_path)
    examples = {e.id: e for e in openi.read(root).examples}
    assert examples["openi-1"].images == ("1_IM-0001-4001.dcm.png", "1_IM-0001-3001.dcm.png")
    assert examples["openi-1"].answer == "Clear lungs."
    assert examples["openi-3"].images == ("3_IM-1384-1001.dcm.png", "3_IM-1384-3001.dcm.png")
    assert set(examples) == {"openi-1", "openi-3"}
    both = {e.id: e.answer for e in openi.read(root, sections="both").examples}
    assert both == {
        "openi-1": "Clear lungs. Normal chest.",
        "openi-2": "Opacity, left base.",
        "openi-3": "No effusion.",
    }
    assert {e.id for e in openi.read(root, sections="impression").examples} == {"openi-1", "openi-2"}


def test_problems_of_kaggles_files_are_listed(tmp_path: Path) -> None:
    dataset = openi.read(write_kaggle_openi(tmp_path))
    assert [(p.file, p.row, p.what) for p in dataset.problems] == [
        ("indiana_reports.csv", "3", "findings section is empty"),
        ("indiana_reports.csv", "5", "image is empty"),
    ]
    assert dataset.notes == [
        "no split in the files: 70 / 10 / 20% of the studies, by a hash of their number",
        "target: findings",
        "1 further images of studies with several views are not read",
    ]


def test_the_hash_split_is_deterministic_and_near_its_shares() -> None:
    splits = [openi._hash_split(str(number)) for number in range(3955)]
    assert splits == [openi._hash_split(str(number)) for number in range(3955)]
    shares = {split: splits.count(split) / 3955 for split in set(splits)}
    error = sampling_error(math.sqrt(0.7 * 0.3), 3955)
    assert shares == pytest.approx({"train": 0.7, "validate": 0.1, "test": 0.2}, abs=error)


def test_the_other_layouts_use_r2gens_split_if_its_file_exists(tmp_path: Path) -> None:
    root = write_kaggle_openi(tmp_path)
    write_r2gen(root, "", train=[r2gen_entry("CXR1_1_IM-0001", "train", VIEWS)], val=[], test=[])
    dataset = openi.read(root, sections="impression")
    assert [(e.id, e.split, e.answer) for e in dataset.examples] == [("openi-1", "train", "Normal chest.")]
    assert "3 studies are in no split of annotation.json" in [p.what for p in dataset.problems]


def test_the_original_xml_gives_sections_views_problems_and_its_licence(tmp_path: Path) -> None:
    root = write_xml_openi(tmp_path)
    dataset = openi.read(root, sections="both")
    assert [e.id for e in dataset.examples] == ["openi-1", "openi-2", "openi-10"]
    first, second, third = dataset.examples
    assert first.images == ("CXR1_IM-0001-1001.png", "CXR1_IM-0001-2001.png")
    assert first.answer == "Clear lungs. Normal & stable."
    assert first.meta["problems"] == "Cardiomegaly/mild;Opacity"
    assert (len(second.images), len(third.images)) == (1, 2)
    assert dataset.open_image(third.images[1]).size == (4, 4)
    assert dataset.licence == ("open access at NLM; 1.xml names http://creativecommons.org/licenses/by-nc-nd/4.0/")
    assert len(openi.read(root / "ecgen-radiology", text_only=True).examples) == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<eCitation>", "3.xml: not valid XML"),
        ('<!DOCTYPE x [<!ENTITY a "b">]><eCitation/>', "3.xml defines entities"),
        (openi_xml(3, "x", "y").replace("CXR3", "3"), "3.xml: no uId of the form CXR1"),
        (openi_xml(1, "x", "y"), "row 1: its id is already used by row 1 of 1.xml"),
    ],
)
def test_errors_name_a_bad_xml_file(tmp_path: Path, text: str, message: str) -> None:
    root = write_xml_openi(tmp_path)
    (root / "ecgen-radiology" / "3.xml").write_text(text)
    assert message in read_error(root)


def test_a_folder_of_another_layout_is_refused_with_the_expected_files(tmp_path: Path) -> None:
    message = read_error(tmp_path)
    assert (
        "R2Gen's annotation.json" in message and "indiana_reports.csv" in message and "ecgen-radiology/1.xml" in message
    )


def test_errors_name_missing_files_and_columns_of_kaggles_pair(tmp_path: Path) -> None:
    root = write_kaggle_openi(tmp_path)
    write_csv(root / "indiana_projections.csv", ("uid", "file"), (1, "a.png"))
    assert "indiana_projections.csv, row 1: no column filename, projection; its columns are uid, file" in read_error(
        root
    )
    (root / "indiana_projections.csv").unlink()
    assert "holds indiana_reports.csv without indiana_projections.csv" in read_error(root)
