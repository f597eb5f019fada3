"""What the nearest training image got, the baseline that a model should beat; and all baselines by name."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from normtune.data.records import Dataset, Example, Prediction
from normtune.errors import InputError
from normtune.evaluation.baselines import OneText, QuestionOnly, words_of
from normtune.models.family import Family
from normtune.models.image_cache import read_pixels
from normtune.models.types import Pixels

Answers = Callable[[Dataset, Sequence[Example]], list[Prediction]]  # the dataset opens the images
Tick = Callable[[int, int], None]  # images done, images in all
Features = NDArray[np.float64]


@dataclass(frozen=True)
class Retrieval:
    """The text of the nearest training study, among those that were asked the same question.

    A report is asked by the empty question, so any training study can be its nearest. Studies are compared
    by their mean image features with the mean of the training studies taken off, by cosine similarity, which
    is the prediction's `score`; of equally near ones the first counts. A question that training did not ask
    gets `QuestionOnly`'s answer.

    Attributes:
        family: whose image encoder, as it is, makes the features.
        train: the training rows.
        mean: [width], of the training studies' features.
        directions: [training rows, width], centred and of length one.
        by_question: words of a question -> rows of `directions`.
        otherwise: for questions that training did not ask.
    """

    family: Family
    train: tuple[Example, ...]
    mean: Features
    directions: Features
    by_question: dict[tuple[str, ...], list[int]]
    otherwise: QuestionOnly

    @classmethod
    def fit(
        cls, family: Family, dataset: Dataset, train: Sequence[Example], tick: Tick | None = None
    ) -> Retrieval:
        """Compute the features of the training images, each once.

        Raises:
            InputError: there are no rows, an image cannot be read, or the family gives no features.
        """
        otherwise = QuestionOnly.fit(train)
        features = study_features(family, dataset, train, tick)
        mean = np.mean(list(features.values()), axis=0)
        by_question = defaultdict(list)
        for row, example in enumerate(train):
            by_question[words_of(example.question)].append(row)
        directions = np.stack([_direction(features[example.images] - mean) for example in train])
        return cls(family, tuple(train), mean, directions, dict(by_question), otherwise)

    def predict(
        self, dataset: Dataset, examples: Sequence[Example], tick: Tick | None = None
    ) -> list[Prediction]:
        """One prediction an example, in order; references are not looked at.

        Raises:
            InputError: an image cannot be read.
        """
        features = study_features(self.family, dataset, examples, tick)
        guesses = self.otherwise.predict(examples)
        return [
            self._nearest(example, features[example.images] - self.mean) or guess
            for example, guess in zip(examples, guesses, strict=True)
        ]

    def _nearest(self, example: Example, centred: Features) -> Prediction | None:
        rows = self.by_question.get(words_of(example.question))
        if rows is None:
            return None
        near = self.directions[rows] @ _direction(centred)
        best = int(near.argmax())
        return Prediction(example.id, self.train[rows[best]].answer, float(near[best]))


def study_features(
    family: Family, dataset: Dataset, examples: Sequence[Example], tick: Tick | None = None
) -> dict[tuple[str, ...], Features]:
    """Images of a study -> the mean of its views' features [width]; every image is opened once.

    Raises:
        InputError: an image cannot be read, or the family gives no features.
    """
    keys = list(dict.fromkeys(key for example in examples for key in example.images))
    pooled = {}
    for done, key in enumerate(keys, start=1):
        pooled[key] = pooled_features(family, read_pixels(family, dataset, key))
        if tick is not None:
            tick(done, len(keys))
    studies = dict.fromkeys(example.images for example in examples)
    return {images: np.mean([pooled[key] for key in images], axis=0) for images in studies}


def pooled_features(family: Family, pixels: Pixels) -> Features:
    """What the image encoder makes of one image, its tokens averaged: [width].

    Raises:
        InputError: the family gives no features of an image alone.
    """
    seen = family.encode_image(pixels)
    made = [seen[name] for name in sorted(seen) if name not in pixels and seen[name].is_floating_point()]
    if not made:
        raise InputError(
            f"--baseline retrieval: {type(family).__name__} gives no image features. Choose most-frequent."
        )
    means = [each.flatten(0, -2).double().mean(0).numpy() for each in made]
    return np.concatenate(means).astype(np.float64)


def _direction(vector: Features) -> Features:
    length = float(np.linalg.norm(vector))
    return vector / length if length else vector


def fitted(name: str, family: Family | None, dataset: Dataset, train: Sequence[Example]) -> Answers:
    """The baseline of that name, fitted on training rows; `family` is for retrieval alone.

    Raises:
        InputError: see `Retrieval.fit`.
    """
    if name == "retrieval":
        assert family is not None, "retrieval has a model whose features it compares"
        return Retrieval.fit(family, dataset, train).predict
    fit: dict[str, Callable[[Sequence[Example]], QuestionOnly | OneText]] = {
        "question-only": QuestionOnly.fit,
        "most-frequent": OneText.most_frequent,
        "medoid": OneText.medoid,
    }
    blind = fit[name](train)
    return lambda dataset, examples: blind.predict(examples)
