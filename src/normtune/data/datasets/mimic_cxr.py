"""MIMIC-CXR (Johnson et al. 2019, doi:10.1038/s41597-019-0322-0): chest films with free-text reports."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from normtune.data.images.files import ImageFolder
from normtune.data.reading.r2gen import FILE, read_entries
from normtune.data.reading.radiology import Sections, called, report_sections, target, two_views
from normtune.data.reading.row_reader import RowReader, image_folder
from normtune.data.reading.tables import csv_rows, file_bytes, find_table
from normtune.data.records import Dataset, Problem
from normtune.errors import InputError

LICENCE = "PhysioNet Credentialed Health Data License 1.5.0 (credentialed access, data use agreement)"
_SPLIT, _METADATA, _LABELS = "mimic-cxr-*-split.csv", "mimic-cxr-*-metadata.csv", "mimic-cxr-*-chexpert.csv"
_R2GEN_IMAGES = ("images", "files", "")
_JPG_IMAGES = ("", "mimic-cxr-jpg", "physionet.org/files/mimic-cxr-jpg/2.0.0")
_REPORTS = ("", "mimic-cxr-reports", "reports", "mimic-cxr")
_IDS = {"subject_id": r"\d{8}", "study_id": r"\d{8}", "dicom_id": r"[0-9a-f-]+"}


def read(root: Path, *, sections: Sections = "findings", text_only: bool = False) -> Dataset:
    """Read the JPG release with the reports beside it, or R2Gen's annotation.json.

    The JPG release: `mimic-cxr-2.0.0-split.csv` and, where they are there, `-metadata.csv` (the views) and
    `-chexpert.csv` (14 labels, into `meta`), each also as .gz; `files/p10/p10000032/s50414267/*.jpg`. The
    reports are MIMIC-CXR's `mimic-cxr-reports.zip`, unpacked there or into mimic-cxr-reports/:
    `files/p10/p10000032/s50414267.txt`. Every study is one report of one or two views, frontal first; its
    sections are taken by `normtune.data.reading.radiology`. Ids are `mimic-cxr-s50414267`.

    R2Gen's file, read where it stands, holds the findings of one image each; ids are `mimic-cxr-<id>`.

    Studies without the section are left out and listed, and so are those whose report or image files are
    missing (images: not with `text_only`). No text and no name of a patient enters a message.

    Raises:
        InputError: neither layout is there, there are no reports, a file is damaged or lacks a column, an
            id is no id of MIMIC-CXR's, or a study stands in two splits.
    """
    reading = RowReader("mimic-cxr", text_only)
    split_file = find_table(root, _SPLIT)
    if (root / FILE).is_file() and (sections == "findings" or split_file is None):
        read_entries(reading, root, sections)
        reading.notes.append("R2Gen's annotation.json: its findings, its split, one image a study")
        names = (name for example in reading.examples for name in example.images)
        folder = image_folder(root, _R2GEN_IMAGES, names)
    elif split_file is not None:
        _read_release(reading, root, split_file, sections)
        names = (name for example in reading.examples for name in example.images)
        folder = image_folder(root, _JPG_IMAGES, names)
    else:
        raise InputError(
            f"{root} holds neither mimic-cxr-2.0.0-split.csv (the JPG release) nor R2Gen's {FILE}: not "
            "MIMIC-CXR's folder. Point --root at the folder that does."
        )
    shown = folder.relative_to(root).as_posix()
    reading.check_images(folder, "" if shown == "." else shown)
    return reading.dataset(ImageFolder(folder), LICENCE)


@dataclass
class _Study:
    row: str
    subject: str
    split: str
    images: list[tuple[str, str]] = field(default_factory=list)  # (dicom_id, key)


def _read_release(reading: RowReader, root: Path, split_file: Path, sections: Sections) -> None:
    studies = _studies(reading, split_file)
    views = _views(reading, root)
    labels = _labels(reading, root)
    folder = _report_folder(root, studies)
    unused = 0
    for study, found in studies.items():
        row = reading.unique_row(split_file.name, found.row, f"mimic-cxr-s{study}")
        texts = _report(folder, found.subject, study)
        if texts is None:
            row.problem("its report file is missing", "Unpack all of mimic-cxr-reports.zip.")
        texts = texts or {}
        keys = two_views([(views.get(dicom, ""), key) for dicom, key in found.images])
        unused += len(found.images) - len(keys)
        row.finish(
            images=keys,
            question="",
            answer=target(texts.get("findings", ""), texts.get("impression", ""), sections),
            kind="report",
            split=row.split(found.split),
            meta={"language": "en", "patient": found.subject, "chexpert": labels.get(study, "")},
            answer_called=called(sections),
        )
    reading.notes.append(f"target: {sections}, by the rules of MIMIC-CXR's own section parser")
    if unused:
        reading.notes.append(f"{unused} further images of studies with several views are not read")


def _studies(reading: RowReader, file: Path) -> dict[str, _Study]:
    """study_id -> its images and split, in file order."""
    studies: dict[str, _Study] = {}
    for number, cells in _checked(file, ("dicom_id", "study_id", "subject_id", "split")):
        subject, study, split = cells["subject_id"], cells["study_id"], cells["split"]
        found = studies.setdefault(study, _Study(str(number), subject, split))
        if (found.subject, found.split) != (subject, split):
            what = "its study stands under another patient or split too"
            raise InputError(f"{file.name}, row {number}: {what}. Fetch the file again.")
        key = f"files/p{subject[:2]}/p{subject}/s{study}/{cells['dicom_id']}.jpg"
        found.images.append((cells["dicom_id"], key))
    return studies


def _checked(file: Path, columns: tuple[str, ...]) -> Iterator[tuple[int, dict[str, str]]]:
    """Rows whose ids are of MIMIC-CXR's form: paths are made of them."""
    for number, cells in csv_rows(file, columns):
        for column in columns:
            if column in _IDS and not re.fullmatch(_IDS[column], cells[column]):
                raise InputError(
                    f"{file.name}, row {number}: {column} is no id of MIMIC-CXR's. Use the file as released."
                )
        yield number, cells


def _views(reading: RowReader, root: Path) -> dict[str, str]:
    """dicom_id -> ViewPosition (PA, AP, LATERAL, LL, ...)."""
    file = find_table(root, _METADATA)
    if file is None:
        mend = "The first image of each study is taken: put the file there for frontal and lateral views."
        reading.problems.append(Problem("mimic-cxr-2.0.0-metadata.csv", "", "file is missing", mend))
        return {}
    return {
        cells["dicom_id"]: cells["ViewPosition"] for _, cells in _checked(file, ("dicom_id", "ViewPosition"))
    }


def _labels(reading: RowReader, root: Path) -> dict[str, str]:
    """study_id -> the labels that CheXpert gave, as `Edema 1, Pneumonia -1` (1 yes, 0 no, -1 uncertain)."""
    file = find_table(root, _LABELS)
    if file is None:
        mend = "Read without the 14 labels: put the file there where they are wanted."
        reading.problems.append(Problem("mimic-cxr-2.0.0-chexpert.csv", "", "file is missing", mend))
        return {}
    found = {}
    for _, cells in _checked(file, ("subject_id", "study_id")):
        named = [(name, value) for name, value in cells.items() if name not in _IDS and value]
        found[cells["study_id"]] = ", ".join(f"{name} {value.removesuffix('.0')}" for name, value in named)
    return found


def _report_folder(root: Path, studies: dict[str, _Study]) -> Path:
    """The folder that holds files/p10/...: told by the first studies whose report is there."""
    for study, found in list(studies.items())[:1000]:
        for name in _REPORTS:
            if _report_file(root / name, found.subject, study).is_file():
                return root / name
    raise InputError(
        f"{root} holds no reports: looked for files/p10/p10000032/s50414267.txt and the like, there and in "
        f"{', '.join(name for name in _REPORTS if name)}. Unpack MIMIC-CXR's mimic-cxr-reports.zip there."
    )


def _report_file(folder: Path, subject: str, study: str) -> Path:
    return folder / "files" / f"p{subject[:2]}" / f"p{subject}" / f"s{study}.txt"


def _report(folder: Path, subject: str, study: str) -> dict[str, str] | None:
    file = _report_file(folder, subject, study)
    if not file.is_file():
        return None
    return report_sections(file_bytes(file).decode("utf-8", errors="replace"))
