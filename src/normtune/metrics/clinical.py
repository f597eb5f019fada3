"""Clinical scores of reports: F1 of finding labels (by rules or by CheXbert), and RadGraph F1.

The name of a label F1 is LABELLER_f1_AVERAGE_FINDINGS: `findings_rules_f1_micro_14`, `chexbert_f1_macro_5`.

- The 14 findings are those of CheXpert with No Finding. The 5 findings are those of its competition
  (cardiomegaly, edema, consolidation, atelectasis, pleural effusion).
- The micro average sums the counts over findings. The macro average is the mean of the findings' F1; a
  finding that neither side has counts as 0, as in scikit-learn and f1chexbert.
- An uncertain label counts as positive, as in f1chexbert. R2Gen's script counts it as negative
  (`uncertain="negative"`).
- Labels are computed from the original texts, never from normalised ones.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from normtune.errors import InputError
from normtune.metrics.finding_rules import FINDINGS, FIVE_FINDINGS, Status, extract_findings
from normtune.metrics.statistics.intervals import Floats
from normtune.metrics.sum_metrics import SumMetric, mean_metric

Texts = Mapping[str, tuple[str, str]]  # row id -> (prediction, reference)
Labels = Mapping[str, Mapping[str, Status]]  # row id -> finding -> status
Uncertain = Literal["positive", "negative"]  # what an uncertain label counts as
_SETS = {14: FINDINGS, 5: FIVE_FINDINGS}  # number of findings -> their names


def label_metrics(
    predictions: Labels, references: Labels, labeller: str, *, uncertain: Uncertain = "positive"
) -> dict[str, SumMetric]:
    """Build the micro and macro F1 over 14 and over 5 findings.

    A set of findings is omitted if no reference has any of them.

    Args:
        predictions: labels of the predictions.
        references: labels of the references.
        labeller: first part of the metrics' names.
        uncertain: what an uncertain label counts as.
    """
    rows = {id: _count_labels(predictions[id], references[id], uncertain) for id in references}
    # True positives plus false negatives: how many references have each finding, [14].
    reference_counts = sum(row[0] + row[2] for row in (counts.reshape(3, -1) for counts in rows.values()))
    metrics = {}
    for size, names in _SETS.items():
        columns = [FINDINGS.index(name) for name in names]
        if not np.any(np.asarray(reference_counts)[columns]):
            continue
        for average in ("micro", "macro"):
            metrics[f"{labeller}_f1_{average}_{size}"] = SumMetric(
                rows, functools.partial(_f1, columns=columns, average=average)
            )
    return metrics


def _is_positive(status: Status, uncertain: Uncertain) -> bool:
    return status == "positive" or (status == "uncertain" and uncertain == "positive")


def _count_labels(prediction: Mapping[str, Status], reference: Mapping[str, Status], uncertain: Uncertain) -> Floats:
    """Count one row: true positives [14], then false positives [14], then false negatives [14], as [42]."""
    predicted = np.array([_is_positive(prediction[name], uncertain) for name in FINDINGS])
    expected = np.array([_is_positive(reference[name], uncertain) for name in FINDINGS])
    return np.concatenate([predicted & expected, predicted & ~expected, ~predicted & expected]).astype(np.float64)


def _f1(sums: Floats, columns: Sequence[int], average: str) -> Floats:
    """Compute F1 = 2 TP / (2 TP + FP + FN) from summed counts, [n, 42] -> [n]."""
    # [n, 42] -> [n, 3, 14] -> [n, 3, findings] -> three times [n, findings]
    true, false, missed = np.moveaxis(sums.reshape(len(sums), 3, -1)[:, :, columns], 1, 0)
    if average == "micro":
        true, false, missed = (counts.sum(axis=1, keepdims=True) for counts in (true, false, missed))
    total = 2 * true + false + missed
    f1: Floats = np.divide(2 * true, total, out=np.zeros_like(total), where=total > 0).mean(axis=1)
    return f1


def finding_table(predictions: Labels, references: Labels) -> dict[str, dict[str, float | int]]:
    """Compute precision, recall and F1 of each finding, and how many predictions and references have it.

    A share with the denominator 0 is 0.
    """
    rows = [_count_labels(predictions[id], references[id], "positive") for id in references]
    total = np.sum(rows, axis=0).reshape(3, -1)  # [3, findings]
    table: dict[str, dict[str, float | int]] = {}
    for name, (true, false, missed) in zip(FINDINGS, total.T.tolist(), strict=True):
        table[name] = {
            "precision": true / (true + false) if true + false else 0.0,
            "recall": true / (true + missed) if true + missed else 0.0,
            "f1": 2 * true / (2 * true + false + missed) if true else 0.0,
            "predictions": int(true + false),
            "references": int(true + missed),
        }
    return table


def label_with_rules(texts: Texts) -> tuple[dict[str, dict[str, Status]], dict[str, dict[str, Status]]]:
    """Label predictions and references with `findings_rules`."""
    predictions, references = ({id: extract_findings(pair[side]) for id, pair in texts.items()} for side in (0, 1))
    return predictions, references


def rules_metrics(texts: Texts) -> dict[str, SumMetric]:
    """Build the label F1 of `findings_rules`.

    The result is empty if no reference mentions any finding, for example in reports of other organs.
    """
    labels = label_with_rules(texts)  # labels of predictions, and labels of references
    return label_metrics(*labels, "findings_rules") if mentions_any_finding(labels[1]) else {}


def mentions_any_finding(labels: Labels) -> bool:
    """Whether any report mentions any finding, including findings that it denies."""
    return any(status != "absent" for row in labels.values() for name, status in row.items() if name != "No Finding")


def label_with_chexbert(
    texts: Texts, weights: Path | str, *, device: str | None = None
) -> tuple[dict[str, dict[str, Status]], dict[str, dict[str, Status]]]:
    """Label predictions and references with CheXbert (Smit et al. 2020).

    Raises:
        InputError: if the directory does not contain `chexbert.pth` and `vocab.txt`, or they are damaged.
    """
    from normtune.metrics.chexbert import load_chexbert

    label = load_chexbert(weights, device=device)
    predictions = dict(zip(texts, label([prediction for prediction, _ in texts.values()]), strict=True))
    references = dict(zip(texts, label([reference for _, reference in texts.values()]), strict=True))
    return predictions, references


def radgraph_metrics(texts: Texts) -> dict[str, SumMetric]:
    """Build RadGraph F1 (Delbrouck et al. 2022) as means over rows, in three levels.

    `simple` compares entities, `partial` also their relations, and `complete` also the kinds of relations.

    Raises:
        InputError: if the package or its weights are missing.
    """
    try:
        from radgraph import F1RadGraph
    except ImportError as error:
        raise InputError(
            "RadGraph F1 needs the package radgraph, which is not installed. Run: pip install 'normtune[clinical]'."
        ) from error
    model = "radgraph-xl"
    try:
        scorer: Any = F1RadGraph(reward_level="all", model_type=model)
    except Exception as error:  # the package raises a bare Exception if the download fails
        raise InputError(
            f"cannot load RadGraph's model {model} ({type(error).__name__}). Download it once with a network "
            "connection; with transformers 5, use --metric-model radgraph=DIR, since radgraph 0.1.18 fails there."
        ) from error
    _, rewards, _, _ = scorer(
        refs=[reference for _, reference in texts.values()], hyps=[prediction for prediction, _ in texts.values()]
    )
    levels = ("simple", "partial", "complete")
    return {
        f"radgraph_f1_{level}": mean_metric(dict(zip(texts, map(float, rows), strict=True)))
        for level, rows in zip(levels, rewards, strict=True)
    }
