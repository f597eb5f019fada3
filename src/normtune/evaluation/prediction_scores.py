"""Everything that `metrics.json` says about predictions: scores, strata, choices, reliance and confidence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from normtune.data.records import Example, Prediction
from normtune.evaluation import image_reliance
from normtune.evaluation.choices import choice_report
from normtune.evaluation.results import Evaluation
from normtune.evaluation.score_files import clinical_table
from normtune.metrics.answers import Metric, count_ignored_signs, score_rows, summarise_scores
from normtune.metrics.calibration import abstention_report, confidence_report
from normtune.metrics.conformal import conformal_report
from normtune.metrics.metric_models import MetricModel, model_folder
from normtune.metrics.reports import text_pairs
from normtune.metrics.strata import score_strata
from normtune.metrics.sum_metrics import SumMetric
from normtune.metrics.table import metric_table, summarize_metrics


def compute_scores(
    examples: Sequence[Example],
    predictions: Sequence[Prediction],
    controls: Mapping[str, Sequence[Prediction]],
    normalisation: str | Sequence[str],
    models: Mapping[str, MetricModel],
) -> dict[str, Any]:
    """Compute all scores of the predictions, and the scores with control images if there are any.

    The metrics that need a model do not score the control images.

    Returns:
        `metrics`; with metric models `metric_models` (see `score_with_models`) and `row_scores`, the scores of each
        row: metric -> row id -> score; `strata` (see `score_strata`); for reports that mention findings `findings`:
        labeller -> finding -> precision, recall, f1 and counts; with controls `reliance` (see `image_reliance`);
        for answers `signs_ignored` (see `count_ignored_signs`), with options `choices` (see `choice_report`), with
        other images `grounding` (see `grounding_scores`);
        `limit_reached`: the share of the generated answers that reached the token limit.
    """
    table = metric_table(examples, predictions, normalisation, bertscore=model_folder(models, "bertscore"))
    clinical: dict[str, SumMetric] = {}
    recorded: dict[str, Any] = {}
    if not isinstance(normalisation, str):
        clinical, recorded = clinical_table(text_pairs(examples, predictions), models)
    table |= clinical
    scores: dict[str, Any] = {"metrics": summarize_metrics(table, examples), "strata": score_strata(examples, table)}
    scores |= {name: values for name, values in recorded.items() if values}
    if models:
        names = [name for name in table if name in clinical or name.startswith("bertscore")]
        scores["row_scores"] = {name: table[name].by_row() for name in names if table[name].is_mean}
    if isinstance(normalisation, str):
        scores["signs_ignored"] = count_ignored_signs(examples, predictions, normalisation)
        if any(example.options for example in examples):
            scores["choices"] = choice_report(examples, predictions)
    if controls:
        control_tables = {name: metric_table(examples, rows, normalisation) for name, rows in controls.items()}
        scores["reliance"] = image_reliance.image_reliance(examples, table, control_tables)
        if isinstance(normalisation, str) and "other" in controls:
            scores["grounding"] = image_reliance.grounding_scores(
                examples, predictions, controls["other"], scores["reliance"]["other"], normalisation
            )
    if limit_reached := _share_at_limit(examples, predictions):
        scores["limit_reached"] = asdict(limit_reached)
    return scores


def describe_confidence(
    examples: Sequence[Example],
    predictions: Sequence[Prediction],
    normalisation: str | Sequence[str],
    abstain_below: float | None,
    calibration: Evaluation | None,
) -> dict[str, Any]:
    """Describe how sure the model is, as far as it applies.

    Returns:
        `confidence` of answers (see `confidence_report`), `abstention` with a threshold (see `abstention_report`), and
        `conformal` with calibration rows (see `conformal_report`).
    """
    right = None
    if isinstance(normalisation, str):
        right = score_rows(examples, predictions, normalisation=normalisation)["global_exact"]
    described: dict[str, Any] = {}
    if right is not None and (report := confidence_report(examples, predictions, right)):
        described["confidence"] = report
    if abstain_below is not None:
        described["abstention"] = abstention_report(examples, predictions, right, abstain_below)
    if calibration is not None:
        described["conformal"] = conformal_report(
            (calibration.examples, calibration.predictions), (examples, predictions)
        )
    return described


def _share_at_limit(examples: Sequence[Example], predictions: Sequence[Prediction]) -> Metric | None:
    """Compute the share of the generated answers that reached the token limit; None if none was generated."""
    rows = {p.id: float(p.finish_reason == "length") for p in predictions if p.finish_reason is not None}
    return summarise_scores({"limit_reached": rows}, examples)["limit_reached"] if rows else None
