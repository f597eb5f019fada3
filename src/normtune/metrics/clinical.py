"""Clinical scores of reports: F1 of finding labels (by rules or by CheXbert), and RadGraph F1.

Label F1 is named LABELLER_f1_AVERAGE_FINDINGS: `findings_rules_f1_micro_14`, `chexbert_f1_macro_5`. The 14
are CheXpert's with No Finding; the 5 are its competition's (cardiomegaly, edema, consolidation, atelectasis,
pleural effusion). Micro sums over findings, macro averages their F1, where a finding that neither side has
counts 0 as it does in scikit-learn and f1chexbert. An uncertain label counts as positive, as in f1chexbert;
R2Gen's script counts it as negative (`uncertain="negative"`). Labels are of the texts as they are, never
normalised.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from normtune.errors import InputError
from normtune.metrics.finding_rules import FINDINGS, FIVE, Status, findings
from normtune.metrics.statistics import Floats
from normtune.metrics.sum_metrics import SumMetric, mean_metric

Texts = Mapping[str, tuple[str, str]]  # row id -> prediction, reference
Labels = Mapping[str, Mapping[str, Status]]  # row id -> finding -> status
Uncertain = Literal["positive", "negative"]
_SETS = {14: FINDINGS, 5: FIVE}


def label_metrics(
    said: Labels, meant: Labels, labeller: str, *, uncertain: Uncertain = "positive"
) -> dict[str, SumMetric]:
    """Micro and macro F1 over 14 and over 5 findings; a set that no reference has is left out."""
    rows = {id: _counts(said[id], meant[id], uncertain) for id in meant}
    held = sum(row[0] + row[2] for row in (counts.reshape(3, -1) for counts in rows.values()))
    metrics = {}
    for size, names in _SETS.items():
        which = [FINDINGS.index(name) for name in names]
        if not np.any(np.asarray(held)[which]):
            continue
        for average in ("micro", "macro"):
            metrics[f"{labeller}_f1_{average}_{size}"] = SumMetric(
                rows, functools.partial(_f1, which=which, average=average)
            )
    return metrics


def _has(status: Status, uncertain: Uncertain) -> bool:
    return status == "positive" or (status == "uncertain" and uncertain == "positive")


def _counts(said: Mapping[str, Status], meant: Mapping[str, Status], uncertain: Uncertain) -> Floats:
    """True positives, false positives, false negatives of the 14 findings, one after the other: [42]."""
    ours = np.array([_has(said[name], uncertain) for name in FINDINGS])
    theirs = np.array([_has(meant[name], uncertain) for name in FINDINGS])
    return np.concatenate([ours & theirs, ours & ~theirs, ~ours & theirs]).astype(np.float64)


def _f1(sums: Floats, which: Sequence[int], average: str) -> Floats:
    """F1 from summed counts, [m, 42] -> [m]."""
    true, false, missed = np.moveaxis(sums.reshape(len(sums), 3, -1)[:, :, which], 1, 0)  # each [m, findings]
    if average == "micro":
        true, false, missed = (part.sum(axis=1, keepdims=True) for part in (true, false, missed))
    spread = 2 * true + false + missed
    found: Floats = np.divide(2 * true, spread, out=np.zeros_like(spread), where=spread > 0).mean(axis=1)
    return found


def finding_table(
    said: Labels, meant: Labels, *, uncertain: Uncertain = "positive"
) -> dict[str, dict[str, float | int]]:
    """Precision, recall, F1 and how often each side has each finding; 0 where a share is of nothing."""
    total = np.sum([_counts(said[id], meant[id], uncertain) for id in meant], axis=0).reshape(3, -1)
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


def rules_labels(texts: Texts) -> tuple[dict[str, dict[str, Status]], dict[str, dict[str, Status]]]:
    """`findings_rules`' labels of predictions and of references."""
    return (
        {id: findings(said) for id, (said, _) in texts.items()},
        {id: findings(meant) for id, (_, meant) in texts.items()},
    )


def rules_metrics(texts: Texts) -> dict[str, SumMetric]:
    """Label F1 by `findings_rules`; nothing where no reference speaks of any finding, as of other organs."""
    said, meant = rules_labels(texts)
    return label_metrics(said, meant, "findings_rules") if mentions_any_finding(meant) else {}


def mentions_any_finding(labels: Labels) -> bool:
    """Whether any report mentions any finding, if only to deny it."""
    return any(
        status != "absent" for row in labels.values() for name, status in row.items() if name != "No Finding"
    )


def chexbert_labels(
    texts: Texts, weights: Path | str, *, device: str | None = None
) -> tuple[dict[str, dict[str, Status]], dict[str, dict[str, Status]]]:
    """CheXbert's labels of predictions and of references (Smit et al. 2020).

    Raises:
        InputError: the directory does not hold `chexbert.pth` and `vocab.txt`, or they are damaged.
    """
    from normtune.metrics.chexbert import chexbert

    label = chexbert(weights, device=device)
    said = dict(zip(texts, label([said for said, _ in texts.values()]), strict=True))
    meant = dict(zip(texts, label([meant for _, meant in texts.values()]), strict=True))
    return said, meant


def radgraph_metrics(texts: Texts, model_type: str = "radgraph-xl") -> dict[str, SumMetric]:
    """RadGraph F1 (Delbrouck et al. 2022), mean over rows: entities; with relations; with their kinds too.

    Raises:
        InputError: the package or its weights are not there.
    """
    try:
        from radgraph import F1RadGraph
    except ImportError as error:
        raise InputError(
            "RadGraph F1 needs the package radgraph, which is not installed. "
            "Run: pip install 'normtune[clinical]'."
        ) from error
    try:
        scorer: Any = F1RadGraph(reward_level="all", model_type=model_type)
    except Exception as error:  # its download wraps whatever failed in a bare Exception
        raise InputError(
            f"cannot load RadGraph's model {model_type} ({type(error).__name__}). "
            "Fetch it once with the network on."
        ) from error
    _, rewards, _, _ = scorer(
        refs=[meant for _, meant in texts.values()], hyps=[said for said, _ in texts.values()]
    )
    levels = ("simple", "partial", "complete")
    return {
        f"radgraph_f1_{level}": mean_metric(dict(zip(texts, map(float, rows), strict=True)))
        for level, rows in zip(levels, rewards, strict=True)
    }
