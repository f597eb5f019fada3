"""SLAKE 1.0 (Liu et al. 2021, arXiv 2102.09542): English and Chinese questions of CT, MR and X-ray images."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from normtune.data.images.files import ImageFolder
from normtune.data.reading.row_reader import RowReader
from normtune.data.records import Dataset, Problem
from normtune.errors import InputError, did_you_mean
from normtune.runtime.files import read_json

LICENCE = "CC BY 4.0"
LANGUAGES = {"en": "English", "zh": "Chinese"}
_FILES = {"train": "train.json", "validate": "validate.json", "test": "test.json"}
_IMAGES = "imgs"


def read(root: Path, *, language: Literal["en", "zh", "all"] = "en", text_only: bool = False) -> Dataset:
    """Read the original release: train.json, validate.json, test.json and imgs/xmlabN/source.jpg.

    `kind` is the file's answer_type: CLOSED is wider than yes/no (it includes "lung" and "T2"). `meta` holds
    language, modality, organ (the file's location) and content_type. Ids are `slake-<qid>`.

    Rows without an answer or image are left out and listed (with `text_only`, those whose image file is
    missing are kept); repeated rows are kept, as published counts keep
    them, and listed. The English and the Chinese splits were drawn apart: how many test images of one
    language stand in the other's training split is listed too.

    Raises:
        InputError: a file or the image folder is missing or of another layout, or the language is unknown.
    """
    if language not in (*LANGUAGES, "all"):
        raise InputError(
            f"SLAKE has no language '{language}'{did_you_mean(language, [*LANGUAGES, 'all']) or '.'} "
            "It has en and zh; all reads both."
        )
    present = {split: file for split, file in _FILES.items() if (root / file).is_file()}
    if not present:
        raise InputError(
            f"{root} holds none of {', '.join(_FILES.values())}: not SLAKE's folder. "
            "Point --root at the folder that holds these and imgs/."
        )
    if not text_only and not (root / _IMAGES).is_dir():
        raise InputError(f"{root} has no image folder '{_IMAGES}'. Unpack SLAKE's imgs.zip there.")
    reading = RowReader("slake", text_only)
    images: _Images = {}
    for split, file in _FILES.items():
        if split not in present:
            mend = f"There is no split '{split}' without it."
            reading.problems.append(Problem(file, "", "file is missing", mend))
            continue
        rows = read_json(root / file)
        if not isinstance(rows, list):
            raise InputError(f"{root / file} holds no list of rows. Use SLAKE's original {file}.")
        for number, cells in enumerate(rows, start=1):
            _note_image(images, split, cells)
            if language == "all" or _language(cells) == language:
                _read_row(reading, file, number, cells, split)
    if language != "all":
        reading.problems += _language_leaks(images)
    reading.check_images(root / _IMAGES, _IMAGES)
    reading.check_repeats()
    return reading.dataset(ImageFolder(root / _IMAGES), LICENCE)


_Images = dict[tuple[str, str], set[str]]  # (split, language) -> image names


def _language(cells: Any) -> str:
    return str(cells.get("q_lang") or "en") if isinstance(cells, dict) else "en"


def _note_image(images: _Images, split: str, cells: Any) -> None:
    if isinstance(cells, dict) and isinstance(cells.get("img_name"), str):
        images.setdefault((split, _language(cells)), set()).add(cells["img_name"])


def _read_row(reading: RowReader, file: str, number: int, cells: Any, split: str) -> None:
    cells = cells if isinstance(cells, dict) else {}
    qid = cells.get("qid")
    row = reading.row(file, str(qid) if isinstance(qid, int | str) else f"row {number}")
    answer = row.text("answer", cells.get("answer"))
    if _language(cells) not in LANGUAGES:
        row.problem("q_lang is neither en nor zh", "Kept under the language it names.")
    row.finish(
        images=(row.text("img_name", cells.get("img_name")),),
        question=row.text("question", cells.get("question")),
        answer=answer,
        kind=row.kind(row.text("answer_type", cells.get("answer_type")), answer),
        split=split,
        meta={
            "language": _language(cells),
            "modality": row.text("modality", cells.get("modality")),
            "organ": row.text("location", cells.get("location")),
            "content_type": row.text("content_type", cells.get("content_type")),
        },
    )


def _language_leaks(images: _Images) -> list[Problem]:
    """Test images of one language in the training split of the other; `leaks` finds them under 'all'."""
    found = []
    for language, other in (("en", "zh"), ("zh", "en")):
        test = images.get(("test", language), set())
        shared = len(test & images.get(("train", other), set()))
        if shared:
            what = (
                f"{shared} of the {len(test)} {LANGUAGES[language]} test images stand in the "
                f"{LANGUAGES[other]} training split"
            )
            mend = "Train and test in one language, or read all and split by image."
            found.append(Problem("test.json", "", what, mend))
    return found
