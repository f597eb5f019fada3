"""Reads the real datasets SLAKE, VQA-RAD, OpenI (R2Gen's annotation.json) and MedPix."""

from __future__ import annotations

from pathlib import Path

import pytest

from normtune.data.options import DataOptions
from normtune.data.records import Dataset
from normtune.data.registry import open_configured, open_dataset
from normtune.data.splits import find_leaks
from normtune.data.summary import summarize, summary_text
from normtune.errors import InputError

FILE = "VQA_RAD Dataset Public.json"


@pytest.fixture(scope="module")
def slake(slake_root: Path) -> Dataset:
    return open_dataset("slake", slake_root)


@pytest.fixture(scope="module")
def vqa_rad(vqa_rad_root: Path) -> Dataset:
    return open_dataset("vqa-rad", vqa_rad_root)


def rows_of(dataset: Dataset, what: str) -> list[str]:
    return [problem.row for problem in dataset.problems if problem.what == what]


def counts(dataset: Dataset, *fields: str) -> dict[str, tuple[int, ...]]:
    return {name: tuple(part[f] for f in fields) for name, part in summarize(dataset)["parts"].items()}


def test_english_slake_has_the_published_rows_and_images(slake: Dataset) -> None:
    assert counts(slake, "rows", "usable", "images", "open", "closed") == {
        "train": (4919, 4918, 450, 2976, 1943),
        "validate": (1053, 1053, 96, 631, 422),
        "test": (1061, 1061, 96, 645, 416),
    }


def test_chinese_slake_can_be_read_separately_or_with_english(slake_root: Path) -> None:
    chinese = open_dataset("slake", slake_root, language="zh")
    assert {e.meta["language"] for e in chinese.examples} == {"zh"}
    assert counts(chinese, "rows") == {"train": (4916,), "validate": (1046,), "test": (1033,)}
    both = counts(open_dataset("slake", slake_root, language="all"), "rows")
    assert {f"{part} (zh)": rows for part, rows in counts(chinese, "rows").items()}.items() <= both.items()
    assert sum(rows for (rows,) in both.values()) == 14_028


def test_slakes_leak_between_languages_is_reported(slake: Dataset, slake_root: Path) -> None:
    assert find_leaks(slake) == []
    text = summary_text(summarize(slake))
    assert "72 of the 96 English test images are in the Chinese training split" in text
    assert "70 of the 96 Chinese test images are in the English training split" in text
    both = [str(leak) for leak in find_leaks(open_dataset("slake", slake_root, language="all"))]
    assert "72 of 96 images of test (en) are in train (zh) too" in both
    assert "70 of 96 images of test (zh) are in train (en) too" in both


def test_slakes_empty_answer_and_repeated_rows_are_reported(slake: Dataset) -> None:
    assert rows_of(slake, "answer is empty") == ["1622"]
    assert [e.id for e in slake.skipped] == ["slake-1622"]
    repeated = rows_of(slake, "same image, question and answer as an earlier row")
    assert repeated == [str(qid) for qid in range(592, 599)]
    assert any(e.answer == "None" for e in slake.examples)


def test_vqa_rads_training_rows_are_all_read(vqa_rad: Dataset) -> None:
    assert counts(vqa_rad, "rows", "usable", "images", "open", "closed", "yes_no") == {
        "train": (1797, 1797, 313, 770, 1027, 942)
    }


def test_vqa_rads_problems_are_reported(vqa_rad: Dataset) -> None:
    assert rows_of(vqa_rad, "qid is text, not a number") == ["0"]
    assert rows_of(vqa_rad, "answer is a number, not text") == ["1511", "1568", "1683", "2234", "2235"]
    assert len(rows_of(vqa_rad, "answer_type has blanks around it")) == 2
    assert rows_of(vqa_rad, "question_rephrase is missing") == ["2036", "2037"]
    assert len(rows_of(vqa_rad, "answer holds tabs or line ends")) == 4
    assert len(rows_of(vqa_rad, "question holds tabs or line ends")) == 5
    assert len(rows_of(vqa_rad, "question_type is none of the release's")) == 2
    assert len(rows_of(vqa_rad, "same image, question and answer as an earlier row")) == 3
    unused = [p.file for p in vqa_rad.problems if p.what == "image without a question"]
    assert len(unused) == 2  # one of them has questions only in the official test rows
    assert not any("NULL" in (e.question, e.answer, *e.meta.values()) for e in vqa_rad.examples)


def test_vqa_rad_can_be_split_by_image(vqa_rad_root: Path) -> None:
    dataset = open_configured(DataOptions(data="vqa-rad", root=vqa_rad_root, image_disjoint=True))
    assert find_leaks(dataset) == []
    assert counts(dataset, "images") == {"train": (219,), "validate": (31,), "test": (63,)}


@pytest.mark.parametrize(("name", "count"), [("slake", 642), ("vqa-rad", 313)])
def test_every_image_opens(name: str, count: int, request: pytest.FixtureRequest) -> None:
    dataset = open_dataset(name, request.getfixturevalue(f"{name.replace('-', '_')}_root"), language="all")
    keys = {key for example in dataset.examples for key in example.images}
    assert len(keys) == count
    for key in keys:
        picture = dataset.open_image(key)
        assert picture.mode == "RGB"
        assert max(picture.size) <= 384


def test_openi_has_r2gens_split_and_reports_missing_images(openi_root: Path) -> None:
    dataset = open_dataset("openi", openi_root, text_only=True)
    assert counts(dataset, "rows", "usable", "images", "report") == {
        "train": (2069, 2069, 4138, 2069),
        "validate": (296, 296, 592, 296),
        "test": (590, 590, 1180, 590),
    }
    assert {len(example.images) for example in dataset.examples} == {2}
    missing = [p.file for p in dataset.problems if p.what == "image is missing"]
    assert len(missing) == len(dataset.problems) == 5910
    assert find_leaks(dataset) == []
    assert not any("\n" in e.answer or "  " in e.answer for e in dataset.examples)


def test_openi_without_images_suggests_text_only(openi_root: Path) -> None:
    with pytest.raises(InputError, match=r"no usable rows.*image is missing.*add --text-only"):
        open_dataset("openi", openi_root)
    with pytest.raises(InputError, match="has only the findings"):
        open_dataset("openi", openi_root, sections="both", text_only=True)


def test_medpix_has_its_published_rows_split_by_case(medpix_root: Path) -> None:
    dataset = open_dataset("medpix", medpix_root)
    assert counts(dataset, "rows", "usable", "images", "report") == {
        "train": (1482, 1482, 1482, 1482),
        "validate": (186, 186, 186, 186),
        "test": (176, 176, 176, 176),
    }
    assert summarize(dataset)["parts"]["train"]["modalities"] == {"CT": 781, "MR": 701}
    assert [p.what for p in dataset.problems] == ["modality has blanks around it"]
    assert find_leaks(dataset) == []
    cases = {s: {e.meta["case"] for e in dataset.split(s)} for s in ("train", "validate", "test")}
    assert not cases["train"] & cases["test"] and not cases["validate"] & cases["test"]
    for example in dataset.split("test"):
        assert max(dataset.open_image(example.images[0]).size) <= 256
