"""SLAKE 1.0 (Liu et al. 2021, arXiv 2102.09542): English and Chinese questions on CT, MR and X-ray images."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from normtune.data.reading.row_reader import RowReader
from normtune.data.reading.tables import json_rows
from normtune.data.records import Dataset, Problem
from normtune.errors import InputError, did_you_mean

LICENCE = "CC BY 4.0"
LANGUAGES = {"en": "English", "zh": "Chinese"}
_FILES = {"train": "train.json", "validate": "validate.json", "test": "test.json"}
_IMAGES = "imgs"


def read(root: Path, *, language: Literal["en", "zh", "all"] = "en", text_only: bool = False) -> Dataset:
    """Read the original release: train.json, validate.json, test.json and imgs/xmlabN/source.jpg.

    `kind` is the file's answer_type: CLOSED is wider than yes/no (it includes "lung" and "T2"). `meta` holds
    language, modality, organ (the file's location) and content_type. Ids are `slake-<qid>`.

    Rows without an answer or image are skipped and listed; with `text_only`, those with a missing image file
    are kept. Repeated rows are kept, as in published counts, and listed. The English and the Chinese splits
    were drawn independently, so the number of test images of one language that are in the training split of
    the other is listed too.

    Raises:
        InputError: the image folder or all files are missing, a file has another layout, the path of an image
            is outside the image folder, or the language is unknown.
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
            "Point --root at the folder with these files and imgs/."
        )
    if not text_only and not (root / _IMAGES).is_dir():
        raise InputError(f"{root} has no image folder '{_IMAGES}'. Unpack SLAKE's imgs.zip there.")
    reader = RowReader("slake", text_only)
    images: _Images = {}
    for split, file in _FILES.items():
        if split not in present:
            reader.note_missing_split(file, split)
            continue
        for number, cells in json_rows(root / file, file, "SLAKE"):
            if isinstance(cells.get("img_name"), str):
                images.setdefault((split, _language(cells)), set()).add(cells["img_name"])
            if language == "all" or _language(cells) == language:
                _read_row(reader, file, number, cells, split)
            else:
                reader.dropped[f"language {_language(cells)}"] += 1
    if language != "all":
        reader.problems += _language_leaks(images)
    return reader.finish(root, (_IMAGES,), LICENCE)


_Images = dict[tuple[str, str], set[str]]  # (split, language) -> image names


def _language(cells: dict[str, Any]) -> str:
    """The row's language; English if it names none."""
    return str(cells.get("q_lang") or "en")


def _read_row(reader: RowReader, file: str, number: int, cells: dict[str, Any], split: str) -> None:
    qid = cells.get("qid")
    row = reader.start_row(file, str(qid) if isinstance(qid, int | str) else f"row {number}")
    answer = row.read_text("answer", cells.get("answer"))
    if _language(cells) not in LANGUAGES:
        row.add_problem("q_lang is neither en nor zh", "Kept, with the language that the row names.")
    row.finish(
        images=(row.image_key(row.read_text("img_name", cells.get("img_name"))),),
        question=row.read_text("question", cells.get("question")),
        answer=answer,
        kind=row.read_kind(row.read_text("answer_type", cells.get("answer_type")), answer),
        split=split,
        meta={
            "language": _language(cells),
            "modality": row.read_text("modality", cells.get("modality")),
            "organ": row.read_text("location", cells.get("location")),
            "content_type": row.read_text("content_type", cells.get("content_type")),
        },
    )


def _language_leaks(images: _Images) -> list[Problem]:
    """List test images of one language in the training split of the other, which `find_leaks` cannot see."""
    problems = []
    for language, other in (("en", "zh"), ("zh", "en")):
        test = images.get(("test", language), set())
        shared = len(test & images.get(("train", other), set()))
        if shared:
            what = (
                f"{shared} of the {len(test)} {LANGUAGES[language]} test images are in the "
                f"{LANGUAGES[other]} training split"
            )
            fix = "Train and test in one language, or use --language all with --image-disjoint."
            problems.append(Problem("test.json", "", what, fix))
    return problems
