from __future__ import annotations

import collections
import fractions
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from normtune.data.datasets import path_vqa
from normtune.errors import InputError
from tests.support.dataset_samples import png_bytes, write_parquet
from tests.support.report_samples import write_path_vqa

ROW = {"image": "train_0001", "question": "Is it?", "answer": "yes"}


def read_error(root: Path) -> str:
    with pytest.raises(InputError) as caught:
        path_vqa.read(root)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def write_train(root: Path, rows: Any) -> Path:
    (root / "qas/train/train_qa.pkl").write_bytes(rows if isinstance(rows, bytes) else pickle.dumps(rows))
    return root


def test_the_plain_pickles_are_read_and_yes_and_no_are_closed(tmp_path: Path) -> None:
    dataset = path_vqa.read(write_path_vqa(tmp_path))
    assert [(e.id, e.kind, e.split) for e in dataset.examples[:3]] == [
        ("path-vqa-train-1", "closed", "train"),
        ("path-vqa-train-2", "open", "train"),
        ("path-vqa-validate-1", "closed", "validate"),
    ]
    assert dataset.examples[0].images == ("train/train_0001.jpg",)
    assert dataset.open_image("test/test_0001.jpg").size == (4, 4)
    assert dataset.licence.startswith("MIT")
    assert dataset.problems == []


def test_pickles_with_question_types_are_read_if_the_plain_ones_are_missing(tmp_path: Path) -> None:
    first = path_vqa.read(write_path_vqa(tmp_path, typed=True)).examples[0]
    assert (first.id, first.question, first.answer) == ("path-vqa-0", "Where is it made?", "in a made place")
    assert first.meta == {"language": "en", "question_type": "where"}
    assert first.images == ("train/train_0001.jpg",)


def test_the_hubs_parquet_is_read(tmp_path: Path) -> None:
    cells = {"image": {"bytes": png_bytes(3), "path": None}, "question": "Is it?", "answer": "no"}
    write_parquet(tmp_path / "data/train-00000-of-00007.parquet", [cells])
    write_parquet(tmp_path / "data/validation-00000-of-00003.parquet", [cells])
    dataset = path_vqa.read(tmp_path)
    assert [(e.id, e.kind, e.split) for e in dataset.examples] == [
        ("path-vqa-train-0", "closed", "train"),
        ("path-vqa-validate-1", "closed", "validate"),
    ]
    assert (dataset.name, dataset.licence) == ("path-vqa", path_vqa.LICENCE)


class Evil:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize(
    "thing", [collections.OrderedDict(), fractions.Fraction(1, 2), print, {1, 2}.__class__, Path("x")]
)
def test_a_pickle_with_a_class_or_function_is_refused(tmp_path: Path, thing: Any) -> None:
    root = write_train(write_path_vqa(tmp_path), [ROW, {"image": thing}])
    assert "but only lists, dicts, strings and numbers are read" in read_error(root)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_nothing_in_a_pickle_runs(tmp_path: Path, protocol: int) -> None:
    mark = tmp_path / "ran"
    with pytest.raises(InputError, match=r"x\.pkl: it holds (posix|nt)\.mkdir"):
        path_vqa.load_plain(pickle.dumps([Evil(mark)], protocol=protocol), "x.pkl")
    assert not mark.exists()


@given(st.binary(max_size=60))
def test_any_bytes_are_read_or_refused_in_one_line(data: bytes) -> None:
    try:
        path_vqa.load_plain(data, "x.pkl")
    except InputError as error:
        assert str(error).startswith("x.pkl: ")
        assert len(str(error).splitlines()) == 1


plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


@given(plain, st.integers(0, pickle.HIGHEST_PROTOCOL))
def test_plain_values_are_read_back_unchanged(value: Any, protocol: int) -> None:
    assert path_vqa.load_plain(pickle.dumps(value, protocol=protocol), "x.pkl") == value


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([ROW, {"image": "a", "question": "?"}], "qas/train/train_qa.pkl, row 2: no answer."),
        ([ROW, "text"], "qas/train/train_qa.pkl, row 2: no image, question, answer."),
        ([ROW | {"image": "../../../x"}], "row 1: the image's path is outside the dataset's folder"),
        ({"a": 1}, "qas/train/train_qa.pkl holds no list of rows"),
        (b"\x80\x04]", "qas/train/train_qa.pkl: not a pickle, or damaged"),
        (b"", "qas/train/train_qa.pkl: not a pickle, or damaged"),
    ],
)
def test_errors_name_the_file_and_row_of_a_bad_pickle(tmp_path: Path, rows: Any, message: str) -> None:
    assert message in read_error(write_train(write_path_vqa(tmp_path), rows))


def test_a_repeated_question_id_is_refused(tmp_path: Path) -> None:
    root = write_path_vqa(tmp_path, typed=True)
    row = {"img_id": "train_0001", "sent": "Where?", "label": {"here": 1}, "question_id": 7}
    (root / "qas/train_vqa.pkl").write_bytes(pickle.dumps([row, row]))
    assert "qas/train_vqa.pkl, row 2: its id is already used by row 1" in read_error(root)


def test_missing_files_and_images_are_listed(tmp_path: Path) -> None:
    root = write_path_vqa(tmp_path / "pvqa")
    (root / "qas/val/val_qa.pkl").unlink()
    (root / "images/test/test_0001.jpg").unlink()
    dataset = path_vqa.read(root)
    assert [str(p) for p in dataset.problems] == [
        "qas/val/val_qa.pkl: file is missing. There is no split 'validate' without it.",
        "images/test/test_0001.jpg: image is missing. Rows skipped: 2. Put the image there.",
    ]
    assert len(path_vqa.read(root, text_only=True).examples) == 4
    (tmp_path / "none").mkdir()
    assert "holds neither qas/train/train_qa.pkl nor qas/train_vqa.pkl nor *.parquet" in read_error(tmp_path / "none")
