"""The retrieval baseline, which predicts the text of the nearest image, and all baselines by name."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from normtune.data.records import Dataset, Example, Prediction
from normtune.errors import InputError
from normtune.evaluation.baselines import ConstantText, QuestionOnly, question_words
from normtune.models.family import Family
from normtune.models.image_cache import read_pixels
from normtune.models.types import Pixels

# Predicts one text per example; the dataset opens the images.
Predictor = Callable[[Dataset, Sequence[Example]], list[Prediction]]
Features = NDArray[np.float64]


@dataclass(frozen=True)
class Retrieval:
    """Predicts the text of the nearest training study that has the same question.

    Reports have the empty question, so every training study is a candidate. Studies are compared by the
    cosine similarity of their mean image features, after subtraction of the training studies' mean. The
    similarity is the `score` of the prediction. If studies are equally near, the first is taken. A question that
    training does not have gets the answer of `QuestionOnly`.
    """

    family: Family  # its image encoder computes the features, without changes to it
    train: tuple[Example, ...]  # the training rows
    mean: Features  # mean of the training studies' features, [width]
    directions: Features  # centred features of unit length, [training rows, width]
    by_question: dict[tuple[str, ...], list[int]]  # words of a question -> rows of `directions`
    fallback: QuestionOnly  # answers questions that training does not have

    @classmethod
    def fit(cls, family: Family, dataset: Dataset, train: Sequence[Example]) -> Retrieval:
        """Compute the features of the training images, each once.

        Raises:
            InputError: if there are no rows, an image cannot be read, or the family provides no features.
        """
        fallback = QuestionOnly.fit(train)
        features = study_features(family, dataset, train)
        mean = np.mean(list(features.values()), axis=0)
        by_question = defaultdict(list)
        for row, example in enumerate(train):
            by_question[question_words(example.question)].append(row)
        directions = np.stack([_direction(features[example.images] - mean) for example in train])
        return cls(family, tuple(train), mean, directions, dict(by_question), fallback)

    def predict(self, dataset: Dataset, examples: Sequence[Example]) -> list[Prediction]:
        """Predict one text per example, in order. References are not used.

        Raises:
            InputError: if an image cannot be read.
        """
        features = study_features(self.family, dataset, examples)
        fallbacks = self.fallback.predict(examples)
        return [
            self._nearest(example, features[example.images] - self.mean) or fallback
            for example, fallback in zip(examples, fallbacks, strict=True)
        ]

    def _nearest(self, example: Example, centred: Features) -> Prediction | None:
        """Predict the text of the nearest training row with the same question, or None if there is none.

        If the question has options, only rows with one of them as their answer count.
        """
        rows = self.by_question.get(question_words(example.question), [])
        if example.options:
            rows = [row for row in rows if self.train[row].answer in example.options]
        if not rows:
            return None
        similarities = self.directions[rows] @ _direction(centred)  # [rows, width] @ [width] -> [rows]
        best = int(similarities.argmax())
        return Prediction(example.id, self.train[rows[best]].answer, float(similarities[best]))


def study_features(family: Family, dataset: Dataset, examples: Sequence[Example]) -> dict[tuple[str, ...], Features]:
    """Compute the mean features of the views of each study. Every image is opened once.

    Returns:
        Image keys of a study -> features, [width].

    Raises:
        InputError: if an image cannot be read, or the family provides no features.
    """
    keys = dict.fromkeys(key for example in examples for key in example.images)
    pooled = {key: pooled_features(family, read_pixels(family, dataset, key)) for key in keys}
    studies = dict.fromkeys(example.images for example in examples)
    return {images: np.mean([pooled[key] for key in images], axis=0) for images in studies}


def pooled_features(family: Family, pixels: Pixels) -> Features:
    """Encode one image and average over its tokens: features of shape [width].

    Raises:
        InputError: if the family provides no features of an image without a question.
    """
    encoded = family.encode_image(pixels)
    # The encoder's outputs are the floating-point entries that `pixels` did not have.
    states = [encoded[name] for name in sorted(encoded) if name not in pixels and encoded[name].is_floating_point()]
    if not states:
        raise InputError(
            f"--baseline retrieval: {type(family).__name__} provides no image features. Choose most-frequent."
        )
    means = [state.flatten(0, -2).double().mean(0).numpy() for state in states]  # [..., width] -> [width]
    return np.concatenate(means).astype(np.float64)


def _direction(vector: Features) -> Features:
    """Scale a vector to unit length; a zero vector stays zero."""
    length = float(np.linalg.norm(vector))
    return vector / length if length else vector


def fit_baseline(name: str, family: Family | None, dataset: Dataset, train: Sequence[Example]) -> Predictor:
    """Fit the baseline of that name on training rows. Only retrieval uses `family`.

    Raises:
        InputError: see `Retrieval.fit`.
    """
    if name == "retrieval":
        assert family is not None, "retrieval needs a model that computes image features"
        return Retrieval.fit(family, dataset, train).predict
    fit: dict[str, Callable[[Sequence[Example]], QuestionOnly | ConstantText]] = {
        "question-only": QuestionOnly.fit,
        "most-frequent": ConstantText.most_frequent,
        "medoid": ConstantText.medoid,
    }
    baseline = fit[name](train)
    return lambda dataset, examples: baseline.predict(examples)
