"""Phantoms as a dataset: the records that every reader yields, with images drawn when they are opened."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from PIL import Image

from normtune.data.phantom.acquisition import render
from normtune.data.phantom.questions import questions
from normtune.data.phantom.reports import report
from normtune.data.phantom.scene import check_hospital, sample_scene
from normtune.data.records import Dataset, Example
from normtune.errors import InputError

SPLIT_SIZES: Mapping[str, int] = {"train": 300, "validate": 60, "test": 120}
LARGEST_SIZE = 480
_PER_SPLIT = 10_000_000  # scene seeds kept for one split of one dataset seed


def dataset(
    hospital: str,
    images: int | Mapping[str, int] | None = None,
    seed: int = 0,
    size: int = 96,
    task: Literal["vqa", "report", "all"] = "vqa",
) -> Dataset:
    """The phantom dataset of hospital "a" or "b", deterministic by `seed`, split by image.

    Args:
        images: images a split (default 300 / 60 / 120); a number is the size of train, and the other two
            splits get a fifth of it each. A larger split begins with the images of a smaller one.
        size: width and height of the images in pixels, 32 to 480.
        task: question answering, one report an image (kind "report", empty question), or both.

    An example is closed where it is answered by yes or no. Keys of images are like "b-000123".

    Raises:
        InputError: an unknown hospital or task, or a size or a number of images that is out of range.
    """
    name = check_hospital(hospital)
    if not 32 <= size <= LARGEST_SIZE:
        raise InputError(f"phantom size {size} is out of range. Choose 32 to {LARGEST_SIZE} pixels.")
    if task not in ("vqa", "report", "all"):
        raise InputError(f"phantom task '{task}' is unknown. Choose vqa, report or all.")
    if isinstance(images, int):
        images = {"train": images, "validate": max(1, images // 5), "test": max(1, images // 5)}
    counts = dict(SPLIT_SIZES if images is None else images)
    scenes: dict[str, int] = {}  # image key -> scene seed
    examples: list[Example] = []
    for split, count in counts.items():
        if split not in SPLIT_SIZES or not 0 <= count < _PER_SPLIT:
            raise InputError(
                f"phantom images: '{split}: {count}' is not possible. Splits are train, validate and test."
            )
        for number in range(count):
            key = f"{name}-{len(scenes):06d}"
            scenes[key] = scene_seed(split, number, seed)
            examples += _examples(key, scenes[key], name, split, task)

    def open_image(key: str) -> Image.Image:
        if key not in scenes:
            raise InputError(
                f"the phantom dataset holds no image '{key}'. Keys run to {name}-{len(scenes) - 1:06d}."
            )
        return Image.fromarray(render(sample_scene(scenes[key], name), name, size)).convert("RGB")

    return Dataset(f"phantom-{name}", examples, open_image, licence="Apache-2.0 (synthetic)")


def scene_seed(split: str, number: int, seed: int) -> int:
    """The seed of a split's scene; splits and dataset seeds have ranges of their own."""
    return (seed * len(SPLIT_SIZES) + list(SPLIT_SIZES).index(split)) * _PER_SPLIT + number


def _examples(key: str, seed: int, hospital: str, split: str, task: str) -> list[Example]:
    name = check_hospital(hospital)
    scene = sample_scene(seed, name)
    found = []
    if task in ("vqa", "all"):
        for number, asked in enumerate(questions(scene, name)):
            id = f"{key}-{number:02d}"
            found.append(Example(id, (key,), asked.question, asked.answer, asked.kind, split, asked.meta))
    if task in ("report", "all"):
        meta = {"type": "report", "modality": scene.modality, "organ": scene.region}
        found.append(Example(f"{key}-report", (key,), "", report(scene, name), "report", split, meta))
    return found
