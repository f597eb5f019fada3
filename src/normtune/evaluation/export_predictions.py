"""Exports the answers of an evaluation to files that lmms-eval and VLMEvalKit score without a model.

The layouts, taken from the sources of both harnesses in November 2026:

`lmms-eval` A `.json` file that its model `from_log` reads (lmms_eval/models/simple/from_log.py, release
    0.7.3). It has `args` (model, model_args, limit), `model_configs.task` and `logs`; each log has `doc_id`
    and `resps`. `from_log` does not read the `.jsonl` files that --log_samples writes today. `doc_id` is the
    index of the row in the task.
`vlmevalkit` A table of index, question, answer, prediction and category, as `vlmutil eval` loads it
    (vlmeval/smp/file.py calls pandas' read_csv with tabs; vlmeval/dataset/image_vqa.py and image_shortqa.py
    read the columns). pandas reads words such as None and NA as missing values, and VLMEvalKit scores them as
    "nan".
"""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from normtune.data.records import Example
from normtune.errors import InputError, did_you_mean
from normtune.evaluation.results import read_evaluation
from normtune.runtime.files import write_json, write_text
from normtune.runtime.notebook import Result

HARNESSES = ("lmms-eval", "vlmevalkit")
# lmms-eval's tasks on SLAKE: language -> (task, number of its rows)
_SLAKE = {"en": ("slake_en", 1061), "zh": ("slake_zh", 1033), "all": ("slake", 2094)}
# Words that pandas.read_csv reads as a missing value by default (pandas 2 and 3).
_MISSING = frozenset((
    "", "#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND", "1.#QNAN", "<NA>", "N/A",
    "NA", "NULL", "NaN", "None", "n/a", "nan", "null",
))  # fmt: skip


@dataclass(frozen=True)
class Exported(Result):
    """The written file, and how many of its texts the harness will misread."""

    out: str
    to: str  # the harness
    task: str | None  # the task of lmms-eval
    rows: int
    misread: int  # number of predictions and answers that pandas reads as missing

    def __str__(self) -> str:
        task = f", task {self.task}" if self.task else ""
        text = f"{self.rows} answers for {self.to}{task}: {self.out}"
        if self.misread:
            text += f". pandas reads {self.misread} of the texts as missing; they will be scored as 'nan'"
        return text


def export_predictions(run: Path | str, to: str, out: Path | str, *, task: str | None = None) -> Exported:
    """Write the answers of an evaluation to a file for another harness. The top of this module describes it.

    Args:
        run: result folder of an evaluation of questions.
        to: one of `HARNESSES`.
        out: the file: `.json` for lmms-eval, `MODEL_DATASET.tsv` for VLMEvalKit.
        task: lmms-eval's task; by default it is known for SLAKE's test split. The rows of the task must be
            the evaluated rows in the same order, because `doc_id` is the index in predictions.jsonl.

    Raises:
        InputError: as `read_evaluation`, or if the run has reports, the harness, file ending or task is unknown, or
            the rows are not those of a known task.
    """
    if to not in HARNESSES:
        known = ", ".join(HARNESSES)
        raise InputError(f"--to {to}: unknown harness{did_you_mean(to, HARNESSES) or '.'} Known: {known}.")
    out = Path(out)
    evaluation = read_evaluation(run)
    examples, record = evaluation.examples, evaluation.record
    if evaluation.is_report:
        raise InputError(f"{run} has reports, which neither harness can score. Export answers.")
    ending = ".json" if to == "lmms-eval" else ".tsv"
    if out.suffix != ending:
        raise InputError(f"--out {out}: {to} reads files that end in {ending}. Use this ending.")
    answers = [prediction.text for prediction in evaluation.predictions]
    if to == "lmms-eval":
        task = task or _known_task(record)
        _check_rows(task, examples, record)
        evaluated_at = datetime.fromtimestamp((Path(run) / "metrics.json").stat().st_mtime, UTC)
        write_json(out, _lmms_eval_log(examples, answers, record, task, evaluated_at))
        return Exported(str(out), to, task, len(examples), 0)
    if task is not None:
        raise InputError("--task is for lmms-eval; VLMEvalKit gets its dataset from the name of the file.")
    write_text(out, _vlmevalkit_table(examples, answers))
    misread = sum(text in _MISSING for text in (*answers, *(example.answer for example in examples)))
    return Exported(str(out), to, None, len(examples), misread)


def _known_task(record: dict[str, Any]) -> str:
    """Return lmms-eval's task for the evaluated dataset."""
    data = record.get("data") or {}
    known = _SLAKE.get(data.get("language", "en")) if record["dataset"] == "slake" else None
    if known is None:
        raise InputError(
            f"no task of lmms-eval is known for {record['dataset']}. "
            "Give --task, the name of a task with the evaluated rows in the same order."
        )
    return known[0]


def _check_rows(task: str, examples: Sequence[Example], record: dict[str, Any]) -> None:
    """Check that a run has all rows of a known task, because `doc_id` counts from the task's first row."""
    rows = dict(_SLAKE.values()).get(task)
    if rows is not None and (len(examples) != rows or record["splits"] != ["test"]):
        raise InputError(
            f"lmms-eval's {task} is the whole test split of SLAKE, {rows} rows; the result has "
            f"{len(examples)} of {', '.join(record['splits'])}. Evaluate --split test without --limit."
        )


def _lmms_eval_log(
    examples: Sequence[Example], answers: Sequence[str], record: dict[str, Any], task: str, time: datetime
) -> dict[str, Any]:
    """Build the log that lmms-eval's `from_log` reads."""
    model_args = [f"{key}={record[key]}" for key in ("base", "adapter") if record.get(key)]
    return {
        "args": {"model": "normtune", "model_args": ",".join(model_args), "limit": None},
        "model_configs": {"task": task},
        "time": time.strftime("%m%d_%H%M"),
        "logs": [
            {"doc_id": index, "id": example.id, "target": example.answer, "resps": [[answer]]}
            for index, (example, answer) in enumerate(zip(examples, answers, strict=True))
        ],
    }


def _vlmevalkit_table(examples: Sequence[Example], answers: Sequence[str]) -> str:
    """Build the tab-separated table that VLMEvalKit reads."""
    buffer = io.StringIO()
    rows = csv.writer(buffer, delimiter="\t", quoting=csv.QUOTE_ALL, lineterminator="\n")
    rows.writerow(["index", "id", "question", "answer", "prediction", "category"])
    for index, (example, answer) in enumerate(zip(examples, answers, strict=True)):
        rows.writerow([index, example.id, example.question, example.answer, answer, example.kind])
    return buffer.getvalue()
