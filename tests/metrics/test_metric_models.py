"""Metric models run in a process of their own; a stand-in of RadEval shows what the process gets and returns."""

from __future__ import annotations

import json
import sys
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import numpy as np
import pytest
import torch

from normtune.data.records import Dataset, Example, Split
from normtune.errors import InputError
from normtune.evaluation.compare import compare
from normtune.evaluation.config import EvaluateConfig
from normtune.evaluation.evaluate import evaluate
from normtune.evaluation.results import Evaluation, read_evaluation
from normtune.evaluation.score_files import score_files, score_text
from normtune.metrics import metric_models
from normtune.metrics.metric_models import RADEVAL_MODELS, parse_metric_models, score_with_models
from normtune.metrics.sum_metrics import mean_metric, metric_intervals
from normtune.models.family import Family
from tests.support.fake_family import FakeFamily, fake_dataset
from tests.support.tolerance import approx

# The signatures, names of scores and failures of RadEval 2.2.1: radeval/radeval.py (RadEval), metrics/*/adapter.py (one
# list per name with per_sample=True), metrics/crimson/crimson.py (NaN for an unreadable judgement), and
# metrics/RaTEScore/score.py (texts of less than three characters are dropped). Like RadEval, it prints texts.
RADEVAL = """
import os, sys, time
from pathlib import Path

class RadEval:
    def __init__(self, metrics=None, openai_api_key=None, gemini_api_key=None, per_sample=False, detailed=False,
                 show_progress=True, cache_dir=None):
        assert per_sample and not show_progress and os.environ["HF_HUB_OFFLINE"] == "1"
        (self.metric,) = metrics
        hub = Path(os.environ["HF_HOME"]) / "hub"
        models = [(folder / "snapshots" / (folder / "refs/main").read_text() / "config.json").read_text()
                  for folder in sorted(hub.iterdir())]
        if "broken" in models:
            raise OSError("the weights are damaged\\nin two lines")

    def __call__(self, refs, hyps):
        print(refs, hyps)
        print(refs, hyps, file=sys.stderr)
        overlap = [len({*r.split()} & {*h.split()}) / len({*r.split()}) for r, h in zip(refs, hyps)]
        if "crash" in hyps:
            raise ValueError("cannot read " + hyps[0])
        if "slow" in hyps:
            time.sleep(60)
        if self.metric == "radgraph":
            return {f"radgraph_{level}": overlap for level in ("simple", "partial", "complete")}
        if self.metric == "crimson":
            return {"crimson": [float("nan") if "unreadable" in h else 2 * s - 1 for h, s in zip(hyps, overlap)]}
        if self.metric == "radcliq":
            return {"radcliq_v1": overlap[:-1]}
        return {self.metric: [s for s, h in zip(overlap, hyps) if len(h) >= 3 or self.metric != "ratescore"]}
"""
TEXTS = {"a": ("clear lungs", "clear lungs"), "b": ("secret effusion", "no effusion"), "c": ("", "clear heart")}
GREEN = RADEVAL_MODELS["green"][0]


@pytest.fixture
def radeval(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A Python, beside its own environment variables, in which the stand-in is installed."""
    packages = tmp_path / "packages"
    (packages / "radeval-2.2.1.dist-info").mkdir(parents=True)
    (packages / "radeval-2.2.1.dist-info/METADATA").write_text("Metadata-Version: 2.1\nName: radeval\nVersion: 2.2.1\n")
    (packages / "radeval.py").write_text(RADEVAL)
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\ntest -z "$PYTHONPATH" || exit 9\nPYTHONPATH={packages} exec {sys.executable} "$@"\n')
    python.chmod(0o755)
    monkeypatch.setenv("PYTHONPATH", "of another environment")
    return python


def save_models(folder: Path, repositories: Sequence[str], config: str = "{}") -> Path:
    """Write models as `hf download --cache-dir` does."""
    for repository in repositories:
        model = folder / f"models--{repository.replace('/', '--')}"
        (model / "snapshots/f00").mkdir(parents=True)
        (model / "refs").mkdir()
        (model / "refs/main").write_text("f00\n")
        (model / "snapshots/f00/config.json").write_text(config)
        (model / "snapshots/f00/README.md").write_text("---\nlicense: mit\n---\n")
    return folder


def save_radgraph(folder: Path) -> None:
    """Write the archives of RadGraph, with the part of their config that names the encoder, and the encoder."""
    config = folder / "archive-config.json"
    config.write_text('{"model": {"embedder": {"token_embedders": {"bert": {"model_name": "tiny/encoder"}}}}}')
    for name in ("radgraph-xl", "radgraph"):
        scorers = folder / "models--StanfordAIMI--RRG_scorers/snapshots/f00"
        with tarfile.open(scorers / f"{name}.tar.gz", "w:gz") as archive:
            archive.add(config, "config.json")
    save_models(folder, ["tiny/encoder"])


def option(radeval: Path, metric: str, config: str = "{}") -> str:
    folder = save_models(radeval.with_name(f"{metric} models"), RADEVAL_MODELS[metric], config)
    if metric in ("radgraph", "radcliq"):
        save_radgraph(folder)
    return f"{metric}={folder}:{radeval}"


def test_scores_of_another_environment_are_joined_to_their_rows(
    radeval: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    models = parse_metric_models(f"{option(radeval, 'radgraph')},{option(radeval, 'green')}")
    metrics, records = score_with_models({id: TEXTS[id] for id in "ba"}, models)
    assert metrics["radgraph_f1_partial"].by_row() == metrics["green"].by_row() == {"b": 0.5, "a": 1.0}
    assert list(records) == ["radgraph", "green"]
    (model,) = records["green"]["models"].values()
    assert (model["licence"], model["bytes"], len(model["sha256"])) == ("mit", 23, 64)
    assert {**records["green"], "models": 0, "seconds": 0} == {
        "package": "radeval",
        "version": "2.2.1",
        "models": 0,
        "seconds": 0,
        "unscored": 0,
    }
    assert "effusion" not in "".join(capfd.readouterr())


def test_a_folder_may_be_the_only_model_itself(radeval: Path, tmp_path: Path) -> None:
    folder = tmp_path / "plain"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    metrics, records = score_with_models(TEXTS, parse_metric_models(f"green={folder}:{radeval}"))
    before = records["green"]["models"][GREEN]
    assert metrics["green"].by_row() == {"a": 1.0, "b": 0.5, "c": 0.0} and before["licence"] is None
    (folder / "config.json").write_text("[]")  # of the same size
    assert metric_models._describe(folder)["sha256"] != before["sha256"]


def test_ratescore_does_not_lose_its_place_at_an_empty_text(radeval: Path) -> None:
    models = parse_metric_models(option(radeval, "ratescore"))
    metrics, _ = score_with_models({"c": TEXTS["c"], **TEXTS}, models)
    assert metrics["ratescore"].by_row() == {"c": 0.5, "a": 1.0, "b": 0.5}
    metrics, _ = score_with_models({"c": TEXTS["c"]}, models)
    assert metrics["ratescore"].by_row() == {"c": 0.5}


def test_rows_without_a_score_are_counted(radeval: Path, tmp_path: Path) -> None:
    texts = {**TEXTS, "d": ("unreadable", "clear")}
    predictions, references = tmp_path / "p.jsonl", tmp_path / "r.jsonl"
    for path, field, side in ((predictions, "prediction", 0), (references, "reference", 1)):
        path.write_text("".join(json.dumps({"id": id, field: pair[side]}) + "\n" for id, pair in texts.items()))
    models = option(radeval, "crimson")
    result = score_files(predictions, references, metric_model=models)
    metric = result["metrics"]["crimson"]
    assert (metric["value"], metric["rows"], metric["images"]) == (0.0, 3, 3)
    assert result["metrics"]["bleu_1/none"]["rows"] == 4 and result["metric_models"]["crimson"]["unscored"] == 1
    assert f"crimson: radeval 2.2.1, {RADEVAL_MODELS['crimson'][0]} (mit); 1 rows have no score" in score_text(result)
    with pytest.raises(InputError, match="no score for any row"):
        score_with_models({"d": texts["d"]}, parse_metric_models(models))


def test_an_error_has_no_text_of_a_report(radeval: Path) -> None:
    models = parse_metric_models(option(radeval, "green"))
    with pytest.raises(
        InputError, match=r"green: radeval failed \(exit status 1\): ValueError in radeval\.py"
    ) as error:
        score_with_models({**TEXTS, "d": ("crash", "x")}, models)
    assert "secret" not in str(error.value) and "lungs" not in str(error.value)


def test_damaged_models_and_missing_scores_are_reported(radeval: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="OSError: the weights are damaged in two lines"):
        score_with_models(TEXTS, parse_metric_models(option(radeval, "green", "broken")))
    with pytest.raises(InputError, match="2 scores for 3 rows"):
        score_with_models(TEXTS, parse_metric_models(option(radeval, "radcliq")))
    monkeypatch.setattr(metric_models, "_TIMEOUT", 1)
    monkeypatch.setattr(metric_models, "_TIMEOUT_ROW", 0)
    with pytest.raises(InputError, match="was stopped after 1 s"):
        score_with_models({"a": ("slow", "x")}, parse_metric_models(option(radeval, "radgraph")))


def test_what_is_missing_is_reported_at_the_start(radeval: Path, tmp_path: Path) -> None:
    encoder = tmp_path / "encoder"
    encoder.mkdir()
    (encoder / "config.json").write_text("{}")
    for text, message in (
        ("gren=models", r"did you mean 'green'\? Known names: bertscore, chexbert, radgraph"),
        ("green", "not NAME=DIR or NAME=DIR:PYTHON"),
        (f"green={tmp_path}/nowhere", "nowhere is no folder"),
        (f"green={tmp_path}:{radeval}", f"has no {GREEN}. .*hf download --cache-dir {tmp_path} {GREEN}"),
        (f"chexbert={tmp_path}", r"has no chexbert\.pth"),
        (f"bertscore={encoder}:{radeval}", "Normtune computes it itself"),
        (f"bertscore={encoder},bertscore={encoder}", "is named twice"),
        (f"radgraph={save_models(tmp_path / 'r', RADEVAL_MODELS['radgraph'])}:{radeval}", r"xl\.tar\.gz is missing or"),
    ):
        with pytest.raises(InputError, match=message):
            parse_metric_models(text)
    with pytest.raises(InputError, match="is named twice"):
        parse_metric_models(f"bertscore={encoder}", bertscore=tmp_path)
    folder = option(radeval, "green").rpartition(":")[0]
    empty = tmp_path / "empty-python"
    empty.write_text(f'#!/bin/sh\nexec {sys.executable} -S "$@"\n')
    empty.chmod(0o755)
    with pytest.raises(InputError, match=r"has no package radeval\. Run: .* -m pip install radeval, or name another"):
        parse_metric_models(f"{folder}:{empty}")
    with pytest.raises(InputError, match=r"there is no program .*nothing"):
        parse_metric_models(f"{folder}:{tmp_path}/nothing")


def test_questions_have_no_metric_models(tmp_path: Path) -> None:
    questions = fake_dataset([Example("q", ("1",), "?", "yes", "closed", "test")])
    with pytest.raises(InputError, match="scores reports, not answers"):
        evaluate_reports(questions, {"q": "yes"}, None, f"green={tmp_path}")


def evaluate_reports(dataset: Dataset, predictions: dict[str, str], out: Path | None, models: str) -> Evaluation:
    config = EvaluateConfig.checked(model="fake", data="fake", out=out, metric_model=models)
    return evaluate(cast(Family, FakeFamily(predictions)), Split(dataset, dataset.examples), config)


def test_evaluations_record_the_scores_of_rows_and_compare_them(radeval: Path, tmp_path: Path) -> None:
    dataset = fake_dataset([Example(id, (str(ord(id)),), "", pair[1], "report", "test") for id, pair in TEXTS.items()])
    models = f"{option(radeval, 'radgraph')},{option(radeval, 'crimson')}"
    first = evaluate_reports(dataset, {id: pair[0] for id, pair in TEXTS.items()}, tmp_path / "1", models)
    evaluate_reports(dataset, {"a": "clear lungs", "b": "no effusion", "c": "unreadable"}, tmp_path / "2", models)
    assert first.metrics["radgraph_f1_simple"].value == 0.5
    assert first.record["metric_models"]["crimson"]["version"] == "2.2.1"
    assert first.record["settings"]["metric_model"] == models
    read = read_evaluation(tmp_path / "1")
    assert read.row_scores == first.row_scores and read.row_scores["crimson"] == {"a": 1.0, "b": 0.0, "c": -1.0}
    comparison = compare([tmp_path / "1", tmp_path / "2"])
    assert comparison.differences["2"]["radgraph_f1_simple"].difference == approx(0.5 / 3, dtype=torch.float64)
    assert "crimson" in comparison.not_compared and "crimson" not in comparison.differences["2"]


def test_an_interval_has_the_range_of_its_metric() -> None:
    """The interval of shares, moved and stretched; scores outside of the range are in their interval all the same."""
    scores = dict(enumerate(np.linspace(-1, 0.4, 12)))
    images = {str(n): n for n in scores}
    shares, crimson = (
        metric_intervals({name: mean_metric({str(n): score / scale + shift for n, score in scores.items()})}, images)
        for name, scale, shift in (("share", 2, 0.5), ("crimson", 1, 0.0))
    )
    share, interval = shares["share"], crimson["crimson"]
    assert [interval.low, interval.high] == approx([2 * share.low - 1, 2 * share.high - 1], dtype=torch.float64)
    assert -1 < interval.low < interval.value < interval.high < 1
    outside = metric_intervals({"radcliq_v1": mean_metric({"a": 9.0, "b": 9.0})}, {"a": 1, "b": 2})["radcliq_v1"]
    assert outside.low <= outside.value <= outside.high
