"""Small made-up files in the exact layouts of the report and caption datasets, without real data."""

from __future__ import annotations

import csv
import gzip
import json
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.support.dataset_samples import write_image, write_jsonl

DICOM = "02aa804e-bde0afdd-112c0b34-7bc16630-4e384014"
REPORT = """                                 FINAL REPORT
 EXAMINATION:  CHEST (PA AND LAT)
 
 INDICATION:  ___ year old with made-up cough.
 
 COMPARISON:  None.
 
 FINDINGS: 
 
 The lungs are clear.
 The heart is of normal size.
 
 IMPRESSION: 
 
 No acute process.
"""


def r2gen_entry(id: str, split: str, images: Sequence[str], **changes: Any) -> dict[str, Any]:
    return {"id": id, "report": f"Made findings of {id}.", "image_path": list(images), "split": split} | changes


def write_r2gen(root: Path, images: str = "images", **splits: list[dict[str, Any]]) -> Path:
    """Write annotation.json and, unless `images` is empty, the images that it names to this folder."""
    root.mkdir(parents=True, exist_ok=True)
    (root / "annotation.json").write_text(json.dumps(splits), encoding="utf-8")
    for entry in (entry for rows in splits.values() for entry in rows if images):
        for name in entry["image_path"]:
            write_image(root / images / name)
    return root


def write_csv(path: Path, *rows: Sequence[object]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    open_file = gzip.open if path.suffix == ".gz" else open
    with open_file(path, "wt", newline="", encoding="utf-8") as handle:
        csv.writer(handle).writerows(rows)
    return path


def write_kaggle_openi(root: Path) -> Path:
    """Write four studies: two views; one view without findings; three views; no image."""
    head = ("uid", "MeSH", "Problems", "image", "indication", "comparison", "findings", "impression")
    write_csv(
        root / "indiana_reports.csv",
        head,
        (1, "normal", "normal", "Xray Chest PA and Lateral", "Cough", "None.", "Clear\nlungs.", "Normal chest."),
        (2, "Opacity", "Opacity", "PA", "XXXX", "", "", "Opacity, left base."),
        (3, "normal", "normal", "PA", "", "", "No effusion.", ""),
        (4, "normal", "normal", "PA", "", "", "Made.", "Made."),
    )
    views = [
        (1, "1_IM-0001-3001.dcm.png", "Lateral"),
        (1, "1_IM-0001-4001.dcm.png", "Frontal"),
        (2, "2_IM-0652-1001.dcm.png", "Frontal"),
        *((3, f"3_IM-1384-{n}001.dcm.png", "Frontal" if n < 3 else "Lateral") for n in (1, 2, 3)),
    ]
    write_csv(root / "indiana_projections.csv", ("uid", "filename", "projection"), *views)
    for _, name, _ in views:
        write_image(root / "images" / "images_normalized" / str(name))
    return root


def openi_xml(number: int, findings: str | None, impression: str, images: int = 2) -> str:
    """A report in the XML format of ecgen-radiology."""
    findings_text = "" if findings is None else findings
    parents = "".join(
        f'<parentImage id="CXR{number}_IM-0001-{n}001"><figureId>F{n}</figureId><caption>Chest</caption>'
        f'<panel type="single"><url>/x/CXR{number}_IM-0001-{n}001.jpg</url></panel></parentImage>'
        for n in range(1, images + 1)
    )
    return (
        f'<?xml version="1.0" encoding="utf-8"?><eCitation><meta type="rr"/><uId id="CXR{number}"/>'
        f'<pmcId id="{number}"/><docSource>CXR</docSource><IUXRId id="{number}"/>'
        "<licenseType>open-access</licenseType>"
        "<licenseURL>http://creativecommons.org/licenses/by-nc-nd/4.0/</licenseURL>"
        "<MedlineCitation><Article><Abstract>"
        '<AbstractText Label="COMPARISON">None.</AbstractText><AbstractText Label="INDICATION"/>'
        f'<AbstractText Label="FINDINGS">{findings_text}</AbstractText>'
        f'<AbstractText Label="IMPRESSION">{impression}</AbstractText>'
        "</Abstract></Article></MedlineCitation>"
        f"<MeSH><major>Cardiomegaly/mild</major><major>Opacity</major></MeSH>{parents}</eCitation>"
    )


def write_xml_openi(root: Path, images: bool = True) -> Path:
    folder = root / "ecgen-radiology"
    folder.mkdir(parents=True)
    (folder / "1.xml").write_text(openi_xml(1, "Clear lungs.", "Normal &amp; stable."))
    (folder / "2.xml").write_text(openi_xml(2, None, "Opacity.", images=1))
    (folder / "10.xml").write_text(openi_xml(10, "Large heart.", "Cardiomegaly.", images=3))
    for number, count in ((1, 2), (2, 1), (10, 3)) if images else ():
        for n in range(1, count + 1):
            write_image(root / "NLMCXR_png" / f"CXR{number}_IM-0001-{n}001.png")
    return root


def write_mimic(root: Path, packed: str = "", reports: str = "mimic-cxr-reports") -> Path:
    """Write three studies of the JPG release: train (3 views), validate (no findings), test (no report)."""
    studies = (
        ("10000032", "50414267", "train", ("LATERAL", "AP", "PA"), REPORT),
        ("10000935", "50578979", "validate", ("LL",), REPORT.replace("FINDINGS: ", "IMPRESSION: ")),
        ("11000011", "51029426", "test", ("PA",), None),
    )
    split: list[Sequence[object]] = [("dicom_id", "study_id", "subject_id", "split")]
    metadata: list[Sequence[object]] = [("dicom_id", "subject_id", "study_id", "ViewPosition", "Rows")]
    for number, (subject, study, name, views, report) in enumerate(studies):
        folder = f"files/p{subject[:2]}/p{subject}"
        for n, view in enumerate(views):
            dicom = f"{number}{n}{DICOM[2:]}"
            split.append((dicom, study, subject, name))
            metadata.append((dicom, subject, study, view, 2544))
            write_image(root / folder / f"s{study}" / f"{dicom}.jpg")
        if report is not None:
            text = root / reports / folder / f"s{study}.txt"
            text.parent.mkdir(parents=True, exist_ok=True)
            text.write_text(report)
    write_csv(root / f"mimic-cxr-2.0.0-split.csv{packed}", *split)
    write_csv(root / f"mimic-cxr-2.0.0-metadata.csv{packed}", *metadata)
    labels = [("subject_id", "study_id", "Edema", "No Finding"), ("10000032", "50414267", "-1.0", "1.0")]
    write_csv(root / f"mimic-cxr-2.0.0-chexpert.csv{packed}", *labels)
    return root


def write_path_vqa(root: Path, typed: bool = False) -> Path:
    """Write the original pickles of PathVQA, in the plain layout or in the one with question types."""
    for split in ("train", "val", "test"):
        rows: list[dict[str, Any]]
        if typed:
            file = root / "qas" / f"{split}_vqa.pkl"
            rows = [
                {
                    "answer_type": "other",
                    "img_id": f"{split}_0001",
                    "label": {"in a made place": 1},
                    "question_id": ("train", "val", "test").index(split) * 1000,
                    "question_type": "where",
                    "sent": "Where is it made?",
                }
            ]
        else:
            file = root / "qas" / split / f"{split}_qa.pkl"
            rows = [
                {"image": f"{split}_0001", "question": "Is it made?", "answer": "yes"},
                {"image": f"{split}_0001", "question": "What is it?", "answer": "a square"},
            ]
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(pickle.dumps(rows, protocol=4))
        write_image(root / "images" / split / f"{split}_0001.jpg")
    return root


def write_roco(root: Path) -> Path:
    """Write ROCO's repository with downloaded images, named by id in train and by article in other splits."""
    for split, number in (("train", 2), ("validation", 20), ("test", 35)):
        folder = root / "data" / split / "radiology"
        (root / "data" / split / "non-radiology").mkdir(parents=True)
        folder.mkdir(parents=True)
        id, name = f"ROCO_{number:05}", f"PMC{number}_made-g001.jpg"
        (folder / "captions.txt").write_text(f"{id}\t A made caption,\nof two lines.\n")
        licence = "NO-CC CODE" if split == "test" else "CC BY"
        write_csv(folder / "licences.txt", ("ROCO_ID", "PMC_ID", "CC"), (id, name, licence))
        write_image(folder / "images" / (f"{id}.jpg" if split == "train" else name))
    return root


def medpix_row(id: str, **changes: Any) -> dict[str, Any]:
    return {
        "id": id,
        "image": f"images/{id}.jpg",
        "report": f"A made finding\nof {id}.",
        "case": id.split("_")[0],
        "type": "CT",
        "plane": "Axial",
        "modality": "CT - noncontrast",
        "location": "Chest, Pulmonary",
    } | changes


def write_medpix(root: Path, **files: list[dict[str, Any]]) -> Path:
    root.mkdir(parents=True, exist_ok=True)
    for name, rows in files.items():
        write_jsonl(root / f"{name}.jsonl", *rows)
        for row in rows:
            write_image(root / row["image"])
    return root


def llava_med_row(id: str, *pairs: tuple[str, str], **changes: Any) -> dict[str, Any]:
    """A conversation as in llava_med_instruct_60k.json; the image mark follows the first question."""
    turns = []
    for number, (question, answer) in enumerate(pairs):
        turns.append({"from": "human", "value": question if number else f"{question}\n<image>"})
        turns.append({"from": "gpt", "value": answer})
    domain = {"chest_xray": False, "mri": False, "histology": False, "gross": False, "ct_scan": True}
    return {"id": id, "image": f"{id}.jpg", "domain": domain, "conversations": turns} | changes


def messages_row(question: str, answer: str, *images: Any, **changes: Any) -> dict[str, Any]:
    return {
        "messages": [
            {"role": "system", "content": "You are made up."},
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer},
        ],
        "images": list(images),
    } | changes
