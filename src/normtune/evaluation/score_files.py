"""Scores a JSONL file of predictions against a JSONL file of references, joined by id."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, cast

from normtune.data.examples import KINDS, check_options
from normtune.data.reading.cells import is_yes_no
from normtune.data.records import Example, Kind
from normtune.errors import InputError, did_you_mean
from normtune.metrics.answers import count_ignored_signs, ignored_signs_text, score_rows, score_vqa
from normtune.metrics.metric_models import (
    MetricModel,
    metric_models_text,
    model_folder,
    parse_metric_models,
    score_with_models,
)
from normtune.metrics.reports import report_table, summarise_reports
from normtune.metrics.sum_metrics import INTERVALS, SumMetric
from normtune.runtime.files import write_json
from normtune.runtime.number_format import format_interval
from normtune.runtime.text_table import text_table

Task = Literal["vqa", "report"]
TASKS: tuple[Task, ...] = ("report", "vqa")
# Fields that may contain the text of a row; the first one that a row has is used.
_PREDICTION = ("prediction",)
_REFERENCE = ("reference", "answer", "report")  # in files of evaluations, of question datasets, of report datasets
_LIBRARIES = ("sacrebleu", "rouge-score", "nltk")  # their versions are recorded


@dataclass(frozen=True)
class Row:
    """The used fields of one line of a file."""

    line: int  # number of the line, from 1
    text: str
    images: tuple[str, ...]
    kind: Kind | None
    patient: str | None
    options: tuple[str, ...] = ()


def score_files(
    predictions: Path | str,
    references: Path | str,
    *,
    task: Task | None = None,
    normalisations: Sequence[str] | None = None,
    chexbert: Path | None = None,
    bertscore: Path | None = None,
    radgraph: bool = False,
    meteor15: Path | None = None,
    metric_model: str | None = None,
    out: Path | None = None,
) -> dict[str, Any]:
    """Score a file of predictions against a file of references. Rows are joined by id, in any order.

    Args:
        predictions: JSONL file of {"id", "prediction"}. Other fields are ignored, so that the
            `predictions.jsonl` of an evaluation can be both files.
        references: JSONL file of {"id", "reference"}; the text may also be in `answer` or `report`. Rows with
            the same `image`, `images` or `patient` are one cluster of the intervals. `kind` (open, closed, choice,
            report) selects the metrics of a row. A row of kind choice has its `options`, a list of texts.
        task: vqa or report; by default report, unless rows have a `kind` of question.
        normalisations: applied to the texts; by default `none` and `r2gen-iu` for reports, `vqa` for answers.
        chexbert: folder of CheXbert's weights, for its label F1 of reports.
        bertscore: folder of a model, for BERTScore of reports.
        radgraph: adds RadGraph F1 of reports.
        meteor15: the path of `meteor-1.5.jar`, for METEOR 1.5 of reports.
        metric_model: further metrics of reports, as for `parse_metric_models`: "green=DIR,radgraph=DIR:PYTHON".
        out: a file to write the result to as JSON.

    Returns:
        task, rows, images, normalisations, metrics (name -> value, low, high, rows, images), versions; for
        reports also `findings`, the table of every labeller, and with metric models `metric_models` (see
        `score_with_models`); for answers `signs_ignored` (see
        `normtune.metrics.answers.count_ignored_signs`).

    Raises:
        InputError: if the task is unknown, a row is not as described above, an id occurs more than once, the
            ids of the files differ, or something that a metric needs is missing. The message names the file
            and the line.
    """
    if task not in (None, *TASKS):
        raise InputError(f"--task {task}: unknown{did_you_mean(str(task), TASKS) or '.'} Known: {', '.join(TASKS)}.")
    prediction_rows = read_texts(predictions, _PREDICTION)
    reference_rows = read_texts(references, _REFERENCE)
    _check_same_ids(Path(predictions), prediction_rows, Path(references), reference_rows)
    task = task or _infer_task(reference_rows)
    examples = [
        Example(
            id,
            images=row.images or (f"row {id}",),  # a row without images is a cluster alone
            question="",
            answer=row.text,
            kind=_kind(row, task),
            split="",
            meta={} if row.patient is None else {"patient": row.patient},
            options=row.options,
        )
        for id, row in reference_rows.items()
    ]
    texts = {id: row.text for id, row in prediction_rows.items()}
    extra: dict[str, Any]
    if task == "vqa":
        if chexbert or bertscore or radgraph or meteor15 or metric_model:
            raise InputError(
                "CheXbert, BERTScore, RadGraph, METEOR and metric models score reports. Remove their options, or set "
                "--task report."
            )
        used = tuple(normalisations or ("vqa",))
        if len(used) > 1:
            raise InputError("answers are scored under one normalisation at a time. Give --normalisation once.")
        metrics = score_vqa(examples, texts, normalisation=used[0])
        extra = {"signs_ignored": count_ignored_signs(examples, texts, used[0])}
    else:
        used = tuple(normalisations or ("none", "r2gen-iu"))
        pairs = {example.id: (texts[example.id], example.answer) for example in examples}
        models = parse_metric_models(metric_model, chexbert=chexbert, bertscore=bertscore)
        if radgraph and "radgraph" in models:
            raise InputError("--radgraph and --metric-model radgraph compute the same scores. Give one of them.")
        clinical_metrics, extra = clinical_table(pairs, models, radgraph=radgraph)
        table = report_table(pairs, normalisations=used, bertscore=model_folder(models, "bertscore"), meteor15=meteor15)
        metrics = summarise_reports({**table, **clinical_metrics}, examples)
    result = {
        "task": task,
        "rows": len(examples),
        "images": len({example.images for example in examples}),
        "normalisations": list(used),
        "metrics": {name: asdict(metric) for name, metric in metrics.items()},
        "intervals": INTERVALS,
        **extra,
        "versions": {library: version(library) for library in _LIBRARIES},
    }
    if out is not None:
        write_json(out, result)
    return result


def clinical_table(
    pairs: Mapping[str, tuple[str, str]], models: Mapping[str, MetricModel], *, radgraph: bool = False
) -> tuple[dict[str, SumMetric], dict[str, Any]]:
    """Compute the clinical metrics of reports.

    Args:
        pairs: row id -> (prediction, reference).
        models: the metric models of CheXbert and of the metrics of RadEval, if any.
        radgraph: computes RadGraph F1 with the package radgraph.

    Returns:
        The metrics (those of `findings_rules` and BERTScore are in `report_table`), and what else is recorded:
        `findings`, labeller -> finding -> precision, recall, f1 and counts; with models of RadEval `metric_models`
        (see `score_with_models`).

    Raises:
        InputError: if weights or a package are missing.
    """
    from normtune.metrics import clinical

    # The other processes first: they may fail.
    metrics, records = score_with_models(pairs, models)
    tables: dict[str, Any] = {}
    predictions, references = clinical.label_with_rules(pairs)
    if clinical.mentions_any_finding(references):
        tables["findings_rules"] = clinical.finding_table(predictions, references)
    if chexbert := model_folder(models, "chexbert"):
        predictions, references = clinical.label_with_chexbert(pairs, chexbert)
        metrics.update(clinical.label_metrics(predictions, references, "chexbert"))
        tables["chexbert"] = clinical.finding_table(predictions, references)
    if radgraph:
        metrics.update(clinical.radgraph_metrics(pairs))
    return metrics, {"findings": tables, **({"metric_models": records} if records else {})}


def read_texts(path: Path | str, fields: Sequence[str]) -> dict[str, Row]:
    """Read a JSONL file as id -> row, in the order of the file.

    Args:
        fields: fields that may contain the text; the first one that a row has is used.

    Raises:
        InputError: if the file cannot be read, has no row, or a row is invalid.
    """
    path = Path(path)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}. Check the path.") from error
    rows: dict[str, Row] = {}
    for number, line in enumerate(data.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):  # without a BOM
        if not line.strip():
            continue
        try:
            id, row = _parse_row(line, number, fields)
        except InputError as error:
            raise InputError(f"{path}, line {number}: {error}") from error
        if id in rows:
            raise InputError(
                f"{path}, line {number}: id '{id}' is also on line {rows[id].line}. Keep one of the two rows."
            )
        rows[id] = row
    if not rows:
        raise InputError(f"{path} has no rows. Write one JSON object per line.")
    return rows


def _parse_row(line: bytes, number: int, fields: Sequence[str]) -> tuple[str, Row]:
    """Parse and check one line: its id and its row."""
    try:
        cells = json.loads(line)
    except UnicodeDecodeError as error:
        raise InputError("not UTF-8 text. Save the file as UTF-8.") from error
    except (ValueError, RecursionError) as error:
        raise InputError("not valid JSON. Write one JSON object per line.") from error
    layout = f'{{"id": ..., "{fields[0]}": ...}}'
    if not isinstance(cells, dict):
        raise InputError(f"not a JSON object. Write {layout}.")
    id = cells.get("id")
    if isinstance(id, bool) or not isinstance(id, str | int) or id == "":
        raise InputError(f"field 'id' is missing or is not text. Write {layout}.")
    field = next((field for field in fields if field in cells), None)
    if field is None:
        hint = did_you_mean(fields[0], [key for key in cells if key != "id"]).replace("did you mean", "is it")
        raise InputError(f"field '{fields[0]}' is missing{hint or '.'} Write {layout}.")
    text = cells[field]
    if isinstance(text, int | float) and not isinstance(text, bool):
        text = str(text)  # answers may be numbers
    if not isinstance(text, str):
        raise InputError(f"field '{field}' is {_json_type(text)}, not text. Write it as text.")
    if fields is _REFERENCE and not text.strip():
        raise InputError(f"field '{field}' is empty. Fill it in, or remove the row from both files.")
    patient = cells.get("patient")
    patient = None if patient is None else str(patient)
    kind, options = _parse_kind(cells), tuple(_parse_texts(cells, "options", "the texts of the options"))
    if fields is _REFERENCE and (options or kind == "choice"):
        kind = kind or "choice"
        check_options(kind, options, text)
    images = tuple(_parse_texts(cells, "images" if "images" in cells else "image", "the images' names"))
    return str(id), Row(number, text, images, kind, patient, options)


def _json_type(value: object) -> str:
    return {"NoneType": "null", "bool": "true or false", "list": "a list", "dict": "an object"}[type(value).__name__]


def _parse_texts(cells: Mapping[str, Any], field: str, what: str) -> Sequence[str]:
    """Read a field with one text or a list of texts; `what` they are, for the message."""
    value = cells.get(field)
    if value is None:
        return ()
    texts = value if isinstance(value, list) else [value]
    if not all(isinstance(text, str) for text in texts):
        raise InputError(f"field '{field}' is not a list of texts. Write {what}, or remove the field.")
    return texts


def _parse_kind(cells: Mapping[str, Any]) -> Kind | None:
    kind = cells.get("kind")
    if kind in (None, ""):
        return None
    if kind not in KINDS:
        raise InputError(f"field 'kind' is unknown. Known kinds: {', '.join(KINDS)}.")
    return cast(Kind, kind)


def _check_same_ids(
    predictions: Path, prediction_rows: Mapping[str, Row], references: Path, reference_rows: Mapping[str, Row]
) -> None:
    """Check that both files have the same ids."""
    for path, rows, other, other_rows in (
        (predictions, prediction_rows, references, reference_rows),
        (references, reference_rows, predictions, prediction_rows),
    ):
        unmatched = [id for id in rows if id not in other_rows]
        if unmatched:
            more = f" (and {len(unmatched) - 1} more)" if len(unmatched) > 1 else ""
            raise InputError(
                f"{path}, line {rows[unmatched[0]].line}: id '{unmatched[0]}'{more} is not in {other}. "
                "Write the same ids to both files."
            )


def _infer_task(rows: Mapping[str, Row]) -> Task:
    """Infer the task from the kinds of the references: vqa if all are questions, report if none is."""
    is_question = [bool(row.options) or row.kind in ("open", "closed") for row in rows.values()]
    if any(is_question) and not all(is_question):
        raise InputError("the references have questions and reports. Set --task, or score them separately.")
    return "vqa" if is_question[0] else "report"


def _kind(row: Row, task: Task) -> Kind:
    """Return the row's kind. Without one, a question is closed if its reference is yes or no."""
    if task == "report":
        return "report"
    return row.kind or ("closed" if is_yes_no(row.text) else "open")


def score_lists(
    predictions: Sequence[str], references: Sequence[str], *, task: Task = "report", **options: Any
) -> dict[str, float]:
    """Compute every metric of a task for two lists of texts in the same order, without intervals.

    Args:
        predictions: the texts to score.
        references: the reference of each prediction.
        task: report or vqa.
        options: options of `report_table` (normalisations, findings, bertscore), or `normalisation` of
            answers.

    Returns:
        Metric name -> value.

    Raises:
        InputError: if the lists differ in length or are empty.
    """
    if len(predictions) != len(references) or not references:
        raise InputError(
            f"{len(predictions)} predictions and {len(references)} references. "
            "Give the same number of both, at least one."
        )
    if task == "report":
        pairs = {str(at): pair for at, pair in enumerate(zip(predictions, references, strict=True))}
        return {name: metric.overall() for name, metric in report_table(pairs, **options).items()}
    examples = [
        Example(str(at), (str(at),), "", text, "closed" if is_yes_no(text) else "open", "")
        for at, text in enumerate(references)
    ]
    texts = {str(at): text for at, text in enumerate(predictions)}
    table = score_rows(examples, texts, **options)
    return {name: sum(rows.values()) / len(rows) for name, rows in table.items()}


def score_text(result: Mapping[str, Any]) -> str:
    """Format the result of `score_files` as aligned tables: shares in %, CIDEr and CIDEr-D times 100."""
    lines = [f"{result['task']}: {result['rows']} rows, {result['images']} images; {result['intervals']}"]
    lines += text_table(
        [
            [name, format_interval(metric, digits=2), f"{metric['rows']} rows"]
            for name, metric in result["metrics"].items()
        ]
    )
    lines += [*ignored_signs_text(result), *metric_models_text(result)]
    for labeller, table in result.get("findings", {}).items():
        rows = [[labeller, "precision", "recall", "F1", "predictions", "references"]]
        for name, row in table.items():
            shares = [f"{100 * row[column]:.2f}" for column in ("precision", "recall", "f1")]
            rows.append([name, *shares, str(row["predictions"]), str(row["references"])])
        lines += ["", *text_table(rows)]
    return "\n".join(lines)
