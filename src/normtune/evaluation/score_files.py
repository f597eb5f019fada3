"""Two JSONL files, predictions and references, joined by id -> every metric of their task."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, cast

from normtune.data.reading.cells import is_yes_no
from normtune.data.records import Example, Kind
from normtune.errors import InputError, did_you_mean
from normtune.metrics.answers import score_vqa, scores
from normtune.metrics.reports import report_table, summarise
from normtune.metrics.statistics import RESAMPLES
from normtune.runtime.files import write_json

Task = Literal["vqa", "report"]
TASKS: tuple[Task, ...] = ("report", "vqa")
_PREDICTION = ("prediction",)
_REFERENCE = ("reference", "answer", "report")  # an evaluation's file, a dataset's own, a report's
_KINDS: tuple[Kind, ...] = ("open", "closed", "report")
_LIBRARIES = ("sacrebleu", "rouge-score", "nltk")


@dataclass(frozen=True)
class Row:
    """One line of a file: its text, and what else of it is used."""

    line: int  # from 1
    text: str
    images: tuple[str, ...]
    kind: Kind | None


def score_files(
    predictions: Path | str,
    references: Path | str,
    *,
    task: Task | None = None,
    normalisations: Sequence[str] | None = None,
    chexbert: Path | None = None,
    bertscore: Path | None = None,
    radgraph: bool = False,
    resamples: int = RESAMPLES,
    out: Path | None = None,
) -> dict[str, Any]:
    """Score a file of predictions against a file of references; rows are joined by id, in any order.

    Args:
        predictions: {"id", "prediction"} a line; more fields are let pass, so that the `predictions.jsonl`
            of an evaluation serves as both files.
        references: {"id", "reference"} a line, or `answer` or `report` for the text; `image` or `images` say
            which rows are resampled together, `kind` (open, closed, report) which metrics take a row.
        task: by default report, unless rows have a `kind` of question.
        normalisations: of texts; by default `none` and `r2gen-iu` for reports, `vqa` for answers.
        chexbert: folder of CheXbert's weights, for its label F1 of reports.
        bertscore: folder of a model, for BERTScore of reports.
        radgraph: add RadGraph F1 of reports.
        resamples: draws of the bootstrap.
        out: where the result is written as JSON besides.

    Returns:
        task, rows, images, normalisations, metrics (name -> value, low, high, rows, images), versions; for
        reports `findings`, the table of every labeller.

    Raises:
        InputError: a row is not as above, an id stands twice, the files' ids differ, or what a metric needs
            is not there; the message names the file and the line.
    """
    said = read_texts(predictions, _PREDICTION)
    meant = read_texts(references, _REFERENCE)
    _match(Path(predictions), said, Path(references), meant)
    task = task or _told_task(meant)
    examples = [
        Example(id, row.images or (f"row {id}",), "", row.text, _kind(row, task), "")
        for id, row in meant.items()
    ]
    texts = {id: row.text for id, row in said.items()}
    found: dict[str, Any]
    if task == "vqa":
        if chexbert or bertscore or radgraph:
            raise InputError(
                "CheXbert, BERTScore and RadGraph score reports. Leave them out, or say --task report."
            )
        used = tuple(normalisations or ("vqa",))
        if len(used) > 1:
            raise InputError(
                "answers are scored under one normalisation at a time. Give --normalisation once."
            )
        metrics = score_vqa(examples, texts, normalisation=used[0], resamples=resamples)
        found = {}
    else:
        used = tuple(normalisations or ("none", "r2gen-iu"))
        pairs = {example.id: (texts[example.id], example.answer) for example in examples}
        more, findings = clinical_table(pairs, chexbert=chexbert, radgraph=radgraph)
        table = report_table(pairs, normalisations=used, bertscore=bertscore)
        metrics = summarise({**table, **more}, examples, resamples=resamples)
        found = {"findings": findings}
    result = {
        "task": task,
        "rows": len(examples),
        "images": len({example.images for example in examples}),
        "normalisations": list(used),
        "metrics": {name: asdict(metric) for name, metric in metrics.items()},
        "intervals": f"95%, percentile bootstrap over images, {resamples} resamples",
        **found,
        "versions": {library: version(library) for library in _LIBRARIES},
    }
    if out is not None:
        write_json(out, result)
    return result


def clinical_table(
    pairs: Mapping[str, tuple[str, str]], *, chexbert: Path | None = None, radgraph: bool = False
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Metrics of the asked-for models, and labeller -> finding -> precision, recall, f1, counts.

    Raises:
        InputError: what one of them needs is not there.
    """
    from normtune.metrics import clinical

    metrics: dict[str, Any] = {}
    tables: dict[str, Any] = {}
    said, meant = clinical.rules_labels(pairs)
    if clinical.mentions_any_finding(meant):
        tables["findings_rules"] = clinical.finding_table(said, meant)
    if chexbert is not None:
        said, meant = clinical.chexbert_labels(pairs, chexbert)
        metrics.update(clinical.label_metrics(said, meant, "chexbert"))
        tables["chexbert"] = clinical.finding_table(said, meant)
    if radgraph:
        metrics.update(clinical.radgraph_metrics(pairs))
    return metrics, tables


def read_texts(path: Path | str, fields: Sequence[str]) -> dict[str, Row]:
    """id -> row of a JSONL file, in its order; the text is the first of `fields` that a row has.

    Raises:
        InputError: the file cannot be read, has no row, or a row is not as it must be.
    """
    path = Path(path)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}. Check the path.") from error
    rows: dict[str, Row] = {}
    for number, line in enumerate(data.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            id, row = _row(line, number, fields)
        except InputError as error:
            raise InputError(f"{path}, line {number}: {error}") from error
        if id in rows:
            raise InputError(
                f"{path}, line {number}: id '{id}' stands on line {rows[id].line} too. Keep one of the two."
            )
        rows[id] = row
    if not rows:
        raise InputError(f"{path} holds no row. Write one JSON object a line.")
    return rows


def _row(line: bytes, number: int, fields: Sequence[str]) -> tuple[str, Row]:
    try:
        cells = json.loads(line)
    except UnicodeDecodeError as error:
        raise InputError("not UTF-8 text. Save the file as UTF-8.") from error
    except (ValueError, RecursionError) as error:
        raise InputError("not valid JSON. Write one JSON object a line.") from error
    shape = f'{{"id": ..., "{fields[0]}": ...}}'
    if not isinstance(cells, dict):
        raise InputError(f"not a JSON object. Write {shape}.")
    id = cells.get("id")
    if isinstance(id, bool) or not isinstance(id, str | int) or id == "":
        raise InputError(f"field 'id' is missing or is no text. Write {shape}.")
    field = next((field for field in fields if field in cells), None)
    if field is None:
        hint = did_you_mean(fields[0], [key for key in cells if key != "id"]).replace("did you mean", "is it")
        raise InputError(f"field '{fields[0]}' is missing{hint or '.'} Write {shape}.")
    text = cells[field]
    if isinstance(text, int | float) and not isinstance(text, bool):
        text = str(text)  # answers may be numbers
    if not isinstance(text, str):
        raise InputError(f"field '{field}' is {_kind_of(text)}, not text. Write it as text.")
    if fields is _REFERENCE and not text.strip():
        raise InputError(f"field '{field}' is empty. Fill it in, or remove the row from both files.")
    return str(id), Row(number, text, _images(cells), _kind_cell(cells))


def _kind_of(value: object) -> str:
    return {"NoneType": "null", "bool": "true or false", "list": "a list", "dict": "an object"}[
        type(value).__name__
    ]


def _images(cells: Mapping[str, Any]) -> tuple[str, ...]:
    value = cells.get("images", cells.get("image"))
    if value is None:
        return ()
    names = value if isinstance(value, list) else [value]
    if not all(isinstance(name, str) for name in names):
        raise InputError("field 'images' is no list of texts. Write the images' names, or leave it out.")
    return tuple(names)


def _kind_cell(cells: Mapping[str, Any]) -> Kind | None:
    kind = cells.get("kind")
    if kind in (None, ""):
        return None
    if kind not in _KINDS:
        raise InputError(f"field 'kind' is unknown. Known kinds: {', '.join(_KINDS)}.")
    return cast(Kind, kind)


def _match(predictions: Path, said: Mapping[str, Row], references: Path, meant: Mapping[str, Row]) -> None:
    """Check that both files hold the same ids."""
    for path, rows, other, held in (
        (predictions, said, references, meant),
        (references, meant, predictions, said),
    ):
        odd = [id for id in rows if id not in held]
        if odd:
            more = f" (and {len(odd) - 1} more)" if len(odd) > 1 else ""
            raise InputError(
                f"{path}, line {rows[odd[0]].line}: id '{odd[0]}'{more} is not in {other}. "
                "Give both files the same rows."
            )


def _told_task(rows: Mapping[str, Row]) -> Task:
    questions = [row.kind in ("open", "closed") for row in rows.values()]
    if any(questions) and not all(questions):
        raise InputError("the references hold questions and reports. Say --task, or score them apart.")
    return "vqa" if questions[0] else "report"


def _kind(row: Row, task: Task) -> Kind:
    if task == "report":
        return "report"
    return row.kind or ("closed" if is_yes_no(row.text) else "open")


def score_lists(
    predictions: Sequence[str], references: Sequence[str], *, task: Task = "report", **options: Any
) -> dict[str, float]:
    """Every metric of a task for two lists of texts in the same order, as plain numbers.

    Args:
        predictions: the texts to score.
        references: the text that each is scored against.
        task: report or vqa.
        options: of `report_table` (normalisations, findings, bertscore), or `normalisation` of answers.

    Raises:
        InputError: the lists differ in length or are empty.
    """
    if len(predictions) != len(references) or not references:
        raise InputError(
            f"{len(predictions)} predictions and {len(references)} references. "
            "Give as many of one as of the other, at least one."
        )
    if task == "report":
        pairs = {str(at): pair for at, pair in enumerate(zip(predictions, references, strict=True))}
        return {name: metric.overall() for name, metric in report_table(pairs, **options).items()}
    examples = [
        Example(str(at), (str(at),), "", text, "closed" if is_yes_no(text) else "open", "")
        for at, text in enumerate(references)
    ]
    texts = {str(at): text for at, text in enumerate(predictions)}
    found = scores(examples, texts, **options)
    return {name: sum(rows.values()) / len(rows) for name, rows in found.items()}


def score_text(found: Mapping[str, Any]) -> str:
    """The result of `score_files` as aligned tables; shares in %, CIDEr and CIDEr-D times 100."""
    width = max(len(name) for name in found["metrics"])
    lines = [f"{found['task']}: {found['rows']} rows, {found['images']} images; {found['intervals']}"]
    for name, metric in found["metrics"].items():
        value, low, high = (100 * metric[end] for end in ("value", "low", "high"))
        lines.append(f"{name:<{width}}  {value:6.2f}  [{low:.2f}, {high:.2f}]  {metric['rows']} rows")
    for labeller, table in found.get("findings", {}).items():
        lines += ["", f"{labeller:<{width}}  precision  recall      F1  predictions  references"]
        for name, row in table.items():
            shares = "".join(f"{100 * row[column]:8.2f}" for column in ("precision", "recall", "f1"))
            lines.append(f"{name:<{width}}   {shares}  {row['predictions']:11}  {row['references']:10}")
    return "\n".join(lines)
