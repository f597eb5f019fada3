"""PathVQA (He et al. 2020, arXiv 2003.10286): questions about pathology images, on the hub or as pickles."""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any, NoReturn

from normtune.data.reading.cells import is_yes_no
from normtune.data.reading.row_reader import RowReader
from normtune.data.reading.tables import file_bytes, find_table
from normtune.data.records import Dataset
from normtune.errors import InputError

LICENCE = "MIT (the images' copyright stays with the books and libraries that they are from)"
HUB_NAME = "flaviagiammarino/path-vqa"
# Our split name -> the release's.
_SPLITS = {"train": "train", "validate": "val", "test": "test"}
# The two files of a split, by name of the split: rows of image, question and answer, or with more fields.
_PLAIN, _TYPED = "qas/{0}/{0}_qa.pkl", "qas/{0}_vqa.pkl"
_IMAGES = "images"


def read(root: Path, *, text_only: bool = False) -> Dataset:
    """Read the hub's parquet files, or the original release: qas/ and images/.

    - Hub: see `normtune.data.datasets.table`; `root` may be the hub name, flaviagiammarino/path-vqa.
    - Release: `qas/train/train_qa.pkl` (image, question, answer) or, if it is missing, `qas/train_vqa.pkl`
      (img_id, sent, label, question_type, question_id), and the same for val and test; images such as
      `images/train/train_0422.jpg`.

    Neither layout labels open and closed questions: yes and no are closed, as papers count them. Ids are
    `path-vqa-<split>-<row>`, or `path-vqa-<question_id>`.

    Pickles are read without running any code in them: only lists, dicts, strings and numbers are accepted.

    Raises:
        InputError: neither layout is present, or a file is damaged, holds anything else or lacks a field.
    """
    files = {split: find_table(root, _PLAIN.format(name), _TYPED.format(name)) for split, name in _SPLITS.items()}
    if not any(files.values()):
        return _parquet(root, text_only)
    if not text_only and not (root / _IMAGES).is_dir():
        raise InputError(f"{root} has no image folder '{_IMAGES}'. Put PathVQA's images/ there.")
    reader = RowReader("path-vqa", text_only)
    for split, file in files.items():
        if file is None:
            reader.note_missing_split(_PLAIN.format(_SPLITS[split]), split)
            continue
        file_name = file.relative_to(root).as_posix()
        for number, cells in enumerate(_rows(file, file_name), start=1):
            _read_row(reader, file_name, number, cells, split)
    return reader.finish(root, (_IMAGES,), LICENCE)


def load_plain(data: bytes, name: str) -> Any:
    """Unpickle lists, dicts, strings and numbers; no code in the file can run.

    Raises:
        InputError: the pickle names a class or function, or is damaged.
    """
    try:
        return _PlainUnpickler(io.BytesIO(data), encoding="utf-8", errors="replace").load()
    except InputError as error:
        raise InputError(f"{name}: {error}") from error
    except Exception as error:  # a damaged pickle may raise almost any type
        raise InputError(f"{name}: not a pickle, or damaged. Fetch it again.") from error


class _PlainUnpickler(pickle.Unpickler):
    """An unpickler that refuses all classes and functions, so that it cannot call any."""

    def find_class(self, module: str, name: str) -> NoReturn:
        raise InputError(
            f"it holds {module}.{name}, but only lists, dicts, strings and numbers are read. "
            "Use PathVQA's original file."
        )

    def persistent_load(self, pid: object) -> NoReturn:
        raise InputError("it refers to an object outside the file. Use PathVQA's original file.")


def _parquet(root: Path, text_only: bool) -> Dataset:
    from normtune.data.datasets import table

    if root.is_dir() and not any(root.rglob("*.parquet")):
        raise InputError(
            f"{root} holds neither {_PLAIN.format('train')} nor {_TYPED.format('train')} nor *.parquet: not "
            f"PathVQA's folder. Point --root at it, or write --root {HUB_NAME}."
        )
    return table.read(root, format="parquet", name="path-vqa", licence=LICENCE, text_only=text_only)


def _rows(file: Path, file_name: str) -> list[Any]:
    rows = load_plain(file_bytes(file), file_name)
    if not isinstance(rows, list):
        raise InputError(f"{file_name} holds no list of rows. Use PathVQA's original file.")
    return rows


def _read_row(reader: RowReader, file: str, number: int, cells: Any, split: str) -> None:
    cells = cells if isinstance(cells, dict) else {}
    if "sent" in cells:
        cells = _to_plain_row(cells)
    missing = [field for field in ("image", "question", "answer") if field not in cells]
    if missing:
        raise InputError(f"{file}, row {number}: no {', '.join(missing)}. Use PathVQA's original file.")
    question_id = cells.get("question_id")
    id = str(question_id) if isinstance(question_id, int | str) and question_id != "" else f"{split}-{number}"
    row = reader.start_unique_row(file, str(number), f"path-vqa-{id}")
    answer = row.read_text("answer", cells["answer"])
    image = row.read_text("image", cells["image"])
    row.finish(
        images=(row.image_key(f"{_image_folder(image, split)}/{image}.jpg") if image else "",),
        question=row.read_text("question", cells["question"]),
        answer=answer,
        kind="closed" if is_yes_no(answer) else "open",
        split=split,
        meta={"language": "en", "question_type": row.read_text("question_type", cells.get("question_type"))},
    )


def _image_folder(image: str, split: str) -> str:
    """The image's subfolder of images/: train for train_0422, also if the row is in another split."""
    prefix = image.split("_")[0]
    return prefix if prefix in _SPLITS.values() else _SPLITS[split]


def _to_plain_row(cells: dict[Any, Any]) -> dict[str, Any]:
    """Convert a row of `<split>_vqa.pkl` to the fields of `<split>_qa.pkl`.

    `label` is a dict answer -> score; the answer is the one with the best score.
    """
    label = cells.get("label")
    scores = (
        [(answer, score) for answer, score in label.items() if isinstance(score, int | float)]
        if isinstance(label, dict)
        else []
    )
    return {
        "image": cells.get("img_id"),
        "question": cells["sent"],
        "answer": max(scores, key=lambda pair: pair[1])[0] if scores else "",
        "question_type": cells.get("question_type"),
        "question_id": cells.get("question_id"),
    }
