"""What a dataset holds, as counts: what `normtune data` prints. No question or answer is quoted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from statistics import mean, median
from typing import Any

from normtune.data.reading.cells import is_yes_no
from normtune.data.records import Dataset, Example
from normtune.data.splits import leaks, split_group_of, split_groups

_FIRST = 20  # problems shown in full
_TOP = 5  # most frequent modalities and organs shown


def summarize(dataset: Dataset) -> dict[str, Any]:
    """Counts of a dataset, ready for JSON.

    Returns:
        `dataset`, `licence`; `parts`: split (with language where there are several) -> `rows`, `open`,
        `closed`, `report` and `yes_no` (of all rows of the file, as published counts are), `usable`; of the
        usable rows `images`, `questions_per_image` {`mean`, `median`, `max`}, `longest_question_words`,
        `longest_answer_words`, `modalities`, `organs` (name -> rows, most frequent first); `notes`: how
        the files were taken, where there was a choice; `problems`: `count`, `by_kind` (what -> number) and
        the first 20 as `first` [{`file`, `row`, `what`, `mend`}];
        `leaks`: [{`what`, `part`, `other`, `shared`, `total`, `text`}].
    """
    name = split_group_of(dataset)
    left_out: dict[str, list[Example]] = {}
    for example in dataset.skipped:
        left_out.setdefault(name(example), []).append(example)
    return {
        "dataset": dataset.name,
        "licence": dataset.licence,
        "parts": {
            part: _counts(usable, left_out.get(part, [])) for part, usable in split_groups(dataset).items()
        },
        "notes": dataset.notes,
        "problems": {
            "count": len(dataset.problems),
            "by_kind": dict(Counter(problem.what for problem in dataset.problems).most_common()),
            "first": [
                {"file": p.file, "row": p.row, "what": p.what, "mend": p.mend}
                for p in dataset.problems[:_FIRST]
            ],
        },
        "leaks": [
            {
                "what": leak.what,
                "part": leak.part,
                "other": leak.other,
                "shared": leak.shared,
                "total": leak.total,
                "text": str(leak),
            }
            for leak in leaks(dataset)
        ],
    }


def summary_text(found: dict[str, Any]) -> str:
    """A survey as plain text for people: a table of the parts, then leaks, then problems."""
    heads = ("split", "rows", "usable", "images", "open", "closed", "report", "yes/no", "questions an image")
    table = [heads]
    for part, counts in found["parts"].items():
        per_image = counts["questions_per_image"]
        spread = f"{per_image['mean']:.1f} mean, {per_image['median']:g} median, {per_image['max']} most"
        fields = ("rows", "usable", "images", "open", "closed", "report", "yes_no")
        table.append((part, *(str(counts[field]) for field in fields), spread))
    lines = [f"{found['dataset']} (licence: {found['licence']})", "", *_aligned(table)]
    for part, counts in found["parts"].items():
        words = f"{counts['longest_question_words']} and {counts['longest_answer_words']} words"
        lines += ["", f"{part}: longest question and answer {words}"]
        for field in ("modalities", "organs"):
            if counts[field]:
                named = ", ".join(f"{name} {rows}" for name, rows in list(counts[field].items())[:_TOP])
                more = f", {len(counts[field]) - _TOP} more" if len(counts[field]) > _TOP else ""
                lines.append(f"  {field}: {named}{more}")
    if found["notes"]:
        lines += ["", "How the files were read:", *(f"  {note}" for note in found["notes"])]
    lines += ["", f"Leaks between splits: {len(found['leaks']) or 'none among these rows'}"]
    lines += [f"  {leak['text']}" for leak in found["leaks"]]
    problems = found["problems"]
    lines += ["", f"Problems in the files: {problems['count'] or 'none'}"]
    lines += [f"  {count} x {what}" for what, count in problems["by_kind"].items()]
    if problems["first"]:
        lines += ["", f"The first {len(problems['first'])}:"]
    for problem in problems["first"]:
        where = f"{problem['file']}, row {problem['row']}" if problem["row"] else problem["file"]
        lines.append(f"  {where}: {problem['what']}. {problem['mend']}")
    return "\n".join(lines)


def _counts(examples: Sequence[Example], left_out: Sequence[Example]) -> dict[str, Any]:
    rows = [*examples, *left_out]
    kinds = Counter(example.kind for example in rows)
    per_image = Counter(example.images for example in examples).values()
    return {
        "rows": len(rows),
        "usable": len(examples),
        "images": len({key for example in examples for key in example.images}),
        "open": kinds["open"],
        "closed": kinds["closed"],
        "report": kinds["report"],
        "yes_no": sum(is_yes_no(example.answer) for example in rows),
        "questions_per_image": {
            "mean": round(mean(per_image), 2),
            "median": median(per_image),
            "max": max(per_image),
        },
        "longest_question_words": max(len(example.question.split()) for example in examples),
        "longest_answer_words": max(len(example.answer.split()) for example in examples),
        "modalities": _frequent(examples, "modality"),
        "organs": _frequent(examples, "organ"),
    }


def _frequent(examples: Sequence[Example], field: str) -> dict[str, int]:
    named = Counter(example.meta[field] for example in examples if field in example.meta)
    return dict(sorted(named.items(), key=lambda item: (-item[1], item[0])))


def _aligned(table: Sequence[Sequence[str]]) -> list[str]:
    """Rows of a text table: the first and last column flush left, the others flush right."""
    widths = [max(len(cell) for cell in column) for column in zip(*table, strict=True)]
    last = len(widths) - 1
    return [
        "  ".join(
            cell.ljust(width) if column in (0, last) else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in table
    ]
