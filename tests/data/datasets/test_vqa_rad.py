from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from normtune.data.datasets import vqa_rad
from normtune.data.splits import find_leaks, image_disjoint
from normtune.data.summary import summarize
from normtune.errors import InputError
from tests.support.dataset_samples import vqa_rad_row, write_image, write_vqa_rad

FILE = "VQA_RAD Dataset Public.json"


def official() -> list[dict[str, Any]]:
    """2248 rows over 314 images as in the official file: 202 of the 203 test images are in training too."""
    rows = []
    for number in range(1797):
        phrase = "freeform" if number % 3 else "para"
        rows.append(vqa_rad_row(number, f"synpic{number % 313}.jpg", phrase_type=phrase))
    for number in range(451):
        image = number % 203 if number % 203 < 202 else 313  # image 313 is only in the test split
        phrase = "test_freeform" if number % 3 else "test_para"
        rows.append(vqa_rad_row(2000 + number, f"synpic{image}.jpg", phrase_type=phrase))
    rows[1797] = vqa_rad_row(2000, "synpic0.jpg", phrase_type="test_para", question=rows[0]["question"].upper())
    return rows


@pytest.fixture(scope="module")
def official_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = write_vqa_rad(tmp_path_factory.mktemp("official"), official())
    write_image(root / "VQA_RAD Image Folder" / "synpic999.jpg")
    return root


def test_the_official_file_gives_1797_training_and_451_test_rows(official_root: Path) -> None:
    summary = summarize(vqa_rad.read(official_root))
    parts = summary["parts"]
    assert {name: (part["rows"], part["usable"], part["images"]) for name, part in parts.items()} == {
        "train": (1797, 1797, 313),
        "test": (451, 451, 203),
    }


def test_the_leak_of_the_official_split_is_listed(official_root: Path) -> None:
    messages = [str(leak) for leak in find_leaks(vqa_rad.read(official_root))]
    assert messages == [
        "202 of 203 images of test are in train too",
        "1 of 451 rows of test are word for word in train too",
    ]


def test_an_image_disjoint_split_of_the_official_file_leaks_nothing(official_root: Path) -> None:
    dataset = image_disjoint(vqa_rad.read(official_root))
    assert find_leaks(dataset) == []
    images = {split: {e.images[0] for e in dataset.split(split)} for split in ("train", "validate", "test")}
    assert [len(part) for part in images.values()] == [220, 31, 63]  # 70%, 10% and 20% of 314
    assert len(dataset.examples) == 2248


def test_an_image_without_a_question_is_listed(official_root: Path) -> None:
    messages = [str(problem) for problem in vqa_rad.read(official_root).problems]
    assert messages == [
        "VQA_RAD Image Folder/synpic999.jpg: image without a question. Nothing to do. The image is not used."
    ]


def test_the_layout_of_two_files_lets_the_file_decide(tmp_path: Path) -> None:
    for name, rows in (("trainset", [vqa_rad_row(1, "a.jpg")]), ("testset", [vqa_rad_row(2, "b.jpg")])):
        (tmp_path / f"{name}.json").write_text(json.dumps(rows))
        write_image(tmp_path / "images" / rows[0]["image_name"])
    dataset = vqa_rad.read(tmp_path)
    assert [(e.id, e.split) for e in dataset.examples] == [("vqa-rad-1", "train"), ("vqa-rad-2", "test")]


@pytest.mark.parametrize("path", ["../scan.jpg", "/data/scan.jpg"])
def test_an_image_path_outside_the_image_folder_is_refused(tmp_path: Path, path: str) -> None:
    root = write_vqa_rad(tmp_path, [vqa_rad_row(1, "a.jpg")])
    write_image(root / "scan.jpg")
    (root / FILE).write_text(json.dumps([vqa_rad_row(1, "a.jpg"), vqa_rad_row(2, path)]))
    with pytest.raises(InputError, match=r"row 2: the image's path is outside the dataset's folder"):
        vqa_rad.read(root)


def test_irregular_cells_of_the_release_are_read_as_text_and_listed(tmp_path: Path) -> None:
    rows = [
        vqa_rad_row("0", "a.jpg"),
        vqa_rad_row(1, "a.jpg", answer=4, answer_type="OPEN"),
        vqa_rad_row(2, "a.jpg", answer_type="CLOSED "),
        vqa_rad_row(3, "a.jpg", answer="\tRight lobe\n", answer_type="OPEN"),
        vqa_rad_row(4, "a.jpg", answer="NULL"),
        vqa_rad_row(5, "a.jpg", question="NULL"),
        vqa_rad_row(6, "a.jpg", question_type="PRSE"),
        vqa_rad_row(7, "a.jpg", answer_type="YES/NO"),
        vqa_rad_row(8, "a.jpg", phrase_type="other"),
        vqa_rad_row(9, ""),
    ]
    del rows[0]["question_rephrase"]
    dataset = vqa_rad.read(write_vqa_rad(tmp_path, rows))
    by_id = {e.id: e for e in dataset.examples}
    assert sorted(by_id) == [f"vqa-rad-{number}" for number in (0, 1, 2, 3, 6, 7, 8)]
    assert by_id["vqa-rad-1"].answer == "4"
    assert by_id["vqa-rad-2"].kind == by_id["vqa-rad-7"].kind == "closed"
    assert by_id["vqa-rad-3"].answer == "Right lobe"
    assert {(p.row, p.what) for p in dataset.problems} == {
        ("0", "qid is text, not a number"),
        ("0", "question_rephrase is missing"),
        ("1", "answer is a number, not text"),
        ("2", "answer_type has blanks around it"),
        ("3", "answer holds tabs or line ends"),
        ("3", "answer has blanks around it"),
        ("4", "answer is empty"),
        ("5", "question is empty"),
        ("6", "question_type is none of the release's"),
        ("7", "answer_type is neither OPEN nor CLOSED"),
        ("8", "phrase_type is unknown"),
        ("9", "image is empty"),
    }
    assert by_id["vqa-rad-0"].meta == {
        "language": "en",
        "organ": "chest",
        "question_type": "PRES",
        "phrase_type": "freeform",
    }


def test_a_folder_of_another_layout_is_refused_with_the_expected_files(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"holds neither 'VQA_RAD Dataset Public\.json' nor trainset\.json"):
        vqa_rad.read(tmp_path)
    (tmp_path / FILE).write_text("{}")
    with pytest.raises(InputError, match="no image folder"):
        vqa_rad.read(tmp_path)
    (tmp_path / "images").mkdir()
    with pytest.raises(InputError, match="holds no list of rows"):
        vqa_rad.read(tmp_path)
