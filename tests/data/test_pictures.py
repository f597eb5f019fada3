from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from normtune.data.options import DataOptions
from normtune.data.pictures import equal_pictures, near_duplicates, read_pictures
from normtune.data.records import Dataset, Example
from normtune.data.registry import open_configured
from normtune.data.splits import find_leaks
from tests.support.dataset_samples import write_jsonl


def noise(seed: int, size: int = 64) -> Image.Image:
    """A smooth random picture: blobs, as natural images have them."""
    grid = np.random.default_rng(seed).integers(0, 256, (6, 6), dtype=np.uint8)
    return Image.fromarray(grid).resize((size, size), Image.Resampling.BICUBIC)


def two_names(root: Path, count: int = 5, **columns: str) -> Path:
    """Every picture under two names in two formats, one name in train and one in test."""
    rows: dict[str, list[dict[str, str]]] = {"train": [], "test": []}
    for number in range(count):
        for split, ending in (("train", "png"), ("test", "bmp")):
            name = f"{split}-{number}.{ending}"
            noise(number).save(root / name)
            rows[split].append({"image": name, "question": "Is it?", "answer": "yes", **columns})
    for split, cells in rows.items():
        write_jsonl(root / f"{split}.jsonl", *cells)
    return root


def test_pictures_with_the_same_pixels_are_leaks_and_stay_in_one_split(tmp_path: Path) -> None:
    options = {"data": "jsonl", "root": two_names(tmp_path)}
    dataset = open_configured(DataOptions(**options))
    assert find_leaks(dataset) == []  # nothing is known before the pictures are opened
    read_pictures(dataset)
    assert [(leak.what, leak.shared, leak.total) for leak in find_leaks(dataset)] == [("picture", 5, 5)]
    new = open_configured(DataOptions(**options, image_disjoint=True))
    splits: dict[str, set[str]] = {}
    for example in new.examples:
        splits.setdefault(example.images[0].split("-")[1][0], set()).add(example.split)
    assert [len(names) for names in splits.values()] == [1] * 5
    assert len({name for names in splits.values() for name in names}) > 1
    assert find_leaks(new) == []
    assert new.notes[-1] == "new splits by picture; 5 pictures have several names; patients by column: none"


def test_copies_that_were_encoded_again_or_resized_are_near_duplicates(tmp_path: Path) -> None:
    original, other = noise(1), noise(2)
    jpeg = io.BytesIO()
    original.save(jpeg, "JPEG", quality=70)
    images = {
        "a": original,
        "b": Image.open(jpeg),
        "c": original.resize((97, 80)),
        "d": other,
        "blank": Image.new("L", (64, 64)),
        "grey": Image.new("L", (64, 64), 9),
    }
    examples = [Example(key, (key,), "?", "x", "open", "train") for key in images]
    dataset = Dataset("made", examples, lambda key: images[key].convert("RGB"))
    pictures = read_pictures(dataset)
    assert equal_pictures(pictures) == []
    assert near_duplicates(pictures) == [("a", "b"), ("a", "c"), ("b", "c")]
    moved = [Example(key, (key,), "?", "x", "open", "test" if key == "c" else "train") for key in images]
    leaks = find_leaks(Dataset("made", moved, dataset.open_image, pictures=pictures))
    assert [(leak.what, leak.examples) for leak in leaks] == [("near-duplicate", ("c",))]


def test_a_picture_is_opened_once_and_damage_is_recorded(tmp_path: Path) -> None:
    two_names(tmp_path, count=2)
    damaged = tmp_path / "test-1.bmp"
    damaged.write_bytes(damaged.read_bytes()[:60])
    dataset = open_configured(DataOptions(data="jsonl", root=tmp_path))
    opened, open_image, ticks = [], dataset.open_image, []

    def count(key: str) -> Image.Image:
        opened.append(key)
        return open_image(key)

    dataset.open_image = count
    read_pictures(dataset, progress=lambda done, total: ticks.append((done, total)))
    pictures = read_pictures(dataset)
    assert sorted(opened) == sorted(pictures)
    assert ticks == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert "test-1.bmp" in pictures["test-1.bmp"].error
    assert [key for key, picture in pictures.items() if picture.error] == ["test-1.bmp"]


@pytest.mark.parametrize("column", ["patient_id", "subject_id", "PatientID", "case", "study", "group"])
def test_images_of_a_patient_stay_together_under_the_usual_column_names(tmp_path: Path, column: str) -> None:
    rows = []
    for number in range(24):
        noise(number).save(tmp_path / f"{number}.png")
        rows.append({"image": f"{number}.png", "question": "?", "answer": "x", column: f"P{number % 12}"})
    write_jsonl(tmp_path / "train.jsonl", *rows[:15])
    write_jsonl(tmp_path / "validate.jsonl", *rows[15:])
    options = {"data": "jsonl", "root": tmp_path}
    (leak,) = find_leaks(open_configured(DataOptions(**options)))
    assert str(leak) == f"9 of 9 values of {column} in validate are in train too"
    new = open_configured(DataOptions(**options, image_disjoint=True))
    assert find_leaks(new) == []
    assert new.notes[-1].endswith(f"patients by column: {column}")


def test_group_by_names_the_column_and_a_wrong_name_is_refused(tmp_path: Path) -> None:
    two_names(tmp_path, ward="W1", patient="P")
    options = {"data": "jsonl", "root": tmp_path, "image_disjoint": True}
    assert {e.split for e in open_configured(DataOptions(**options, group_by="ward")).examples} == {"train"}
    with pytest.raises(ValueError, match=r"no row has a column 'wadr', did you mean 'ward'\?"):
        open_configured(DataOptions(**options, group_by="wadr"))


def test_an_arm_of_a_trial_is_no_patient(tmp_path: Path) -> None:
    examples = [
        Example(str(n), (str(n),), "?", "x", "open", "train" if n < 6 else "test", {"group": "case" if n < 7 else "c"})
        for n in range(9)
    ]
    assert find_leaks(Dataset("made", examples, lambda key: noise(0))) == []
