"""Runs the metrics of the real RadEval, with tiny models of random weights.

RadEval needs other versions of numpy than Normtune: NORMTUNE_RADEVAL_PYTHON names the Python of an environment that has
it. The published weights are not part of the repository, so that the calls are tested, not published scores.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from normtune.errors import InputError
from normtune.metrics.metric_models import parse_metric_models, score_with_models
from normtune.metrics.sum_metrics import SumMetric
from tests.support import tiny_radeval_models

pytestmark = pytest.mark.timeout(1800)  # each metric imports torch, transformers and spaCy in a new process
TEXTS = {
    "same": ("the heart is large .", "the heart is large ."),
    "other": ("clear lungs .", "no pneumonia . small left effusion"),
    "empty": ("", "clear lungs"),
}


@pytest.fixture(scope="module")
def radeval() -> str:
    python = os.environ.get("NORMTUNE_RADEVAL_PYTHON")
    if not python:
        pytest.skip("NORMTUNE_RADEVAL_PYTHON names no Python with RadEval")
    return python


@pytest.fixture(scope="module")
def models(radeval: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    subprocess.run([radeval, tiny_radeval_models.__file__, str(folder)], check=True, capture_output=True)
    return folder


def score(metric: str, models: Path, radeval: str) -> dict[str, SumMetric]:
    metrics, records = score_with_models(TEXTS, parse_metric_models(f"{metric}={models / metric}:{radeval}"))
    assert records[metric]["version"] and all(
        metric.row_statistics.keys() == TEXTS.keys() for metric in metrics.values()
    )
    return metrics


def test_radgraph(models: Path, radeval: str) -> None:
    metrics = score("radgraph", models, radeval)
    assert list(metrics) == [f"radgraph_f1_{level}" for level in ("simple", "partial", "complete")]
    rows = metrics["radgraph_f1_complete"].by_row()
    assert rows["same"] == 1 and 0 <= rows["other"] < 1 and rows["empty"] == 0


def test_ratescore(models: Path, radeval: str) -> None:
    rows = score("ratescore", models, radeval)["ratescore"].by_row()
    assert rows["same"] == pytest.approx(1) and rows["empty"] == 0.5


def test_radcliq(models: Path, radeval: str) -> None:
    rows = score("radcliq", models, radeval)["radcliq_v1"].by_row()
    assert rows["same"] < rows["other"] and rows["same"] < rows["empty"]


def test_green(models: Path, radeval: str) -> None:
    """Empty judgements have no findings, which RadEval scores as 0."""
    assert score("green", models, radeval)["green"].by_row() == dict.fromkeys(TEXTS, 0.0)


def test_crimson(models: Path, radeval: str) -> None:
    """Empty judgements are no JSON, which RadEval does not score."""
    with pytest.raises(InputError, match="it has no score for any row"):
        score("crimson", models, radeval)


def test_the_encoder_of_radgraph_is_named_if_it_is_missing(models: Path, radeval: str) -> None:
    encoder = models / "radgraph/models--tiny--encoder"
    encoder.rename(models / "encoder")
    try:
        with pytest.raises(InputError, match=r"radgraph has no tiny/encoder\. .*hf download .* tiny/encoder"):
            parse_metric_models(f"radgraph={models / 'radgraph'}:{radeval}")
    finally:
        (models / "encoder").rename(encoder)
