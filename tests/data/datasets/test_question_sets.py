"""The larger question sets, as small made-up files in the layouts that their scripts and descriptions name."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import pytest

from normtune.data.registry import open_dataset
from normtune.errors import InputError
from tests.support.dataset_samples import png_bytes, write_image, write_jsonl, write_parquet
from tests.support.report_samples import write_csv

STUDY = "p10/p10000032/s50414267"


def test_mimic_cxr_vqa_joins_answers_and_skips_questions_without_any(tmp_path: Path) -> None:
    write_image(tmp_path / "files" / STUDY / "a.jpg")
    row: dict[str, Any] = {
        "idx": 7,
        "image_path": f"{STUDY}/a.jpg",
        "subject_id": "10000032",
        "study_id": "50414267",
        "question": "What is abnormal?",
        "content_type": "abnormality",
        "semantic_type": "query",
        "answer": ["atelectasis", "edema"],
    }
    rows = [row, row | {"idx": 8, "answer": []}, row | {"idx": 9, "semantic_type": "choose", "answer": ["left lung"]}]
    folder = tmp_path / "dataset"
    folder.mkdir()
    (folder / "train.json").write_text(json.dumps(rows))
    (folder / "valid.json").write_text(json.dumps([row | {"semantic_type": "verify", "answer": ["yes"]}]))
    dataset = open_dataset("mimic-cxr-vqa", tmp_path)
    assert [(e.split, e.id, e.answer, e.kind) for e in dataset.examples] == [
        ("train", "mimic-cxr-vqa-train-7", "atelectasis, edema", "open"),
        ("train", "mimic-cxr-vqa-train-9", "left lung", "closed"),
        ("validate", "mimic-cxr-vqa-validate-7", "yes", "closed"),
    ]
    assert dataset.examples[0].meta["patient_id"] == "10000032"
    assert dataset.dropped == {"answer is empty": 1}
    assert dataset.open_image(dataset.examples[0].images[0]).size == (4, 4)


def test_mimic_cxr_vqa_before_its_script_has_run_is_refused_with_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "_train.json").write_text("[]")
    with pytest.raises(InputError, match=r"Run build_dataset\.sh"):
        open_dataset("mimic-cxr-vqa", tmp_path)


@pytest.mark.parametrize("packed", [False, True])
def test_mimic_ext_cxr_qba_takes_images_and_splits_of_its_tables(tmp_path: Path, packed: bool) -> None:
    for name in ("a", "b", "c"):
        write_image(tmp_path / "files" / STUDY / f"{name}.jpg")
    question = {"question_id": "D02_001", "question": "Is there edema?", "answers": [{"text": "No."}]}
    other = {"question_id": "B09_006", "question": "Describe it.", "answers": [{"text": "Clear."}, {"text": "Normal."}]}
    text = json.dumps({"questions": [question, other]})
    if packed:
        with zipfile.ZipFile(tmp_path / "qa.zip", "w") as archive:
            archive.writestr(f"qa/{STUDY}.qa.json", text)
    else:
        (tmp_path / "qa" / STUDY).parent.mkdir(parents=True)
        (tmp_path / "qa" / f"{STUDY}.qa.json").write_text(text)
    (first, second) = open_dataset("mimic-ext-cxr-qba", tmp_path).examples
    assert first.images == second.images == (f"{STUDY}/a.jpg", f"{STUDY}/b.jpg")
    keys = {"patient_id": "p10000032", "study_id": "s50414267"}
    rows = [keys | {"question_id": "D02_001", "image_id": "c"}, keys | {"question_id": "B09_006", "image_id": "b"}]
    write_parquet(tmp_path / "metadata" / "question_image_metadata.parquet", rows)
    (tmp_path / "mimic-cxr-2.0.0-split.csv").write_text(
        "dicom_id,study_id,subject_id,split\nc,50414267,10000032,test\n"
    )
    dataset = open_dataset("mimic-ext-cxr-qba", tmp_path)
    assert [(e.id, e.images, e.answer, e.kind, e.split) for e in dataset.examples] == [
        ("s50414267-D02_001", (f"{STUDY}/c.jpg",), "No.", "closed", "test"),
        ("s50414267-B09_006", (f"{STUDY}/b.jpg",), "Clear. Normal.", "open", "test"),
    ]
    assert dataset.notes == []


@pytest.mark.parametrize("form", ["lines", "list", "one object"])
def test_mimic_ext_cxr_qba_reads_questions_outside_the_file_of_their_study(tmp_path: Path, form: str) -> None:
    write_image(tmp_path / "files" / STUDY / "a.jpg")
    keys = {"patient_id": "p10000032", "study_id": "s50414267"}
    answers = [{"text": "No.", "sub_answers": [{"text": "Not read."}]}]
    rows = [
        keys
        | {"question_id": f"D02_{number}", "question": "Is there edema?", "question_type": "has", "answers": answers}
        for number in (1, 2)
    ]
    (tmp_path / "qa").mkdir()
    if form == "lines":
        write_jsonl(tmp_path / "qa" / "part.qa.jsonl", *rows)
    elif form == "list":
        (tmp_path / "qa" / "part.qa.json").write_text(json.dumps(rows))
    else:
        for row in rows:
            (tmp_path / "qa" / f"{row['question_id']}.qa.json").write_text(json.dumps(row))
    write_csv(
        tmp_path / "metadata" / "question_image_metadata.csv",
        ("patient_id", "study_id", "question_id", "image_id"),
        ("p10000032", "s50414267", "D02_1", "a"),
    )
    dataset = open_dataset("mimic-ext-cxr-qba", tmp_path)
    assert [(e.id, e.images, e.answer, e.kind, e.meta["question_type"]) for e in dataset.examples] == [
        ("s50414267-D02_1", (f"{STUDY}/a.jpg",), "No.", "closed", "has"),
        ("s50414267-D02_2", (f"{STUDY}/a.jpg",), "No.", "closed", "has"),
    ]


def test_vindr_cxr_vqa_flattens_the_questions_of_an_image(tmp_path: Path) -> None:
    write_image(tmp_path / "train" / "abc.png")
    questions = [
        {"question": "Where is it?", "answer": "Left <1,2,3,4>.", "type": "Where", "gt_finding": "Nodule"},
        {"question": "Is it large?", "answer": "Yes", "type": "Yes_No"},
    ]
    (tmp_path / "data_v1.json").write_text(json.dumps([{"image_id": "abc", "num_questions": 2, "vqa": questions}]))
    dataset = open_dataset("vindr-cxr-vqa", tmp_path)
    assert [(e.id, e.images, e.kind) for e in dataset.examples] == [
        ("vindr-cxr-vqa-abc-1", ("abc.png",), "open"),
        ("vindr-cxr-vqa-abc-2", ("abc.png",), "closed"),
    ]
    assert dataset.examples[0].meta["gt_finding"] == "Nodule"
    assert len(open_dataset("vindr-cxr-vqa", tmp_path / "data_v1.json").examples) == 2


def test_kvasir_vqa_reads_images_inside_the_file_and_beside_it(tmp_path: Path) -> None:
    row = {"question": "Is there a polyp?", "answer": "no", "img_id": "k1"}
    inside = row | {"image": {"bytes": png_bytes(3), "path": None}, "source": "HyperKvasir"}
    write_parquet(tmp_path / "old" / "data" / "raw-00000-of-00001.parquet", [inside])
    (example,) = open_dataset("kvasir-vqa", tmp_path / "old").examples
    assert (example.split, example.kind, example.meta["source"]) == ("train", "closed", "HyperKvasir")
    write_parquet(tmp_path / "new" / "test-00000-of-00001.parquet", [row | {"complexity": 2, "question_class": ["a"]}])
    write_image(tmp_path / "new" / "images" / "k1.jpg")
    dataset = open_dataset("kvasir-vqa", tmp_path / "new")
    (example,) = dataset.examples
    assert (dataset.name, example.split, example.images) == ("kvasir-vqa", "test", ("images/k1.jpg",))
    assert dataset.open_image("images/k1.jpg").size == (4, 4)
    assert dataset.examples[0].meta["complexity"] == "2"


def test_gemex_reads_single_choices_as_options_and_appends_several(tmp_path: Path) -> None:
    write_image(tmp_path / "files" / STUDY / "a.jpg")
    row = {"q_id": 1, "image_path": f"{STUDY}/a.jpg", "question": "Which?", "type": "disease", "ori_report": "secret"}
    choices = ["A: edema", "B: nodule"]
    write_jsonl(tmp_path / "multi_choice_question.jsonl", row | {"answer": ["A", "B"], "choices": choices})
    write_jsonl(tmp_path / "single_choice_question.jsonl", row | {"answer": "B", "choices": choices})
    write_jsonl(tmp_path / "closed_ended_question.jsonl", row | {"answer": "No.", "choices": None})
    write_jsonl(tmp_path / "open_ended_question.jsonl", row | {"answer": "Edema of both lungs."})
    dataset = open_dataset("gemex", tmp_path)
    assert {e.id: (e.question, e.answer, e.kind) for e in dataset.examples} == {
        "gemex-single_choice-1": ("Which?", "nodule", "choice"),
        "gemex-multi_choice-1": ("Which?\nA: edema\nB: nodule", "A, B", "closed"),
        "gemex-closed_ended-1": ("Which?", "No.", "closed"),
        "gemex-open_ended-1": ("Which?", "Edema of both lungs.", "open"),
    }
    assert [e.options for e in dataset.examples if e.kind == "choice"] == [("edema", "nodule")]
    assert dataset.examples[0].meta == {
        "language": "en", "modality": "X-Ray", "patient_id": "p10000032", "study_id": "s50414267",
        "question_type": "disease",
    }  # fmt: skip


@pytest.mark.parametrize("name", ["mimic-cxr-vqa", "mimic-ext-cxr-qba", "vindr-cxr-vqa", "kvasir-vqa", "gemex"])
def test_an_empty_folder_is_refused_in_one_line(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError) as caught:
        open_dataset(name, tmp_path)
    assert len(str(caught.value).splitlines()) == 1
