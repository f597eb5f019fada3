"""PathVQA (He et al. 2020, arXiv 2003.10286): questions of pathology images, on the hub or as pickles."""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any, NoReturn

from normtune.data.images.files import ImageFolder
from normtune.data.reading.cells import is_yes_no
from normtune.data.reading.row_reader import RowReader
from normtune.data.reading.tables import file_bytes
from normtune.data.records import Dataset, Problem
from normtune.errors import InputError

LICENCE = "MIT (the images' copyright stays with the books and libraries that they are from)"
HUB_NAME = "flaviagiammarino/path-vqa"
_SPLITS = {"train": "train", "validate": "val", "test": "test"}
_PLAIN, _TYPED = "qas/{0}/{0}_qa.pkl", "qas/{0}_vqa.pkl"
_IMAGES = "images"


def read(root: Path, *, text_only: bool = False) -> Dataset:
    """Read the hub's parquet files, or the original release: qas/ and images/.

    The hub's layout: see `normtune.data.datasets.parquet`; `root` may be its name, flaviagiammarino/path-vqa. The
    release's: `qas/train/train_qa.pkl` (image, question, answer) or, where it is missing,
    `qas/train_vqa.pkl` (img_id, sent, label, question_type, question_id), and likewise val and test;
    `images/train/train_0422.jpg`. Neither names open and closed: yes and no are closed, as papers count it.
    Ids are `path-vqa-<split>-<row>`, or `path-vqa-<question_id>`.

    Pickles are read without running anything in them: lists, dicts, strings and numbers alone.

    Raises:
        InputError: neither layout is there, or a file is damaged, holds anything else or lacks a field.
    """
    files = {split: _pickle_of(root, name) for split, name in _SPLITS.items()}
    if not any(files.values()):
        return _parquet(root, text_only)
    if not text_only and not (root / _IMAGES).is_dir():
        raise InputError(f"{root} has no image folder '{_IMAGES}'. Put PathVQA's images/ there.")
    reading = RowReader("path-vqa", text_only)
    for split, file in files.items():
        if file is None:
            missing = _PLAIN.format(_SPLITS[split])
            mend = f"There is no split '{split}' without it."
            reading.problems.append(Problem(missing, "", "file is missing", mend))
            continue
        shown = file.relative_to(root).as_posix()
        for number, cells in enumerate(_rows(file, shown), start=1):
            _read_row(reading, shown, number, cells, split)
    reading.check_images(root / _IMAGES, _IMAGES)
    reading.check_repeats()
    return reading.dataset(ImageFolder(root / _IMAGES), LICENCE)


def load_plain(data: bytes, name: str) -> Any:
    """Unpickle lists, dicts, strings and numbers; nothing in the file can run.

    Raises:
        InputError: the pickle names a class or function, or is damaged.
    """
    try:
        return _Plain(io.BytesIO(data), encoding="utf-8", errors="replace").load()
    except InputError as error:
        raise InputError(f"{name}: {error}") from error
    except Exception as error:  # a damaged pickle raises nearly any kind
        raise InputError(f"{name}: no pickle, or damaged. Fetch it again.") from error


class _Plain(pickle.Unpickler):
    """An unpickler that knows no class and no function, and so can call none."""

    def find_class(self, module: str, name: str) -> NoReturn:
        raise InputError(
            f"it holds {module}.{name}, where lists, dicts, strings and numbers alone are read. "
            "Use PathVQA's original file."
        )

    def persistent_load(self, pid: object) -> NoReturn:
        raise InputError("it points outside of itself. Use PathVQA's original file.")


def _parquet(root: Path, text_only: bool) -> Dataset:
    from normtune.data.datasets import parquet  # pyarrow takes half a second

    if root.is_dir() and not any(root.rglob("*.parquet")):
        raise InputError(
            f"{root} holds neither {_PLAIN.format('train')} nor {_TYPED.format('train')} nor *.parquet: not "
            f"PathVQA's folder. Point --root at it, or write --root {HUB_NAME}."
        )
    return parquet.read(root, name="path-vqa", licence=LICENCE, text_only=text_only)


def _pickle_of(root: Path, split: str) -> Path | None:
    for pattern in (_PLAIN, _TYPED):
        if (root / pattern.format(split)).is_file():
            return root / pattern.format(split)
    return None


def _rows(file: Path, shown: str) -> list[Any]:
    rows = load_plain(file_bytes(file), shown)
    if not isinstance(rows, list):
        raise InputError(f"{shown} holds no list of rows. Use PathVQA's original file.")
    return rows


def _read_row(reading: RowReader, file: str, number: int, cells: Any, split: str) -> None:
    cells = cells if isinstance(cells, dict) else {}
    if "sent" in cells:
        cells = _typed(cells)
    lacking = [field for field in ("image", "question", "answer") if field not in cells]
    if lacking:
        raise InputError(f"{file}, row {number}: no {', '.join(lacking)}. Use PathVQA's original file.")
    stated = cells.get("question_id")
    id = str(stated) if isinstance(stated, int | str) and stated != "" else f"{split}-{number}"
    row = reading.unique_row(file, str(number), f"path-vqa-{id}")
    answer = row.text("answer", cells["answer"])
    image = row.text("image", cells["image"])
    row.finish(
        images=(row.image(f"{_folder(image, split)}/{image}.jpg") if image else "",),
        question=row.text("question", cells["question"]),
        answer=answer,
        kind="closed" if is_yes_no(answer) else "open",
        split=split,
        meta={"language": "en", "question_type": row.text("question_type", cells.get("question_type"))},
    )


def _folder(image: str, split: str) -> str:
    """train_0422 lies in images/train, whichever split names it."""
    prefix = image.split("_")[0]
    return prefix if prefix in _SPLITS.values() else _SPLITS[split]


def _typed(cells: dict[Any, Any]) -> dict[str, Any]:
    """A row of `<split>_vqa.pkl` with the names of `<split>_qa.pkl`; its answer is the label's best one."""
    label = cells.get("label")
    scored = (
        [(a, s) for a, s in label.items() if isinstance(s, int | float)] if isinstance(label, dict) else []
    )
    return {
        "image": cells.get("img_id"),
        "question": cells["sent"],
        "answer": max(scored, key=lambda pair: pair[1])[0] if scored else "",
        "question_type": cells.get("question_type"),
        "question_id": cells.get("question_id"),
    }
