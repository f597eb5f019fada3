"""VQA-RAD (Lau et al. 2018, doi:10.1038/sdata.2018.251): clinicians' questions on 315 radiology images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from normtune.data.images.files import ImageFolder
from normtune.data.reading.row_reader import Row, RowReader
from normtune.data.reading.tables import json_rows
from normtune.data.records import Dataset, Problem
from normtune.errors import InputError

LICENCE = "CC0 1.0"
_RELEASE_FILE = "VQA_RAD Dataset Public.json"  # all rows in one file
_SPLIT_FILES = {"train": "trainset.json", "test": "testset.json"}  # the other layout
_IMAGE_FOLDERS = ("VQA_RAD Image Folder", "images")
# Values of phrase_type in the release's file, which decide the split.
_TRAIN_PHRASES, _TEST_PHRASES = ("freeform", "para"), ("test_freeform", "test_para")
_QUESTION_TYPES = frozenset(
    ["ABN", "ATTRIB", "COLOR", "COUNT", "MODALITY", "ORGAN", "OTHER", "PLANE", "POS", "PRES", "SIZE"]
)
_ORGANS = {"ABD": "abdomen", "CHEST": "chest", "HEAD": "head"}


def read(root: Path, *, text_only: bool = False) -> Dataset:
    """Read the original release, or the trainset.json and testset.json that many papers use.

    In the release's single file, the rows with phrase_type test_freeform or test_para (451 in the official
    file) are the test split, and all others the training split. In the other layout the file decides. `kind`
    is the file's answer_type: CLOSED is wider than yes/no. `meta` holds organ, question_type and phrase_type.
    Ids are `vqa-rad-<qid>`, with a number if a qid is repeated. Rephrased and framed questions are not read.

    Rows without an answer (or with "NULL") or image are skipped and listed; with `text_only`, those with a
    missing image file are kept. Repeated rows are kept and listed.

    Raises:
        InputError: the files or the image folder are missing or have another layout, or the path of an image
            is outside the image folder.
    """
    files = {"": _RELEASE_FILE} if (root / _RELEASE_FILE).is_file() else {}
    files = files or {split: file for split, file in _SPLIT_FILES.items() if (root / file).is_file()}
    if not files:
        missing = f"neither '{_RELEASE_FILE}' nor {' and '.join(_SPLIT_FILES.values())}"
        raise InputError(f"{root} holds {missing}. Point --root at VQA-RAD's folder.")
    folder = next((name for name in _IMAGE_FOLDERS if (root / name).is_dir()), None)
    if folder is None and text_only:
        folder = _IMAGE_FOLDERS[0]
    if folder is None:
        raise InputError(f"{root} has no image folder. Put VQA-RAD's images in '{_IMAGE_FOLDERS[0]}' there.")
    reader = RowReader("vqa-rad", text_only)
    for split, file in files.items():
        for number, cells in json_rows(root / file, "file", "VQA-RAD"):
            _read_row(reader, file, number, cells, split)
    reader.check_images(root / folder, folder)
    reader.check_repeats()
    _list_unused(reader, root, folder)
    return reader.build_dataset(ImageFolder(root / folder), LICENCE)


def _read_row(reader: RowReader, file: str, number: int, cells: dict[str, Any], split: str) -> None:
    """Read one row; `split` is empty where the row's phrase_type decides."""
    qid = cells.get("qid")
    row = reader.start_row(file, str(qid) if isinstance(qid, int | str) and qid != "" else f"row {number}")
    if isinstance(qid, str):
        row.add_problem("qid is text, not a number", "Accepted.")
    if split == "" and "question_rephrase" not in cells:
        row.add_problem("question_rephrase is missing", "Not needed: the question itself is read.")
    text = {field: _text(row, field, cells) for field in ("question", "answer", "answer_type", "phrase_type")}
    organ = _text(row, "image_organ", cells)
    row.finish(
        images=(row.image_key(_text(row, "image_name", cells)),),
        question=text["question"],
        answer=text["answer"],
        kind=row.read_kind(text["answer_type"], text["answer"]),
        split=split or _split_of_phrase_type(row, text["phrase_type"]),
        meta={
            "language": "en",
            "organ": _ORGANS.get(organ.upper(), organ.lower()),
            "question_type": _question_type(row, _text(row, "question_type", cells)),
            "phrase_type": text["phrase_type"],
        },
    )


def _text(row: Row, field: str, cells: dict[str, Any]) -> str:
    """The cell's text; the release writes "NULL" for an empty cell."""
    text = row.read_text(field, cells.get(field))
    return "" if text == "NULL" else text


def _split_of_phrase_type(row: Row, phrase_type: str) -> str:
    if phrase_type not in (*_TRAIN_PHRASES, *_TEST_PHRASES):
        row.add_problem("phrase_type is unknown", "Read as a training row.")
    return "test" if phrase_type in _TEST_PHRASES else "train"


def _question_type(row: Row, text: str) -> str:
    """The question's types in capitals, separated by commas; unknown types are listed."""
    types = [word.strip().upper() for word in text.split(",") if word.strip()]
    if any(word not in _QUESTION_TYPES for word in types):
        row.add_problem("question_type is none of the release's", "Kept unchanged.")
    return ", ".join(types)


def _list_unused(reader: RowReader, root: Path, folder: str) -> None:
    """List the image files without a question."""
    used = {name for example in reader.examples for name in example.images}
    for path in sorted((root / folder).glob("*")):
        if path.suffix.lower() in (".jpg", ".jpeg", ".png") and path.name not in used:
            fix = "Nothing to do. The image is not used."
            reader.problems.append(Problem(f"{folder}/{path.name}", "", "image without a question", fix))
