"""MIMIC-CXR (Johnson et al. 2019, doi:10.1038/s41597-019-0322-0): chest films with free-text reports."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from normtune.data.reading.r2gen import R2GEN_FILE, read_entries
from normtune.data.reading.radiology import Sections, report_sections, section_label, select_views, target_text
from normtune.data.reading.row_reader import RowReader
from normtune.data.reading.tables import csv_rows, file_bytes, find_table
from normtune.data.records import Dataset, Problem
from normtune.errors import InputError

LICENCE = "PhysioNet Credentialed Health Data License 1.5.0 (credentialed access, data use agreement)"
_SPLIT, _METADATA, _LABELS = "mimic-cxr-*-split.csv", "mimic-cxr-*-metadata.csv", "mimic-cxr-*-chexpert.csv"
# Folders below root that may hold the images, in R2Gen's layout and the JPG release, and the reports.
_R2GEN_IMAGES = ("images", "files", "")
_JPG_IMAGES = ("", "mimic-cxr-jpg", "physionet.org/files/mimic-cxr-jpg/2.0.0")
_REPORTS = ("", "mimic-cxr-reports", "reports", "mimic-cxr")
# Column -> pattern of its ids. File paths are made of ids, so nothing else is accepted.
_IDS = {"subject_id": r"\d{8}", "study_id": r"\d{8}", "dicom_id": r"[0-9a-f-]+"}


def read(root: Path, *, sections: Sections = "findings", text_only: bool = False) -> Dataset:
    """Read the JPG release together with the reports, or R2Gen's annotation.json.

    - JPG release: `mimic-cxr-2.0.0-split.csv`, and if present `-metadata.csv` (the views) and `-chexpert.csv`
      (14 labels, for `meta`), each also as .gz; images `files/p10/p10000032/s50414267/*.jpg`. The reports
      are MIMIC-CXR's `mimic-cxr-reports.zip`, unpacked in the same folder or in mimic-cxr-reports/:
      `files/p10/p10000032/s50414267.txt`. Each study is one report on one or two views, frontal first.
      `normtune.data.reading.radiology` splits it into sections. Ids are `mimic-cxr-s50414267`.
    - R2Gen's file has the findings of one image per row. If the file exists, it is used for the findings. Ids
      are `mimic-cxr-<id>`.

    Studies without the section are skipped and listed. So are studies with a missing report file and, without
    `text_only`, those with missing image files. Messages contain no text and no name of a patient.

    Raises:
        InputError: neither layout is present, there are no reports, a file is damaged or lacks a column, an
            id has another form than MIMIC-CXR's, or a study is in two splits.
    """
    reader = RowReader("mimic-cxr", text_only)
    split_file = find_table(root, _SPLIT)
    if (root / R2GEN_FILE).is_file() and (sections == "findings" or split_file is None):
        read_entries(reader, root, sections)
        reader.notes.append("R2Gen's annotation.json: its findings, its split, one image per study")
        subfolders = _R2GEN_IMAGES
    elif split_file is not None:
        _read_release(reader, root, split_file, sections)
        subfolders = _JPG_IMAGES
    else:
        raise InputError(
            f"{root} holds neither mimic-cxr-2.0.0-split.csv (the JPG release) nor R2Gen's {R2GEN_FILE}: not "
            "MIMIC-CXR's folder. Point --root at the folder with one of them."
        )
    return reader.build_dataset(reader.find_images(root, subfolders), LICENCE)


@dataclass
class _Study:
    """One study of the split file."""

    row: str  # number of its first row
    subject: str  # the patient
    split: str
    images: list[tuple[str, str]] = field(default_factory=list)  # (dicom_id, key)


def _read_release(reader: RowReader, root: Path, split_file: Path, sections: Sections) -> None:
    studies = _studies(split_file)
    views = _views(reader, root)
    labels = _labels(reader, root)
    folder = _report_folder(root, studies)
    unused = 0
    for study, info in studies.items():
        row = reader.start_unique_row(split_file.name, info.row, f"mimic-cxr-s{study}")
        texts = _report(folder, info.subject, study)
        if texts is None:
            row.add_problem("its report file is missing", "Unpack all of mimic-cxr-reports.zip.")
        texts = texts or {}
        keys = select_views([(views.get(dicom, ""), key) for dicom, key in info.images])
        unused += len(info.images) - len(keys)
        row.finish(
            images=keys,
            question="",
            answer=target_text(texts.get("findings", ""), texts.get("impression", ""), sections),
            kind="report",
            split=row.read_split(info.split),
            meta={"language": "en", "patient": info.subject, "chexpert": labels.get(study, "")},
            answer_name=section_label(sections),
        )
    reader.notes.append(f"target: {sections}, by the rules of MIMIC-CXR's own section parser")
    if unused:
        reader.notes.append(f"{unused} further images of studies with several views are not read")


def _studies(file: Path) -> dict[str, _Study]:
    """study_id -> patient, split and images, in file order."""
    studies: dict[str, _Study] = {}
    for number, cells in _rows_with_valid_ids(file, ("dicom_id", "study_id", "subject_id", "split")):
        subject, study, split = cells["subject_id"], cells["study_id"], cells["split"]
        entry = studies.setdefault(study, _Study(str(number), subject, split))
        if (entry.subject, entry.split) != (subject, split):
            what = "its study is also under another patient or split"
            raise InputError(f"{file.name}, row {number}: {what}. Fetch the file again.")
        key = f"files/p{subject[:2]}/p{subject}/s{study}/{cells['dicom_id']}.jpg"
        entry.images.append((cells["dicom_id"], key))
    return studies


def _rows_with_valid_ids(file: Path, columns: tuple[str, ...]) -> Iterator[tuple[int, dict[str, str]]]:
    """Yield (row number, cells) of a CSV file, after checking that ids have MIMIC-CXR's form.

    Raises:
        InputError: an id has another form; see also `csv_rows`.
    """
    for number, cells in csv_rows(file, columns):
        for column in columns:
            if column in _IDS and not re.fullmatch(_IDS[column], cells[column]):
                raise InputError(
                    f"{file.name}, row {number}: {column} is not a MIMIC-CXR id. Use the file as released."
                )
        yield number, cells


def _optional_rows(
    reader: RowReader, root: Path, name: str, columns: tuple[str, ...], without: str
) -> Iterator[dict[str, str]]:
    """Yield the rows of a table of the release; if it is missing, list what its absence means (`without`)."""
    if (file := find_table(root, name)) is None:
        reader.problems.append(Problem(name.replace("*", "2.0.0"), "", "file is missing", without))
        return
    for _, cells in _rows_with_valid_ids(file, columns):
        yield cells


def _views(reader: RowReader, root: Path) -> dict[str, str]:
    """dicom_id -> ViewPosition (PA, AP, LATERAL, LL, ...)."""
    without = "Each study has its first image only. Put the file there for frontal and lateral views."
    rows = _optional_rows(reader, root, _METADATA, ("dicom_id", "ViewPosition"), without)
    return {cells["dicom_id"]: cells["ViewPosition"] for cells in rows}


def _labels(reader: RowReader, root: Path) -> dict[str, str]:
    """study_id -> CheXpert's labels as text, `Edema 1, Pneumonia -1` (1 yes, 0 no, -1 uncertain)."""
    without = "Read without the 14 labels. Put the file there to use them."
    labels = {}
    for cells in _optional_rows(reader, root, _LABELS, ("subject_id", "study_id"), without):
        values = [(name, value) for name, value in cells.items() if name not in _IDS and value]
        labels[cells["study_id"]] = ", ".join(f"{name} {value.removesuffix('.0')}" for name, value in values)
    return labels


def _report_folder(root: Path, studies: dict[str, _Study]) -> Path:
    """The folder of files/p10/...: the first that has the report of one of the first 1000 studies."""
    for study, info in list(studies.items())[:1000]:
        for name in _REPORTS:
            if _report_file(root / name, info.subject, study).is_file():
                return root / name
    raise InputError(
        f"{root} holds no reports: looked for files/p10/p10000032/s50414267.txt and the like, there and in "
        f"{', '.join(name for name in _REPORTS if name)}. Unpack MIMIC-CXR's mimic-cxr-reports.zip there."
    )


def _report_file(folder: Path, subject: str, study: str) -> Path:
    return folder / "files" / f"p{subject[:2]}" / f"p{subject}" / f"s{study}.txt"


def _report(folder: Path, subject: str, study: str) -> dict[str, str] | None:
    """Section name -> text of a study's report; None if the file is missing."""
    file = _report_file(folder, subject, study)
    if not file.is_file():
        return None
    return report_sections(file_bytes(file).decode("utf-8", errors="replace"))
