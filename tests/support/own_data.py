"""The same rows in every format of own data, and the same volume as NIfTI and as a DICOM series."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import openpyxl
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from pydicom.uid import generate_uid

from tests.support.dataset_samples import dicom_bytes, make_dicom

Rows = list[dict[str, Any]]
_SPLITS = ("train", "validate", "test")


def make_rows(root: Path, count: int = 40) -> Rows:
    """Rows with two questions on each picture, two pictures of each patient, and texts that need quotes."""
    (root / "scans").mkdir(parents=True, exist_ok=True)
    rows = []
    for number in range(count):
        image = f"scans/{number // 2:03d}.png"
        if number % 2 == 0:
            Image.new("L", (8, 8), 5 * number).save(root / image)
        rows.append({
            "id": f"r{number}",
            "image": image,
            "question": ("Is there an effusion?", 'Which organ, "left" or right,\nis shown?')[number % 2],
            "answer": (("yes", "no")[number // 2 % 2], "Lung; Größe 3,5 cm")[number % 2],
            "split": ("train", "train", "validate", "test")[number // 4 % 4],
            "patient_id": f"p{number // 4}",
        })  # fmt: skip
    return rows


def write_delimited(file: Path, rows: Rows, delimiter: str = ",", encoding: str = "utf-8-sig") -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    with open(file, "w", newline="", encoding=encoding) as out:
        writer = csv.DictWriter(out, list(rows[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)
    return file


def write_workbook(file: Path, *sheets: tuple[str, Rows]) -> Path:
    book = openpyxl.Workbook()
    book.remove(book.active)
    for title, rows in sheets:
        sheet = book.create_sheet(title)
        sheet.append(list(rows[0]))
        for row in rows:
            sheet.append(list(row.values()))
    book.save(file)
    return file


def write_arrow(folder: Path, rows: Rows, root: Path | None = None, **features: Any) -> Path:
    """Write a dataset as `save_to_disk` of datasets 5.2 does; with `root`, the bytes of the images are inside."""
    folder.mkdir(parents=True, exist_ok=True)
    if root is not None:
        rows = [row | {"image": {"bytes": (root / row["image"]).read_bytes(), "path": None}} for row in rows]
    table = pa.Table.from_pylist(rows)
    name = "data-00000-of-00001.arrow"
    with pa.OSFile(str(folder / name), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=7)
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": name}], "_split": None}))
    (folder / "dataset_info.json").write_text(json.dumps({"features": features}))
    return folder


def write_arrow_splits(folder: Path, rows: Rows, root: Path) -> Path:
    """A `DatasetDict`: the split of a row is its folder."""
    names = {"train": "train", "validate": "validation", "test": "test"}
    for split, name in names.items():
        members = [{k: v for k, v in row.items() if k != "split"} for row in rows if row["split"] == split]
        write_arrow(folder / name, members, root)
    (folder / "dataset_dict.json").write_text(json.dumps({"splits": list(names.values())}))
    return folder


def write_metadata(root: Path, rows: Rows, ending: str) -> Path:
    """A Hugging Face image folder: metadata.ENDING with file_name, beside the images."""
    rows = [{"file_name" if k == "image" else k: v for k, v in row.items()} for row in rows]
    file = root / f"metadata.{ending}"
    if ending == "csv":
        write_delimited(file, rows)
    elif ending == "jsonl":
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        pq.write_table(pa.Table.from_pylist(rows), file)
    return root


def write_chats(file: Path, rows: Rows, layout: str) -> Path:
    """The rows as conversations of one turn: `messages` (LLaMA-Factory), `conversations` (LLaVA), or ms-swift."""
    chats = []
    for row in rows:
        rest = {name: row[name] for name in ("id", "split", "patient_id")}
        turns = (row["question"], row["answer"])
        if layout == "messages":
            roles = ({"role": r, "content": t} for r, t in zip(("user", "assistant"), turns, strict=True))
            chats.append(rest | {"messages": list(roles), "images": [row["image"]]})
        elif layout == "conversations":
            speakers = ({"from": r, "value": t} for r, t in zip(("human", "gpt"), turns, strict=True))
            chats.append(rest | {"image": row["image"], "conversations": list(speakers)})
        else:
            chats.append(rest | {"query": turns[0], "response": turns[1], "images": [row["image"]]})
    text = json.dumps(chats) if file.suffix == ".json" else "".join(json.dumps(chat) + "\n" for chat in chats)
    file.write_text(text)
    return file


# Format -> writes the rows below a folder that has the images, and returns what a user gives as --data.
FORMATS: dict[str, Callable[[Path, Rows], Path]] = {
    "csv": lambda root, rows: write_delimited(root / "rows.csv", rows),
    "csv with semicolons": lambda root, rows: write_delimited(root / "rows.csv", rows, ";"),
    "tsv": lambda root, rows: write_delimited(root / "rows.tsv", rows, "\t", "utf-8"),
    "xlsx": lambda root, rows: write_workbook(root / "rows.xlsx", ("Sheet1", rows)),
    "xlsx with a sheet a split": lambda root, rows: write_workbook(
        root / "rows.xlsx", *((split, [r for r in rows if r["split"] == split]) for split in _SPLITS)
    ),
    "json": lambda root, rows: write_text(root / "rows.json", json.dumps(rows)),
    "json by split": lambda root, rows: write_text(
        root / "rows.json", json.dumps({s: [r for r in rows if r["split"] == s] for s in _SPLITS})
    ),
    "jsonl": lambda root, rows: write_text(root / "rows.jsonl", "".join(json.dumps(row) + "\n" for row in rows)),
    "parquet": lambda root, rows: write_parquet_rows(root / "rows.parquet", rows),
    "arrow": lambda root, rows: write_arrow(root / "saved", rows, root),
    "arrow by split": lambda root, rows: write_arrow_splits(root / "saved", rows, root),
    "imagefolder csv": lambda root, rows: write_metadata(root, rows, "csv"),
    "imagefolder jsonl": lambda root, rows: write_metadata(root, rows, "jsonl"),
    "imagefolder parquet": lambda root, rows: write_metadata(root, rows, "parquet"),
    "messages": lambda root, rows: write_chats(root / "rows.jsonl", rows, "messages"),
    "llava": lambda root, rows: write_chats(root / "rows.json", rows, "conversations"),
    "ms-swift": lambda root, rows: write_chats(root / "rows.jsonl", rows, "query"),
}


def write_text(file: Path, text: str) -> Path:
    file.write_text(text, encoding="utf-8")
    return file


def write_parquet_rows(file: Path, rows: Rows) -> Path:
    pq.write_table(pa.Table.from_pylist(rows), file)
    return file


def write_nifti(file: Path, depth: int) -> Path:
    """A volume of 6 x 4 x depth voxels in RAS order; slice z has the value 10 z, and its right anterior corner 255."""
    values = np.broadcast_to(10.0 * np.arange(depth), (6, 4, depth)).astype(np.float32)
    values[-1, -1, :] = 255
    nibabel.save(nibabel.Nifti1Image(values, np.eye(4)), file)
    return file


def write_series(folder: Path, depth: int, series: str | None = None, **elements: Any) -> Path:
    """A DICOM series with file names in another order than the positions; slice z has the value 10 z."""
    folder.mkdir(parents=True)
    series = series or generate_uid()
    for z in range(depth):
        file = make_dicom(
            np.full((4, 6), 10 * z, np.uint8),
            SeriesInstanceUID=series,
            ImagePositionPatient=[0, 0, float(z)],
            ImageOrientationPatient=[1, 0, 0, 0, 1, 0],
            WindowCenter=128,
            WindowWidth=256,
            **elements,
        )
        (folder / f"{(7 * z) % depth:03d}.dcm").write_bytes(dicom_bytes(file))
    return folder
