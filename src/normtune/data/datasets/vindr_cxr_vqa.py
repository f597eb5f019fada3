"""VinDr-CXR-VQA (arXiv 2511.00504): questions with boxes and reasons on chest films of VinDr-CXR."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from normtune.data.images.files import ImageFolder
from normtune.data.reading.cells import is_yes_no
from normtune.data.reading.row_reader import RowReader
from normtune.data.reading.tables import json_rows
from normtune.data.records import Dataset
from normtune.errors import InputError

LICENCE = "CC BY 4.0 (questions); the images have VinDr-CXR's licence"
_IMAGES = ("train", "images", "")
_ENDINGS = (".png", ".jpg", ".dicom", ".dcm")


def read(root: Path, *, text_only: bool = False) -> Dataset:
    """Read the JSON file of the release (data_v1.json on the hub), with VinDr-CXR's images in train/ or images/.

    From the dataset's card and from loaders of others, not from the file itself: a list of images, each with image_id
    and `vqa`, a list of question, answer, reason, type (Where, What, Is_there, How_many, Which, Yes_No), difficulty,
    gt_finding and gt_location. The images are named by image_id.

    The file names no splits: all rows are of train; `--split-ratio` makes splits by image. Answers keep their boxes,
    such as `<691,1375,1653,1831>`. Yes and no are closed. Ids are `vindr-cxr-vqa-<image_id>-<number>`.

    Raises:
        InputError: there is not exactly one JSON file, it holds no list of images, or no row can be used.
    """
    files = [root] if root.is_file() else sorted(root.glob("*.json"))
    root = root.parent if root.is_file() else root
    if len(files) != 1:
        names = ", ".join(file.name for file in files) or "none"
        raise InputError(
            f"{root} needs one JSON file of VinDr-CXR-VQA, and there are {names}. Give the file as --root."
        )
    reader = RowReader("vindr-cxr-vqa", text_only)
    folder = next((root / name for name in _IMAGES if (root / name).is_dir()), root)
    endings = {path.stem: path.suffix for path in folder.iterdir() if path.suffix.lower() in _ENDINGS}
    for number, cells in json_rows(files[0], files[0].name, "VinDr-CXR-VQA"):
        questions = cells.get("vqa")
        if not isinstance(questions, list):
            raise InputError(f"{files[0].name}, row {number}: no list 'vqa'. Use VinDr-CXR-VQA's original file.")
        for index, question in enumerate(questions, start=1):
            question = question if isinstance(question, dict) else {}
            _read_question(
                reader, files[0].name, f"{number}, question {index}", cells.get("image_id"), question, endings
            )
    reader.check_images(folder)
    reader.check_repeats()
    return reader.build_dataset(ImageFolder(folder), LICENCE)


def _read_question(
    reader: RowReader, file: str, place: str, image_id: object, cells: dict[str, Any], endings: dict[str, str]
) -> None:
    number = place.rpartition(" ")[2]
    row = reader.start_row(file, place, f"vindr-cxr-vqa-{image_id}-{number}")
    image = row.read_text("image_id", image_id)
    answer = row.read_text("answer", cells.get("answer"))
    row.finish(
        images=(row.image_key(f"{image}{endings.get(image, '.png')}" if image else ""),),
        question=row.read_text("question", cells.get("question")),
        answer=answer,
        kind="closed" if is_yes_no(answer) else "open",
        split="train",
        meta={"language": "en", "modality": "X-Ray"}
        | {name: row.read_text(name, cells.get(name)) for name in ("type", "difficulty", "gt_finding", "gt_location")},
    )
