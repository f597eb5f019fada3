"""The workloads of several benchmarks: a random model of a real shape, with real questions and images.

There are four: --shape miss or llava with --data slake or vqa-rad. Images are preprocessed once, before any
timing, and both sides of a comparison read the pixels from memory.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from shape import Shape
from shapes import SHAPES

from normtune.data.groups import group_by_image
from normtune.data.records import Dataset, Example
from normtune.data.registry import open_dataset
from normtune.models.family import Family

DATA = ("slake", "vqa-rad")


def build_parser(description: str, *, pairs: int, rounds: int) -> argparse.ArgumentParser:
    """The options that these benchmarks share; `pairs` and `rounds` are the defaults."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--shape", choices=SHAPES, required=True)
    parser.add_argument("--data", choices=DATA, required=True)
    parser.add_argument("--root", type=Path, required=True, help="the dataset's folder")
    parser.add_argument("--out", type=Path, help="JSON file; the table is written next to it as .md")
    parser.add_argument("--pairs", type=int, default=pairs, help="question-answer pairs (default %(default)s)")
    parser.add_argument(
        "--rounds", type=int, default=rounds, help="how often everything is measured (default %(default)s)"
    )
    return parser


@dataclass(frozen=True)
class Workload:
    """What a benchmark measures: a shape, and examples of a dataset.

    The tokenizer of `shape` was built from the texts of the dataset (`Shape.learn_words`).
    """

    shape: Shape
    data: str
    dataset: Dataset
    examples: list[Example]

    @property
    def questions_per_image(self) -> float:
        return len(self.examples) / len(group_by_image(self.examples))

    def cache_images(self, family: Family) -> Dataset:
        """Load all images into memory and preprocess them, so that neither is part of a measured time.

        Returns:
            The dataset, restricted to the examples. Its `open_image` returns the loaded image objects, and
            `family.preprocess_image` is replaced by a look-up of their pixels.
        """
        images = {
            key: self.dataset.open_image(key) for key in dict.fromkeys(example.images[0] for example in self.examples)
        }
        processed = {id(image): family.preprocess_image(image) for image in images.values()}
        family.preprocess_image = lambda image: processed[id(image)]  # type: ignore[method-assign]
        return replace(self.dataset, examples=self.examples, open_image=images.__getitem__, skipped=[])

    def describe(self) -> dict[str, Any]:
        """The fields of the workload in the JSON record."""
        return {
            "shape": self.shape.describe(),
            "data": self.data,
            "questions": len(self.examples),
            "questions_per_image": self.questions_per_image,
        }


def load_workload(options: argparse.Namespace, questions: int) -> Workload:
    """Images of the training split with all their questions, about `questions` in all."""
    shape = SHAPES[options.shape]
    dataset = open_dataset(options.data, options.root)
    shape.learn_words([f"{example.question} {example.answer}" for example in dataset.examples])
    return Workload(shape, options.data, dataset, sample_images(dataset.split("train"), questions))


def sample_images(examples: Sequence[Example], pairs: int) -> list[Example]:
    """Images with all their questions, about `pairs` pairs in all.

    The mean number of questions per image is near that of the dataset: images are sorted by their number of
    questions and taken at even steps.
    """
    groups = sorted(group_by_image(examples), key=len)
    count = max(1, round(pairs * len(groups) / len(examples)))
    return [example for i in range(count) for example in groups[int((i + 0.5) * len(groups) / count)]]


def median_and_range(values: Sequence[float]) -> dict[str, float]:
    """Median, lowest and highest of the values, one per round."""
    return {"median": statistics.median(values), "low": min(values), "high": max(values)}


def ratio(numerators: Sequence[float], denominators: Sequence[float]) -> dict[str, float]:
    """Ratios of two measurements, round by round: each round measured both within the same minutes."""
    return median_and_range([a / b for a, b in zip(numerators, denominators, strict=True)])


def format_range(values: dict[str, float], digits: int, unit: str = "") -> str:
    """The text `median [low, high]` of a result of `median_and_range`."""
    return f"{values['median']:.{digits}f}{unit} [{values['low']:.{digits}f}, {values['high']:.{digits}f}]"
