"""Rows in = rows used + rows reported, for random rows in every layout."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from normtune.data.preflight import preflight
from normtune.data.registry import ROOTS, open_dataset
from normtune.errors import InputError
from tests.support import own_data
from tests.support.dataset_samples import (
    png_bytes,
    slake_row,
    vqa_rad_row,
    write_image,
    write_jsonl,
    write_parquet,
    write_slake,
    write_vqa_rad,
)
from tests.support.report_samples import medpix_row, messages_row, r2gen_entry, write_csv, write_medpix

# One row: (question, answer, whether its image exists, language). Some of them are faulty.
texts = st.sampled_from(["What is it?", "lung", "yes", "B", "", " ", "a\nb", 3, 2.5, float("nan"), None, "<|im_end|>"])
row = st.tuples(
    texts, texts, st.sampled_from(["a.png", "b.png", "missing.png", ""]), st.sampled_from(["en", "zh", "EN"])
)
rows = st.lists(row, min_size=1, max_size=8)
Row = tuple[Any, Any, str, str]
OPTIONS = ["lung", "yes", "What is it?"]  # an answer is one of them, their letter or number, or neither


def options_of(question: Any) -> list[str] | None:
    """The options of a row: choices and other rows are in one file."""
    return OPTIONS if question == "What is it?" else None


def jsonl(root: Path, rows: list[Row]) -> str:
    keys = ("question", "answer", "image", "language")
    lines = [dict(zip(keys, row, strict=True)) | {"options": options_of(row[0])} for row in rows]
    write_jsonl(root / "train.jsonl", *lines)
    return "jsonl"


def messages(root: Path, rows: list[Row]) -> str:
    lines = [messages_row(q, a, i) | {"language": tag, "options": options_of(q)} for q, a, i, tag in rows]
    write_jsonl(root / "train.jsonl", *lines)
    return "messages"


def parquet(root: Path, rows: list[Row]) -> str:
    cells = [
        {"question": str(q or ""), "answer": str(a or ""), "image": image, "language": tag, "options": options_of(q)}
        for q, a, image, tag in rows
    ]
    write_parquet(root / "train.parquet", cells)
    return "parquet"


def slake(root: Path, rows: list[Row]) -> str:
    cells = [
        slake_row(n, 1, language, question=q, answer=a, img_name=f"xmlab1/{image}" if image else None)
        for n, (q, a, image, language) in enumerate(rows, start=1)
    ]
    write_slake(root, train=cells)
    (root / "imgs/xmlab1/missing.png").unlink(missing_ok=True)
    return "slake"


def vqa_rad(root: Path, rows: list[Row]) -> str:
    cells = [vqa_rad_row(n, image, question=q, answer=a) for n, (q, a, image, _) in enumerate(rows, start=1)]
    write_vqa_rad(root, cells)
    (root / "VQA_RAD Image Folder/missing.png").unlink(missing_ok=True)
    return "vqa-rad"


def medpix(root: Path, rows: list[Row]) -> str:
    cells = [
        medpix_row(str(n), report=a, image=f"images/{image or 'missing.png'}")
        for n, (_, a, image, _) in enumerate(rows, start=1)
    ]
    write_medpix(root, train=cells)
    (root / "images/missing.png").unlink(missing_ok=True)
    return "medpix"


def path_vqa(root: Path, rows: list[Row]) -> str:
    cells = [{"image": image.removesuffix(".png"), "question": q, "answer": a} for q, a, image, _ in rows]
    (root / "qas/train").mkdir(parents=True)
    (root / "qas/train/train_qa.pkl").write_bytes(pickle.dumps(cells))
    for name in ("a", "b"):
        write_image(root / f"images/train/{name}.jpg")
    return "path-vqa"


def openi(root: Path, rows: list[Row]) -> str:
    cells = [r2gen_entry(str(n), "train", [image], report=a) for n, (_, a, image, _) in enumerate(rows)]
    (root / "annotation.json").write_text(json.dumps({"train": cells, "val": [], "test": []}))
    for name in ("a", "b"):
        write_image(root / f"images/{name}.png")
    return "openi"


def mimic_cxr(root: Path, rows: list[Row]) -> str:
    """A study for each row; without an answer it has no report file."""
    table: list[tuple[str, ...]] = [("dicom_id", "study_id", "subject_id", "split")]
    for n, (q, a, image, _) in enumerate(rows):
        study = f"files/p10/p10000032/s{50000000 + n}"
        table.append((f"{n}", f"{50000000 + n}", "10000032", "train"))
        if image not in ("missing.png", ""):
            write_image(root / study / f"{n}.jpg")
        if a is not None:
            (root / study).parent.mkdir(parents=True, exist_ok=True)
            (root / f"{study}.txt").write_text(f" FINAL REPORT\n FINDINGS: {a}\n IMPRESSION: {q}\n")
    write_csv(root / "mimic-cxr-2.0.0-split.csv", *table)
    return "mimic-cxr"


def roco(root: Path, rows: list[Row]) -> str:
    cells = [(f"ROCOv2_{n}", "" if a is None else a) for n, (_, a, _, _) in enumerate(rows)]
    write_csv(root / "train_captions.csv", ("ID", "Caption"), *cells)
    for (id, _), (_, _, image, _) in zip(cells, rows, strict=True):
        if image not in ("missing.png", ""):
            write_image(root / "train" / f"{id}.jpg")
    return "roco"


def table(name: str, write: Callable[[Path, list[dict[str, Any]]], object]) -> Callable[[Path, list[Row]], str]:
    """A layout of a format of own data."""

    def layout(root: Path, rows: list[Row]) -> str:
        keys = ("question", "answer", "image", "language")
        cells = [{k: "" if v is None else str(v) for k, v in zip(keys, row, strict=True)} for row in rows]
        write(
            root,
            [of_row | {"options": "|".join(options_of(row[0]) or [])} for of_row, row in zip(cells, rows, strict=True)],
        )
        return name

    layout.__name__ = name
    return layout


TABLES = [
    table("csv", own_data.FORMATS["csv"]),
    table("tsv", own_data.FORMATS["tsv"]),
    table("xlsx", own_data.FORMATS["xlsx"]),
    table("json", own_data.FORMATS["json"]),
    table("arrow", own_data.write_arrow),
    table("imagefolder", own_data.FORMATS["imagefolder csv"]),
    table("dicom", own_data.FORMATS["csv"]),
]


def texts_of(rows: list[Row]) -> list[tuple[str, str, str]]:
    return [("" if q is None else str(q), "" if a is None else str(a), image) for q, a, image, _ in rows]


def mimic_cxr_vqa(root: Path, rows: list[Row]) -> str:
    cells = [{"idx": n, "question": q, "answer": [a], "image_path": i} for n, (q, a, i) in enumerate(texts_of(rows))]
    (root / "train.json").write_text(json.dumps(cells))
    return "mimic-cxr-vqa"


def mimic_ext_cxr_qba(root: Path, rows: list[Row]) -> str:
    """A study for each image; a question without an image is about a study without one."""
    for n, (q, a, image) in enumerate(texts_of(rows)):
        study = f"p10/p10000001/s{n}"
        if image in ("a.png", "b.png"):
            write_image(root / "files" / study / f"{n}.jpg")
        (root / "qa" / study).parent.mkdir(parents=True, exist_ok=True)
        questions = [{"question_id": "A", "question": q, "answers": [{"text": a}]}]
        (root / "qa" / f"{study}.qa.json").write_text(json.dumps({"questions": questions}))
    return "mimic-ext-cxr-qba"


def vindr_cxr_vqa(root: Path, rows: list[Row]) -> str:
    images = [{"image_id": i.split(".")[0], "vqa": [{"question": q, "answer": a}]} for q, a, i in texts_of(rows)]
    (root / "data_v1.json").write_text(json.dumps(images))
    return "vindr-cxr-vqa"


def kvasir_vqa(root: Path, rows: list[Row]) -> str:
    cells = [{"question": q, "answer": a, "img_id": i.split(".")[0]} for q, a, i in texts_of(rows)]
    write_parquet(root / "train.parquet", cells)
    return "kvasir-vqa"


def gemex(root: Path, rows: list[Row]) -> str:
    cells = [{"q_id": n, "question": q, "answer": a, "image_path": i} for n, (q, a, i) in enumerate(texts_of(rows))]
    write_jsonl(root / "open_ended_question.jsonl", *cells)
    return "gemex"


def pmc_vqa(root: Path, rows: list[Row]) -> str:
    header = ("Figure_path", "Question", "Answer", *(f"Choice {letter}" for letter in "ABCD"), "Answer_label")
    cells = [
        (i, q, a, *(f" {letter}:{text} " for letter, text in zip("ABC", OPTIONS, strict=True)), "D: knee", a[:1] or "B")
        for q, a, i in texts_of(rows)
    ]
    write_csv(root / "train.csv", header, *cells)
    return "pmc-vqa"


def omnimedvqa(root: Path, rows: list[Row]) -> str:
    options = dict(zip(("option_A", "option_B", "option_C"), OPTIONS, strict=True))
    cells = [{"question": q, "gt_answer": a, "image_path": i} | options for q, a, i in texts_of(rows)]
    (root / "QA_information/Open-access").mkdir(parents=True)
    (root / "QA_information/Open-access/A.json").write_text(json.dumps(cells))
    return "omnimedvqa"


def medxpertqa(root: Path, rows: list[Row]) -> str:
    options = dict(zip("ABC", OPTIONS, strict=True))
    (root / "MM").mkdir()
    cells = [
        {"id": f"MM-{n}", "question": q, "label": "ABCD"[n % 4] if a else a, "images": [i], "options": options}
        for n, (q, a, i) in enumerate(texts_of(rows))
    ]
    write_jsonl(root / "MM/test.jsonl", *cells)
    return "medxpertqa"


def mmmu(root: Path, rows: list[Row]) -> str:
    """Images are inside the file; rows with a missing one have none."""
    picture = {"bytes": png_bytes(7), "path": None}
    cells = [
        {
            "id": f"validation_{'Pharmacy' if language == 'en' else 'Art'}_{n}",
            "question": "" if q is None else str(q),
            "options": str(OPTIONS) if n % 2 else "[]",
            "answer": "" if a is None else str(a)[:1] or "?",
            "image_1": picture if image in ("a.png", "b.png") else None,
        }
        for n, (q, a, image, language) in enumerate(rows)
    ]
    write_parquet(root / "Pharmacy/validation-00000-of-00001.parquet", [*cells])
    return "mmmu"


def rexvqa(root: Path, rows: list[Row]) -> str:
    options = [f"{letter}. {text}" for letter, text in zip("ABC", OPTIONS, strict=True)]
    cells = {
        f"q{n}": {"question": q, "options": options, "correct_answer": a[:1], "ImagePath": [f"../deid_png/{i}"]}
        for n, (q, a, i) in enumerate(texts_of(rows))
    }
    (root / "metadata").mkdir()
    (root / "metadata/test_vqa_data.json").write_text(json.dumps(cells))
    return "rexvqa"


def medpix_vqa(root: Path, rows: list[Row]) -> str:
    cells = [
        {"question": q, "answer": a, "image_id": i, "case_id": str(n)} for n, (q, a, i) in enumerate(texts_of(rows))
    ]
    write_parquet(root / "train.parquet", cells)
    return "medpix-vqa"


def pathmmu(root: Path, rows: list[Row]) -> str:
    options = [f"{letter}) {text}" for letter, text in zip("ABC", OPTIONS, strict=True)]
    cells = [{"No": 0, "img": i, "question": q, "options": options, "answer": f"C) {a}"} for q, a, i in texts_of(rows)]
    (root / "data.json").write_text(json.dumps({"PubMed": {"val": cells[:2], "test_tiny": cells[2:]}}))
    return "pathmmu"


def vqa_med_2019(root: Path, rows: list[Row]) -> str:
    lines = [f"{i.split('.')[0]}|{q}|{a}".replace("\n", " ") for q, a, i in texts_of(rows)]
    (root / "All_QA_Pairs_train.txt").write_text("\n".join(lines))
    for name in ("a", "b"):
        write_image(root / f"Train_images/{name}.jpg")
    return "vqa-med-2019"


RELEASES = [mimic_cxr_vqa, mimic_ext_cxr_qba, vindr_cxr_vqa, kvasir_vqa, gemex]
RELEASES += [pmc_vqa, omnimedvqa, medxpertqa, mmmu, rexvqa, medpix_vqa, pathmmu, vqa_med_2019]
LAYOUTS = [*TABLES, *RELEASES, jsonl, messages, parquet, slake, vqa_rad, path_vqa, medpix, openi, mimic_cxr, roco]


def test_every_dataset_that_is_read_from_files_has_a_layout_here() -> None:
    assert {write.__name__.replace("_", "-") for write in LAYOUTS} == set(ROOTS)


@pytest.mark.parametrize("write", LAYOUTS, ids=lambda write: write.__name__)
@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=rows)
def test_rows_in_are_rows_used_and_rows_reported(
    tmp_path_factory: pytest.TempPathFactory, write: Any, rows: Any
) -> None:
    root = tmp_path_factory.mktemp("data")
    for name in ("a.png", "b.png"):
        write_image(root / name)
    name = write(root, rows)
    try:
        dataset = open_dataset(name, root, skip_bad=True)
    except InputError as error:  # no row can be used, or a published file has a cell that it cannot have
        assert "\n" not in str(error)
        return
    counts = preflight(dataset)
    assert counts.rows["read"] == len(rows)
    assert counts.rows["used"] + sum(counts.rows["dropped"].values()) == len(rows)
    assert all(counts.rows["dropped"].values())
    assert json.loads(json.dumps(counts.to_dict())) == counts.to_dict()
