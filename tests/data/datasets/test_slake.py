from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from normtune.data.datasets import slake
from normtune.errors import InputError
from tests.support.dataset_samples import slake_row, write_slake


def problems(root: Path, **options: str) -> list[str]:
    return [str(problem) for problem in slake.read(root, **options).problems]


def test_rows_become_examples_with_the_files_own_answer_type(tmp_path: Path) -> None:
    closed = slake_row(2, 1, answer="Lung", answer_type="CLOSED")
    write_slake(tmp_path, train=[slake_row(1, 1), closed], validate=[slake_row(3, 2)], test=[slake_row(4, 3)])
    dataset = slake.read(tmp_path)
    first = dataset.split("train")[0]
    assert (first.id, first.images, first.answer) == ("slake-1", ("xmlab1/source.jpg",), "Lung")
    assert first.meta == {"language": "en", "modality": "X-Ray", "organ": "Lung", "content_type": "Organ"}
    assert [e.kind for e in dataset.split("train")] == ["open", "closed"]
    assert [e.split for e in dataset.examples] == ["train", "train", "validate", "test"]
    assert np.asarray(dataset.open_image(first.images[0])).shape == (4, 4, 3)
    assert dataset.licence == "CC BY 4.0"
    assert dataset.problems == []


def test_languages_are_read_separately_or_together(tmp_path: Path) -> None:
    rows = [slake_row(1, 1), slake_row(2, 1, "zh", question="图中是什么？", answer="肺"), slake_row(3, 2)]
    write_slake(tmp_path, train=rows, validate=rows[:1], test=rows[:1])
    assert [e.id for e in slake.read(tmp_path).split("train")] == ["slake-1", "slake-3"]
    assert [e.answer for e in slake.read(tmp_path, language="zh").examples] == ["肺"]
    assert len(slake.read(tmp_path, language="all").split("train")) == 3
    with pytest.raises(InputError, match="SLAKE has no language 'fr'"):
        slake.read(tmp_path, language="fr")  # type: ignore[arg-type]


def test_test_images_in_the_other_languages_training_split_are_listed(tmp_path: Path) -> None:
    train = [slake_row(1, 1), slake_row(2, 2, "zh")]
    test = [slake_row(3, 2), slake_row(4, 3), slake_row(5, 1, "zh")]
    write_slake(tmp_path, train=train, validate=[slake_row(6, 9)], test=test)
    messages = problems(tmp_path)
    assert "1 of the 2 English test images are in the Chinese training split" in messages[0]
    assert "1 of the 1 Chinese test images are in the English training split" in messages[1]


def test_unusable_rows_are_skipped_and_listed(tmp_path: Path) -> None:
    train = [slake_row(1, 1), slake_row(2, 1, answer=""), slake_row(3, 1, img_name=None), "no row", slake_row(4, 8)]
    write_slake(tmp_path, train=[row for row in train if isinstance(row, dict)], validate=[], test=[])
    (tmp_path / "train.json").write_text(json.dumps(train))
    (tmp_path / "imgs/xmlab8/source.jpg").unlink()
    dataset = slake.read(tmp_path)
    assert [e.id for e in dataset.examples] == ["slake-1"]
    assert len(dataset.skipped) == 4
    messages = [str(problem) for problem in dataset.problems]
    assert messages[0] == "imgs/xmlab8/source.jpg: image is missing. Rows skipped: 1. Put the image there."
    assert "train.json, row 2: answer is empty. Row skipped. Fill it in to use the row." in messages
    assert any(text.startswith("train.json, row 3: image is empty") for text in messages)
    assert any(text.startswith("train.json, row row 4: image is empty") for text in messages)


@pytest.mark.parametrize("path", ["../../scan.png", "/data/scan.png", "a/../../scan.png", "C:/scan.png", ".."])
def test_an_image_path_outside_the_image_folder_is_refused(tmp_path: Path, path: str) -> None:
    write_slake(tmp_path, train=[slake_row(1, 1)], validate=[], test=[])
    (tmp_path / "test.json").write_text(json.dumps([slake_row(7, 1, img_name=path)]))
    with pytest.raises(InputError, match=r"test\.json, row 7: the image's path is outside the dataset's folder"):
        slake.read(tmp_path)


@pytest.mark.parametrize("image", ["data:image/png;base64," + "QUJD" * 900, "iVBORw0KGgo/" * 400])
def test_an_image_in_place_of_its_path_is_refused_and_not_printed(tmp_path: Path, image: str) -> None:
    write_slake(tmp_path, train=[slake_row(1, 1)], validate=[], test=[])
    (tmp_path / "test.json").write_text(json.dumps([slake_row(7, 1, img_name=image)]))
    with pytest.raises(InputError, match=r"^test\.json, row 7: the image is .{,100}$"):
        slake.read(tmp_path)


def test_none_is_an_answer_and_repeated_rows_are_kept_and_listed(tmp_path: Path) -> None:
    row = slake_row(1, 1, answer="None")
    write_slake(tmp_path, train=[row, row | {"qid": 2}], validate=[], test=[])
    dataset = slake.read(tmp_path)
    assert [e.answer for e in dataset.examples] == ["None", "None"]
    assert [(p.row, p.what) for p in dataset.problems] == [("2", "same image, question and answer as an earlier row")]


def test_half_of_a_surrogate_pair_is_a_fault_of_its_row(tmp_path: Path) -> None:
    write_slake(tmp_path, train=[slake_row(1, 1)], validate=[], test=[])
    rows = [slake_row(1, 1), slake_row(2, 1, question="Which \ud83e?")]
    (tmp_path / "train.json").write_text(json.dumps(rows))
    assert [e.id for e in slake.read(tmp_path).examples] == ["slake-1"]
    assert problems(tmp_path)[0].startswith("train.json, row 2: question contains half of a surrogate pair.")
    (tmp_path / "train.json").write_text(json.dumps([slake_row(1, 1) | {"qid": "\udfff"}]))
    with pytest.raises(InputError, match=r"train\.json, row \udfff: its id or a field contains half"):
        slake.read(tmp_path)


def test_repeated_ids_get_a_number(tmp_path: Path) -> None:
    write_slake(tmp_path, train=[slake_row(1, 1), slake_row(1, 2)], validate=[], test=[])
    assert [e.id for e in slake.read(tmp_path).examples] == ["slake-1", "slake-1-2"]


def test_a_folder_of_another_layout_is_refused_with_the_expected_files(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"holds none of train\.json, validate\.json, test\.json"):
        slake.read(tmp_path)
    (tmp_path / "train.json").write_text("{}")
    with pytest.raises(InputError, match="no image folder 'imgs'"):
        slake.read(tmp_path)
    (tmp_path / "imgs").mkdir()
    with pytest.raises(InputError, match="holds no list of rows"):
        slake.read(tmp_path)
    (tmp_path / "train.json").write_text("[{]")
    with pytest.raises(InputError, match=r"train\.json, line 1: not valid JSON"):
        slake.read(tmp_path)
    (tmp_path / "train.json").write_text("[]")
    with pytest.raises(InputError, match="has no usable rows"):
        slake.read(tmp_path)
