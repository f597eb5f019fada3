"""Scores of a baseline that reads only the question, on SLAKE (English) and VQA-RAD (split by image).

    python benchmarks/question_only.py --slake DIR --vqa-rad DIR --out benchmarks/question_only.json

It answers with the most frequent training answer to the same question, or else to questions with the same first two
words. A model that is not above it has not shown that it uses the image. docs/results.md has it beside the models.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import Any

from record import record

from normtune.data.registry import open_configured
from normtune.evaluation.baselines import QuestionOnly
from normtune.evaluation.config import EvaluateConfig
from normtune.metrics.answers import score_vqa
from normtune.runtime.number_format import format_interval

METRICS = ("closed_label", "open_exact", "open_recall", "global_exact")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--slake", type=Path, required=True)
    parser.add_argument("--vqa-rad", type=Path, required=True)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    data: dict[str, dict[str, Any]] = {
        "slake": {"data": "slake", "root": options.slake},
        "vqa-rad": {"data": "vqa-rad", "root": options.vqa_rad, "image_disjoint": True},
    }
    rows = [baseline_row(name, data_options) for name, data_options in data.items()]
    for row in rows:
        print(row["dataset"], *(f"{metric} {format_interval(row['metrics'][metric])}" for metric in METRICS), sep="  ")
    if options.out:
        record(options.out, "question_only", rows)


def baseline_row(name: str, data_options: dict[str, Any]) -> dict[str, Any]:
    """The baseline's metrics on the test split of one data set."""
    dataset = open_configured(EvaluateConfig(model="nano", out=Path("unused"), **data_options))
    test = dataset.split("test")
    metrics = score_vqa(test, QuestionOnly.fit(dataset.split("train")).predict(test))
    return {"dataset": name, "rows": len(test), "metrics": {metric: asdict(metrics[metric]) for metric in METRICS}}


if __name__ == "__main__":
    main()
