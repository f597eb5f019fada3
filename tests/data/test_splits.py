from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from normtune.data.reading.cells import clean_text, is_yes_no
from normtune.data.records import Dataset, Example, Problem
from normtune.data.split_names import split_name
from normtune.data.splits import find_identical_images, find_leaks, image_disjoint, rows_by_split
from normtune.errors import InputError


def example(id: str, *images: str, split: str = "train", **fields: str) -> Example:
    meta = {"language": fields.pop("language")} if "language" in fields else {}
    return Example(id, images, fields.get("question", "What?"), fields.get("answer", "this"), "open", split, meta)


def dataset(*examples: Example, **fields: object) -> Dataset:
    shades = {"black": 0, "dark": 0, "white": 255}
    return Dataset("made", list(examples), lambda key: Image.new("RGB", (2, 2), shades.get(key, 9)), **fields)


def test_a_missing_split_is_reported_with_the_existing_ones() -> None:
    data = dataset(example("1", "a"), example("2", "b", split="test"))
    assert [e.id for e in data.split("test")] == ["2"]
    with pytest.raises(InputError, match=r"no split 'tset', did you mean 'test'\?.* Its splits: test, train"):
        data.split("tset")


def test_a_problem_names_the_place_and_the_fix() -> None:
    assert (
        str(Problem("f.json", "3", "answer is empty", "Fill it in.")) == "f.json, row 3: answer is empty. Fill it in."
    )
    assert str(Problem("f.json", "", "file is missing", "Fetch it.")) == "f.json: file is missing. Fetch it."


def test_shared_images_and_rows_are_leaks_of_the_later_split() -> None:
    data = dataset(
        example("1", "a", question="Is it  OLD?"),
        example("2", "b"),
        example("3", "a", split="validate", question="Other?"),
        example("4", "a", split="test", question="is it old?", answer="THIS"),
        example("5", "c", split="test"),
    )
    assert [str(leak) for leak in find_leaks(data)] == [
        "1 of 1 images of validate are in train too",
        "1 of 2 images of test are in train too",
        "1 of 2 rows of test are word for word in train too",
        "1 of 2 images of test are in validate too",
    ]
    assert find_leaks(data)[2].examples == ("4",)


@pytest.mark.parametrize("field", ["patient", "case"])
def test_images_of_one_patient_or_case_go_to_one_split(field: str) -> None:
    rows = [Example(str(n), (f"i{n}",), "", "x", "report", "train", {field: str(n // 4)}) for n in range(80)]
    data = image_disjoint(dataset(*rows))
    splits = {(e.meta[field], e.split) for e in data.examples}
    assert len(splits) == 20
    assert {split for _, split in splits} == {"train", "validate", "test"}


def test_languages_are_listed_separately_and_leak_only_across_splits() -> None:
    data = dataset(
        example("1", "a", language="en"),
        example("2", "a", language="zh"),
        example("3", "a", language="zh", split="test"),
    )
    assert list(rows_by_split(data.examples)) == ["train (en)", "train (zh)", "test (zh)"]
    assert [(leak.split, leak.earlier_split) for leak in find_leaks(data) if leak.what == "image"] == [
        ("test (zh)", "train (en)"),
        ("test (zh)", "train (zh)"),
    ]


keys = st.integers(0, 30).map(str)
many = st.lists(st.lists(keys, min_size=1, max_size=2), min_size=1, max_size=40)


@settings(max_examples=80)
@given(many, st.integers(0, 3), st.randoms(use_true_random=False))
def test_no_image_is_in_two_splits_and_no_row_is_lost(images: list[list[str]], seed: int, order: random.Random) -> None:
    examples = [example(str(number), *names) for number, names in enumerate(images)]
    data = image_disjoint(dataset(*examples), seed=seed)
    assert find_leaks(data) == []
    assert [(e.id, e.images) for e in data.examples] == [(e.id, e.images) for e in examples]
    order.shuffle(examples)
    again = image_disjoint(dataset(*examples), seed=seed)
    assert {e.id: e.split for e in again.examples} == {e.id: e.split for e in data.examples}


def test_new_splits_have_the_fractions_of_images_and_depend_on_the_seed() -> None:
    data = dataset(*(example(f"{i}-{j}", f"i{i}") for i in range(50) for j in range(1 + i % 3)))
    examples = image_disjoint(data).examples
    images = {name: {e.images[0] for e in examples.take(rows)} for name, rows in rows_by_split(examples).items()}
    sizes = {name: len(of_split) for name, of_split in images.items()}
    assert sizes == {"train": 35, "validate": 5, "test": 10}
    assert image_disjoint(data, seed=1).examples != image_disjoint(data, seed=0).examples


def test_skipped_rows_get_the_split_of_their_image() -> None:
    images = [f"i{number}" for number in range(20)]
    skipped = [example(f"x-{name}", name, answer="") for name in images]
    without_image = Example("y", (), "", "", "open", "train")
    data = image_disjoint(dataset(*(example(name, name) for name in images), skipped=[*skipped, without_image]))
    assert [e.split for e in data.skipped] == [*(e.split for e in data.examples), "train"]
    assert {e.split for e in data.skipped} == {"train", "validate", "test"}


def test_identical_images_under_two_names_stay_together() -> None:
    data = dataset(*(example(name, name) for name in ("black", "dark", "white")))
    assert find_identical_images(data) == [("black", "dark")]
    for seed in range(8):
        examples = image_disjoint(data, seed, find_identical_images(data)).examples
        assert examples[0].split == examples[1].split != examples[2].split


def test_split_names_and_cells_are_normalised() -> None:
    assert {split_name(word) for word in ("Validation", "valid", "val", " dev ", "validate")} == {"validate"}
    assert split_name("fold-3") == "fold-3"
    assert [is_yes_no(word) for word in ("Yes.", " no ", "nodule", "")] == [True, True, False, False]
    assert clean_text(None) == ("", [])
    assert clean_text(3) == ("3", ["is a number, not text"])
    assert clean_text(" a\tb\n") == ("a b", ["holds tabs or line ends", "has blanks around it"])
    with pytest.raises(InputError, match="is of type bool"):
        clean_text(True)
