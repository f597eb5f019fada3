"""The published sets of multiple-choice questions, as small made-up files in their layouts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from normtune.data.registry import open_dataset
from normtune.errors import InputError
from tests.support.dataset_samples import png_bytes, write_image, write_jsonl, write_parquet
from tests.support.report_samples import write_csv

FOUR = ("lung", "heart", "liver", "spleen")
V1 = ("Figure_path", "Question", "Answer", "Choice A", "Choice B", "Choice C", "Choice D", "Answer_label")
V2 = ("", "Figure_path", "Caption", "Question", "Choice A", "Choice B", "Choice C", "Choice D", "Answer", "split")


def write_pmc_vqa(root: Path) -> None:
    lettered = [f" {letter}:{text} " for letter, text in zip("ABCD", FOUR, strict=True)]
    for name in ("train.csv", "test.csv", "test_clean.csv"):
        write_csv(root / name, V1, ("PMC1_F1.jpg", "Which organ?", "heart", *lettered, "B"))
    for name in ("train_2.csv", "test_2.csv"):
        rows = [
            (n, "PMC1_F1.jpg", "A caption.", " Which organ?", *lettered, letter, name[:5]) for n, letter in ((0, "D"),)
        ]
        write_csv(root / name, V2, *rows)
    write_image(root / "figures" / "PMC1_F1.jpg")


def test_pmc_vqa_reads_the_newest_version_or_the_named_file(tmp_path: Path) -> None:
    write_pmc_vqa(tmp_path)
    dataset = open_dataset("pmc-vqa", tmp_path)
    assert [(e.id, e.split, e.question, e.answer, e.options, e.kind) for e in dataset.examples] == [
        ("pmc-vqa-train_2-2", "train", "Which organ?", "spleen", FOUR, "choice"),
        ("pmc-vqa-test_2-2", "test", "Which organ?", "spleen", FOUR, "choice"),
    ]
    assert dataset.notes[:2] == [
        "files: train_2.csv, test_2.csv",
        "not read: test.csv, test_clean.csv, train.csv. Give one of them as --root to read it",
    ]
    assert dataset.open_image("PMC1_F1.jpg").size == (4, 4)
    (only,) = open_dataset("pmc-vqa", tmp_path / "test.csv").examples
    assert (only.id, only.answer, only.letter) == ("pmc-vqa-test-2", "heart", "B")
    for name in ("train_2.csv", "test_2.csv", "train.csv"):
        (tmp_path / name).unlink()
    assert [e.id for e in open_dataset("pmc-vqa", tmp_path).examples] == ["pmc-vqa-test_clean-2"]


def test_omnimedvqa_has_two_to_four_options_and_lists_images_that_are_not_released(tmp_path: Path) -> None:
    row = {
        "dataset": "ACRIMA",
        "question_id": "ACRIMA_0000",
        "question_type": "Disease Diagnosis",
        "question": "Is there glaucoma?",
        "gt_answer": "No.",
        "image_path": "Images/ACRIMA/a.png",
        "option_A": "Yes.",
        "option_B": "No.",
        "modality_type": "Fundus Photography",
    }
    other = {name: value for name, value in row.items() if name != "modality_type"} | {"modality": "CT"}
    other |= {"question_id": "X_1", "option_C": "Unknown.", "gt_answer": "unknown"}
    restricted = row | {"question_id": "Y_1", "image_path": "Images/Y/b.png"}
    wrong = row | {"question_id": "Z_1", "gt_answer": "Maybe."}
    for folder, rows in (("Open-access", [row, other, wrong]), ("Restricted-access", [restricted])):
        (tmp_path / "QA_information" / folder).mkdir(parents=True)
        (tmp_path / "QA_information" / folder / "rows.json").write_text(json.dumps(rows))
    write_image(tmp_path / "Images/ACRIMA/a.png")
    dataset = open_dataset("omnimedvqa", tmp_path)
    assert [(e.id, e.options, e.answer, e.split) for e in dataset.examples] == [
        ("omnimedvqa-ACRIMA_0000", ("Yes.", "No."), "No.", "test"),
        ("omnimedvqa-X_1", ("Yes.", "No.", "Unknown."), "Unknown.", "test"),
    ]
    assert [e.meta["modality"] for e in dataset.examples] == ["Fundus Photography", "CT"]
    assert dataset.dropped == {"the answer is none of the options": 1, "image is missing": 1}


MEDXPERT = {
    "id": "MM-0",
    "question": "Which organ is shown?\nAnswer Choices: (A) lung (B) heart (C) liver (D) spleen",
    "options": dict(zip("ABCD", FOUR, strict=True)),
    "label": "C",
    "images": ["MM-0-a.jpeg", "MM-0-b.jpeg"],
    "medical_task": "Diagnosis",
    "body_system": "Digestive",
    "question_type": "Reasoning",
}


def test_medxpertqa_reads_the_rows_of_the_hub_and_of_its_repository(tmp_path: Path) -> None:
    for name in MEDXPERT["images"]:
        write_image(tmp_path / "images" / str(name))
    (tmp_path / "MM").mkdir()
    write_jsonl(tmp_path / "MM/dev.jsonl", MEDXPERT | {"id": "MM-dev-0"})
    write_jsonl(tmp_path / "MM/test.jsonl", MEDXPERT)
    examples = list(open_dataset("medxpertqa", tmp_path).examples)
    assert [(e.id, e.split) for e in examples] == [("medxpertqa-MM-dev-0", "train"), ("medxpertqa-MM-0", "test")]
    of_repository = MEDXPERT | {
        "options": [{"letter": letter, "content": text} for letter, text in MEDXPERT["options"].items()],  # type: ignore[attr-defined]
        "label": ["C"],
        "images": [{"image_path": name} for name in MEDXPERT["images"]],
    }
    for name in ("dev", "test"):
        (tmp_path / f"MM/{name}.jsonl").unlink()
    write_jsonl(tmp_path / "medxpertqa_mm_input.jsonl", of_repository)
    (example,) = open_dataset("medxpertqa", tmp_path).examples
    assert example == examples[1]
    assert (example.question, example.answer, example.options) == ("Which organ is shown?", "liver", FOUR)
    assert example.images == ("MM-0-a.jpeg", "MM-0-b.jpeg")
    assert example.meta["body_system"] == "Digestive"


def mmmu_row(id: str, **changes: Any) -> dict[str, Any]:
    images = {f"image_{n}": {"bytes": png_bytes(10 * n), "path": None} if n < 3 else None for n in range(1, 8)}
    question = "What do <image 1> and <image 2> show?"
    row = {"id": id, "question": question, "options": "['lung', \"Crohn's disease\"]", "answer": "B"}
    more = {"question_type": "multiple-choice", "subfield": "Radiology", "topic_difficulty": "Easy"}
    return row | more | images | changes


def test_mmmu_reads_the_medical_subjects_and_counts_what_it_leaves_out(tmp_path: Path) -> None:
    rows = [
        mmmu_row("validation_Clinical_Medicine_1"),
        mmmu_row("validation_Clinical_Medicine_2", options="[]", answer="7", question_type="open"),
    ]
    write_parquet(tmp_path / "Clinical_Medicine/validation-00000-of-00001.parquet", rows)
    write_parquet(tmp_path / "Clinical_Medicine/dev-00000-of-00001.parquet", [mmmu_row("dev_Clinical_Medicine_1")])
    write_parquet(tmp_path / "Pharmacy/test-00000-of-00001.parquet", [mmmu_row("test_Pharmacy_1", answer="?")])
    write_parquet(tmp_path / "Art/validation-00000-of-00001.parquet", [mmmu_row("validation_Art_1")])
    dataset = open_dataset("mmmu", tmp_path)
    assert [(e.id, e.split, e.kind, e.options, e.answer) for e in dataset.examples] == [
        ("mmmu-dev_Clinical_Medicine_1", "train", "choice", ("lung", "Crohn's disease"), "Crohn's disease"),
        ("mmmu-validation_Clinical_Medicine_1", "validate", "choice", ("lung", "Crohn's disease"), "Crohn's disease"),
        ("mmmu-validation_Clinical_Medicine_2", "validate", "open", (), "7"),
    ]
    first = dataset.examples[0]
    assert first.question == "What do [image 1] and [image 2] show?"
    assert [dataset.open_image(key).getpixel((0, 0))[0] for key in first.images] == [10, 20]  # type: ignore[index]
    assert first.meta["subject"] == "Clinical_Medicine"
    assert dataset.dropped == {"the answer is not published": 1}
    assert dataset.notes == ["1 files of other subjects are not read", "1 rows left out: the answer is not published"]


def test_mmmu_with_all_subjects_in_one_file_is_read_by_id(tmp_path: Path) -> None:
    rows = [mmmu_row("validation_Art_1"), mmmu_row("validation_Public_Health_3", options=["lung", "heart"])]
    write_parquet(tmp_path / "data/validation-00000-of-00001.parquet", [rows[1]])
    write_parquet(tmp_path / "data/validation-00000-of-00002.parquet", [rows[0]])
    dataset = open_dataset("mmmu", tmp_path)
    assert [(e.id, e.answer) for e in dataset.examples] == [("mmmu-validation_Public_Health_3", "heart")]
    assert dataset.dropped == {"not a subject of health and medicine": 1}
    write_parquet(tmp_path / "other/a.parquet", [{"question": "What?", "answer": "A"}])
    with pytest.raises(InputError, match=r"other/a\.parquet has not the columns id"):
        open_dataset("mmmu", tmp_path)


def test_rexvqa_reads_no_field_of_the_report_or_the_person(tmp_path: Path) -> None:
    row = {
        "question": "Which finding is absent?",
        "options": ["A. Effusion", "B. Nodule", "C. Edema", "D. Fracture"],
        "correct_answer": "D",
        "correct_answer_explanation": "No fracture is described.",
        "task_name": "negation_detection",
        "category": "Bones",
        "ImagePath": ["../deid_png/P1/A1/studies/1/instances/X.png", "../deid_png/P1/A1/studies/1/instances/Y.png"],
        "study_id": "S1",
        "PatientID": "P1",
        "PatientAge": "081Y",
        "Findings": "secret",
        "Indication": "secret",
    }
    (tmp_path / "metadata").mkdir()
    for name in ("train", "valid"):
        (tmp_path / f"metadata/{name}_vqa_data.json").write_text(json.dumps({f"{name}-1": row}))
    for name in ("X", "Y"):
        write_image(tmp_path / f"deid_png/P1/A1/studies/1/instances/{name}.png")
    dataset = open_dataset("rexvqa", tmp_path)
    assert [(e.id, e.split, e.answer, e.letter) for e in dataset.examples] == [
        ("rexvqa-train-1", "train", "Fracture", "D"),
        ("rexvqa-valid-1", "validate", "Fracture", "D"),
    ]
    first = dataset.examples[0]
    assert first.images == ("P1/A1/studies/1/instances/X.png", "P1/A1/studies/1/instances/Y.png")
    assert first.meta == {
        "language": "en", "modality": "X-Ray", "study_id": "S1", "patient_id": "P1",
        "question_type": "negation_detection", "category": "Bones",
    }  # fmt: skip
    assert [problem.file for problem in dataset.problems] == ["metadata/test_vqa_data.json"]
    assert dataset.open_image(first.images[0]).size == (4, 4)


def test_medpix_vqa_has_open_questions_with_images_inside_the_file(tmp_path: Path) -> None:
    row = {"image_id": {"bytes": png_bytes(3), "path": "MPX1.png"}, "mode": "easy", "case_id": "c1"}
    rows = [row | {"question": "Which modality?", "answer": "CT"}, row | {"question": "Is it CT?", "answer": "Yes"}]
    write_parquet(tmp_path / "data/train-00000-of-00001.parquet", rows)
    write_parquet(tmp_path / "data/validation-00000-of-00001.parquet", rows[:1])
    dataset = open_dataset("medpix-vqa", tmp_path)
    assert [(e.split, e.kind, e.meta) for e in dataset.examples] == [
        ("train", "open", {"mode": "easy", "case_id": "c1"}),
        ("train", "closed", {"mode": "easy", "case_id": "c1"}),
        ("validate", "open", {"mode": "easy", "case_id": "c1"}),
    ]
    assert dataset.open_image(dataset.examples[0].images[0]).size == (4, 4)
    assert dataset.licence.startswith("none found")


def test_pathmmu_joins_the_two_parts_of_test(tmp_path: Path) -> None:
    row = {
        "No": 0,
        "img": "a.jpg",
        "question": "Which feature?",
        "options": ["A) Bi-lobed nuclei", "B) Macronucleoli", "C) Vacuoles"],
        "answer": "B) Macronucleoli",
        "explanation": "not read",
    }
    letter, wrong = row | {"answer": "C"}, row | {"answer": "D"}
    sources = {"PubMed": {"val": [row, letter], "test": [row]}, "Atlas": {"test_tiny": [row, wrong]}}
    (tmp_path / "data.json").write_text(json.dumps(sources))
    write_image(tmp_path / "images/a.jpg")
    dataset = open_dataset("pathmmu", tmp_path)
    assert [(e.id, e.split, e.answer, e.meta["subset"]) for e in dataset.examples] == [
        ("pathmmu-PubMed-val-0", "validate", "Macronucleoli", "val"),
        ("pathmmu-PubMed-val-0-2", "validate", "Vacuoles", "val"),
        ("pathmmu-PubMed-test-0", "test", "Macronucleoli", "test"),
        ("pathmmu-Atlas-test_tiny-0", "test", "Macronucleoli", "test_tiny"),
    ]
    assert dataset.examples[0].options == ("Bi-lobed nuclei", "Macronucleoli", "Vacuoles")
    assert dataset.dropped == {"the answer is a letter beyond the options": 1}
    for value in ([row], {"val": [row]}, {"PubMed": {"other": [row]}}):
        (tmp_path / "data.json").write_text(json.dumps(value))
        with pytest.raises(InputError, match=r"data\.json: "):
            open_dataset("pathmmu", tmp_path)


def test_vqa_med_2019_reads_categories_and_several_answers(tmp_path: Path) -> None:
    train = tmp_path / "ImageClef-2019-VQA-Med-Training"
    test = tmp_path / "VQAMed2019Test"
    write_image(train / "Train_images/synpic1.jpg")
    write_image(test / "VQAMed2019_Test_Images/synpic2.jpg")
    lines = ["synpic1|what modality is shown?|ct w/contrast (iv)", "synpic1|is this a t1 image?|no"]
    (train / "All_QA_Pairs_train.txt").write_text("\n".join(lines) + "\n")
    (train / "QAPairsByCategory").mkdir()
    (train / "QAPairsByCategory/C1_Modality_train.txt").write_text(lines[0] + "\n")
    (test / "VQAMed2019_Test_Questions_w_Ref_Answers.txt").write_text(
        "synpic2|organ|what organ system is imaged?|face, sinuses, and neck#skull and contents\n"
    )
    dataset = open_dataset("vqa-med-2019", tmp_path)
    assert [(e.id, e.split, e.answer, e.kind, e.meta.get("question_type")) for e in dataset.examples] == [
        ("vqa-med-2019-train-1", "train", "ct w/contrast (iv)", "open", "modality"),
        ("vqa-med-2019-train-2", "train", "no", "closed", None),
        ("vqa-med-2019-test-1", "test", "face, sinuses, and neck", "open", "organ"),
    ]
    assert dataset.examples[2].meta["other_answers"] == "skull and contents"
    assert dataset.examples[0].images == ("ImageClef-2019-VQA-Med-Training/Train_images/synpic1.jpg",)
    assert [problem.file for problem in dataset.problems] == ["All_QA_Pairs_val.txt"]
    (train / "All_QA_Pairs_train.txt").write_text("synpic1 what?\n")
    with pytest.raises(InputError, match=r"All_QA_Pairs_train\.txt, row 1: not IMAGE\|QUESTION\|ANSWER"):
        open_dataset("vqa-med-2019", tmp_path)


NAMES = ["pmc-vqa", "omnimedvqa", "medxpertqa", "mmmu", "rexvqa", "medpix-vqa", "pathmmu", "vqa-med-2019"]


@pytest.mark.parametrize("name", NAMES)
def test_an_empty_folder_is_refused_in_one_line(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError) as caught:
        open_dataset(name, tmp_path)
    assert len(str(caught.value).splitlines()) == 1
