"""OpenI / IU X-ray (Demner-Fushman et al. 2016, doi:10.1093/jamia/ocv080): chest films with reports."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

from normtune.data.images.files import ImageFolder
from normtune.data.reading.r2gen import FILE, entries, read_entries
from normtune.data.reading.radiology import Sections, called, target, two_views
from normtune.data.reading.row_reader import RowReader, image_folder
from normtune.data.reading.tables import csv_rows, file_bytes
from normtune.data.records import Dataset, Problem
from normtune.errors import InputError

LICENCE = "open access at NLM; the release's XML files name CC BY-NC-ND 4.0"
_REPORTS, _VIEWS = "indiana_reports.csv", "indiana_projections.csv"
_XML = "ecgen-radiology"
_R2GEN_IMAGES = ("images", "")
_KAGGLE_IMAGES = ("images/images_normalized", "images_normalized", "images", "")
_XML_IMAGES = ("NLMCXR_png", "images", "png", "")
_SHARES = (0.7, 0.8)  # of the studies: train up to the first, validate up to the second, then test


def read(root: Path, *, sections: Sections = "findings", text_only: bool = False) -> Dataset:
    """Read R2Gen's annotation.json, the Kaggle pair of CSV files, or the original XML reports.

    Every study is one report of one or two views, frontal first. The answer is its findings, its impression
    or both. Ids are `openi-CXR2384_IM-0942` in R2Gen's layout, `openi-2384` in the others.

    R2Gen's file holds the findings and the split 2069 / 296 / 590 that papers compare on; where it stands,
    it is read for the findings. The others name no split: where annotation.json stands beside them its split
    is taken, by the study's number, and studies that it leaves out are left out; else each study goes to
    train, validate or test (70 / 10 / 20%) by a hash of its number.

    Studies without the section, or without an image, are left out and listed; with `text_only` those whose
    image files are missing are kept.

    Raises:
        InputError: none of the layouts is there, a file is damaged or lacks a column, an id comes twice.
    """
    reading = RowReader("openi", text_only)
    below: tuple[str, ...]
    has_csv, xml = (root / _REPORTS).is_file(), _xml_folder(root)
    if (root / FILE).is_file() and (sections == "findings" or not (has_csv or xml)):
        read_entries(reading, root, sections)
        reading.notes.append("R2Gen's annotation.json: its findings, its split, its two views")
        below, licence = _R2GEN_IMAGES, LICENCE
    elif has_csv:
        _finish(reading, root, _csv_studies(root), sections)
        below, licence = _KAGGLE_IMAGES, LICENCE
    elif xml:
        _finish(reading, root, _xml_studies(xml), sections)
        below, licence = _XML_IMAGES, _xml_licence(xml)
    else:
        raise InputError(
            f"{root} holds neither R2Gen's {FILE}, nor Kaggle's {_REPORTS}, nor the XML reports "
            f"({_XML}/1.xml): not OpenI's folder. Point --root at the folder that does."
        )
    names = (name for example in reading.examples for name in example.images)
    folder = image_folder(root, below, names)
    shown = folder.relative_to(root).as_posix()
    reading.check_images(folder, "" if shown == "." else shown)
    return reading.dataset(ImageFolder(folder), licence)


@dataclass(frozen=True)
class _Study:
    file: str
    row: str
    number: str
    findings: str
    impression: str
    views: list[tuple[str, str]]  # (view, image name)
    problems: str  # as the file names them, for meta


def _finish(reading: RowReader, root: Path, studies: Iterator[_Study], sections: Sections) -> None:
    """Add a row for each study; studies that the split leaves out and views that are not read are counted."""
    split_of = _splits(root, reading)
    outside = unused = 0
    for study in studies:
        split = split_of(study.number)
        outside += split is None
        if split is None:
            continue
        row = reading.unique_row(study.file, study.row, f"openi-{study.number}")
        keys = [row.image(name) for name in two_views(study.views)]
        unused += len(study.views) - len(keys)
        findings = row.prose("findings", study.findings)
        impression = row.prose("impression", study.impression)
        row.finish(
            images=keys,
            question="",
            answer=target(findings, impression, sections),
            kind="report",
            split=row.split(split),
            meta={"language": "en", "problems": study.problems},
            answer_called=called(sections),
        )
    reading.notes.append(f"target: {sections}")
    if unused:
        reading.notes.append(f"{unused} further images of studies with several views are not read")
    if outside:
        what = f"{outside} studies stand in no split of {FILE}"
        reading.problems.append(Problem(FILE, "", what, "Left out, as published counts leave them."))


def _splits(root: Path, reading: RowReader) -> Callable[[str], str | None]:
    """A study's number -> its split, None where annotation.json is there and does not name it."""
    if not (root / FILE).is_file():
        reading.notes.append("no split in the files: 70 / 10 / 20% of the studies, by a hash of their number")
        return _hashed
    named = {}
    for split, rows in entries(root).items():
        for cells in rows:
            number = re.match(r"CXR(\d+)_", str(cells["id"]))
            if number:
                named[number.group(1)] = split
    reading.notes.append(f"split of R2Gen's {FILE}")
    return named.get


def _hashed(number: str) -> str:
    share = int.from_bytes(hashlib.sha256(f"openi:{number}".encode()).digest()[:8]) / 2**64
    return "train" if share < _SHARES[0] else "validate" if share < _SHARES[1] else "test"


def _csv_studies(root: Path) -> Iterator[_Study]:
    views: dict[str, list[tuple[str, str]]] = {}
    if not (root / _VIEWS).is_file():
        raise InputError(f"{root} holds {_REPORTS} without {_VIEWS}. Put both there.")
    for _, cells in csv_rows(root / _VIEWS, ("uid", "filename", "projection")):
        views.setdefault(cells["uid"], []).append((cells["projection"], cells["filename"]))
    for number, cells in csv_rows(root / _REPORTS, ("uid", "Problems", "findings", "impression")):
        uid = cells["uid"].strip()
        yield _Study(
            _REPORTS,
            str(number),
            uid,
            cells["findings"],
            cells["impression"],
            views.get(uid, []),
            cells["Problems"],
        )


def _xml_folder(root: Path) -> Path | None:
    """The folder of the XML reports: ecgen-radiology/, or root itself."""
    for folder in (root / _XML, root):
        if any(folder.glob("*.xml")):
            return folder
    return None


def _xml_studies(folder: Path) -> Iterator[_Study]:
    """Studies in the order of their numbers. The files name no views: the images' order stands for it."""
    for file in sorted(folder.glob("*.xml"), key=lambda path: (len(path.stem), path.stem)):
        report = _xml(file)
        uid = report.find(".//uId")
        number = re.fullmatch(r"CXR(\d+)", uid.get("id", "") if uid is not None else "")
        if number is None:
            raise InputError(f"{file.name}: no uId of the form CXR1. Use the original ecgen-radiology files.")
        texts = {e.get("Label", "").upper(): e.text or "" for e in report.iter("AbstractText")}
        names = [f"{image.get('id', '')}.png" for image in report.iter("parentImage")]
        order = ("Frontal", "Lateral")
        yield _Study(
            file.name,
            number.group(1),
            number.group(1),
            texts.get("FINDINGS", ""),
            texts.get("IMPRESSION", ""),
            list(zip(order, names, strict=False)) + [("", name) for name in names[len(order) :]],
            ";".join((e.text or "").strip() for e in report.iterfind(".//MeSH/major")),
        )


def _xml_licence(folder: Path) -> str:
    """The licence that the first report names."""
    first = min(folder.glob("*.xml"), key=lambda path: (len(path.stem), path.stem))
    url = (_xml(first).findtext(".//licenseURL") or "").strip()
    return f"open access at NLM; {first.name} names {url}" if url else LICENCE


def _xml(file: Path) -> ElementTree.Element:
    data = file_bytes(file)
    if b"<!ENTITY" in data:
        raise InputError(f"{file.name} defines entities, as no report of OpenI does. Fetch it again.")
    try:
        return ElementTree.fromstring(data)
    except (ElementTree.ParseError, ValueError) as error:
        raise InputError(f"{file.name}: no valid XML ({error}). Fetch it again.") from error
