"""Prediction sets of closed questions and choices that contain the right answer with a probability of 90% or 95%.

Split conformal prediction (Vovk et al. 2005; Papadopoulos et al. 2002): a candidate is in the set of a question if
one minus its probability share is at most a threshold (Sadinle et al. 2019), and the threshold is a quantile of one
minus the share of the right answer on other rows, the *calibration* rows.

Questions about one image are not independent, so that the quantile is taken over images, or patients where the data
name patients (hierarchical conformal prediction: Lee, Barber and Willett 2023; Dunn, Wasserman and Ramdas 2023): each
of the K calibration images has the weight 1/(K + 1), divided evenly among its questions, and the rest of the weight is
at infinity. If the images of both sets are a random sample of the same images, a set contains the right answer to a
random question about a new image with at least the stated probability. This holds for any model; a bad model has large
sets. It does not hold for each image, each kind of question, or for another hospital.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from normtune.data.records import Example, Prediction
from normtune.metrics.answers import summarise_scores
from normtune.metrics.normalisation import normalise
from normtune.metrics.statistics.intervals import Floats
from normtune.metrics.sum_metrics import cluster_rows

LEVELS = (0.9, 0.95)


@dataclass
class CandidateRows:
    """Questions with probabilities of candidates or options, if one of these is the answer."""

    examples: list[Example] = field(default_factory=list)  # the questions
    shares: list[list[float]] = field(default_factory=list)  # each question's shares of the candidates
    scores: list[float] = field(default_factory=list)  # one minus the share of the right answer
    left_out: int = 0  # number of questions for which no candidate is the answer

    @classmethod
    def select(cls, examples: Sequence[Example], predictions: Sequence[Prediction]) -> CandidateRows:
        """Select these questions; both sequences have the same order."""
        rows = cls()
        for example, prediction in zip(examples, predictions, strict=True):
            candidates, shares = _shares(example, prediction)
            position = _position(example.answer, candidates)
            if position is not None:
                rows.examples.append(example)
                rows.shares.append(shares)
                rows.scores.append(1 - shares[position])
            elif candidates:
                rows.left_out += 1
        return rows


def _shares(example: Example, prediction: Prediction) -> tuple[list[str], list[float]]:
    """The candidates or options of a question, and their shares by the first scoring; empty without probabilities."""
    if prediction.shares is not None:
        return list(prediction.shares), list(prediction.shares.values())
    likelihoods = next(iter(prediction.choice.scores.values()), None) if prediction.choice is not None else None
    if likelihoods is None or all(value is None for value in likelihoods):
        return [], []
    logs = np.array([-math.inf if value is None else value for value in likelihoods])
    shares = np.exp(logs - logs.max())
    return list(example.options), (shares / shares.sum()).tolist()


def _position(answer: str, candidates: Sequence[str]) -> int | None:
    """The position of the same text, else of a text that is the same after normalisation; None if there is none."""
    if answer not in candidates:
        answer, candidates = normalise(answer), [normalise(candidate) for candidate in candidates]
    return candidates.index(answer) if answer in candidates else None


def conformal_threshold(scores: Floats, clusters: Sequence[str], level: float) -> float:
    """Compute the threshold of the score with which a set contains the right answer with a probability of `level`.

    Args:
        scores: one minus the share of the right answer, [rows].
        clusters: the image or patient of each row.
        level: such as 0.9.

    Returns:
        The threshold; infinity, so that a set contains all candidates, if there are fewer than level / (1 - level)
        clusters (9 at 90%, 19 at 95%).
    """
    sizes = Counter(clusters)
    weights = np.array([1 / sizes[name] for name in clusters]) / (len(sizes) + 1)
    order = np.argsort(scores, kind="stable")
    # a sum of weights that is the level up to rounding reaches it
    reached = np.flatnonzero(np.cumsum(weights[order]) >= level * (1 - 1e-12))
    return float(scores[order][reached[0]]) if len(reached) else math.inf


def conformal_set(shares: Mapping[str, float], threshold: float) -> list[str]:
    """Return the candidates that are in the set of a question."""
    return [candidate for candidate, share in shares.items() if 1 - share <= threshold]


def conformal_report(
    calibration: tuple[Sequence[Example], Sequence[Prediction]], test: tuple[Sequence[Example], Sequence[Prediction]]
) -> dict[str, Any] | None:
    """Calibrate prediction sets on some rows, and describe the sets of others.

    Args:
        calibration, test: examples and their predictions, in the same order; of different images.

    Returns:
        `calibration` and `test`: `rows`, `images` (clusters) and `left_out` (questions with candidates, none of which
        is the answer). `levels`: "0.9" and "0.95" -> `threshold` (None: infinity), `coverage` with its interval,
        `mean_size`, and `sizes`: number of candidates -> rows. None if either has no questions with candidates.
    """
    fitted, tested = CandidateRows.select(*calibration), CandidateRows.select(*test)
    if not fitted.examples or not tested.examples:
        return None
    cluster = cluster_rows(fitted.examples)
    clusters = [cluster[example.id] for example in fitted.examples]
    fitted_scores, tested_scores = np.array(fitted.scores), np.array(tested.scores)
    report: dict[str, Any] = {
        name: {
            "rows": len(rows.examples),
            "images": len(set(cluster_rows(rows.examples).values())),
            "left_out": rows.left_out,
        }
        for name, rows in (("calibration", fitted), ("test", tested))
    }
    report["levels"] = {}
    for level in LEVELS:
        threshold = conformal_threshold(fitted_scores, clusters, level)
        sizes = [sum(1 - share <= threshold for share in shares) for shares in tested.shares]
        covered = dict(zip((e.id for e in tested.examples), (tested_scores <= threshold).astype(float), strict=True))
        report["levels"][str(level)] = {
            "threshold": threshold if math.isfinite(threshold) else None,
            "coverage": asdict(summarise_scores({"coverage": covered}, tested.examples)["coverage"]),
            "mean_size": float(np.mean(sizes)),
            "sizes": {str(size): rows for size, rows in sorted(Counter(sizes).items())},
        }
    return report


def conformal_text(result: Mapping[str, Any]) -> list[str]:
    """Describe the `conformal` of an evaluation's record, one line for each level."""
    lines = []
    for level, sets in ((result.get("conformal") or {}).get("levels") or {}).items():
        coverage, test = sets["coverage"], result["conformal"]["test"]
        lines.append(
            f"conformal sets at {100 * float(level):g}%: {100 * coverage['value']:.1f} "
            f"[{100 * coverage['low']:.1f}, {100 * coverage['high']:.1f}] contain the answer, "
            f"{sets['mean_size']:.2f} candidates on average; {test['rows']} rows"
        )
    return lines
