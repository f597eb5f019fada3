"""Checks the rows of a dataset before any expensive work: what is used, what is lost, and why.

`preflight` counts; `check` also decides: it refuses bad rows, or leaves them out with `--skip-bad`, and with
`--strict` refuses any loss.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from normtune.data.examples import Example, Examples, as_examples, image_keys
from normtune.data.pictures import Picture, cluster, equal_pictures, near_duplicates, read_pictures
from normtune.data.records import Dataset
from normtune.data.splits import Leak, find_leaks, group_columns
from normtune.data.text_counts import count_texts
from normtune.data.token_limits import TextLimits, count_image_tokens, count_tokens, image_text, limit_text
from normtune.errors import InputError
from normtune.runtime.files import write_json

Rows = TypeVar("Rows", bound=Examples)
_FIRST = 5  # number of rows, pictures and messages that are quoted
# Reasons of dropped rows that a choice of the user explains: another language or task.
_CHOSEN = ("language ", "is a question", "is a report")


@dataclass
class Preflight:
    """The counts of one dataset before it is used. Everything but `bad_rows` is written to preflight.json."""

    dataset: str
    rows: dict[str, Any]  # read, used, dropped {reason: rows}
    pictures: dict[str, Any]  # opened, unreadable, equal, near_duplicates, and the first of each
    texts: dict[str, Any]  # languages, control_tokens, not_a_number, constant, repeated, contradictions, unseen
    grouped_by: list[str]  # columns that name patients, cases or studies
    leaks: list[Leak]
    limits: dict[str, Any] = field(default_factory=dict)  # lengths of texts, and the score ceiling
    losses: dict[str, int] = field(default_factory=dict)  # what is lost -> rows; empty if nothing is
    memory: dict[str, Any] = field(default_factory=dict)  # memory of training; see `memory_plan.plan.estimate_memory`
    bad_rows: dict[str, str] = field(default_factory=dict)  # id of an example that cannot be used -> why
    seconds: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """The contents of preflight.json. Ids and reasons of bad rows are the first few."""
        first = dict(list(self.bad_rows.items())[:_FIRST])
        counts = asdict(self) | {"leaks": list(map(str, self.leaks))}
        return counts | {"bad_rows": {"count": len(self.bad_rows), "first": first}}

    def require_no_loss(self) -> None:
        """Apply `--strict`. Raises `InputError` if there is a loss; the message counts all of them."""
        if self.losses:
            raise InputError(f"--strict: {_joined(self.losses)}. Correct the data, or leave out --strict.")

    def figures(self) -> dict[str, Any]:
        """The rows, losses and limits, for the files of a run's results."""
        return {"rows": self.rows, "losses": self.losses, "limits": self.limits}

    def memory_text(self) -> str:
        """The memory that training will take, in one line; empty if it was not planned."""
        if not self.memory:
            return ""
        if "not_planned" in self.memory:
            return f"not planned: {self.memory['not_planned']}"
        plan = {name: f"{value / 2**30:.2f} GiB" for name, value in self.memory.items() if name in ("peak", "free")}
        free = f"; {plan['free']} are free" if "free" in plan else ""
        return f"about {plan['peak']} to train {self.memory['recipe']} with --batch {self.memory['batch']}{free}"

    def adapter_figures(self) -> dict[str, Any]:
        """What `adapter.json` records: limits in tokens, losses, rows, the highest possible score, planned bytes."""
        names = {"prompt": "prompts", "reference": "references", "answer": "answers"}
        limits = {name: self.limits[key]["limit"] for name, key in names.items() if key in self.limits}
        ceiling = {name: self.limits[name] for name in ("score_ceiling",) if name in self.limits}
        if "max_pixels" in self.limits:
            limits["max_pixels"] = self.limits["max_pixels"]
        # without `program` and `free`, which differ from run to run: equal runs write equal files
        parts = ("batch", "weights", "optimiser", "cached", "step")
        memory = {"memory": {name: self.memory[name] for name in parts}} if "peak" in self.memory else {}
        return {"limits": limits, "losses": self.losses, "rows": self.rows, **ceiling, **memory}

    def save(self, folder: Path) -> None:
        """Write `preflight.json` to a folder."""
        write_json(folder / "preflight.json", self.to_dict())

    def text(self) -> str:
        """The counts as lines of plain text, except for the leaks, which the summary of the dataset lists."""
        dropped = self.rows["dropped"]
        lines = [
            f"rows            {self.rows['read']} read, {self.rows['used']} used, {sum(dropped.values())} not used",
            *(f"{'':16}  {rows} x {reason}" for reason, rows in dropped.items()),
            f"pictures        {_pictures_text(self.pictures)}",
            f"patients        {_joined(self.grouped_by) or 'no column'} names them",
        ]
        for name, what in (("prompts", "questions"), ("references", "references"), ("answers", "answers")):
            if name in self.limits:
                lines.append(f"{what:<15} {limit_text(self.limits[name])}")
        if "texts_tried" in self.limits:
            tried, texts = self.limits["texts_tried"], self.limits["texts"]
            lines.append(f"{'':16}estimated from {tried:,} of {texts:,} different texts (--strict: from all)")
        if "images" in self.limits:
            lines.append(f"{'images':<15} {image_text(self.limits)}")
        if "score_ceiling" in self.limits:
            ceiling = ", ".join(f"{name} {100 * value:.2f}" for name, value in self.limits["score_ceiling"].items())
            lines.append(f"score ceiling   {ceiling} (a model that knows every reference, within the limit)")
        for name, text in _TEXT_COUNTS.items():
            if self.texts[name]:
                value = self.texts[name]
                lines.append(f"{'texts':<15} {text}: {_joined(value) if isinstance(value, dict) else value}")
        lines += [f"{'memory':<15} {memory}"] if (memory := self.memory_text()) else []
        lines += [f"{'lost':<15} {rows} x {loss}" for loss, rows in self.losses.items()]
        return "\n".join(lines)


_TEXT_COUNTS = {
    "languages": "languages of the rows",
    "control_tokens": "rows with a control token of a model in their text",
    "not_a_number": "rows with the answer nan, inf or null",
    "constant": "splits in which every answer is the same",
    "repeated": "rows that repeat picture, question and answer of another row",
    "contradictions": "rows with the picture and question of another row and a different answer",
    "unseen": "closed rows with an answer that no training row has",
}


def preflight(
    dataset: Dataset,
    examples: Sequence[Example] | None = None,
    limits: TextLimits | None = None,
    *,
    open_pictures: bool = True,
    exact: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Preflight:
    """Count what a dataset holds and what will be lost of it. Nothing is changed.

    Args:
        examples: the rows that will be used, such as one split; by default all.
        limits: how the model cuts texts; without it nothing is counted in tokens.
        open_pictures: whether every picture of `examples` is opened once; False for pictures that are drawn.
        exact: tokenise every text; otherwise, if they are very many, only a sample of the shorter ones.
        progress: called with (pictures opened, pictures in all).
    """
    started = time.perf_counter()
    rows = dataset.examples if examples is None else as_examples(examples)
    pictures = read_pictures(dataset, image_keys(rows), progress) if open_pictures else {}
    unreadable = {key for key, picture in pictures.items() if picture.error}
    bad_rows = {
        example.id: pictures[key].error
        for example in rows.where(rows.flags("images", lambda keys: not unreadable.isdisjoint(keys)))
        for key in example.images
        if key in unreadable
    }
    equal = equal_pictures(pictures)
    dropped = dict(dataset.dropped)
    if len(dataset.examples) > len(rows):
        dropped["in another split, or not selected"] = len(dataset.examples) - len(rows)
    columns, alike = group_columns(dataset.examples), near_duplicates(pictures)
    all_alike = alike if len(pictures) == len(dataset.pictures) else None
    result = Preflight(
        dataset=dataset.name,
        rows={"read": len(rows) + sum(dropped.values()), "used": len(rows), "dropped": dropped},
        pictures=_count_pictures(pictures, equal, alike, bad_rows),
        texts=count_texts(dataset, rows, cluster(equal)),
        grouped_by=list(columns),
        leaks=find_leaks(dataset, columns, all_alike),
        losses={reason: n for reason, n in dataset.dropped.items() if not reason.startswith(_CHOSEN)},
        bad_rows=bad_rows,
    )
    if bad_rows:
        result.losses["picture cannot be decoded"] = len(bad_rows)
    if limits is not None:
        counts = count_tokens(rows, limits, exact=exact)
        result.limits = counts.limits
        result.losses |= counts.losses
        result.bad_rows |= {id: message for id, message in counts.bad_rows.items() if id not in result.bad_rows}
        if limits.max_pixels is not None:
            result.limits["max_pixels"] = limits.max_pixels
        if limits.image_tokens is not None:
            result.limits |= count_image_tokens(pictures, limits)
    result.seconds = time.perf_counter() - started
    return result


def check(
    dataset: Dataset,
    examples: Sequence[Example],
    limits: TextLimits | None = None,
    *,
    strict: bool = False,
    skip_bad: bool = False,
    open_pictures: bool = True,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[Examples, Preflight]:
    """Run `preflight` and apply it: the examples that can be used, and the counts.

    Args:
        dataset, examples, limits, open_pictures, progress: as for `preflight`.
        strict: any loss is an error.
        skip_bad: rows that cannot be used are left out instead of being an error.

    Raises:
        InputError: rows cannot be used, and `skip_bad` is off; nothing is left; or, with `strict`, there is a loss.
    """
    result = preflight(dataset, examples, limits, open_pictures=open_pictures, exact=strict, progress=progress)
    if strict:
        result.require_no_loss()
    if result.bad_rows and not skip_bad:
        first = " ".join(f"{id}: {why.removesuffix('.')}." for id, why in list(result.bad_rows.items())[:_FIRST])
        raise InputError(
            f"{len(result.bad_rows)} of {len(examples)} rows cannot be used. {first} Correct them, or leave them out "
            "with --skip-bad."
        )
    usable = usable_rows(as_examples(examples), result)
    if not usable:
        raise InputError(
            f"dataset {dataset.name}: none of the {len(examples)} rows can be used. {_joined(result.losses)}."
        )
    result.rows["used"] = len(usable)
    if result.bad_rows:
        result.rows["dropped"] = result.rows["dropped"] | {"bad row (--skip-bad)": len(result.bad_rows)}
    return usable, result


def usable_rows(examples: Rows, result: Preflight) -> Rows:
    """The rows that `preflight` did not find bad."""
    if not result.bad_rows:
        return examples
    return examples.where(~examples.flags("id", result.bad_rows.__contains__))


def _count_pictures(
    pictures: dict[str, Picture],
    equal: Sequence[tuple[str, ...]],
    alike: Sequence[tuple[str, str]],
    bad_rows: dict[str, str],
) -> dict[str, Any]:
    unreadable = [picture.error for picture in pictures.values() if picture.error]
    return {
        "opened": len(pictures),
        "unreadable": len(unreadable),
        "rows_with_unreadable": len(bad_rows),
        "equal": len(equal),
        "near_duplicates": len(alike),
        "first_unreadable": unreadable[:_FIRST],
        "first_equal": [list(keys) for keys in equal[:_FIRST]],
        "first_near_duplicates": [list(keys) for keys in alike[:_FIRST]],
    }


def _pictures_text(pictures: dict[str, Any]) -> str:
    if not pictures["opened"]:
        return "not opened"
    unreadable = f"{pictures['unreadable']} cannot be decoded" if pictures["unreadable"] else "all can be decoded"
    return (
        f"{pictures['opened']} opened, {unreadable}; {pictures['equal'] or 'none'} under several names; "
        f"{pictures['near_duplicates'] or 'no'} pairs look alike"
    )


def _joined(counts: dict[str, int] | Iterable[str]) -> str:
    if isinstance(counts, dict):
        return ", ".join(f"{name} {count}" for name, count in counts.items())
    return ", ".join(counts)
