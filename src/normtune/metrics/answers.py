"""Scores of answers to questions; every way of counting has a name of its own.

Published figures for one model and one test set differ by points because "closed" and "open" are counted
differently. Here each metric says which rows it takes and how it scores one:

========================  ============================  =====================================================
name                      rows                          score of one row
========================  ============================  =====================================================
`closed_label`            labelled closed               exact match after normalisation
`closed_yes_no`           reference is yes or no        exact match ("closed" of MISS and MILE)
`closed_substring`        labelled closed               reference is a substring of the prediction after
                                                        `llava-med` normalisation (so "no" is in "normal")
`open_exact`              labelled open                 exact match
`open_not_yes_no`         reference is not yes or no    exact match ("open" of MISS and MILE)
`open_recall`             labelled open                 share of the reference's tokens found, each as often
                                                        as it stands in the prediction
`open_f1`                 labelled open                 token F1 (Rajpurkar et al. 2016, SQuAD)
`open_recall_llava_med`   labelled open                 LLaVA-Med's recall: see `llava_med_recall`
`global_exact`            all                           exact match
========================  ============================  =====================================================

LLaVA-Med's released script leaves a closed row out of the count where the prediction holds "yes" or "no" but
not the reference, which hides most wrong answers; `closed_substring` counts such a row as wrong.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from normtune.data.records import Example, Prediction
from normtune.errors import InputError
from normtune.metrics.normalisation import normalise, tokens
from normtune.metrics.statistics import RESAMPLES, bootstrap_means, by_cluster

Scores = dict[str, dict[str, float]]  # metric -> example id -> score in [0, 1]


@dataclass(frozen=True)
class Metric:
    """A mean score with the 95% interval from resampling images, and how many rows and images it rests on."""

    value: float
    low: float
    high: float
    rows: int
    images: int


def pair_with_predictions(
    examples: Sequence[Example], predictions: Mapping[str, str] | Sequence[Prediction]
) -> list[tuple[Example, str]]:
    """Each example with its prediction's text, joined by id, in the order of the examples.

    Raises:
        InputError: an id stands twice, an example has no prediction, or a prediction has no example; the
            message says how many and names the first.
    """
    if isinstance(predictions, Mapping):
        texts = dict(predictions)
    else:
        texts = {prediction.id: prediction.text for prediction in predictions}
        check_unique_ids([prediction.id for prediction in predictions], "predictions")
    check_unique_ids([example.id for example in examples], "examples")
    known = {example.id for example in examples}
    for what, odd in (
        ("examples have no prediction", [example.id for example in examples if example.id not in texts]),
        ("predictions have no example", [id for id in texts if id not in known]),
    ):
        if odd:
            raise InputError(
                f"{len(odd)} {what}, first id '{odd[0]}'. Predict exactly the rows of the split."
            )
    return [(example, texts[example.id]) for example in examples]


def check_unique_ids(ids: Sequence[str], what: str) -> None:
    """Check that no id stands twice.

    Raises:
        InputError: one does; the message says how many and names the first.
    """
    if len(set(ids)) < len(ids):
        twice = [id for id, times in Counter(ids).items() if times > 1]
        raise InputError(
            f"{len(twice)} ids stand twice among the {what}, first '{twice[0]}'. Keep one of each."
        )


def exact(prediction: str, reference: str) -> float:
    """1.0 where the two normalised texts are the same, else 0.0."""
    return float(prediction == reference)


def recall(prediction: str, reference: str) -> float:
    """Share of the reference's tokens that the prediction holds, each counted at most as often as there.

    With an empty reference it is 1.0 for an empty prediction, else 0.0.
    """
    return _overlap(prediction, reference)[1]


def f1(prediction: str, reference: str) -> float:
    """Harmonic mean of token precision and recall (SQuAD; Rajpurkar et al. 2016)."""
    precision, recall = _overlap(prediction, reference)
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def _overlap(prediction: str, reference: str) -> tuple[float, float]:
    """Token precision and recall with clipped counts."""
    said, meant = Counter(tokens(prediction)), Counter(tokens(reference))
    if not said or not meant:
        return (1.0, 1.0) if said == meant else (0.0, 0.0)
    common = (said & meant).total()
    return common / said.total(), common / meant.total()


def llava_med_recall(prediction: str, reference: str) -> float:
    """Recall as LLaVA-Med counts it, from raw texts (Li et al. 2023; calculate_f1score of its evaluation).

    tp / (tp + fn), where tp counts every *occurrence in the prediction* of a word that the reference has,
    and fn the reference's occurrences of words that the prediction lacks. Saying a right word again raises
    it: "left left left" scores 3/4 against "left kidney", "left" scores 1/2. Two passes of normalisation,
    as there; 0.0 where either side is empty.
    """
    said, meant = (
        Counter(normalise(normalise(text, "llava-med"), "llava-med").split())
        for text in (prediction, reference)
    )
    found = sum(times for word, times in said.items() if word in meant)
    missed = sum(times for word, times in meant.items() if word not in said)
    return found / (found + missed) if found else 0.0


def closed_substring(prediction: str, reference: str) -> float:
    """LLaVA-Med's closed score, from raw texts: the reference is a substring of the prediction."""
    return float(normalise(reference, "llava-med") in normalise(prediction, "llava-med"))


def _is_yes_no(example: Example) -> bool:
    return example.answer.strip().lower() in ("yes", "no")


def _is_closed(example: Example) -> bool:
    return example.kind == "closed"


def _is_open(example: Example) -> bool:
    return example.kind == "open"


_Takes = Callable[[Example], bool]
_Score = Callable[[str, str], float]
_NORMALISED: dict[str, tuple[_Takes, _Score]] = {
    "closed_label": (_is_closed, exact),
    "closed_yes_no": (_is_yes_no, exact),
    "open_exact": (_is_open, exact),
    "open_not_yes_no": (lambda example: not _is_yes_no(example), exact),
    "open_recall": (_is_open, recall),
    "open_f1": (_is_open, f1),
    "global_exact": (lambda example: True, exact),
}
_RAW: dict[str, tuple[_Takes, _Score]] = {
    "closed_substring": (_is_closed, closed_substring),
    "open_recall_llava_med": (_is_open, llava_med_recall),
}
METRICS = (*_NORMALISED, *_RAW)


def scores(
    examples: Sequence[Example],
    predictions: Mapping[str, str] | Sequence[Prediction],
    *,
    normalisation: str = "vqa",
) -> Scores:
    """Score of every row under every metric that takes it; a metric that takes no row is left out.

    Raises:
        InputError: ids do not match one to one, an example asks for a report, or no such normalisation.
    """
    pairs = pair_with_predictions(examples, predictions)
    report = next((example.id for example, _ in pairs if example.kind == "report"), None)
    if report is not None:
        raise InputError(
            f"example '{report}' asks for a report, not an answer. Score it with the report task."
        )
    table: Scores = {name: {} for name in METRICS}
    for example, text in pairs:
        said, meant = normalise(text, normalisation), normalise(example.answer, normalisation)
        for name, (takes, score) in _NORMALISED.items():
            if takes(example):
                table[name][example.id] = score(said, meant)
        for name, (takes, score) in _RAW.items():
            if takes(example):
                table[name][example.id] = score(text, example.answer)
    return {name: rows for name, rows in table.items() if rows}


def summarise(table: Scores, examples: Sequence[Example], *, resamples: int = RESAMPLES) -> dict[str, Metric]:
    """The mean of each metric over its rows, with intervals that resample the images of `examples`."""
    if not table:
        return {}
    cluster = {example.id: example.images for example in examples}
    index = {images: at for at, images in enumerate(dict.fromkeys(cluster.values()))}
    sums, counts = np.zeros((2, len(table), len(index)))
    for row, rows in enumerate(table.values()):
        held = [index[images] for images in dict.fromkeys(cluster[id] for id in rows)]
        sums[row, held], counts[row, held] = by_cluster(rows, cluster)
    intervals = bootstrap_means(sums, counts, resamples=resamples)
    return {
        name: Metric(interval.value, interval.low, interval.high, len(rows), int((counts[row] > 0).sum()))
        for row, ((name, rows), interval) in enumerate(zip(table.items(), intervals, strict=True))
    }


def score_vqa(
    examples: Sequence[Example],
    predictions: Mapping[str, str] | Sequence[Prediction],
    *,
    normalisation: str = "vqa",
    resamples: int = RESAMPLES,
) -> dict[str, Metric]:
    """Every metric of this module for one set of predictions, joined to the examples by id.

    Args:
        examples: the rows of a split, references included.
        predictions: id -> answer text, or `Prediction`s in any order.
        normalisation: of texts before exact match and token overlap; `none` or `vqa` (metrics named after
            LLaVA-Med always use its own).
        resamples: draws of the bootstrap.

    Raises:
        InputError: ids do not match one to one, an example asks for a report, or no such normalisation.
    """
    return summarise(
        scores(examples, predictions, normalisation=normalisation), examples, resamples=resamples
    )
