"""Computes every metric of a task row by row.

The result can be summarised over all rows or over a stratum, or paired with another run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from normtune.data.records import Example, Prediction
from normtune.metrics import answers, reports
from normtune.metrics.answers import Metric
from normtune.metrics.sum_metrics import SumMetric, mean_metric

# The metrics that are reported for strata and for control images.
HEADLINE_METRICS = (
    "global_exact",
    "choice_accuracy",
    "closed_label",
    "open_exact",
    "open_recall",
    "rouge_l/none",
    "bleu_4/none",
    "cider_d/none",
    "findings_rules_f1_micro_14",
)


def metric_table(
    examples: Sequence[Example],
    predictions: Mapping[str, str] | Sequence[Prediction],
    normalisation: str | Sequence[str],
    *,
    bertscore: Path | None = None,
) -> dict[str, SumMetric]:
    """Compute every metric of answers (one normalisation) or of reports (several normalisations).

    Args:
        examples: the rows with their references; all questions, or all report requests.
        predictions: id -> text, or `Prediction`s in any order; joined to the examples by id.
        normalisation: one name for answers, several names for reports.
        bertscore: local directory of the model for BERTScore of reports; None omits it.

    Returns:
        Metric name -> metric.

    Raises:
        InputError: if ids do not match one to one, or a normalisation is unknown.
    """
    if isinstance(normalisation, str):
        scores = answers.score_rows(examples, predictions, normalisation=normalisation)
        return {name: mean_metric(rows) for name, rows in scores.items()}
    pairs = reports.text_pairs(examples, predictions)
    return reports.report_table(pairs, normalisations=normalisation, bertscore=bertscore)


def summarize_metrics(table: Mapping[str, SumMetric], examples: Sequence[Example]) -> dict[str, Metric]:
    """Summarise each metric of `metric_table`, with its interval clustered by image or patient."""
    if examples[0].kind == "report":
        return reports.summarise_reports(table, examples)
    scores = {name: metric.by_row() for name, metric in table.items()}
    return answers.summarise_scores(scores, examples)


def headline_metrics(table: Mapping[str, SumMetric]) -> dict[str, SumMetric]:
    """Select the `HEADLINE_METRICS` that the table has, in their order."""
    return {name: table[name] for name in HEADLINE_METRICS if name in table}
