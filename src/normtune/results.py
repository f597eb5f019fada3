"""The files of an evaluation, written, read back and compared: predictions, manifest, metrics."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from normtune.card import NOTICE
from normtune.data.records import Dataset, Example
from normtune.errors import InputError
from normtune.files import read_json, write_json, write_jsonl
from normtune.metrics.corpus import Summed, mean_of, paired
from normtune.metrics.report import report_table, text_pairs
from normtune.metrics.stats import RESAMPLES, holm
from normtune.metrics.vqa import Metric, Prediction, scores

INTERVALS = f"95%, percentile bootstrap over images, {RESAMPLES} resamples"


@dataclass(frozen=True)
class Compared:
    """One metric of two runs on the same rows; `difference` is the second less the first."""

    first: float
    second: float
    difference: float
    low: float
    high: float
    p: float
    p_holm: float  # corrected for the number of metrics compared
    rows: int
    images: int
    method: str


def split_hash(ids: Sequence[str]) -> str:
    """SHA-256 of the sorted ids, one a line: equal where and only where two runs hold the same rows."""
    return hashlib.sha256("\n".join(sorted(ids)).encode()).hexdigest()


def write_results(
    out: Path,
    dataset: Dataset,
    examples: Sequence[Example],
    predictions: Sequence[Prediction],
    metrics: Mapping[str, Metric],
    **about: Any,
) -> None:
    """Write `predictions.jsonl`, `manifest.json` and, last, `metrics.json`, each whole or not at all.

    Args:
        out: the directory.
        dataset: whose name and licence are recorded.
        examples: the rows evaluated.
        predictions: one an example, in any order.
        metrics: their scores.
        about: what else metrics.json is to hold: base, adapter, settings, seconds, ...
    """
    ids = sorted(example.id for example in examples)
    by_id = {prediction.id: prediction for prediction in predictions}
    rows = [
        {
            "id": example.id,
            "images": list(example.images),
            "kind": example.kind,
            "question": example.question,
            "reference": example.answer,
            "prediction": by_id[example.id].text,
            "score": by_id[example.id].score,
        }
        for example in examples
    ]
    write_jsonl(out / "predictions.jsonl", rows)
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
            "versions": _versions(),
        },
    )


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for package in ("normtune", "torch", "transformers", "numpy"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    return versions


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
            examples.append(
                Example(row["id"], tuple(row["images"]), row["question"], row["reference"], row["kind"], "")
            )
            texts[row["id"]] = row["prediction"]
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise InputError(f"{path}, line {number}: not a prediction row. Evaluate again.") from error
    if split_hash([example.id for example in examples]) != metrics.get("split_hash"):
        raise InputError(f"{path} does not hold the rows that metrics.json was made of. Evaluate again.")
    return examples, texts, metrics


def compare(run_a: Path | str, run_b: Path | str) -> dict[str, Compared]:
    """Two evaluations of the same rows, paired by id: difference, interval and p-value of every metric.

    Raises:
        InputError: the runs hold different rows, references or normalisations, or a file is damaged.
    """
    examples, first, metrics_a = read_run(run_a)
    others, second, metrics_b = read_run(run_b)
    if metrics_a["split_hash"] != metrics_b["split_hash"]:
        odd = sorted(first.keys() ^ second.keys())
        raise InputError(
            f"{run_a} and {run_b} evaluate different rows: {len(odd)} stand in one alone, first '{odd[0]}'. "
            "Evaluate both on one split."
        )
    references = {example.id: example.answer for example in others}
    changed = [example.id for example in examples if references[example.id] != example.answer]
    if changed:
        raise InputError(f"{run_a} and {run_b} differ in {len(changed)} references, first '{changed[0]}'.")
    normalisation = metrics_a["normalisation"]
    if metrics_b["normalisation"] != normalisation:
        raise InputError(f"{run_a} and {run_b} were scored under different normalisations.")
    cluster = {example.id: example.images for example in examples}
    table_a = _table(examples, first, normalisation)
    table_b = _table(examples, second, normalisation)
    pairs = {name: paired(metric, table_b[name], cluster) for name, metric in table_a.items()}
    corrected = holm({name: pair.p for name, pair in pairs.items()})
    return {
        name: Compared(
            first=table_a[name].overall(),
            second=table_b[name].overall(),
            p_holm=corrected[name],
            **asdict(pair),
        )
        for name, pair in pairs.items()
    }


def _table(
    examples: Sequence[Example], texts: Mapping[str, str], normalisation: str | Sequence[str]
) -> dict[str, Summed]:
    """Every metric of the rows' task, row by row."""
    if isinstance(normalisation, str):
        found = scores(examples, texts, normalisation=normalisation)
        return {name: mean_of(rows) for name, rows in found.items()}
    return report_table(text_pairs(examples, texts), normalisations=normalisation)
