"""Phantoms as a `Dataset`. Images are drawn when they are opened."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from PIL import Image

from normtune.data.examples import Examples
from normtune.data.phantom.acquisition import render
from normtune.data.phantom.questions import ask_questions
from normtune.data.phantom.reports import write_report
from normtune.data.phantom.scene import HospitalName, check_hospital, sample_scene
from normtune.data.records import Dataset, Example
from normtune.errors import InputError

SPLIT_SIZES: Mapping[str, int] = {"train": 300, "validate": 60, "test": 120}  # default number of images
LARGEST_SIZE = 480  # pixels
_PER_SPLIT = 10_000_000  # scene seeds reserved for one split of one dataset seed


def phantom_dataset(
    hospital: str,
    images: int | Mapping[str, int] | None = None,
    seed: int = 0,
    size: int = 96,
    task: Literal["vqa", "report", "all"] = "vqa",
) -> Dataset:
    """Make the phantom dataset of a hospital. Splits share no image.

    Yes/no questions are closed, all others open. Image keys are such as "b-000123".

    Args:
        hospital: "a", "b", or a hospital that differs from A in one thing: "acquisition" (images of B), "wording"
            (questions and answers of B) or "knowledge" (findings that A never has).
        images: number of images of each split (default 300 / 60 / 120). A single number is for train, and
            validate and test have a fifth of it each. A larger split begins with the images of a smaller one.
        seed: the same seed makes the same dataset.
        size: width and height of the images in pixels, 32 to 480.
        task: questions, one report per image (kind "report", empty question), or both.

    Raises:
        InputError: the hospital or task is unknown, or the size or number of images is out of range.
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
            raise InputError(f"the phantom dataset holds no image '{key}'. Keys run to {name}-{len(scenes) - 1:06d}.")
        return Image.fromarray(render(sample_scene(scenes[key], name), name, size)).convert("RGB")

    return Dataset(f"phantom-{name}", Examples(examples), open_image, licence="Apache-2.0 (synthetic)")


def scene_seed(split: str, number: int, seed: int) -> int:
    """The seed of a scene. Each split of each dataset seed has its own range, so that no image is shared."""
    return (seed * len(SPLIT_SIZES) + list(SPLIT_SIZES).index(split)) * _PER_SPLIT + number


def _examples(key: str, seed: int, hospital: HospitalName, split: str, task: str) -> list[Example]:
    """The examples of the image with this key and this seed of its scene."""
    scene = sample_scene(seed, hospital)
    examples = []
    if task in ("vqa", "all"):
        for number, item in enumerate(ask_questions(scene, hospital)):
            id = f"{key}-{number:02d}"
            examples.append(Example(id, (key,), item.question, item.answer, item.kind, split, item.meta))
    if task in ("report", "all"):
        meta = {"type": "report", "modality": scene.modality, "organ": scene.region}
        examples.append(Example(f"{key}-report", (key,), "", write_report(scene, hospital), "report", split, meta))
    return examples
