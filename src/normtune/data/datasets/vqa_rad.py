"""VQA-RAD (Lau et al. 2018, doi:10.1038/sdata.2018.251): clinicians' questions of 315 radiology images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from normtune.data.images.files import ImageFolder
from normtune.data.reading.row_reader import Row, RowReader
from normtune.data.records import Dataset, Problem
from normtune.errors import InputError
from normtune.runtime.files import read_json

LICENCE = "CC0 1.0"
_PUBLIC = "VQA_RAD Dataset Public.json"
_PAIR = {"train": "trainset.json", "test": "testset.json"}
_IMAGE_FOLDERS = ("VQA_RAD Image Folder", "images")
_TRAIN_PHRASES, _TEST_PHRASES = ("freeform", "para"), ("test_freeform", "test_para")
_QUESTION_TYPES = frozenset(
    ["ABN", "ATTRIB", "COLOR", "COUNT", "MODALITY", "ORGAN", "OTHER", "PLANE", "POS", "PRES", "SIZE"]
)
_ORGANS = {"ABD": "abdomen", "CHEST": "chest", "HEAD": "head"}


def read(root: Path, *, text_only: bool = False) -> Dataset:
    """Read the original release, or the trainset.json and testset.json that many papers use.

    In the release's one file the rows of phrase_type test_freeform and test_para (451 in the official file)
    are the test split and all others are training rows; in the other layout the file decides. `kind` is the
    file's answer_type: CLOSED is wider than yes/no. `meta` holds organ, question_type and phrase_type. Ids
    are `vqa-rad-<qid>`, numbered where a qid is used again. Rephrased and framed questions are not read as
    rows.

    Rows without an answer (also "NULL") or image are left out and listed (with `text_only`, those whose
    image file is missing are kept); repeated rows are kept and listed.

    Raises:
        InputError: the files or the image folder are missing or of another layout.
    """
    files = {"": _PUBLIC} if (root / _PUBLIC).is_file() else {}
    files = files or {split: file for split, file in _PAIR.items() if (root / file).is_file()}
    if not files:
        wanted = f"neither '{_PUBLIC}' nor {' and '.join(_PAIR.values())}"
        raise InputError(f"{root} holds {wanted}. Point --root at VQA-RAD's folder.")
    folder = next((name for name in _IMAGE_FOLDERS if (root / name).is_dir()), None)
    if folder is None and text_only:
        folder = _IMAGE_FOLDERS[0]
    if folder is None:
        raise InputError(f"{root} has no image folder. Put VQA-RAD's images in '{_IMAGE_FOLDERS[0]}' there.")
    reading = RowReader("vqa-rad", text_only)
    for split, file in files.items():
        rows = read_json(root / file)
        if not isinstance(rows, list):
            raise InputError(f"{root / file} holds no list of rows. Use VQA-RAD's original file.")
        for number, cells in enumerate(rows, start=1):
            _read_row(reading, file, number, cells if isinstance(cells, dict) else {}, split)
    reading.check_images(root / folder, folder)
    reading.check_repeats()
    _list_unused(reading, root, folder)
    return reading.dataset(ImageFolder(root / folder), LICENCE)


def _read_row(reading: RowReader, file: str, number: int, cells: dict[str, Any], split: str) -> None:
    """Read one row; `split` is empty where the row's phrase_type decides."""
    qid = cells.get("qid")
    row = reading.row(file, str(qid) if isinstance(qid, int | str) and qid != "" else f"row {number}")
    if isinstance(qid, str):
        row.problem("qid is text, not a number", "Read all the same.")
    if split == "" and "question_rephrase" not in cells:
        row.problem("question_rephrase is missing", "Not needed: the question itself is read.")
    text = {field: _text(row, field, cells) for field in ("question", "answer", "answer_type", "phrase_type")}
    organ = _text(row, "image_organ", cells)
    row.finish(
        images=(_text(row, "image_name", cells),),
        question=text["question"],
        answer=text["answer"],
        kind=row.kind(text["answer_type"], text["answer"]),
        split=split or _split(row, text["phrase_type"]),
        meta={
            "language": "en",
            "organ": _ORGANS.get(organ.upper(), organ.lower()),
            "question_type": _question_type(row, _text(row, "question_type", cells)),
            "phrase_type": text["phrase_type"],
        },
    )


def _text(row: Row, field: str, cells: dict[str, Any]) -> str:
    """The cell's text; the release writes "NULL" where there is none."""
    text = row.text(field, cells.get(field))
    return "" if text == "NULL" else text


def _split(row: Row, phrase_type: str) -> str:
    if phrase_type not in (*_TRAIN_PHRASES, *_TEST_PHRASES):
        row.problem("phrase_type is unknown", "Read as a training row.")
    return "test" if phrase_type in _TEST_PHRASES else "train"


def _question_type(row: Row, text: str) -> str:
    types = [word.strip().upper() for word in text.split(",") if word.strip()]
    if any(word not in _QUESTION_TYPES for word in types):
        row.problem("question_type is none of the release's", "Kept as it stands.")
    return ", ".join(types)


def _list_unused(reading: RowReader, root: Path, folder: str) -> None:
    used = {name for example in reading.examples for name in example.images}
    for path in sorted((root / folder).glob("*")):
        if path.suffix.lower() in (".jpg", ".jpeg", ".png") and path.name not in used:
            mend = "Nothing to do: it is not used."
            reading.problems.append(Problem(f"{folder}/{path.name}", "", "image without a question", mend))
