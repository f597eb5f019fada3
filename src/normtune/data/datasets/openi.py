"""OpenI / IU X-ray (Demner-Fushman et al. 2016, doi:10.1093/jamia/ocv080): chest films with reports."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

from normtune.data.reading.r2gen import R2GEN_FILE, load_entries, read_entries
from normtune.data.reading.radiology import Sections, section_label, select_views, target_text
from normtune.data.reading.row_reader import RowReader
from normtune.data.reading.tables import csv_rows, file_bytes
from normtune.data.records import Dataset, Problem
from normtune.errors import InputError

LICENCE = "open access at NLM; the release's XML files name CC BY-NC-ND 4.0"
_REPORTS, _VIEWS = "indiana_reports.csv", "indiana_projections.csv"
_XML = "ecgen-radiology"
# Folders below root that may hold the images, by layout.
_R2GEN_IMAGES = ("images", "")
_KAGGLE_IMAGES = ("images/images_normalized", "images_normalized", "images", "")
_XML_IMAGES = ("NLMCXR_png", "images", "png", "")
# Without a split in the files: hashes in [0, 0.7) are train, in [0.7, 0.8) validate, in [0.8, 1) test.
_SHARES = (0.7, 0.8)


def read(root: Path, *, sections: Sections = "findings", text_only: bool = False) -> Dataset:
    """Read R2Gen's annotation.json, Kaggle's two CSV files, or the original XML reports.

    Each study is one report on one or two views, frontal first. The answer is its findings, its impression or
    both. Ids are `openi-CXR2384_IM-0942` in R2Gen's layout and `openi-2384` in the others.

    R2Gen's file has the findings, and the split 2069 / 296 / 590 that papers use. If the file exists, it is
    used for the findings. The other layouts have no split. If annotation.json is in the same folder, its
    split is used, matched by the study's number, and studies that it does not contain are skipped. Otherwise
    a hash of the study's number assigns it to train, validate or test (70 / 10 / 20%).

    Studies without the section or without an image are skipped and listed; with `text_only`, those with
    missing image files are kept.

    Raises:
        InputError: none of the layouts is present, a file is damaged or lacks a column, or an id is repeated.
    """
    reader = RowReader("openi", text_only)
    subfolders: tuple[str, ...]
    has_csv = (root / _REPORTS).is_file()
    xml = next((folder for folder in (root / _XML, root) if any(folder.glob("*.xml"))), None)
    if (root / R2GEN_FILE).is_file() and (sections == "findings" or not (has_csv or xml)):
        read_entries(reader, root, sections)
        reader.notes.append("R2Gen's annotation.json: its findings, its split, its two views")
        subfolders, licence = _R2GEN_IMAGES, LICENCE
    elif has_csv:
        _read_studies(reader, root, _csv_studies(root), sections)
        subfolders, licence = _KAGGLE_IMAGES, LICENCE
    elif xml:
        _read_studies(reader, root, _xml_studies(xml), sections)
        subfolders, licence = _XML_IMAGES, _xml_licence(xml)
    else:
        raise InputError(
            f"{root} holds neither R2Gen's {R2GEN_FILE}, nor Kaggle's {_REPORTS}, nor the XML reports "
            f"({_XML}/1.xml): not OpenI's folder. Point --root at the folder with one of them."
        )
    return reader.build_dataset(reader.find_images(root, subfolders), licence)


@dataclass(frozen=True)
class _Study:
    """One study, from either the CSV or the XML layout."""

    file: str
    row: str
    number: str  # 2384 of CXR2384
    findings: str
    impression: str
    views: list[tuple[str, str]]  # (view, image name)
    problems: str  # findings as the file names them, for `meta`


def _read_studies(reader: RowReader, root: Path, studies: Iterator[_Study], sections: Sections) -> None:
    """Add a row for each study; note the numbers of studies without a split and of further views."""
    split_of = _splits(root, reader)
    outside = unused = 0
    for study in studies:
        split = split_of(study.number)
        outside += split is None
        if split is None:
            continue
        row = reader.start_unique_row(study.file, study.row, f"openi-{study.number}")
        keys = [row.image_key(name) for name in select_views(study.views)]
        unused += len(study.views) - len(keys)
        findings = row.read_prose("findings", study.findings)
        impression = row.read_prose("impression", study.impression)
        row.finish(
            images=keys,
            question="",
            answer=target_text(findings, impression, sections),
            kind="report",
            split=row.read_split(split),
            meta={"language": "en", "problems": study.problems},
            answer_name=section_label(sections),
        )
    reader.notes.append(f"target: {sections}")
    if unused:
        reader.notes.append(f"{unused} further images of studies with several views are not read")
    if outside:
        reader.dropped[f"in no split of {R2GEN_FILE}"] += outside
        what = f"{outside} studies are in no split of {R2GEN_FILE}"
        reader.problems.append(Problem(R2GEN_FILE, "", what, "Skipped, as in published counts."))


def _splits(root: Path, reader: RowReader) -> Callable[[str], str | None]:
    """Return a function: study's number -> split, or None if annotation.json exists without the study."""
    if not (root / R2GEN_FILE).is_file():
        reader.notes.append("no split in the files: 70 / 10 / 20% of the studies, by a hash of their number")
        return _hash_split
    split_of_study = {}
    for split, rows in load_entries(root).items():
        for cells in rows:
            number = re.match(r"CXR(\d+)_", str(cells["id"]))
            if number:
                split_of_study[number.group(1)] = split
    reader.notes.append(f"split: that of R2Gen's {R2GEN_FILE}")
    return split_of_study.get


def _hash_split(number: str) -> str:
    """A split that depends only on the study's number: the hash is a uniform number in [0, 1)."""
    share = int.from_bytes(hashlib.sha256(f"openi:{number}".encode()).digest()[:8]) / 2**64
    return "train" if share < _SHARES[0] else "validate" if share < _SHARES[1] else "test"


def _csv_studies(root: Path) -> Iterator[_Study]:
    """Studies of Kaggle's two CSV files."""
    views: dict[str, list[tuple[str, str]]] = {}
    if not (root / _VIEWS).is_file():
        raise InputError(f"{root} holds {_REPORTS} without {_VIEWS}. Put both there.")
    for _, cells in csv_rows(root / _VIEWS, ("uid", "filename", "projection")):
        views.setdefault(cells["uid"], []).append((cells["projection"], cells["filename"]))
    for number, cells in csv_rows(root / _REPORTS, ("uid", "Problems", "findings", "impression")):
        uid = cells["uid"].strip()
        yield _Study(
            _REPORTS, str(number), uid, cells["findings"], cells["impression"], views.get(uid, []), cells["Problems"]
        )


def _xml_studies(folder: Path) -> Iterator[_Study]:
    """Studies of the XML files by number. The files name no views: the first image counts as frontal."""
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
    """The licence, with the URL that the first report names."""
    first = min(folder.glob("*.xml"), key=lambda path: (len(path.stem), path.stem))
    url = (_xml(first).findtext(".//licenseURL") or "").strip()
    return f"open access at NLM; {first.name} names {url}" if url else LICENCE


def _xml(file: Path) -> ElementTree.Element:
    data = file_bytes(file)
    if b"<!ENTITY" in data:  # entities can expand to gigabytes ("billion laughs")
        raise InputError(f"{file.name} defines entities, unlike the reports of OpenI. Fetch it again.")
    try:
        return ElementTree.fromstring(data)
    except (ElementTree.ParseError, ValueError) as error:
        raise InputError(f"{file.name}: not valid XML ({error}). Fetch it again.") from error
