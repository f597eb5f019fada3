"""Answers of an evaluation in the forms that lmms-eval and VLMEvalKit score again without a model.

Layouts, read in their sources in November 2026:

`lmms-eval`
    What its model `from_log` reads (lmms_eval/models/simple/from_log.py, release 0.7.3): a `.json` of
    `args` (model, model_args, limit), `model_configs.task` and `logs`, each with `doc_id` and `resps`. It
    does not read the `.jsonl` that --log_samples writes today. `doc_id` is the row's place in the task.
`vlmevalkit`
    A prediction table of index, question, answer, prediction and category, as `vlmutil eval` loads it
    (vlmeval/smp/file.py: pandas' read_csv with tabs; vlmeval/dataset/image_vqa.py and image_shortqa.py read
    the columns). pandas takes words such as None and NA for missing, and they are scored as "nan".
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
from normtune.evaluation.results import read_run
from normtune.runtime.files import write_json, write_text

HARNESSES = ("lmms-eval", "vlmevalkit")
# tasks of lmms-eval on a dataset that is read here: by language, and how many rows the task has
_SLAKE = {"en": ("slake_en", 1061), "zh": ("slake_zh", 1033), "all": ("slake", 2094)}
# what pandas.read_csv takes for a missing value by default (pandas 2 and 3)
_MISSING = frozenset((
    "", "#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND", "1.#QNAN", "<NA>", "N/A",
    "NA", "NULL", "NaN", "None", "n/a", "nan", "null",
))  # fmt: skip


@dataclass(frozen=True)
class Exported:
    """What was written, and how many of its texts the harness will not read as they are."""

    out: str
    to: str
    task: str | None  # of lmms-eval
    rows: int
    misread: int  # predictions and answers that pandas takes for missing


def export_predictions(run: Path | str, to: str, out: Path | str, *, task: str | None = None) -> Exported:
    """Write the answers of the result folder `run` to the file `out`; see the top of this module.

    Args:
        run: result folder of an evaluation of questions.
        to: one of `HARNESSES`.
        out: the file: `.json` for lmms-eval, `MODEL_DATASET.tsv` for VLMEvalKit.
        task: lmms-eval's task; for SLAKE's test split it is known. Its rows must be those evaluated, in their
            order: `doc_id` is the place in predictions.jsonl.

    Raises:
        InputError: as `read_run`; reports; an unknown harness, ending or task; not the rows of a known task.
    """
    if to not in HARNESSES:
        known = ", ".join(HARNESSES)
        raise InputError(f"--to {to}: unknown harness{did_you_mean(to, HARNESSES) or '.'} Known: {known}.")
    out = Path(out)
    examples, texts, about = read_run(run)
    if examples[0].kind == "report":
        raise InputError(f"{run} holds reports, which neither harness scores again. Export answers.")
    ending = ".json" if to == "lmms-eval" else ".tsv"
    if out.suffix != ending:
        raise InputError(f"--out {out}: {to} reads files that end in {ending}. Name it so.")
    answers = [texts[example.id] for example in examples]
    if to == "lmms-eval":
        task = task or _known_task(about)
        _check_rows(task, examples, about)
        written = datetime.fromtimestamp((Path(run) / "metrics.json").stat().st_mtime, UTC)
        write_json(out, _from_log(examples, answers, about, task, written))
        return Exported(str(out), to, task, len(examples), 0)
    if task is not None:
        raise InputError("--task goes with lmms-eval; VLMEvalKit tells its dataset by the name of the file.")
    write_text(out, _table(examples, answers))
    misread = sum(text in _MISSING for text in (*answers, *(example.answer for example in examples)))
    return Exported(str(out), to, None, len(examples), misread)


def _known_task(about: dict[str, Any]) -> str:
    data = about.get("data") or {}
    known = _SLAKE.get(data.get("language", "en")) if about["dataset"] == "slake" else None
    if known is None:
        raise InputError(
            f"lmms-eval has no task of {about['dataset']} that is known here. "
            "Give --task, the name of one whose rows are those evaluated, in their order."
        )
    return known[0]


def _check_rows(task: str, examples: Sequence[Example], about: dict[str, Any]) -> None:
    """That a task whose number of rows is known gets all of them: places are counted from its first."""
    rows = dict(_SLAKE.values()).get(task)
    if rows is not None and (len(examples) != rows or about["splits"] != ["test"]):
        raise InputError(
            f"lmms-eval's {task} is the whole test split of SLAKE, {rows} rows; the result holds "
            f"{len(examples)} of {', '.join(about['splits'])}. Evaluate --split test without --limit."
        )


def _from_log(
    examples: Sequence[Example], answers: Sequence[str], about: dict[str, Any], task: str, written: datetime
) -> dict[str, Any]:
    named = [f"{what}={about[what]}" for what in ("base", "adapter") if about.get(what)]
    return {
        "args": {"model": "normtune", "model_args": ",".join(named), "limit": None},
        "model_configs": {"task": task},
        "time": written.strftime("%m%d_%H%M"),
        "logs": [
            {"doc_id": place, "id": example.id, "target": example.answer, "resps": [[answer]]}
            for place, (example, answer) in enumerate(zip(examples, answers, strict=True))
        ],
    }


def _table(examples: Sequence[Example], answers: Sequence[str]) -> str:
    buffer = io.StringIO()
    rows = csv.writer(buffer, delimiter="\t", quoting=csv.QUOTE_ALL, lineterminator="\n")
    rows.writerow(["index", "id", "question", "answer", "prediction", "category"])
    for place, (example, answer) in enumerate(zip(examples, answers, strict=True)):
        rows.writerow([place, example.id, example.question, example.answer, answer, example.kind])
    return buffer.getvalue()


def export_text(found: Exported) -> str:
    """What was written, as a sentence."""
    said = f"{found.rows} answers for {found.to}{f', task {found.task}' if found.task else ''}: {found.out}"
    if found.misread:
        said += (
            f". {found.misread} texts are words that pandas takes for missing; they will be scored as 'nan'"
        )
    return said
