"""The datasets and file formats that can be opened, and which format a file or folder has."""

from __future__ import annotations

import gzip
import json
import math
import re
from dataclasses import dataclass
from pathlib import Path

from normtune.errors import InputError

# Published dataset -> what --root must point at; messages quote it.
PUBLISHED = {
    "slake": "the folder that holds train.json and imgs/",
    "vqa-rad": "the folder that holds 'VQA_RAD Dataset Public.json'",
    "path-vqa": "the folder that holds qas/ and images/, or parquet files, or the hub name owner/name",
    "openi": "the folder that holds annotation.json, indiana_reports.csv or ecgen-radiology/",
    "mimic-cxr": "the folder that holds mimic-cxr-2.0.0-split.csv and files/, or annotation.json",
    "medpix": "the folder that holds train.jsonl, dev.jsonl, test.jsonl and images/",
    "roco": "the folder that holds data/train/radiology/captions.txt, or another of its layouts",
    "mimic-cxr-vqa": "the folder that holds train.json, valid.json, test.json and files/",
    "mimic-ext-cxr-qba": "the folder that holds qa.zip or qa/, and files/",
    "vindr-cxr-vqa": "the JSON file of the release, or its folder with the images in train/",
    "kvasir-vqa": "the folder that holds parquet files, or the hub name SimulaMet-HOST/Kvasir-VQA",
    "gemex": "the folder that holds open_ended_question.jsonl and the others, and files/",
    "pmc-vqa": "the folder that holds train_2.csv, test_2.csv and figures/, or train.csv and images/, or one CSV file",
    "omnimedvqa": "the folder that holds QA_information/ and Images/",
    "medxpertqa": "the folder that holds MM/test.jsonl and images/",
    "mmmu": "the folder that holds Clinical_Medicine/ and the other subjects with their parquet files",
    "rexvqa": "the folder that holds metadata/train_vqa_data.json and the others, and deid_png/",
    "medpix-vqa": "the folder that holds parquet files, or the hub name mmoukouba/MedPix-VQA",
    "pathmmu": "the folder that holds data.json and images/",
    "vqa-med-2019": "the folder that holds ImageClef-2019-VQA-Med-Training/ and the others",
}
# Format of a user's own data -> what is expected, likewise.
FORMATS = {
    "csv": "a .csv file with one question or report a row, or a folder of such files",
    "tsv": "a .tsv file with one question or report a row, or a folder of such files",
    "xlsx": "an .xlsx workbook with one question or report a row, or a folder of them",
    "json": "a .json file with a list of objects, one a question or report",
    "jsonl": "a JSONL file or a folder of them",
    "parquet": "a parquet file, a folder of them, or a hub name owner/name",
    "messages": "a JSONL, JSON or parquet file of conversations, or a folder of them",
    "arrow": "a folder that save_to_disk of Hugging Face datasets wrote",
    "imagefolder": "a folder of images with metadata.csv, metadata.jsonl or metadata.parquet",
    "dicom": "a folder of DICOM files with one table (.csv, .tsv, .xlsx, .jsonl) of questions or reports",
}
SUFFIXES = {".csv": "csv", ".tsv": "tsv", ".xlsx": "xlsx", ".json": "json", ".jsonl": "jsonl", ".parquet": "parquet"}
METADATA = tuple(f"metadata{suffix}" for suffix in (".csv", ".jsonl", ".parquet"))  # the table of an image folder
DICOM_SUFFIXES = (".dcm", ".dicom", ".ima")
_NO_TABLES = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")
_PEEK_BYTES = 65536
_CONVERSATION = re.compile(r'"(messages|conversations)"\s*:\s*\[')
# Columns of rows with one question that `messages` reads (ms-swift, Alpaca).
_ONE_TURN = (("query", "response"), ("instruction", "output"))


@dataclass(frozen=True)
class MixtureEntry:
    """One dataset of a mixture: its name or path, its root if it needs one, and its weight."""

    data: str
    root: Path | None
    weight: float

    def __str__(self) -> str:
        name, root = name_and_root(self.data, self.root)
        if root is not None and root.exists():  # a root that does not exist is a hub name
            root = root.resolve()
        return f"{name}{'' if root is None else f'={root}'}:{self.weight:g}"


def parse_mixture(data: str) -> list[MixtureEntry]:
    """Parse several datasets with weights, such as "slake=SLAKE:0.7,rows.csv:0.3"; empty for a single dataset.

    Raises:
        InputError: a dataset has no weight, or its weight is not above 0.
    """
    entries = [entry.strip().rpartition(":") for entry in data.split(",")]
    if len(entries) < 2 or Path(data).exists() or not any(_weight(weight) for _, _, weight in entries):
        return []
    mixture = []
    for name, _, weight in entries:
        if not name or not _weight(weight):
            raise InputError(
                f"--data {data}: several datasets need a weight above 0 each, such as slake=FOLDER:0.7,rows.csv:0.3."
            )
        family, has_root, root = name.partition("=")
        named = has_root and (family in PUBLISHED or family in FORMATS)
        mixture.append(MixtureEntry(family if named else name, Path(root) if named else None, _weight(weight)))
    return mixture


def _weight(text: str) -> float:
    """The number that a text states; 0 if it is not above 0."""
    try:
        weight = float(text)
    except ValueError:
        return 0.0
    return weight if 0 < weight < math.inf else 0.0


def name_and_root(data: str, root: Path | None) -> tuple[str, Path | None]:
    """Return a dataset's name and root; a file such as "rows.csv", or a folder, is the root of its format.

    Raises:
        InputError: the file or folder has no known format.
    """
    path = Path(data)
    if root is not None or data in PUBLISHED or data in FORMATS:
        return data, root
    if path.exists() or _suffix(path) in SUFFIXES:
        return recognize(path), path
    return data, root


def recognize(path: Path) -> str:
    """The format of a file or folder, a key of `FORMATS`. Only the first bytes of a file are read.

    Raises:
        InputError: the format is unknown, or a folder holds files of several formats.
    """
    if path.is_dir():
        return _format_of_folder(path)
    suffix = _suffix(path)
    if suffix not in SUFFIXES:
        advice = " Save it as .xlsx." if suffix in (".xls", ".ods", ".numbers") else ""
        raise InputError(
            f"{path}: files that end in '{suffix or path.name}' are not read.{advice} Known: {', '.join(SUFFIXES)}, "
            "and folders of these, of save_to_disk, of images with metadata, and of DICOM files."
        )
    name = SUFFIXES[suffix]
    return "messages" if name in ("json", "jsonl", "parquet") and _holds_conversations(path, name) else name


def table_files(folder: Path) -> list[Path]:
    """The data files directly in a folder."""
    return [
        path
        for path in sorted(folder.iterdir())
        if _suffix(path) in SUFFIXES and path.is_file() and path.name not in _NO_TABLES and path.name[0] not in ".~"
    ]


def files_of_format(folder: Path, format: str) -> list[Path]:
    """The data files directly in a folder that have the ending of this format."""
    return [file for file in table_files(folder) if SUFFIXES[_suffix(file)] == format]


def dicom_files(folder: Path) -> list[Path]:
    """The DICOM files in a folder and its subfolders, by their endings."""
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in DICOM_SUFFIXES and path.is_file())


def metadata_files(folder: Path) -> list[Path]:
    """The metadata tables of a Hugging Face image folder: in the folder, or in its subfolders."""
    return sorted(path for name in METADATA for pattern in (name, f"*/{name}") for path in folder.glob(pattern))


def _suffix(path: Path) -> str:
    """The ending that names the format; .gz after it does not count."""
    return Path(path.stem).suffix.lower() if path.suffix == ".gz" else path.suffix.lower()


def _format_of_folder(folder: Path) -> str:
    if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
        return "messages" if _arrow_conversations(folder) else "arrow"
    if metadata_files(folder):
        return "imagefolder"
    tables = table_files(folder)
    formats = {recognize(path) for path in tables} or ({"parquet"} if any(folder.rglob("*.parquet")) else set())
    if len(formats) == 1:
        (name,) = formats
        is_dicom = name not in ("messages", "parquet") and len(tables) == 1 and dicom_files(folder)
        return "dicom" if is_dicom else name
    if formats:
        raise InputError(
            f"{folder} holds files of several formats ({', '.join(sorted(formats))}): "
            f"{', '.join(path.name for path in tables[:5])}. Give one of the files as --data."
        )
    if dicom_files(folder):
        raise InputError(f"{folder} holds DICOM files and no table. Put a .csv or .xlsx file of reports beside them.")
    raise InputError(
        f"{folder} holds no data file ({', '.join(SUFFIXES)}), no metadata.csv and no dataset of save_to_disk. "
        "Give the file or folder that has the rows."
    )


def _arrow_conversations(folder: Path) -> bool:
    info = next(iter(sorted(folder.rglob("dataset_info.json"))), None)
    try:
        features = json.loads(info.read_bytes()).get("features") if info is not None else None
    except (OSError, ValueError, AttributeError):
        return False
    return isinstance(features, dict) and bool({"messages", "conversations"} & features.keys())


def _holds_conversations(path: Path, name: str) -> bool:
    """Whether the first rows of a file look like conversations; False if it cannot be read, as its reader says why."""
    if name == "parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            columns = set(pq.read_schema(path).names)
        except (pa.ArrowException, OSError):
            return False
        return bool({"messages", "conversations"} & columns)
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
            text = file.read(_PEEK_BYTES).decode("utf-8", "replace")
    except (OSError, EOFError):
        return False
    columns = set(re.findall(r'"(\w+)"\s*:', text))
    if {"question", "answer"} <= columns:
        return False
    return bool(_CONVERSATION.search(text)) or any(columns.issuperset(pair) for pair in _ONE_TURN)
