from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from normtune.data.options import DataOptions
from normtune.data.registry import NAMES, open_configured, open_dataset
from normtune.data.splits import find_leaks
from normtune.errors import InputError
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
from tests.support.report_samples import (
    medpix_row,
    messages_row,
    write_kaggle_openi,
    write_medpix,
    write_mimic,
    write_path_vqa,
    write_roco,
)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """One folder with a small sample of several layouts."""
    rows = [slake_row(1, 1), slake_row(2, 1, "zh")]
    write_slake(tmp_path, train=rows, validate=rows[:1], test=rows[:1])
    write_vqa_rad(tmp_path, [vqa_rad_row(1, "a.jpg"), vqa_rad_row(2, "a.jpg", phrase_type="test_para")])
    write_image(tmp_path / "a.png")
    report = {"image": "a.png", "answer": "Clear.", "kind": "report"}
    write_jsonl(tmp_path / "train.jsonl", {"image": "a.png", "question": "What?", "answer": "lung"}, report)
    cells = {"image": png_bytes(1), "question": "What?", "answer": "lung"}
    write_parquet(tmp_path / "train.parquet", [cells | {"q_lang": "en"}, cells | {"q_lang": "zh"}])
    return tmp_path


@pytest.mark.parametrize(("name", "count"), [("slake", 3), ("vqa-rad", 2), ("jsonl", 1), ("parquet", 1)])
def test_question_readers_are_opened_by_name(root: Path, name: str, count: int) -> None:
    dataset = open_dataset(name, root)
    assert dataset.name == name
    assert len(dataset.examples) == count
    assert dataset.open_image(dataset.examples[0].images[0]).mode == "RGB"


@pytest.mark.parametrize(
    ("name", "count"), [("path-vqa", 6), ("openi", 2), ("mimic-cxr", 1), ("medpix", 1), ("roco", 3), ("messages", 1)]
)
def test_report_and_conversation_readers_are_opened_by_name(tmp_path: Path, name: str, count: int) -> None:
    write = {
        "path-vqa": write_path_vqa,
        "openi": write_kaggle_openi,
        "mimic-cxr": write_mimic,
        "medpix": lambda root: write_medpix(root, train=[medpix_row("MPX1_s1")]),
        "roco": write_roco,
        "messages": lambda root: write_jsonl(root / "train.jsonl", messages_row("What?", "Lung", "a.png")),
    }
    write_image(tmp_path / "a.png")
    write[name](tmp_path)
    dataset = open_dataset(name, tmp_path)  # datasets with reports only need no --task report
    assert dataset.name == name
    assert len(dataset.examples) == count
    assert dataset.open_image(dataset.examples[0].images[0]).mode == "RGB"
    for picture in [*tmp_path.rglob("*.jpg"), *tmp_path.rglob("*.png")]:
        picture.unlink()
    assert len(open_dataset(name, tmp_path, text_only=True).examples) == count


@pytest.mark.parametrize("name", ["slake", "vqa-rad", "jsonl"])
def test_text_only_needs_no_image_files(root: Path, name: str) -> None:
    count = len(open_dataset(name, root).examples)
    for picture in [*root.rglob("*.jpg"), *root.rglob("*.png")]:
        picture.unlink()
    dataset = open_dataset(name, root, text_only=True)
    assert len(dataset.examples) == count
    assert "image is missing" in [problem.what for problem in dataset.problems]


def test_sections_can_be_selected_for_datasets_that_separate_them(tmp_path: Path) -> None:
    options = {"data": "openi", "root": write_kaggle_openi(tmp_path)}
    both = open_configured(DataOptions.checked(**options, sections="both"))
    assert both.split("train")[0].answer.endswith(("Normal chest.", "left base.", "No effusion."))
    for name in ("slake", "medpix", "phantom-a"):
        with pytest.raises(
            InputError, match=f"dataset {name} does not separate the sections of a report: --sections works with"
        ):
            open_dataset(name, tmp_path, sections="impression")


def test_a_single_file_is_a_root_too(root: Path) -> None:
    assert len(open_dataset("jsonl", root / "train.jsonl").examples) == 1
    assert len(open_dataset("parquet", root / "train.parquet", language="all").examples) == 2


def test_one_language_and_one_task_are_selected(root: Path) -> None:
    assert [e.meta["language"] for e in open_dataset("parquet", root, language="zh").examples] == ["zh"]
    assert [e.id for e in open_dataset("slake", root, language="zh").examples] == ["slake-2"]
    assert [e.kind for e in open_dataset("jsonl", root, task="report").examples] == ["report"]
    with pytest.raises(InputError, match="dataset slake has no reports"):
        open_dataset("slake", root, task="report")
    with pytest.raises(InputError, match="dataset vqa-rad has no rows of language 'zh'"):
        open_dataset("vqa-rad", root, language="zh")


def test_phantoms_need_no_root_and_take_a_number_of_training_images() -> None:
    three = open_dataset("phantom-b:6/3/4")
    counts = [len({e.images for e in three.split(split)}) for split in ("train", "validate", "test")]
    assert counts == [6, 3, 4]
    dataset = open_dataset("phantom-b:10")
    images = {split: len({e.images for e in dataset.split(split)}) for split in ("train", "validate", "test")}
    assert dataset.name == "phantom-b"
    assert images == {"train": 10, "validate": 2, "test": 2}
    assert {e.kind for e in open_dataset("phantom-a:1", task="report").examples} == {"report"}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("slak", r"no dataset 'slak', did you mean 'slake'\? Known datasets: slake, vqa-rad, path-vqa, openi"),
        ("phantom-c", r"did you mean 'phantom-[ab]'\?"),
        ("phantom-b:many", "'many' is not a number of images. Write for example phantom-b:240"),
        ("phantom-b:0", "'0' is not a number of images"),
        ("phantom-b:9/x/3", "'x' is not a number of images"),
        ("phantom-b:9/3", r"give one number \(train\) or three \(train/validate/test\)"),
        ("phantom-b:-3", "'-3' is not a number of images"),
        ("slake:7", "only phantoms take a number of images. Write --data slake"),
        ("slake", "dataset slake needs --root: the folder that holds train.json"),
        ("jsonl", "dataset jsonl needs --root: a JSONL file"),
    ],
)
def test_a_wrong_name_and_a_missing_root_are_errors_with_a_fix(name: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        open_dataset(name)


@pytest.mark.parametrize("name", ["slake", "vqa-rad", "jsonl"])
def test_errors_name_a_missing_root(name: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=rf"--root .*/nowhere: no such file or folder\. {name} needs"):
        open_dataset(name, tmp_path / "nowhere")


def test_the_option_image_disjoint_makes_new_splits(root: Path) -> None:
    plain = open_configured(DataOptions(data="vqa-rad", root=root))
    assert [e.split for e in plain.examples] == ["train", "test"]
    assert find_leaks(plain)
    disjoint = open_configured(DataOptions(data="vqa-rad", root=root, image_disjoint=True))
    assert find_leaks(disjoint) == []
    assert len(disjoint.examples) == 2


def test_the_option_describes_every_dataset_name() -> None:
    described = DataOptions.model_fields["data"].description or ""
    assert all(name in described for name in NAMES)


def test_the_registry_does_not_import_slow_packages() -> None:
    code = "import sys, normtune.data.registry; print({'pyarrow', 'pydicom', 'torch'} & {*sys.modules})"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "set()"


def test_rows_of_other_languages_and_tasks_are_counted(tmp_path: Path) -> None:
    write_image(tmp_path / "a.png")
    languages = ["en", "EN", "English", "en-GB", "fr", "de", "fr", None]
    rows = [{"image": "a.png", "question": f"Q{n}?", "answer": "x", "language": t} for n, t in enumerate(languages)]
    write_jsonl(tmp_path / "train.jsonl", *rows, {"image": "a.png", "answer": "Clear.", "kind": "report"})
    dataset = open_dataset("jsonl", tmp_path)
    assert len(dataset.examples) == 5
    assert dataset.dropped == {"language fr": 2, "language de": 1, "is a report (--task report)": 1}
    assert dataset.notes[-1].startswith("4 rows are of another language or task")
    french = open_dataset("jsonl", tmp_path, language="French").examples
    assert [example.meta.get("language") for example in french] == ["fr", "fr", None]
    assert len(open_dataset("jsonl", tmp_path, language="all").examples) == 8


def test_a_language_that_no_row_has_is_refused_with_those_present(tmp_path: Path) -> None:
    write_image(tmp_path / "a.png")
    write_jsonl(tmp_path / "train.jsonl", {"image": "a.png", "question": "?", "answer": "x", "language": "fr"})
    with pytest.raises(InputError, match=r"no rows of language 'en'\. Its languages: fr\."):
        open_dataset("jsonl", tmp_path)


def test_rows_read_are_the_used_and_the_dropped_ones(root: Path) -> None:
    dataset = open_dataset("slake", root)
    assert dataset.dropped == {"language zh": 1}
    assert len(dataset.examples) + dataset.dropped.total() == 4


def test_history_is_for_conversations() -> None:
    with pytest.raises(InputError, match="dataset phantom-a has no conversations: --history works with messages only"):
        open_dataset("phantom-a", history=True)
