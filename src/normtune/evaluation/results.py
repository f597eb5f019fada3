"""Writes and reads the files of an evaluation: predictions, manifest and metrics."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from normtune.adapters.info import NOTICE
from normtune.data.records import Dataset, Example, Prediction
from normtune.errors import InputError
from normtune.evaluation.config import CONTROLS
from normtune.metrics.answers import Metric
from normtune.metrics.statistics import RESAMPLES
from normtune.metrics.strata import strata_of
from normtune.runtime.environment import versions
from normtune.runtime.files import read_json, write_json, write_jsonl

# Describes the intervals in metrics.json.
INTERVALS = f"95%, percentile bootstrap over images, {RESAMPLES} resamples"


def split_hash(ids: Sequence[str]) -> str:
    """Compute SHA-256 of the sorted ids, one per line.

    Two runs have the same hash if and only if they have the same rows.
    """
    return hashlib.sha256("\n".join(sorted(ids)).encode()).hexdigest()


def write_results(
    out: Path,
    dataset: Dataset,
    examples: Sequence[Example],
    predictions: Sequence[Prediction],
    metrics: Mapping[str, Metric],
    controls: Mapping[str, Sequence[Prediction]] | None = None,
    **metadata: Any,
) -> None:
    """Write `predictions.jsonl`, `manifest.json` and finally `metrics.json`, each atomically.

    The predictions for control images are written to `predictions-NAME.jsonl`. Those of an earlier evaluation
    are deleted.

    Args:
        out: the directory.
        dataset: its name and licence are recorded.
        examples: the evaluated rows.
        predictions: one per example, in any order.
        metrics: the scores of the predictions.
        controls: name of a control of `normtune.evaluation.image_reliance` -> its predictions.
        metadata: further fields of metrics.json: base, adapter, settings, seconds, ...
    """
    ids = sorted(example.id for example in examples)
    for name in CONTROLS:
        path = out / f"predictions-{name}.jsonl"
        if controls and name in controls:
            write_jsonl(path, _prediction_rows(examples, controls[name]))
        else:
            path.unlink(missing_ok=True)
    write_jsonl(out / "predictions.jsonl", _prediction_rows(examples, predictions))
    write_json(out / "manifest.json", {"split_hash": split_hash(ids), "ids": ids})
    write_json(
        out / "metrics.json",
        {
            "dataset": dataset.name,
            "splits": sorted({example.split for example in examples}),
            "licence": dataset.licence,
            "notice": NOTICE,
            "rows": len(examples),
            "images": len({example.images for example in examples}),
            "split_hash": split_hash(ids),
            "metrics": {name: asdict(metric) for name, metric in metrics.items()},
            "intervals": INTERVALS,
            **metadata,
            "versions": versions(),
        },
    )


def _prediction_rows(examples: Sequence[Example], predictions: Sequence[Prediction]) -> list[dict[str, Any]]:
    """Build the rows of a predictions file: one per example, with its prediction joined by id."""
    by_id = {prediction.id: prediction for prediction in predictions}
    return [
        {
            "id": example.id,
            "images": list(example.images),
            "kind": example.kind,
            "question": example.question,
            "reference": example.answer,
            "prediction": by_id[example.id].text,
            "score": by_id[example.id].score,
            "strata": strata_of(example),
        }
        for example in examples
    ]


def read_run(directory: Path | str) -> tuple[list[Example], dict[str, str], dict[str, Any]]:
    """Read a finished evaluation.

    Returns:
        The examples, the predictions (id -> text), and the contents of metrics.json.

    Raises:
        InputError: if a file is missing or damaged, or metrics.json was computed from other rows than those
            of predictions.jsonl.
    """
    directory = Path(directory)
    metrics = read_json(directory / "metrics.json")
    path = directory / "predictions.jsonl"
    if not path.is_file():
        raise InputError(f"{path} is missing. Evaluate again.")
    examples, texts = [], {}
    for number, line in enumerate(path.read_text(encoding="utf-8").rstrip("\n").split("\n"), 1):
        try:
            row = json.loads(line)
            fields = row["question"], row["reference"], row["kind"]
            examples.append(Example(row["id"], tuple(row["images"]), *fields, "", row.get("strata", {})))
            texts[row["id"]] = row["prediction"]
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise InputError(f"{path}, line {number}: not a prediction row. Evaluate again.") from error
    if split_hash([example.id for example in examples]) != metrics.get("split_hash"):
        raise InputError(f"{path} does not have the rows that metrics.json was computed from. Evaluate again.")
    return examples, texts, metrics


def read_scores(directory: Path | str) -> dict[str, float | None]:
    """Read the mean log-probability of each prediction of a run: id -> score.

    `read_run` must have read the run before, because it checks the files.
    """
    text = (Path(directory) / "predictions.jsonl").read_text(encoding="utf-8")
    rows = [json.loads(line) for line in text.rstrip("\n").split("\n")]
    return {row["id"]: row.get("score") for row in rows}
