"""The same rows in every format give the same examples, and a file that cannot be read is one error."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pytest
from PIL import Image

import normtune
from normtune import cli
from normtune.data.formats import name_and_root
from normtune.data.records import Dataset
from normtune.data.registry import open_dataset
from normtune.errors import InputError
from tests.support.own_data import (
    FORMATS,
    Rows,
    make_rows,
    write_arrow,
    write_delimited,
    write_metadata,
    write_parquet_rows,
    write_text,
    write_workbook,
)


def contents(dataset: Dataset) -> list[tuple[Any, ...]]:
    """What an example is, whatever the key of its image is."""
    return sorted(
        (
            example.id.removeprefix("parquet-"),
            *(np.asarray(dataset.open_image(key)).tobytes() for key in example.images),
            example.question,
            example.answer,
            example.kind,
            example.split,
            example.meta,
        )
        for example in dataset.examples
    )


@pytest.fixture
def rows(tmp_path: Path) -> Rows:
    return make_rows(tmp_path)


@pytest.mark.parametrize("format", FORMATS)
def test_the_same_rows_are_the_same_examples_in_every_format(tmp_path: Path, rows: Rows, format: str) -> None:
    expected = contents(open_dataset(rows_in(tmp_path, rows)))
    path = FORMATS[format](tmp_path, rows)
    dataset = open_dataset(path)
    assert contents(dataset) == expected
    assert len(expected) == 40
    assert dataset.name == name_and_root(str(path), None)[0]
    assert open_dataset(dataset.name, path).examples == dataset.examples  # --data csv --root PATH


def test_the_same_rows_train_the_same_adapter_in_three_formats(tmp_path: Path, rows: Rows) -> None:
    written = set()
    for format in ("csv", "xlsx", "json"):
        out = tmp_path / "runs" / format
        path = FORMATS[format](tmp_path, rows)
        normtune.train("nano", str(path), tune="ln", out=out, max_steps=2, batch=4, seed=0, progress=False)
        written.add((out / "adapter.safetensors").read_bytes())
    assert len(written) == 1


class TorchLike:
    """What torch calls a map-style dataset: a length and items."""

    def __init__(self, items: list[Any]) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Any:
        return self.items[index]


def rows_in(root: Path, rows: Rows) -> Rows:
    """The rows with absolute image paths, as objects in memory need them."""
    return [row | {"image": str(root / row["image"])} for row in rows]


@pytest.mark.parametrize("make", [list, pandas.DataFrame, TorchLike], ids=["list", "data frame", "torch dataset"])
def test_rows_in_memory_are_read_as_those_of_a_file(tmp_path: Path, rows: Rows, make: Callable[[Rows], Any]) -> None:
    expected = contents(open_dataset(FORMATS["csv"](tmp_path, rows)))
    assert contents(open_dataset(make(rows_in(tmp_path, rows)))) == expected
    opened = [row | {"image": Image.open(tmp_path / row["image"])} for row in rows]
    dataset = open_dataset(make(opened))
    assert contents(dataset) == expected
    assert len({example.images for example in dataset.examples}) == 20  # equal pictures have one key


def test_tuples_and_splits_in_memory_are_read() -> None:
    picture = Image.new("L", (3, 5), 7)
    data = open_dataset({"train": TorchLike([(picture, "What?", "lung")]), "val": [(picture, "Why?", "no")]})
    assert [(e.split, e.question, e.kind) for e in data.examples] == [
        ("train", "What?", "open"),
        ("validate", "Why?", "closed"),
    ]
    assert data.open_image(data.examples[1].images[0]).size == (3, 5)
    with pytest.raises(InputError, match="row 0: the item is a int, neither a dict"):
        open_dataset([1])
    with pytest.raises(InputError, match="int holds no rows"):
        open_dataset(3)


def test_columns_are_found_by_their_usual_names_and_shown(tmp_path: Path, rows: Rows) -> None:
    names = {"image": "Img Path", "question": "Prompt", "answer": "Response", "split": "subset", "patient_id": "Case"}
    renamed = [{names.get(name, name): value for name, value in row.items()} for row in rows]
    dataset = open_dataset(write_delimited(tmp_path / "rows.csv", renamed))
    assert [(e.split, e.question) for e in dataset.examples] == [(row["split"], row["question"]) for row in rows]
    assert dataset.examples[0].meta == {"Case": "p0"}
    note = "columns: image=Img Path, question=Prompt, answer=Response, id=id, split=subset"
    assert note in dataset.notes


def test_columns_can_be_stated_and_a_wrong_one_is_one_error(tmp_path: Path, rows: Rows) -> None:
    renamed = [{"a": r["image"], "b": r["question"], "c": r["answer"], "who": r["patient_id"]} for r in rows]
    file = write_delimited(tmp_path / "rows.csv", renamed)
    columns = {"image": "a", "question": "b", "answer": "c", "patient": "who"}
    dataset = open_dataset(file, columns=columns)
    assert dataset.examples[0].meta == {"patient_id": "p0"}
    assert dataset.options["columns"] == "image=a,question=b,answer=c,patient=who"
    assert open_dataset(file, columns=dataset.options["columns"]).examples == dataset.examples
    for text, message in (
        ("image=scan", r"no column 'scan' for image\. Columns: a, b, c, who\."),
        ("image=a,answer=whom", r"no column 'whom' for answer, did you mean 'who'\?"),
        ("imag=a", r"no field 'imag', did you mean 'image'\?"),
        ("image", "'image' is not ROLE=COLUMN"),
        ("image=a,image=b", "image is named twice"),
    ):
        with pytest.raises(InputError, match=message):
            open_dataset(file, columns=text)


@pytest.mark.parametrize(
    ("columns", "task", "answer"),
    [
        ({"caption": "Clear."}, "vqa", "Clear."),
        ({"findings": "Clear.", "impression": "Normal."}, "vqa", "Clear. Normal."),
        ({"answer": "Clear."}, "report", "Clear."),
        ({"prompt": "Describe it.", "answer": "Clear."}, "report", "Clear."),
    ],
)
def test_a_table_without_questions_holds_reports(tmp_path: Path, columns: Any, task: Any, answer: str) -> None:
    make_rows(tmp_path, 2)
    for file in (
        write_delimited(tmp_path / "rows.csv", [{"image": "scans/000.png"} | columns]),
        write_text(tmp_path / "rows.jsonl", json.dumps({"image": "scans/000.png"} | columns)),
    ):
        (example,) = open_dataset(file, task=task).examples
        assert (example.kind, example.answer) == ("report", answer)
        assert example.question == columns.get("prompt", "")


def test_a_row_may_have_several_images(tmp_path: Path) -> None:
    make_rows(tmp_path, 4)
    first, second = "scans/000.png", "scans/001.png"
    for cell in (f"{first};{second}", f"{first} | {second}", json.dumps([first, second])):
        file = write_delimited(tmp_path / "rows.csv", [{"image": cell, "report": "Clear."}])
        assert open_dataset(file).examples[0].images == (first, second)
    file = write_delimited(tmp_path / "rows.csv", [{"image1": first, "image2": second, "report": "x"}])
    assert open_dataset(file).examples[0].images == (first, second)
    file = write_delimited(tmp_path / "rows.csv", [{"image1": first, "image2": "", "report": "x"}])
    assert open_dataset(file).examples[0].images == (first,)
    (example,) = open_dataset([{"image": [tmp_path / first, tmp_path / second], "report": "x"}]).examples
    assert example.images == (str(tmp_path / first), str(tmp_path / second))


def test_an_image_named_without_its_ending_is_found(tmp_path: Path) -> None:
    make_rows(tmp_path, 4)
    dataset = open_dataset(write_delimited(tmp_path / "rows.csv", [{"image_id": "001", "report": "Clear."}]))
    assert dataset.examples[0].images == ("scans/001.png",)
    assert "1 images are named without their ending" in dataset.notes


def test_classes_of_an_arrow_dataset_are_read_by_name(tmp_path: Path) -> None:
    make_rows(tmp_path, 2)
    rows = [{"image": "scans/000.png", "question": "Which plane?", "label": 1}]
    names = {"_type": "ClassLabel", "names": ["axial", "coronal"]}
    dataset = open_dataset(write_arrow(tmp_path / "saved", rows, tmp_path, label=names))
    assert dataset.examples[0].answer == "coronal"


def test_what_is_left_out_of_a_file_is_noted(tmp_path: Path, rows: Rows) -> None:
    blank = dict.fromkeys(rows[0], "")
    dataset = open_dataset(write_delimited(tmp_path / "rows.csv", [*rows, blank]))
    assert dataset.notes == ["rows.csv: 1 blank rows left out"]
    dataset = open_dataset(write_workbook(tmp_path / "rows.xlsx", ("Data", rows), ("Legend", [{"a": 1}])))
    assert dataset.notes == ["rows.xlsx: sheets that are not read: Legend"]
    file = write_text(tmp_path / "rows.json", json.dumps({"rows": rows, "version": 2}))
    assert open_dataset(file).notes == ["rows.json: fields that are not read: version"]


def test_numbers_of_a_sheet_are_texts(tmp_path: Path, rows: Rows) -> None:
    numbers = [rows[0] | {"answer": 3.0}, rows[1] | {"answer": 2.5}, rows[2] | {"answer": True}]
    dataset = open_dataset(write_workbook(tmp_path / "rows.xlsx", ("Sheet1", numbers)))
    assert [example.answer for example in dataset.examples] == ["3", "2.5", "True"]


def test_bad_rows_can_be_left_out_of_every_format(tmp_path: Path, rows: Rows) -> None:
    bad = [*rows[:4], rows[4] | {"answer": ""}, rows[5] | {"image": "gone.png"}]
    for name, write in FORMATS.items():
        if name.startswith(("json", "csv", "tsv", "xlsx")) and "split" not in name:
            dataset = open_dataset(write(tmp_path, bad), skip_bad=True)
            assert dataset.dropped == {"answer is empty": 1, "image is missing": 1}
            with pytest.raises(InputError, match="answer is empty") as caught:
                open_dataset(write(tmp_path, bad))
            assert "image 'gone.png' is missing" in str(caught.value)


def csv_of(*lines: str) -> Callable[[Path], Path]:
    return lambda root: write_text(root / "rows.csv", "\n".join(lines) + "\n")


def bytes_in(name: str, data: bytes) -> Callable[[Path], Path]:
    def write(root: Path) -> Path:
        (root / name).write_bytes(data)
        return root / name

    return write


def json_of(value: Any) -> Callable[[Path], Path]:
    return lambda root: write_text(root / "rows.json", value if isinstance(value, str) else json.dumps(value))


def sheet_of(**row: Any) -> Callable[[Path], Path]:
    return lambda root: write_workbook(root / "rows.xlsx", ("Sheet1", [row]))


def damaged_arrow(name: str, data: bytes | None) -> Callable[[Path], Path]:
    def write(root: Path) -> Path:
        folder = write_arrow(root / "saved", make_rows(root, 2), root)
        if data is None:
            (folder / name).unlink()
        else:
            (folder / name).write_bytes(data)
        return folder

    return write


def folder_of(*names: str) -> Callable[[Path], Path]:
    def write(root: Path) -> Path:
        (root / "mixed").mkdir()
        for name in names:
            (root / "mixed" / name).write_text("image,question,answer\na.png,What?,lung\n")
        return root / "mixed"

    return write


HEADER, GOOD = "image,question,answer", "scans/000.png,What?,lung"
ROW = {"image": "scans/000.png", "question": "What?", "answer": "lung"}
PNG = b"\x89PNG\r\n\x1a\n" + bytes(40)
BAD: list[tuple[Callable[[Path], Path], str]] = [
    (csv_of(HEADER), "has no usable rows"),
    (bytes_in("rows.csv", b""), "rows.csv is empty"),
    (csv_of("image,question", "scans/000.png,What?"), "has no column for the answer"),
    (csv_of("image,answer", "scans/000.png,lung"), "add --task report"),
    (csv_of("question,answer", "What?,lung"), "has no column for the image"),
    (csv_of("scans/000.png,What?,lung"), "has no column for the image"),
    (csv_of(HEADER, GOOD, "scans/000.png,What?"), "row 3: 2 cells for 3 columns"),
    (csv_of(HEADER, GOOD, "scans/000.png,What, when?,lung"), "row 3: 4 cells for 3 columns"),
    (csv_of(HEADER, 'scans/000.png,"What?,lung'), "not valid CSV"),
    (csv_of(HEADER, 'scans/000.png,"What"?,lung'), "not valid CSV"),
    (csv_of(HEADER, "gone.png,What?,lung"), "row 2: image 'gone.png' is missing"),
    (csv_of(HEADER, "scans/000.png,,lung"), "row 2: question is empty"),
    (csv_of(HEADER, "scans/000.png,What?,"), "row 2: answer is empty"),
    (csv_of(HEADER, ",What?,lung"), "row 2: image is empty"),
    (csv_of(HEADER, "https://a/b.png,What?,lung"), "image 1 is a URL"),
    (csv_of(HEADER, "[scans,What?,lung"), "image is not a JSON list"),
    (csv_of("image,image,answer", "a,b,c"), "column 'image' occurs twice"),
    (csv_of(",,", "a,b,c"), "no column has a name"),
    (csv_of("image,question,answer,kind", f"{GOOD},clsoed"), "kind is unknown, did you mean 'closed'?"),
    (bytes_in("rows.csv", f"{HEADER}\nscans/000.png,Größe?,lung\n".encode("latin-1")), "is not UTF-8 text"),
    (bytes_in("rows.csv", f"{HEADER}\n{GOOD}\n".encode("utf-16")), "is not UTF-8 text"),
    (bytes_in("rows.csv", b"a,b\0\0\0"), "is not a text file"),
    (bytes_in("rows.csv", b"PK\x03\x04" + bytes(30)), "is not a text file"),
    (bytes_in("rows.csv.gz", b"\x1f\x8b\x08\x00broken"), "damaged"),
    (bytes_in("rows.tsv", b"image,question,answer\na,b,c\n"), "has no column for the image"),
    (bytes_in("rows.tsv", b"image\tquestion\tanswer\na\tb\n"), "row 2: 2 cells for 3 columns"),
    (bytes_in("rows.tsv", PNG), "is not UTF-8 text"),
    (bytes_in("rows.xlsx", b""), "is not an .xlsx workbook"),
    (bytes_in("rows.xlsx", b"image,question,answer\n"), "is not an .xlsx workbook"),
    (bytes_in("rows.xlsx", b"\xd0\xcf\x11\xe0" + bytes(600)), "protected by a password"),
    (bytes_in("rows.xlsx", b"PK\x03\x04" + bytes(30)), "is not an .xlsx workbook"),
    (sheet_of(image="scans/000.png", question="What?"), "has no column for the answer"),
    (sheet_of(**ROW | {"image": 7}), "image '7' is missing"),
    (sheet_of(**ROW | {"answer": None}), "row 2: answer is empty"),
    (lambda root: write_workbook(root / "rows.xlsx", ("Sheet1", [{}])), "sheet 'Sheet1' is empty"),
    (bytes_in("rows.xls", b"\xd0\xcf\x11\xe0"), "Save it as .xlsx"),
    (json_of([]), "has no usable rows"),
    (json_of({}), "holds no list of rows"),
    (json_of(3), "holds no list of rows"),
    (json_of({"a": [ROW], "b": [ROW]}), "one list for each split"),
    (json_of([1, 2]), "row 1: not a JSON object"),
    (json_of([ROW | {"answer": ["lung"]}]), "row 1: answer is of type list, not text"),
    (json_of([ROW | {"question": {"text": "What?"}}]), "row 1: question is of type dict, not text"),
    (json_of([ROW | {"image": []}]), "row 1: image is empty"),
    (json_of([ROW | {"image": {"url": "x"}}]), "row 1: image is empty"),
    (json_of([ROW, {"image": "scans/000.png", "answer": "x"}]), "row 2: field 'question' is missing"),
    (json_of('[{"image": "scans/000.png", '), "rows.json"),
    (json_of('[{"image": "\\ud800", "question": "a", "answer": "b"}]'), "half of a surrogate pair"),
    (lambda root: write_text(root / "rows.jsonl", json.dumps({"image": "a.png", "report": 3})), "'a.png' is missing"),
    (bytes_in("rows.parquet", b"PAR1"), "is not a parquet file"),
    (lambda root: write_parquet_rows(root / "rows.parquet", [{"a": 1}]), "has no column for the image"),
    (damaged_arrow("data-00000-of-00001.arrow", b"ARROW1"), "is not an Arrow file, or is damaged"),
    (damaged_arrow("data-00000-of-00001.arrow", None), "is not an Arrow file, or is damaged"),
    (damaged_arrow("state.json", b"[]"), "names no data files"),
    (damaged_arrow("dataset_dict.json", b"{}"), "names no splits"),
    (damaged_arrow("dataset_dict.json", b'{"splits": ["gone"]}'), "gone"),
    (lambda root: write_metadata(root / "scans", [{"name": "000.png", "text": "x"}], "csv"), "no column for the image"),
    (lambda root: write_metadata(root / "scans", [{"image": "no.png", "text": "x"}], "jsonl"), "add --task report"),
    (lambda root: write_metadata(root / "scans", [{"image": "x.png", "caption": "x"}], "csv"), "'x.png' is missing"),
    (folder_of("a.csv", "b.tsv"), "holds files of several formats (csv, tsv)"),
    (folder_of(), "holds no data file"),
    (folder_of("a.dcm"), "holds DICOM files and no table"),
    (lambda root: root / "gone.csv", "no such file or folder. csv needs a .csv file"),
    (lambda root: root / "gone", "no such file or folder"),
    (bytes_in("rows.docx", b"PK"), "files that end in '.docx' are not read"),
]


@pytest.mark.parametrize(("write", "message"), BAD)
def test_a_bad_file_is_one_line_and_status_2(
    tmp_path: Path,
    write: Callable[[Path], Path],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    make_rows(tmp_path, 2)
    monkeypatch.setattr(sys, "argv", ["normtune", "data", str(write(tmp_path))])
    with pytest.raises(SystemExit) as exit:
        cli.main()
    out, error = capsys.readouterr()
    assert exit.value.code == 2
    assert out == ""
    assert len(error.splitlines()) == 1
    assert message in error
    assert ".." not in error.replace("...", "")


def test_there_are_sixty_bad_files() -> None:
    assert len(BAD) >= 60


def test_splits_may_have_their_other_names(tmp_path: Path, rows: Rows) -> None:
    dataset = open_dataset(FORMATS["csv"](tmp_path, rows))
    assert dataset.split("val") == dataset.split("validation") == dataset.split("dev") == dataset.split("validate")
