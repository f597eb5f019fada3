"""The result of an evaluation, and its files: predictions, manifest and metrics."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from normtune.adapters.info import NOTICE
from normtune.adapters.training_rows import Overlap
from normtune.data.examples import Examples
from normtune.data.records import Dataset, Example, Prediction, Split
from normtune.data.splits import group_columns, patient_of_image
from normtune.errors import InputError
from normtune.evaluation.choices import choice_from_json, choice_text, choice_to_json
from normtune.evaluation.config import CONTROLS
from normtune.evaluation.image_reliance import grounding_text, reliance_text
from normtune.metrics.answers import Metric, ignored_signs_text
from normtune.metrics.calibration import confidence_text
from normtune.metrics.conformal import conformal_text
from normtune.metrics.metric_models import metric_models_text
from normtune.metrics.strata import strata_of, strata_text
from normtune.metrics.sum_metrics import INTERVALS
from normtune.runtime.environment import versions
from normtune.runtime.files import read_json, write_json, write_jsonl
from normtune.runtime.notebook import Result, Rows, axes_or_new, data_frame
from normtune.runtime.number_format import format_interval
from normtune.runtime.text_table import text_table

if TYPE_CHECKING:
    import pandas
    from matplotlib.axes import Axes
    from PIL import Image


def split_hash(ids: Sequence[str]) -> str:
    """Compute SHA-256 of the sorted ids, one per line.

    Two runs have the same hash if and only if they have the same rows.
    """
    return hashlib.sha256("\n".join(sorted(ids)).encode()).hexdigest()


class Predictions(list[Prediction]):
    """The predictions for some examples, in the order of the examples: a list that Jupyter shows as a table."""

    def __init__(self, examples: Iterable[Example], predictions: Iterable[Prediction]) -> None:
        by_id = {prediction.id: prediction for prediction in predictions}
        self.examples = list(examples)
        super().__init__(by_id[example.id] for example in self.examples)

    def rows(self) -> Rows:
        """Return one dict for each example, as in `predictions.jsonl`.

        Where the data name patients, `patient` is the first image of the row's patient: rows with the same one are a
        cluster of the intervals.
        """
        patients = patient_of_image(self.examples) if group_columns(Examples(self.examples)) else {}
        return Rows(
            {
                "id": example.id,
                "images": list(example.images),
                "kind": example.kind,
                "question": example.question,
                "reference": example.answer,
                "prediction": prediction.text,
                "score": prediction.score,
                "finish_reason": prediction.finish_reason,
                "strata": strata_of(example),
            }
            | ({"options": list(example.options)} if example.options else {})
            | ({} if prediction.choice is None else {"choice": choice_to_json(prediction.choice)})
            | ({} if prediction.shares is None else {"candidates": dict(prediction.shares)})
            | ({"abstained": True} if prediction.abstained else {})
            | ({"patient": patients[example.images[0]]} if patients and example.images else {})
            for example, prediction in zip(self.examples, self, strict=True)
        )

    def to_pandas(self) -> pandas.DataFrame:
        """Return the rows as a data frame."""
        return data_frame(self.rows())

    def _repr_html_(self) -> str:
        return self.rows()._repr_html_()


@dataclass(frozen=True, repr=False)
class Evaluation(Result):
    """The predictions of a model for some examples, and their scores.

    `print` and Jupyter show the scores as a table.

    Attributes:
        examples: the evaluated examples.
        predictions: one for each example, in their order.
        record: the contents of `metrics.json`: scores, settings, time and memory.
        controls: name of a control of `normtune.evaluation.image_reliance` -> its predictions.
        out: the folder with the files of the evaluation; None if it was not written.
        row_scores: metric that needed a model -> row id -> its score; other metrics are computed again from the texts.
        name: in a comparison: given by the caller, or the shortest end of the folder that no other run has.
    """

    examples: Split
    predictions: Predictions
    record: dict[str, Any]
    controls: dict[str, Predictions] = field(default_factory=dict)
    out: Path | None = None
    name: str = ""
    row_scores: dict[str, dict[str, float]] = field(default_factory=dict)

    @property
    def is_report(self) -> bool:
        """Whether the predictions are reports rather than answers."""
        return self.examples[0].kind == "report"

    @property
    def texts(self) -> dict[str, str]:
        """Example id -> predicted text."""
        return {prediction.id: prediction.text for prediction in self.predictions}

    @property
    def metrics(self) -> dict[str, Metric]:
        """Metric name -> score over all rows, with its 95% interval."""
        return {name: Metric(**values) for name, values in self.record["metrics"].items()}

    @property
    def seconds(self) -> float:
        """The time to read the images and to answer, without control images."""
        return float(self.record["seconds"])

    def to_dict(self) -> dict[str, Any]:
        """Return the scores, settings, time and memory: the contents of `metrics.json`, and `out`."""
        return {**self.record, "out": None if self.out is None else str(self.out)}

    def to_pandas(self) -> pandas.DataFrame:
        """Return a data frame with one row for each metric."""
        return data_frame({"metric": name, **asdict(metric)} for name, metric in self.metrics.items())

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw every metric with its 95% interval, times 100."""
        ax = axes_or_new(ax)
        metrics = list(reversed(self.metrics.values()))
        values = [100 * metric.value for metric in metrics]
        errors = [[100 * (m.value - m.low) for m in metrics], [100 * (m.high - m.value) for m in metrics]]
        ax.errorbar(values, range(len(metrics)), xerr=errors, fmt="o", capsize=3)
        ax.set_yticks(range(len(metrics)), list(reversed(self.record["metrics"])))
        ax.set_xlabel("score x 100, with 95% interval")
        ax.set_title(f"{self.record['dataset']}: {self.record['rows']:,} rows")
        ax.grid(alpha=0.3)
        return ax

    def plot_reliability(self, ax: Axes | None = None) -> Axes:
        """Draw the reliability diagram: the share of right answers against the confidence, with 95% intervals.

        Raises:
            InputError: the answers have no confidence, or are reports.
        """
        if "confidence" not in self.record:
            raise InputError("the answers have no confidence. Evaluate a model, not a baseline, on questions.")
        ax = axes_or_new(ax)
        bins = self.record["confidence"]["all"]["bins"]
        right = [100 * row["right"]["value"] for row in bins]
        ends = [
            [100 * (row["right"]["value"] - row["right"]["low"]) for row in bins],
            [100 * (row["right"]["high"] - row["right"]["value"]) for row in bins],
        ]
        ax.plot([0, 100], [0, 100], color="grey", linewidth=1)
        ax.errorbar([100 * row["confidence"] for row in bins], right, yerr=ends, fmt="o", capsize=3)
        ax.set_xlabel("confidence x 100")
        ax.set_ylabel("right answers x 100, with 95% interval")
        ax.set_title(f"{self.record['dataset']}: {self.record['confidence']['all']['rows']:,} answers")
        ax.grid(alpha=0.3)
        return ax

    def __str__(self) -> str:
        return metrics_text(self.to_dict())

    def __repr__(self) -> str:
        rows, dataset = self.record["rows"], self.record["dataset"]
        return f"<Evaluation of {rows:,} rows of {dataset}: {len(self.record['metrics'])} metrics>"

    def save(self, directory: Path | str) -> None:
        """Write `predictions.jsonl`, `manifest.json` and finally `metrics.json`, each atomically.

        The predictions for control images are written to `predictions-NAME.jsonl`. Those of an earlier
        evaluation in the same directory are deleted.
        """
        directory = Path(directory)
        for name in CONTROLS:
            path = directory / f"predictions-{name}.jsonl"
            if name in self.controls:
                write_jsonl(path, self.controls[name].rows())
            else:
                path.unlink(missing_ok=True)
        rows = self.predictions.rows()
        if self.row_scores:
            for row in rows:
                row["metrics"] = {
                    name: scores[row["id"]] for name, scores in self.row_scores.items() if row["id"] in scores
                }
        write_jsonl(directory / "predictions.jsonl", rows)
        ids = sorted(example.id for example in self.examples)
        write_json(directory / "manifest.json", {"split_hash": split_hash(ids), "ids": ids})
        write_json(directory / "metrics.json", self.record)


def make_record(examples: Split, metrics: Mapping[str, Metric], **fields: Any) -> dict[str, Any]:
    """Build the contents of `metrics.json`.

    Args:
        examples: the evaluated rows; the name and licence of their dataset are recorded.
        fields: further fields: base, adapter, settings, seconds, ...
    """
    return {
        "dataset": examples.dataset.name,
        "splits": sorted({example.split for example in examples}),
        "licence": examples.dataset.licence,
        "notice": NOTICE,
        "rows": len(examples),
        "images": len({example.images for example in examples}),
        "split_hash": split_hash([example.id for example in examples]),
        "metrics": {name: asdict(metric) for name, metric in metrics.items()},
        "intervals": INTERVALS,
        **fields,
        "versions": versions(),
    }


def metrics_text(result: Mapping[str, Any]) -> str:
    """Format the contents of `metrics.json`, and `out`, as aligned tables: metrics in %, with rows and images."""
    lines = [f"{result['dataset']}: {result['rows']} rows, {result['images']} images; {result['intervals']}"]
    if result.get("setting") == "zero-shot":
        lines.append("zero-shot: no adapter")
    elif result.get("setting"):
        trained_on = result["trained_on"] or "data that its file does not name"
        lines.append(f"{result['setting']}: the adapter was trained on {trained_on}")
    lines += trained_rows_text(result)
    lines += text_table(
        [name, format_interval(metric, digits=2), f"{metric['rows']} rows, {metric['images']} images"]
        for name, metric in result["metrics"].items()
    )
    if share := (result.get("limit_reached") or {}).get("value"):
        limit = result["settings"]["max_new_tokens"]
        lines.append(f"{100 * share:.1f}% of the generated answers end at the limit of {limit} tokens")
    lines += [*ignored_signs_text(result), *metric_models_text(result)]
    lines += [*confidence_text(result), *conformal_text(result)]
    lines += ["", choice_text(result["choices"])] if result.get("choices") else []
    lines += ["", strata_text(result["strata"])] if result.get("strata") else []
    lines += ["", reliance_text(result["reliance"])] if result.get("reliance") else []
    lines += grounding_text(result["grounding"]) if result.get("grounding") else []
    speed = f"{result['seconds']:.1f} s, {result['pairs_per_second']:.1f} pairs/s"
    written = f" Written: {result['out']}" if result["out"] else ""
    return "\n".join([*lines, f"{speed}; {result['notice']}.{written}"])


def trained_rows_text(result: Mapping[str, Any]) -> list[str]:
    """Say how many evaluated rows and pictures the adapter was trained on; nothing if it does not record them."""
    return [str(Overlap(**result["trained_rows"]))] if result.get("trained_rows") else []


def read_evaluation(directory: Path | str) -> Evaluation:
    """Read a finished evaluation from its folder; images and the answers to control images are not read.

    Raises:
        InputError: if a file is missing or damaged, or the files do not have the same rows.
    """
    directory = Path(directory)
    record = read_json(directory / "metrics.json")
    path = directory / "predictions.jsonl"
    if not path.is_file():
        raise InputError(f"{path} is missing. Evaluate again.")
    examples, predictions = [], []
    row_scores: dict[str, dict[str, float]] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").rstrip("\n").split("\n"), 1):
        try:
            row = json.loads(line)
            fields = row["question"], row["reference"], row["kind"]
            meta = row.get("strata", {}) | ({"patient": row["patient"]} if "patient" in row else {})
            options = tuple(row.get("options", ()))
            examples.append(Example(row["id"], tuple(row["images"]), *fields, "", meta, (), options))
            choice = choice_from_json(row["choice"]) if "choice" in row else None
            answer = row["prediction"], row.get("score"), row.get("finish_reason")
            shares, abstained = row.get("candidates"), row.get("abstained", False)
            predictions.append(Prediction(row["id"], *answer, choice, shares, abstained))
            for name, score in row.get("metrics", {}).items():
                row_scores.setdefault(name, {})[row["id"]] = float(score)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise InputError(f"{path}, line {number}: not a prediction row. Evaluate again.") from error
    if split_hash([example.id for example in examples]) != record.get("split_hash"):
        raise InputError(f"{path} does not have the rows that metrics.json was computed from. Evaluate again.")
    manifest = read_json(directory / "manifest.json")
    ids = manifest.get("ids") if isinstance(manifest, dict) else None
    if not isinstance(ids, list) or manifest.get("split_hash") != record["split_hash"]:
        raise InputError(f"{directory / 'manifest.json'} does not match predictions.jsonl. Evaluate again.")
    if split_hash([str(id) for id in ids]) != record["split_hash"]:
        raise InputError(f"{directory / 'manifest.json'}: its ids do not match its hash. Evaluate again.")
    dataset = Dataset(record["dataset"], Examples(examples), _no_image, licence=record["licence"])
    split, texts = Split(dataset, examples), Predictions(examples, predictions)
    return Evaluation(split, texts, record, out=directory, row_scores=row_scores)


def _no_image(key: str) -> Image.Image:
    raise InputError(f"the results do not contain image {key}. Open the dataset.")
