"""What throughput and answering are measured on: a random model of a real shape, real questions, images.

The four workloads are --shape miss or llava with --data slake or vqa-rad. Pixels are processed once, before
the clock starts, and come from memory on both sides.
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


def parser(about: str, *, pairs: int, rounds: int) -> argparse.ArgumentParser:
    """The options that both take; `pairs` and `rounds` are defaults."""
    made = argparse.ArgumentParser(description=about)
    made.add_argument("--shape", choices=SHAPES, required=True)
    made.add_argument("--data", choices=DATA, required=True)
    made.add_argument("--root", type=Path, required=True, help="the data set's folder")
    made.add_argument("--out", type=Path, help="JSON file; the table goes beside it")
    made.add_argument("--pairs", type=int, default=pairs, help="question-answer pairs (default %(default)s)")
    made.add_argument(
        "--rounds", type=int, default=rounds, help="times that everything is run (default %(default)s)"
    )
    return made


@dataclass(frozen=True)
class Workload:
    """A shape that knows the data's words, and the examples that are measured."""

    shape: Shape
    data: str
    dataset: Dataset
    examples: list[Example]

    @property
    def questions_per_image(self) -> float:
        return len(self.examples) / len(group_by_image(self.examples))

    def held(self, family: Family) -> Dataset:
        """The examples with their images in memory, and `family` made to know their pixels already."""
        images = {
            key: self.dataset.open_image(key) for key in dict.fromkeys(e.images[0] for e in self.examples)
        }
        processed = {id(image): family.preprocess_image(image) for image in images.values()}
        family.preprocess_image = lambda image: processed[id(image)]  # type: ignore[method-assign]
        return replace(self.dataset, examples=self.examples, open_image=images.__getitem__, skipped=[])

    def about(self) -> dict[str, Any]:
        """For the record."""
        return {
            "shape": self.shape.describe(),
            "data": self.data,
            "questions": len(self.examples),
            "questions_per_image": self.questions_per_image,
        }


def workload(options: argparse.Namespace, questions: int) -> Workload:
    """About `questions` of the training split, in whole images."""
    shape = SHAPES[options.shape]
    dataset = open_dataset(options.data, options.root)
    shape.learn_words([f"{e.question} {e.answer}" for e in dataset.examples])
    return Workload(shape, options.data, dataset, sample(dataset.split("train"), questions))


def sample(examples: Sequence[Example], pairs: int) -> list[Example]:
    """Whole images, about `pairs` pairs in all, with as many questions an image as the data set has.

    Images are sorted by their number of questions and taken at even steps.
    """
    groups = sorted(group_by_image(examples), key=len)
    count = max(1, round(pairs * len(groups) / len(examples)))
    return [e for i in range(count) for e in groups[int((i + 0.5) * len(groups) / count)]]


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, lowest and highest of the rounds."""
    return {"median": statistics.median(values), "low": min(values), "high": max(values)}


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> dict[str, float]:
    """How many times faster, round by round: both were measured within the same minutes."""
    return spread([a / b for a, b in zip(ours, theirs, strict=True)])


def shown(found: dict[str, float], digits: int, unit: str = "") -> str:
    """`median [low, high]`."""
    return f"{found['median']:.{digits}f}{unit} [{found['low']:.{digits}f}, {found['high']:.{digits}f}]"
