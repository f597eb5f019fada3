"""Datasets and splits as they appear in Python sessions."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest

import normtune
from normtune.data.options import DataOptions
from normtune.data.records import Dataset, Example, Kind, Split
from normtune.data.registry import open_configured
from normtune.errors import InputError
from tests.support.fake_family import fake_dataset


@pytest.fixture
def rows_file(tmp_path: Path) -> Path:
    (tmp_path / "a.png").write_bytes(b"")
    rows = [{"image": "a.png", "question": f"Is it {n}?", "answer": "yes", "split": "train"} for n in range(300)]
    rows.append({"image": "a.png", "question": "Is it?", "answer": "no", "split": "test"})
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_a_file_is_opened_by_its_name_as_text_or_path(rows_file: Path) -> None:
    expected = normtune.open_dataset("jsonl", root=rows_file).examples
    assert len(expected) == 301
    assert normtune.open_dataset("jsonl", str(rows_file)).examples == expected
    assert normtune.open_dataset(str(rows_file)).examples == normtune.open_dataset(rows_file).examples == expected


def test_a_missing_file_is_named() -> None:
    with pytest.raises(InputError, match=r"missing\.jsonl: no such file"):
        normtune.open_dataset("missing.jsonl")


def test_the_length_is_that_of_all_splits_and_the_repr_is_short(rows_file: Path) -> None:
    data = normtune.open_dataset(rows_file)
    assert len(data) == 301
    assert repr(data) == "<Dataset jsonl: train 300, test 1 examples>"
    assert data[0] == data.examples[0] and data[-1].split == "test"
    assert repr(data.train) == "<Split train of jsonl: 300 examples>"
    assert repr(data.train[:3]) == "<Split train of jsonl: 3 examples>"


def test_a_split_is_a_list_that_knows_its_dataset(rows_file: Path) -> None:
    data = normtune.open_dataset(rows_file)
    assert data.train == data.split("train") and data.test[0].answer == "no"
    assert data.train[1:3] == list(data.train)[1:3] and data.train[1:3].dataset is data
    with pytest.raises(InputError, match="no split 'validate'"):
        _ = data.validation


def test_a_split_is_shown_as_a_table_and_says_what_is_cut(rows_file: Path) -> None:
    data = normtune.open_dataset(rows_file)
    frame = data.train.to_pandas()
    assert len(frame) == 300 and frame["question"][7] == "Is it 7?"
    assert "and 280 more rows" in data.train._repr_html_()
    assert "<td style='text-align:right'>300</td>" in data._repr_html_()


def test_meta_fields_do_not_replace_the_fields_of_every_dataset() -> None:
    example = Example("1", ("7",), "why?", "because", "open", "test", {"kind": "x", "organ": "lung"})
    (row,) = fake_dataset([example]).test.rows()
    assert row["kind"] == "open" and row["organ"] == "lung"


def test_texts_of_a_dataset_are_escaped_in_html() -> None:
    data = fake_dataset([Example("1", ("7",), "<script>", "&", "open", "test")])
    assert "&lt;script&gt;" in data.test._repr_html_() and "<script>" not in data.test._repr_html_()


def test_a_summary_prints_as_the_command_does(rows_file: Path) -> None:
    summary = normtune.open_dataset(rows_file).summary()
    assert summary["parts"]["train"]["rows"] == 300
    assert str(summary).startswith("jsonl (licence:") and "<pre>jsonl" in summary._repr_html_()
    json.dumps(summary)


def test_the_options_of_a_dataset_open_it_again(rows_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(rows_file.parent)
    data = normtune.open_dataset("rows.jsonl", image_disjoint=True)
    options = DataOptions.checked(**data.options)
    assert open_configured(options).examples == data.examples
    assert options.data_options()["root"] == str(rows_file)
    recorded = DataOptions.checked(data="rows.jsonl").data_options()
    assert (recorded["data"], recorded["root"]) == ("jsonl", str(rows_file))


def test_a_split_is_pickled_with_its_examples() -> None:
    data = Dataset("d", [Example("1", ("7",), "why?", "because", "open", "test")], open_image=repr)  # type: ignore[arg-type]
    copy = pickle.loads(pickle.dumps(data.test))
    assert isinstance(copy, Split) and copy == data.test and copy.dataset.name == "d"


@pytest.mark.parametrize(
    ("kind", "options", "answer", "message"),
    [
        ("open", ("a", "b"), "a", "of kind open has options"),
        ("choice", (), "a", "has 0 options. Give it 2 to 26"),
        ("choice", ("a",), "a", "has 1 options"),
        ("choice", ("a", "", ""), "a", "option B, C is empty"),
        ("choice", ("a", "b"), "A", "the answer is none of the options"),
    ],
)
def test_a_row_has_options_if_it_is_a_choice(kind: Kind, options: tuple[str, ...], answer: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Example("1", ("i",), "q", answer, kind, "test", options=options)


def test_the_letter_of_a_choice_is_that_of_its_first_right_option() -> None:
    choice = Example("1", ("i",), "q", "liver", "choice", "test", options=("lung", "liver", "liver"))
    assert choice.letter == "B"
    assert fake_dataset([choice]).test.rows()[0]["options"] == ["lung", "liver", "liver"]
