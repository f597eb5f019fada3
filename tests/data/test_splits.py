from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from normtune.data.reading.cells import is_yes_no, split_name, text_of
from normtune.data.records import Dataset, Example, Problem
from normtune.data.splits import image_disjoint, leaks, same_pixels, split_groups
from normtune.errors import InputError


def example(id: str, *images: str, split: str = "train", **fields: str) -> Example:
    meta = {"language": fields.pop("language")} if "language" in fields else {}
    return Example(
        id, images, fields.get("question", "What?"), fields.get("answer", "this"), "open", split, meta
    )


def dataset(*examples: Example, **fields: object) -> Dataset:
    shades = {"black": 0, "dark": 0, "white": 255}
    return Dataset("made", list(examples), lambda key: Image.new("RGB", (2, 2), shades.get(key, 9)), **fields)


def test_a_split_that_is_not_there_is_told_with_those_that_are() -> None:
    made = dataset(example("1", "a"), example("2", "b", split="test"))
    assert [e.id for e in made.split("test")] == ["2"]
    with pytest.raises(InputError, match=r"no split 'tset', did you mean 'test'\?.* Its splits: test, train"):
        made.split("tset")


def test_a_problem_says_where_and_what_to_do() -> None:
    assert (
        str(Problem("f.json", "3", "answer is empty", "Fill it in."))
        == "f.json, row 3: answer is empty. Fill it in."
    )
    assert str(Problem("f.json", "", "file is missing", "Fetch it.")) == "f.json: file is missing. Fetch it."


def test_shared_images_and_rows_are_leaks_of_the_later_split() -> None:
    made = dataset(
        example("1", "a", question="Is it  OLD?"),
        example("2", "b"),
        example("3", "a", split="validate", question="Other?"),
        example("4", "a", split="test", question="is it old?", answer="THIS"),
        example("5", "c", split="test"),
    )
    assert [str(leak) for leak in leaks(made)] == [
        "1 of 1 images of validate stand in train too",
        "1 of 2 images of test stand in train too",
        "1 of 2 rows of test stand word for word in train too",
        "1 of 2 images of test stand in validate too",
    ]
    assert leaks(made)[2].examples == ("4",)


@pytest.mark.parametrize("field", ["patient", "case"])
def test_images_of_one_patient_or_case_go_to_one_split(field: str) -> None:
    rows = [Example(str(n), (f"i{n}",), "", "x", "report", "train", {field: str(n // 4)}) for n in range(80)]
    made = image_disjoint(dataset(*rows))
    splits = {(e.meta[field], e.split) for e in made.examples}
    assert len(splits) == 20
    assert {split for _, split in splits} == {"train", "validate", "test"}


def test_languages_are_parts_of_their_own_and_leak_across_splits_alone() -> None:
    made = dataset(
        example("1", "a", language="en"),
        example("2", "a", language="zh"),
        example("3", "a", language="zh", split="test"),
    )
    assert list(split_groups(made)) == ["train (en)", "train (zh)", "test (zh)"]
    assert [(leak.part, leak.other) for leak in leaks(made) if leak.what == "image"] == [
        ("test (zh)", "train (en)"),
        ("test (zh)", "train (zh)"),
    ]


keys = st.integers(0, 30).map(str)
many = st.lists(st.lists(keys, min_size=1, max_size=2), min_size=1, max_size=40)


@settings(max_examples=80, deadline=None)
@given(many, st.integers(0, 3), st.randoms(use_true_random=False))
def test_no_image_stands_in_two_splits_and_no_row_is_lost(
    images: list[list[str]], seed: int, order: random.Random
) -> None:
    examples = [example(str(number), *names) for number, names in enumerate(images)]
    made = image_disjoint(dataset(*examples), seed=seed)
    assert leaks(made) == []
    assert [(e.id, e.images) for e in made.examples] == [(e.id, e.images) for e in examples]
    order.shuffle(examples)
    again = image_disjoint(dataset(*examples), seed=seed)
    assert {e.id: e.split for e in again.examples} == {e.id: e.split for e in made.examples}


def test_the_splits_take_their_fractions_of_the_images_and_change_with_the_seed() -> None:
    made = dataset(*(example(f"{i}-{j}", f"i{i}") for i in range(50) for j in range(1 + i % 3)))
    sizes = {
        name: len({e.images[0] for e in part}) for name, part in split_groups(image_disjoint(made)).items()
    }
    assert sizes == {"train": 35, "validate": 5, "test": 10}
    assert image_disjoint(made, seed=1).examples != image_disjoint(made, seed=0).examples
    whole = image_disjoint(made, fractions=(0, 0, 1))
    assert {e.split for e in whole.examples} == {"test"}
    with pytest.raises(InputError, match="must be at least 0 and add up to 1"):
        image_disjoint(made, fractions=(0.5, 0.1, 0.1))


def test_rows_that_were_left_out_go_with_their_image() -> None:
    gone = [example("x", "a", answer=""), Example("y", (), "", "", "open", "train")]
    made = image_disjoint(dataset(example("1", "a"), skipped=gone), fractions=(0, 0, 1))
    assert [e.split for e in made.skipped] == ["test", "train"]


def test_pictures_that_are_the_same_under_two_names_stay_together() -> None:
    made = dataset(*(example(name, name) for name in ("black", "dark", "white")))
    assert same_pixels(made) == [("black", "dark")]
    for seed in range(8):
        found = image_disjoint(made, (0.5, 0.0, 0.5), seed, same_pixels(made)).examples
        assert found[0].split == found[1].split != found[2].split


def test_a_split_has_one_name_and_a_cell_is_one_line_of_text() -> None:
    assert {split_name(word) for word in ("Validation", "valid", "val", " dev ", "validate")} == {"validate"}
    assert split_name("fold-3") == "fold-3"
    assert [is_yes_no(word) for word in ("Yes.", " no ", "nodule", "")] == [True, True, False, False]
    assert text_of(None) == ("", [])
    assert text_of(3) == ("3", ["is a number, not text"])
    assert text_of(" a\tb\n") == ("a b", ["holds tabs or line ends", "has blanks around it"])
    with pytest.raises(InputError, match="is of type bool"):
        text_of(True)
