from __future__ import annotations

import json
import re
from functools import partial
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from normtune.data.datasets import table
from normtune.errors import InputError
from tests.support.dataset_samples import write_image, write_jsonl

read_jsonl = partial(table.read, format="jsonl")

ROW = {"image": "a.png", "question": "Is this a chest?", "answer": "yes"}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write_image(tmp_path / "a.png")
    write_image(tmp_path / "views" / "b.png")
    return tmp_path


def read_error(root: Path, *rows: object) -> str:
    with pytest.raises(InputError) as caught:
        read_jsonl(write_jsonl(root / "bad.jsonl", *rows))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_minimal_row_gets_an_id_a_kind_and_a_split(root: Path) -> None:
    rows = (ROW, ROW | {"question": "What is it?", "answer": "chest"})
    first, second = read_jsonl(write_jsonl(root / "mine.jsonl", *rows)).examples
    assert (first.id, first.kind, first.split) == ("mine-1", "closed", "train")
    assert (second.id, second.kind, second.images) == ("mine-2", "open", ("a.png",))


def test_optional_fields_are_read_and_other_fields_become_meta(root: Path) -> None:
    row = ROW | {"id": 7, "kind": "open", "split": "Dev", "modality": "CT", "slice": 3, "boxes": [1]}
    (example,) = read_jsonl(write_jsonl(root / "mine.jsonl", row)).examples
    assert (example.id, example.kind, example.split) == ("7", "open", "validate")
    assert example.meta == {"modality": "CT", "slice": "3"}


def test_a_folder_of_files_gives_each_file_its_split(root: Path) -> None:
    for name in ("train", "val", "test"):
        write_jsonl(root / f"{name}.jsonl", ROW)
    dataset = read_jsonl(root)
    assert sorted((e.split, e.id) for e in dataset.examples) == [
        ("test", "test-1"),
        ("train", "train-1"),
        ("validate", "val-1"),
    ]
    assert dataset.open_image("a.png").size == (4, 4)


def test_a_report_takes_several_views_and_needs_no_question(root: Path) -> None:
    row = {"image": ["a.png", "./views/../views/b.png"], "answer": "Clear lungs.", "kind": "report"}
    (example,) = read_jsonl(write_jsonl(root / "r.jsonl", row)).examples
    assert (example.images, example.question, example.kind) == (("a.png", "views/b.png"), "", "report")


def test_an_image_may_be_outside_the_folder(root: Path) -> None:
    rows = [ROW | {"image": "../a.png"}, ROW | {"image": str(root / "a.png")}]
    dataset = read_jsonl(write_jsonl(root / "views" / "train.jsonl", *rows))
    assert [dataset.open_image(e.images[0]).size for e in dataset.examples] == [(4, 4), (4, 4)]


def test_blank_lines_and_a_byte_order_mark_are_skipped(root: Path) -> None:
    file = root / "mine.jsonl"
    file.write_bytes(b"\xef\xbb\xbf" + json.dumps(ROW).encode() + b"\r\n\r\n")
    assert len(read_jsonl(file).examples) == 1


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"image": "a.png", "question": "Why?"}, "field 'answer' is missing. Add 'answer'"),
        ({"image": "a.png", "quesiton": "Why?", "answer": "x"}, "field 'question' is missing, is it 'quesiton'?"),
        (ROW | {"answer": "  "}, "answer is empty"),
        (ROW | {"answer": ["yes"]}, "answer is of type list, not text"),
        (ROW | {"kind": "clsoed"}, "kind is unknown, did you mean 'closed'?"),
        (ROW | {"image": "no.png"}, "image 'no.png' is missing"),
        (ROW | {"image": []}, "image is"),
        (ROW | {"question": "Where? \udc4d"}, "a text contains half of a surrogate pair"),
        (ROW | {"organ": "\ud83e lung"}, "a text contains half of a surrogate pair"),
        (ROW | {"image": "data:image/png;base64," + "QUJD" * 900}, "image 1 is a data URL, not a file"),
        (ROW | {"image": "iVBORw0KGgo/" * 400}, "image 1 is not a path"),
        (["a.png"], "not a JSON object"),
        ('{"image": ', "not valid JSON"),
    ],
)
def test_errors_name_the_file_and_line_of_a_bad_row_and_the_fix(root: Path, row: object, message: str) -> None:
    text = read_error(root, ROW, row)
    assert text.startswith("bad.jsonl, line 2: ")
    assert message in text
    assert len(text) < 300


def test_a_repeated_id_and_many_bad_rows_are_one_error(root: Path) -> None:
    row = ROW | {"id": "x"}
    text = read_error(root, row, row, *["no json"] * 6)
    assert "bad.jsonl, line 2: its id is used by an earlier row" in text
    assert text.endswith("And 2 more bad rows.")


def test_bad_rows_can_be_skipped_and_listed_instead(root: Path) -> None:
    file = write_jsonl(root / "mine.jsonl", ROW, ROW | {"image": "no.png"}, "no json")
    dataset = read_jsonl(file, strict=False)
    assert (len(dataset.examples), len(dataset.skipped)) == (1, 2)
    assert [(p.file, p.row) for p in dataset.problems] == [("mine.jsonl", "3"), ("mine.jsonl", "2")]


def test_errors_name_the_line_that_is_not_utf8(root: Path) -> None:
    file = root / "mine.jsonl"
    file.write_bytes(json.dumps(ROW).encode() + b'\n{"image": "\xff"}\n')
    with pytest.raises(InputError, match="line 2: not UTF-8 text"):
        read_jsonl(file)


def test_a_whole_surrogate_pair_is_read_as_one_character(root: Path) -> None:
    line = '{"image": "a.png", "question": "Thumb \\ud83d\\udc4d?", "answer": "yes"}'
    (example,) = read_jsonl(write_jsonl(root / "mine.jsonl", line)).examples
    assert example.question == "Thumb \N{THUMBS UP SIGN}?"


def test_an_empty_folder_and_an_empty_file_are_refused(root: Path) -> None:
    with pytest.raises(InputError, match=r"holds no \*\.jsonl file"):
        read_jsonl(root / "views")
    with pytest.raises(InputError, match="has no usable rows"):
        read_jsonl(write_jsonl(root / "none.jsonl"))


def test_the_examples_of_the_documentation_are_read(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (Path(__file__).parents[3] / "docs" / "own-data.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```(\w+)\n(.*?)```", page, flags=re.DOTALL)
    write_image(root / "scans" / "001.png")
    lines = [text.strip() for language, text in blocks if language == "json"]
    examples = read_jsonl(write_jsonl(root / "docs.jsonl", *lines)).examples
    assert {example.images for example in examples} == {("scans/001.png",)}
    assert [(example.kind, example.answer) for example in examples] == [("closed", "yes"), ("choice", "Heart")]
    monkeypatch.chdir(root)
    for language, text in blocks:
        if language == "python":
            exec(text, {})
    assert (root / "mydata" / "train.csv").is_file()


values = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
rows = st.dictionaries(
    st.sampled_from(["image", "question", "answer", "id", "kind", "split", "options", "other"]),
    values | st.lists(values, max_size=3) | st.sampled_from(["a.png", "report", "choice", "x|y"]),
)


@settings(max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(rows | values, max_size=4))
def test_any_json_is_read_or_refused_in_one_line(root: Path, lines: list[object]) -> None:
    file = write_jsonl(root / "any.jsonl", *(json.dumps(row) for row in lines))
    try:
        dataset = read_jsonl(file)
    except InputError as error:
        assert str(error)
        assert len(str(error).splitlines()) == 1
    else:
        assert len(dataset.examples) == len(lines)
        assert len({e.id for e in dataset.examples}) == len(lines)
