"""The files of an evaluation, written and read back: predictions, manifest, metrics."""

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

INTERVALS = f"95%, percentile bootstrap over images, {RESAMPLES} resamples"


def split_hash(ids: Sequence[str]) -> str:
    """SHA-256 of the sorted ids, one a line: equal where and only where two runs hold the same rows."""
    return hashlib.sha256("\n".join(sorted(ids)).encode()).hexdigest()


def write_results(
    out: Path,
    dataset: Dataset,
    examples: Sequence[Example],
    predictions: Sequence[Prediction],
    metrics: Mapping[str, Metric],
    controls: Mapping[str, Sequence[Prediction]] | None = None,
    **about: Any,
) -> None:
    """Write `predictions.jsonl`, `manifest.json` and, last, `metrics.json`, each whole or not at all.

    `predictions-NAME.jsonl` hold what was answered to other images than the rows' own; those of an earlier
    evaluation go.

    Args:
        out: the directory.
        dataset: whose name and licence are recorded.
        examples: the rows evaluated.
        predictions: one an example, in any order.
        metrics: their scores.
        controls: the predictions of each control of `normtune.evaluation.image_reliance`.
        about: what else metrics.json is to hold: base, adapter, settings, seconds, ...
    """
    ids = sorted(example.id for example in examples)
    for name in CONTROLS:
        path = out / f"predictions-{name}.jsonl"
        if controls and name in controls:
            write_jsonl(path, _rows(examples, controls[name]))
        else:
            path.unlink(missing_ok=True)
    write_jsonl(out / "predictions.jsonl", _rows(examples, predictions))
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
            **about,
            "versions": versions(),
        },
    )


def _rows(examples: Sequence[Example], predictions: Sequence[Prediction]) -> list[dict[str, Any]]:
    """One row an example, its prediction joined by id."""
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
    """Examples, predictions by id and metrics.json of a finished evaluation.

    Raises:
        InputError: a file is missing or damaged, or predictions.jsonl isn't the one metrics.json was made of.
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
        raise InputError(f"{path} does not hold the rows that metrics.json was made of. Evaluate again.")
    return examples, texts, metrics


def read_scores(directory: Path | str) -> dict[str, float | None]:
    """The mean log-probability of each prediction of a run that `read_run` has read, by id."""
    text = (Path(directory) / "predictions.jsonl").read_text(encoding="utf-8")
    rows = [json.loads(line) for line in text.rstrip("\n").split("\n")]
    return {row["id"]: row.get("score") for row in rows}
