"""Confidence: how well it agrees with the share of right answers, and what abstaining from unsure answers gains.

==================  ====================================================================================================
name                definition
==================  ====================================================================================================
confidence          exp of `Prediction.score`: the geometric mean of the probabilities of its tokens; of a closed
                    question with candidates, the chosen candidate's share of their probabilities
`overconfidence`    mean confidence - share of right answers
`ece`               expected calibration error (Naeini et al. 2015; Guo et al. 2017): the mean over rows of |share of
                    right answers - mean confidence| of the row's bin; `BINS` bins of equal width
`risk_coverage`     the share of wrong answers among the most confident answers, for several shares of all answers
`aurc`              area under this curve (Geifman and El-Yaniv 2017): the mean of the risk over all coverages. Rows of
                    equal confidence count with their mean error, so that the order of the rows does not matter
==================  ====================================================================================================

Intervals are by image, or by patient where the data name patients.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from normtune.data.records import Example, Prediction, is_abstained
from normtune.metrics.answers import Metric, summarise_scores
from normtune.metrics.statistics.intervals import (
    Floats,
    Interval,
    difference_interval,
    influence_of_mean,
    mean_interval,
    ratio_interval,
    satterthwaite_df,
)
from normtune.metrics.sum_metrics import cluster_rows
from normtune.runtime.number_format import format_interval

BINS = 10  # bins of equal width, for the calibration error
COVERAGES = tuple(share / 10 for share in range(1, 11))  # points of the risk-coverage curve
DRAWS = 2_000  # random draws of the calibration error
MAX_BLOCKS = 500  # the jackknife of the area leaves out one cluster at a time, or one of at most this many blocks


@dataclass(frozen=True)
class ConfidentRows:
    """Answers with their confidence."""

    confidence: Floats  # from 0 to 1, [rows]
    right: Floats  # 1 for a right answer, 0 for a wrong one, [rows]
    cluster: NDArray[np.int64]  # the index of the row's image or patient, [rows]

    def sums(self, values: Floats) -> Floats:
        """Sum values of rows, [rows], over each cluster, [clusters]."""
        sums: Floats = np.bincount(self.cluster, values, minlength=int(self.cluster.max()) + 1).astype(np.float64)
        return sums

    def where(self, rows: NDArray[np.bool_]) -> ConfidentRows:
        """Select rows, and number their clusters anew."""
        cluster: NDArray[np.int64] = np.unique(self.cluster[rows], return_inverse=True)[1]
        return ConfidentRows(self.confidence[rows], self.right[rows], cluster)

    def accuracy(self) -> Interval:
        """Compute the share of right answers with its interval."""
        right = self.sums(self.right)
        return mean_interval(right, right, self.sums(np.ones(len(self.right))))


def confidence_report(
    examples: Sequence[Example], predictions: Sequence[Prediction], right: Mapping[str, float]
) -> dict[str, Any] | None:
    """Describe the confidence of answers: calibration and the risk-coverage curve.

    Args:
        examples: the evaluated questions.
        predictions: one for each example, in their order.
        right: example id -> 1 if the answer is right, else 0.

    Returns:
        "all", and each kind of question if there are several -> the fields of this module's table, `rows`, `images`,
        `mean_confidence`, `right` and `bins`. `without_confidence` counts the rows that are left out because their
        probability is 0 or unknown. None if no prediction has a confidence, as with a baseline.
    """
    clusters = cluster_rows(examples)
    index = {name: at for at, name in enumerate(dict.fromkeys(clusters.values()))}
    confident = [(e, p.confidence) for e, p in zip(examples, predictions, strict=True) if p.confidence is not None]
    if not confident:
        return None
    rows = ConfidentRows(
        np.array([value for _, value in confident]),
        np.array([right[example.id] for example, _ in confident]),
        np.array([index[clusters[example.id]] for example, _ in confident]),
    )
    kinds = np.array([example.kind for example, _ in confident])
    images = np.array([str(example.images) for example, _ in confident])
    groups = {"all": np.ones(len(kinds), bool)}
    if len(set(kinds)) > 1:
        groups |= {kind: kinds == kind for kind in sorted(set(kinds))}
    report = {
        name: {"images": len(set(images[inside])), **_describe(rows.where(inside))} for name, inside in groups.items()
    }
    report["all"]["without_confidence"] = len(examples) - len(confident)
    return report


def _describe(rows: ConfidentRows) -> dict[str, Any]:
    return {
        "rows": len(rows.right),
        "mean_confidence": float(rows.confidence.mean()),
        "right": asdict(rows.accuracy()),
        "overconfidence": asdict(overconfidence(rows)),
        "ece": {**asdict(calibration_error(rows)), "bins": BINS, "binning": "equal width"},
        "aurc": asdict(area_under_risk_coverage(rows)),
        "bins": reliability_bins(rows),
        "risk_coverage": risk_coverage(rows),
    }


def overconfidence(rows: ConfidentRows) -> Interval:
    """Compute mean confidence minus share of right answers: positive if the model is too sure."""
    counts = rows.sums(np.ones(len(rows.right)))
    value = float((rows.confidence - rows.right).mean())
    if len(counts) < 2:
        return Interval(value, -1.0, 1.0)
    influence = influence_of_mean(rows.sums(rows.confidence - rows.right), counts)
    df = satterthwaite_df(counts)
    low, high, _ = difference_interval(value, float((influence**2).sum()), df, clusters=len(counts))
    return Interval(value, low, high)


def _bin_of(confidence: Floats) -> NDArray[np.int64]:
    """The bin of each row: [0, 0.1), [0.1, 0.2), ..., [0.9, 1]."""
    return np.digitize(confidence, np.arange(1, BINS) / BINS)


def reliability_bins(rows: ConfidentRows) -> list[dict[str, Any]]:
    """Describe each bin that has rows: its ends, its rows, their mean confidence and their share of right answers."""
    index = _bin_of(rows.confidence)
    bins = []
    for at in np.unique(index):
        inside = rows.where(index == at)
        bins.append(
            {
                "from": float(at / BINS),
                "to": float((at + 1) / BINS),
                "rows": len(inside.right),
                "confidence": float(inside.confidence.mean()),
                "right": asdict(inside.accuracy()),
            }
        )
    return bins


def calibration_error(rows: ConfidentRows) -> Interval:
    """Compute the expected calibration error and its 95% interval.

    The error is the sum of the absolute gaps of the bins, so that chance alone makes it positive: the usual estimate
    is too high for few rows. The interval inverts a test instead. It contains the errors of all gaps that are a
    multiple of the observed ones and under which the observed error is within the central 95% of its distribution.
    This distribution is drawn: the gaps plus normal noise with their covariance over clusters, with Student's t in
    place of the normal. Its lower end is 0 if the error could be chance. The error is at least the difference of mean
    confidence and share of right answers, so that both ends are at least what the interval of that share allows.
    """
    counts = rows.sums(np.ones(len(rows.right)))
    index = _bin_of(rows.confidence)
    gaps = np.stack([rows.sums((rows.right - rows.confidence) * (index == at)) for at in range(BINS)])
    means = gaps.sum(axis=1) / counts.sum()  # [bins]
    value = float(np.abs(means).sum())
    if len(counts) < 2:
        return Interval(value, 0.0, 1.0)
    accuracy, sure = rows.accuracy(), rows.confidence.mean()
    ends = sure - accuracy.high, sure - accuracy.low  # the interval of the overconfidence
    draw, df = np.random.default_rng(0), satterthwaite_df(counts)
    spread = np.sqrt(df / draw.chisquare(df, (DRAWS, 1)))
    noise = draw.standard_normal((DRAWS, len(counts))) @ influence_of_mean(gaps, counts).T * spread  # [draws, bins]

    def errors(factor: float) -> Floats:
        """The distribution of the error if the gaps are `factor` times the observed ones."""
        return np.abs(factor * means + noise).sum(axis=1)

    low = _largest(lambda factor: float(np.mean(errors(factor) >= value)) < 0.025, 1.0)
    high = _largest(lambda factor: float(np.mean(errors(factor) <= value)) > 0.025, 1 / value if value else 0.0)
    lowest, highest = max(low * value, ends[0], -ends[1]), max(high * value, ends[1], -ends[0])
    return Interval(value, min(value, lowest), min(1.0, max(value, highest)))


def _largest(holds: Callable[[float], bool], end: float) -> float:
    """The largest number from 0 to `end` for which a condition holds that only smaller numbers fulfil, by bisection."""
    low, high = 0.0, end
    if not holds(low):
        return low
    for _ in range(20):
        middle = (low + high) / 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low


def _errors_by_confidence(confidence: Floats, right: Floats) -> Floats:
    """The errors of rows that are sorted by falling confidence; of equal confidences, their mean error."""
    starts = np.flatnonzero(np.r_[True, confidence[1:] != confidence[:-1]])
    sizes = np.diff(np.r_[starts, len(confidence)])
    return np.repeat(np.add.reduceat(1 - right, starts) / sizes, sizes)


def _mean_risk(confidence: Floats, right: Floats) -> float:
    """The mean over k of the share of wrong answers among the k most confident rows."""
    errors = np.cumsum(_errors_by_confidence(confidence, right))
    return float((errors / np.arange(1, len(errors) + 1)).mean())


def area_under_risk_coverage(rows: ConfidentRows) -> Interval:
    """Compute AURC with its interval, by the jackknife over clusters (blocks of them if many)."""
    order = np.argsort(-rows.confidence, kind="stable")
    confidence, right, cluster = rows.confidence[order], rows.right[order], rows.cluster[order]
    value, clusters = _mean_risk(confidence, right), int(cluster.max()) + 1
    blocks = min(clusters, MAX_BLOCKS)
    if blocks < 2:
        return Interval(value, 0.0, 1.0)
    block = cluster % blocks
    without = np.array([_mean_risk(confidence[block != at], right[block != at]) for at in range(blocks)])
    influence = (without.mean() - without) * math.sqrt((blocks - 1) / blocks)
    return ratio_interval(value, influence, np.bincount(block).astype(float))


def risk_coverage(rows: ConfidentRows) -> list[dict[str, float]]:
    """List points of the risk-coverage curve.

    Returns:
        For each share of the rows: `coverage`, `risk` (the share of wrong answers among the most confident rows) and
        `confidence`, the lowest one among them: `abstain_below` for this coverage.
    """
    order = np.argsort(-rows.confidence, kind="stable")
    confidence = rows.confidence[order]
    errors = np.cumsum(_errors_by_confidence(confidence, rows.right[order]))
    counts = [math.ceil(share * len(errors)) for share in COVERAGES]
    return [
        {"coverage": share, "risk": float(errors[n - 1] / n), "confidence": float(confidence[n - 1])}
        for share, n in zip(COVERAGES, counts, strict=True)
    ]


def abstention_report(
    examples: Sequence[Example],
    predictions: Sequence[Prediction],
    right: Mapping[str, float] | None,
    abstain_below: float,
) -> dict[str, Any]:
    """Count the answers that are below a threshold, and score the others.

    Args:
        right: example id -> 1 if the answer is right, else 0; None for reports.

    Returns:
        `abstain_below`, `abstained` (rows), and with intervals: `coverage` (the share of the rows that are answered),
        `right_if_answered` and `right_if_abstained` (the share of right answers among both), if there are such rows.
    """
    answered = {p.id: float(not is_abstained(p.score, abstain_below)) for p in predictions}
    tables = {"coverage": answered}
    for name, group in (("right_if_answered", 1.0), ("right_if_abstained", 0.0)):
        tables[name] = {id: right[id] for id, value in answered.items() if value == group} if right else {}
    metrics: dict[str, Metric] = summarise_scores({name: rows for name, rows in tables.items() if rows}, examples)
    return {
        "abstain_below": abstain_below,
        "abstained": sum(value == 0 for value in answered.values()),
        **{name: asdict(metric) for name, metric in metrics.items()},
    }


def confidence_text(result: Mapping[str, Any]) -> list[str]:
    """Describe `confidence` and `abstention` of an evaluation's record, one line for each kind of question."""
    lines = []
    for name, report in (result.get("confidence") or {}).items():
        half = next(point for point in report["risk_coverage"] if point["coverage"] == 0.5)
        cells = (
            f"mean {100 * report['mean_confidence']:.1f}, right {100 * report['right']['value']:.1f}",
            f"ECE {format_interval(report['ece'])} ({report['ece']['bins']} bins)",
            f"AURC {format_interval(report['aurc'])}",
            f"right among the surer half {100 * (1 - half['risk']):.1f}",
        )
        lines.append(f"confidence ({name}): {', '.join(cells)}")
    if report := result.get("abstention"):
        line = f"abstained from {report['abstained']} answers with a confidence below {report['abstain_below']:g}"
        if "right_if_answered" in report:
            line += f"; right among the others: {format_interval(report['right_if_answered'])}"
        lines.append(line)
    return lines
