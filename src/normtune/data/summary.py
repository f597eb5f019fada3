"""Counts of a dataset's contents, as `normtune data` prints them. No question or answer is quoted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from statistics import mean, median
from typing import Any

import numpy as np
from numpy.typing import NDArray

from normtune.data.examples import META, Example, Examples, count_values, image_keys
from normtune.data.reading.cells import is_yes_no
from normtune.data.records import Dataset
from normtune.data.splits import Leak, find_leaks, rows_by_split, split_label
from normtune.runtime.notebook import html_text
from normtune.runtime.text_table import text_table

_FIRST = 20  # number of problems that are listed in full
_TOP = 5  # number of modalities and organs that are listed, the most frequent ones


class DatasetSummary(dict[str, Any]):
    """The counts of a dataset; see `summarize` for the keys. `print` and Jupyter show it as a table."""

    def __str__(self) -> str:
        return summary_text(self)

    def _repr_html_(self) -> str:
        return html_text(str(self))


def summarize(dataset: Dataset, leaks: Sequence[Leak] | None = None) -> DatasetSummary:
    """Count a dataset's rows, images, problems and leaks.

    Args:
        leaks: its leaks, if they are known already, as from `preflight`.

    Returns:
        A dict for JSON with these keys:

        - `dataset`, `licence`.
        - `parts`: split (with the language if there are several) -> counts. Over all rows of the file, as
          published counts are: `rows`, `open`, `closed`, `report`, `choice`, `yes_no`. Over the usable rows: `usable`,
          `images`, `questions_per_image` {`mean`, `median`, `max`}, `options` (number of options of a choice ->
          rows), `longest_question_words`, `longest_answer_words`, `modalities` and `organs` (name -> rows, most
          frequent first).
        - `notes`: choices that the reader made.
        - `problems`: `count`, `by_kind` (what -> number) and the first 20 as `first`
          [{`file`, `row`, `what`, `mend`}], where `mend` is the fix.
        - `leaks`: [{`what`, `part`, `other`, `shared`, `total`, `text`}], where `part` is the later split and
          `other` the earlier one.
    """
    label, rows = split_label(dataset), dataset.examples
    leaks = find_leaks(dataset) if leaks is None else leaks  # first: it takes the most memory
    columns = {  # for all rows at once, not split by split: each entry reads all texts of a column
        "yes_no": rows.flags("answer", is_yes_no),
        "longest_question_words": rows.numbers("question", _count_words, np.int32),
        "longest_answer_words": rows.numbers("answer", _count_words, np.int32),
    }
    skipped: dict[str, list[Example]] = {}
    for example in dataset.skipped:
        skipped.setdefault(label(example), []).append(example)
    return DatasetSummary(
        {
            "dataset": dataset.name,
            "licence": dataset.licence,
            "parts": {
                split: _counts(
                    rows.take(positions), skipped.get(split, []), {name: of[positions] for name, of in columns.items()}
                )
                for split, positions in rows_by_split(rows).items()
            },
            "notes": dataset.notes,
            "problems": {
                "count": len(dataset.problems),
                "by_kind": dict(Counter(problem.what for problem in dataset.problems).most_common()),
                "first": [
                    {"file": p.file, "row": p.row, "what": p.what, "mend": p.fix} for p in dataset.problems[:_FIRST]
                ],
            },
            "leaks": [
                {
                    "what": leak.what,
                    "part": leak.split,
                    "other": leak.earlier_split,
                    "shared": leak.shared,
                    "total": leak.total,
                    "text": str(leak),
                }
                for leak in leaks
            ],
        }
    )


def summary_text(summary: dict[str, Any]) -> str:
    """The result of `summarize` as plain text: a table of the splits, then notes, leaks and problems."""
    choices = ("choice",) if any(counts["choice"] for counts in summary["parts"].values()) else ()
    counted = ("rows", "usable", "images", "open", "closed", "report", *choices)
    heads = ("split", *counted, "yes/no", "questions an image")
    table: list[tuple[str, ...]] = [heads]
    for split, counts in summary["parts"].items():
        per_image = counts["questions_per_image"]
        questions = f"{per_image['mean']:.1f} mean, {per_image['median']:g} median, {per_image['max']} most"
        table.append((split, *(str(counts[field]) for field in (*counted, "yes_no")), questions))
    align = "l" + "r" * (len(heads) - 2) + "l"
    lines = [f"{summary['dataset']} (licence: {summary['licence']})", "", *text_table(table, align)]
    for split, counts in summary["parts"].items():
        words = f"{counts['longest_question_words']} and {counts['longest_answer_words']} words"
        lines += ["", f"{split}: longest question and answer {words}"]
        if counts["options"]:
            lines.append(
                "  options: " + ", ".join(f"{number} in {rows} rows" for number, rows in counts["options"].items())
            )
        for field in ("modalities", "organs"):
            if counts[field]:
                named = ", ".join(f"{name} {rows}" for name, rows in list(counts[field].items())[:_TOP])
                more = f", {len(counts[field]) - _TOP} more" if len(counts[field]) > _TOP else ""
                lines.append(f"  {field}: {named}{more}")
    if summary["notes"]:
        lines += ["", "How the files were read:", *(f"  {note}" for note in summary["notes"])]
    lines += ["", f"Leaks between splits: {len(summary['leaks']) or 'none among these rows'}"]
    lines += [f"  {leak['text']}" for leak in summary["leaks"]]
    problems = summary["problems"]
    lines += ["", f"Problems in the files: {problems['count'] or 'none'}"]
    lines += [f"  {count} x {what}" for what, count in problems["by_kind"].items()]
    if problems["first"]:
        lines += ["", f"The first {len(problems['first'])}:"]
    for problem in problems["first"]:
        where = f"{problem['file']}, row {problem['row']}" if problem["row"] else problem["file"]
        lines.append(f"  {where}: {problem['what']}. {problem['mend']}")
    return "\n".join(lines)


def _counts(examples: Examples, skipped: Sequence[Example], columns: dict[str, NDArray[Any]]) -> dict[str, Any]:
    """The counts of one split; see `summarize`. `columns`: of its rows, what the answers and the longest texts are."""
    kinds = Counter(count_values(*examples.codes("kind"))) + Counter(example.kind for example in skipped)
    codes, images = examples.codes("images")
    per_image = np.bincount(codes, minlength=len(images)).tolist()
    option_codes, options = examples.codes("options")
    # number of rows with 0, 1, 2, ... options
    rows_by_number = np.bincount(np.array([*map(len, options)], np.int64)[option_codes])
    return {
        "rows": len(examples) + len(skipped),
        "usable": len(examples),
        "images": len(image_keys(examples)),
        "open": kinds["open"],
        "closed": kinds["closed"],
        "report": kinds["report"],
        "choice": kinds["choice"],
        "options": {str(number): int(rows_by_number[number]) for number in np.flatnonzero(rows_by_number) if number},
        "yes_no": int(columns["yes_no"].sum()) + sum(is_yes_no(row.answer) for row in skipped),
        "questions_per_image": {"mean": round(mean(per_image), 2), "median": median(per_image), "max": max(per_image)},
        "longest_question_words": int(columns["longest_question_words"].max()),
        "longest_answer_words": int(columns["longest_answer_words"].max()),
        "modalities": _frequent(examples, "modality"),
        "organs": _frequent(examples, "organ"),
    }


def _count_words(text: str) -> int:
    return len(text.split())


def _frequent(examples: Examples, field: str) -> dict[str, int]:
    """Value of a `meta` field -> number of rows, most frequent first."""
    counts = count_values(*examples.codes(META + field))
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))
