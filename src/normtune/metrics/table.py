"""Every metric of a task, row by row, so that it can be summarised over all rows, over a part, or paired."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from normtune.data.records import Example, Prediction
from normtune.metrics import answers, reports
from normtune.metrics.answers import Metric
from normtune.metrics.statistics import RESAMPLES
from normtune.metrics.sum_metrics import SumMetric, mean_metric

HEADLINES = (  # what strata and replaced images are scored by
    "global_exact",
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
) -> dict[str, SumMetric]:
    """Every metric of answers (one normalisation) or of reports (several), joined by id.

    Raises:
        InputError: ids do not match one to one, or there is no such normalisation.
    """
    if isinstance(normalisation, str):
        found = answers.scores(examples, predictions, normalisation=normalisation)
        return {name: mean_metric(rows) for name, rows in found.items()}
    return reports.report_table(reports.text_pairs(examples, predictions), normalisations=normalisation)


def summarize_metrics(
    table: Mapping[str, SumMetric], examples: Sequence[Example], *, resamples: int = RESAMPLES
) -> dict[str, Metric]:
    """Each metric of `metric_table` with the interval from resampling the images of `examples`."""
    if examples[0].kind == "report":
        return reports.summarise(table, examples, resamples=resamples)
    scores = {name: metric.by_row() for name, metric in table.items()}
    return answers.summarise(scores, examples, resamples=resamples)


def headline_metrics(table: Mapping[str, SumMetric]) -> dict[str, SumMetric]:
    """Those of `HEADLINES` that the table has, in their order."""
    return {name: table[name] for name in HEADLINES if name in table}
