"""Scores of answers to questions. Each way of counting has its own metric name.

Published figures for the same model and test set differ by points because "closed" and "open" are counted
differently. Here each metric states which rows it scores and how it scores a row:

========================  ============================  =====================================================
name                      rows                          score of one row
========================  ============================  =====================================================
`closed_label`            labelled closed               exact match after normalisation
`closed_yes_no`           reference is yes or no, and   exact match ("closed" of MISS and MILE)
                          there are no options
`closed_substring`        labelled closed               reference is a substring of the prediction after
                                                        `llava-med` normalisation (so "no" is in "normal")
`open_exact`              labelled open                 exact match
`open_not_yes_no`         neither of these              exact match ("open" of MISS and MILE)
`open_recall`             labelled open                 share of the reference's tokens that the prediction
                                                        contains, each at most as often as it contains it
`open_f1`                 labelled open                 token F1 (Rajpurkar et al. 2016, SQuAD)
`open_recall_llava_med`   labelled open                 LLaVA-Med's recall: see `llava_med_recall`
`global_exact`            all                           exact match
`choice_*`                with options                  whether the right option is chosen: see
                                                        `normtune.metrics.choices`
========================  ============================  =====================================================

LLaVA-Med's released script does not count a closed row if the prediction contains "yes" or "no" but not the
reference. This hides most wrong answers, so `closed_substring` counts such a row as wrong.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from normtune.data.reading.cells import is_yes_no
from normtune.data.records import Example, Prediction
from normtune.errors import InputError
from normtune.metrics import choices
from normtune.metrics.normalisation import differ_in_signs, normalise, normalise_pair, tokens
from normtune.metrics.sum_metrics import cluster_rows, mean_metric, metric_intervals, sum_by_cluster

Scores = dict[str, dict[str, float]]  # metric -> example id -> score in [0, 1]


@dataclass(frozen=True)
class Metric:
    """A score, its 95% interval, and the rows and images that it is based on."""

    value: float
    low: float
    high: float
    rows: int
    images: int


def pair_with_predictions(
    examples: Sequence[Example], predictions: Mapping[str, str] | Sequence[Prediction]
) -> list[tuple[Example, str]]:
    """Pair each example with the text of its prediction, joined by id, in the order of the examples.

    Raises:
        InputError: if an id occurs more than once, an example has no prediction, or a prediction has no
            example. The message states how many there are and names the first.
    """
    if isinstance(predictions, Mapping):
        texts = dict(predictions)
    else:
        texts = {prediction.id: prediction.text for prediction in predictions}
        check_unique_ids([prediction.id for prediction in predictions], "predictions")
    check_unique_ids([example.id for example in examples], "examples")
    example_ids = {example.id for example in examples}
    for problem, ids in (
        ("examples have no prediction", [example.id for example in examples if example.id not in texts]),
        ("predictions have no example", [id for id in texts if id not in example_ids]),
    ):
        if ids:
            raise InputError(f"{len(ids)} {problem}, first id '{ids[0]}'. Predict exactly the rows of the split.")
    return [(example, texts[example.id]) for example in examples]


def check_unique_ids(ids: Sequence[str], what: str) -> None:
    """Check that no id occurs more than once; `what` names the ids' owners in the error ("examples").

    Raises:
        InputError: if one does. The message states how many there are and names the first.
    """
    if len(set(ids)) < len(ids):
        repeated = [id for id, times in Counter(ids).items() if times > 1]
        raise InputError(
            f"{len(repeated)} ids occur more than once in the {what}, first '{repeated[0]}'. Keep one each."
        )


def exact_match(prediction: str, reference: str) -> float:
    """Return 1.0 if the two normalised texts are equal, else 0.0."""
    return float(prediction == reference)


def token_recall(prediction: str, reference: str) -> float:
    """Share of the reference's tokens that the prediction contains, with clipped counts.

    A token counts at most as often as the prediction contains it. If the reference is empty, the recall is
    1.0 for an empty prediction, else 0.0.
    """
    return _overlap(prediction, reference)[1]


def token_f1(prediction: str, reference: str) -> float:
    """Harmonic mean of token precision and recall (SQuAD; Rajpurkar et al. 2016)."""
    precision, recall = _overlap(prediction, reference)
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def _overlap(prediction: str, reference: str) -> tuple[float, float]:
    """Compute token precision and recall with clipped counts."""
    predicted, expected = Counter(tokens(prediction)), Counter(tokens(reference))
    if not predicted or not expected:
        return (1.0, 1.0) if predicted == expected else (0.0, 0.0)
    common = (predicted & expected).total()  # `&` takes the smaller count of each token
    return common / predicted.total(), common / expected.total()


def llava_med_recall(prediction: str, reference: str) -> float:
    """Compute recall as LLaVA-Med does, from raw texts (Li et al. 2023, section 5; its calculate_f1score).

    It is tp / (tp + fn). Here tp counts every *occurrence in the prediction* of a word that the reference
    has, and fn counts the reference's occurrences of words that the prediction lacks. Repeating a correct
    word therefore raises the score: "left left left" scores 3/4 against "left kidney", and "left" scores 1/2.
    Both texts are normalised twice, as in the published code. The score is 0.0 if either text is empty.
    """
    predicted, expected = (
        Counter(normalise(normalise(text, "llava-med"), "llava-med").split()) for text in (prediction, reference)
    )
    true_positives = sum(times for word, times in predicted.items() if word in expected)
    false_negatives = sum(times for word, times in expected.items() if word not in predicted)
    return true_positives / (true_positives + false_negatives) if true_positives else 0.0


def closed_substring(prediction: str, reference: str) -> float:
    """Return 1.0 if the prediction contains the reference, else 0.0: LLaVA-Med's score of closed answers.

    A reference of which the normalisation leaves nothing, such as the option "A", must be a word of the prediction.
    """
    if normalise(reference, "llava-med"):
        return float(normalise(reference, "llava-med") in normalise(prediction, "llava-med"))
    texts = normalise_pair(prediction, reference, "llava-med")
    return float(bool(texts[1]) and f" {texts[1]} " in f" {texts[0]} ")


def is_exact(prediction: str, reference: str, normalisation: str = "vqa") -> bool:
    """Whether the exact-match metrics count a prediction as right."""
    return exact_match(*normalise_pair(prediction, reference, normalisation)) == 1.0


def count_ignored_signs(
    examples: Sequence[Example], predictions: Mapping[str, str] | Sequence[Prediction], normalisation: str = "vqa"
) -> int:
    """Count the rows that `global_exact` scores as right only because the normalisation drops signs, as in "<5 mm"."""
    return sum(
        differ_in_signs(text, example.answer) and is_exact(text, example.answer, normalisation)
        for example, text in pair_with_predictions(examples, predictions)
    )


def ignored_signs_text(result: Mapping[str, Any]) -> list[str]:
    """Say how many rows are right only because signs are dropped (`signs_ignored` of a result); nothing if none."""
    rows = result.get("signs_ignored")
    ending = "only because the normalisation drops signs such as + - < >, or separators in numbers"
    return [f"{rows} {'row is' if rows == 1 else 'rows are'} right {ending}"] if rows else []


def _is_yes_no(example: Example) -> bool:
    return is_yes_no(example.answer) and not example.options


def _is_closed(example: Example) -> bool:
    return example.kind == "closed"


def _is_open(example: Example) -> bool:
    return example.kind == "open"


_Filter = Callable[[Example], bool]  # whether a metric scores an example
_Score = Callable[[str, str], float]  # (prediction, reference) -> score
# Metrics of normalised texts, and metrics of raw texts that normalise in their own way.
_NORMALISED: dict[str, tuple[_Filter, _Score]] = {
    "closed_label": (_is_closed, exact_match),
    "closed_yes_no": (_is_yes_no, exact_match),
    "open_exact": (_is_open, exact_match),
    "open_not_yes_no": (lambda example: not (example.options or _is_yes_no(example)), exact_match),
    "open_recall": (_is_open, token_recall),
    "open_f1": (_is_open, token_f1),
    "global_exact": (lambda example: True, exact_match),
}
_RAW: dict[str, tuple[_Filter, _Score]] = {
    "closed_substring": (_is_closed, closed_substring),
    "open_recall_llava_med": (_is_open, llava_med_recall),
}
METRICS = (*_NORMALISED, *_RAW)


def score_rows(
    examples: Sequence[Example], predictions: Mapping[str, str] | Sequence[Prediction], *, normalisation: str = "vqa"
) -> Scores:
    """Score every row under every metric that applies to it. A metric without rows is omitted.

    Raises:
        InputError: if ids do not match one to one, an example asks for a report, or the normalisation is
            unknown.
    """
    pairs = pair_with_predictions(examples, predictions)
    report = next((example.id for example, _ in pairs if example.kind == "report"), None)
    if report is not None:
        raise InputError(f"example '{report}' asks for a report, not an answer. Score it with the report task.")
    table: Scores = {name: {} for name in METRICS}
    for example, text in pairs:
        prediction, reference = normalise_pair(text, example.answer, normalisation)
        for name, (applies_to, score) in _NORMALISED.items():
            if applies_to(example):
                table[name][example.id] = score(prediction, reference)
        for name, (applies_to, score) in _RAW.items():
            if applies_to(example):
                table[name][example.id] = score(text, example.answer)
    table |= choices.choice_scores(examples, predictions)
    return {name: rows for name, rows in table.items() if rows}


def summarise_scores(table: Scores, examples: Sequence[Example]) -> dict[str, Metric]:
    """Compute the mean of each metric over its rows, with its interval clustered by image or patient."""
    cluster = {example.id: example.images for example in examples}
    metrics = {name: mean_metric(rows) for name, rows in table.items()}
    results = {}
    for name, interval in metric_intervals(metrics, cluster_rows(examples)).items():
        # The sums of the images are added, as earlier versions do: the last bit depends on the order of a sum.
        sums = np.ascontiguousarray(sum_by_cluster(metrics[name].row_statistics, cluster).T)  # [2, images]
        total, rows = sums.sum(axis=1)
        images = int(np.count_nonzero(sums[1]))
        results[name] = Metric(float(total / rows), interval.low, interval.high, len(table[name]), images)
    return results


def score_vqa(
    examples: Sequence[Example], predictions: Mapping[str, str] | Sequence[Prediction], *, normalisation: str = "vqa"
) -> dict[str, Metric]:
    """Compute every metric of this module for one set of predictions, joined to the examples by id.

    Args:
        examples: the rows of a split with their references.
        predictions: id -> answer text, or `Prediction`s in any order.
        normalisation: applied to texts before exact match and token overlap; `none` or `vqa`. Metrics named
            after LLaVA-Med always use LLaVA-Med's normalisation.

    Returns:
        Metric name -> mean with its interval. A metric without rows is omitted.

    Raises:
        InputError: if ids do not match one to one, an example asks for a report, or the normalisation is
            unknown.
    """
    return summarise_scores(score_rows(examples, predictions, normalisation=normalisation), examples)
