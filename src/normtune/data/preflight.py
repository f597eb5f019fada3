"""Checks the rows of a dataset before any expensive work: what is used, what is lost, and why.

`preflight` counts; `check` also decides: it refuses bad rows, or leaves them out with `--skip-bad`, and with
`--strict` refuses any loss.
"""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from operator import attrgetter
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from normtune.data.examples import (
    Example,
    Examples,
    as_examples,
    combine_hashes,
    history_hashes,
    image_keys,
    is_in,
    option_hashes,
)
from normtune.data.pictures import Picture, cluster, equal_pictures, near_duplicates, read_pictures
from normtune.data.records import Dataset
from normtune.data.splits import Leak, find_leaks, group_columns
from normtune.data.text_counts import count_texts
from normtune.errors import InputError
from normtune.runtime.files import write_json

Rows = TypeVar("Rows", bound=Examples)
_MAX_TEXTS = 40_000  # different texts that are all tokenised; of more of them, a sample is
_SPECIAL = re.compile(r"[<>\[\]|]")  # what the texts of control tokens contain, which a model may refuse
_MAX_SIZES = 50  # sizes of images of which the tokens are counted
_FIRST = 5  # number of rows, pictures and messages that are quoted
# Reasons of dropped rows that a choice of the user explains: another language or task.
_CHOSEN = ("language ", "is a question", "is a report")


@dataclass(frozen=True)
class TextLimits:
    """How a model tokenises a row, and the most tokens that it takes. None: no limit.

    Attributes:
        model: its name, for messages.
        tokenize: example -> (tokens of the prompt, tokens of the reference with its end token), both uncut.
            Raises InputError for a row that the model cannot use.
        decode: tokens -> text.
        is_right: (prediction, reference) -> whether the exact match counts it.
        max_prompt: tokens of a question with its frame.
        max_reference: tokens of a reference in training, end token included; None also without training.
        max_answer: tokens that are generated.
        expected: the text of an example's reference as the model is to write it.
        max_pixels: of an image.
        image_tokens: (width, height) of an image -> tokens that it takes, with the frame of the prompt.
    """

    model: str
    tokenize: Callable[[Example], tuple[Sequence[int], Sequence[int]]]
    decode: Callable[[Sequence[int]], str]
    is_right: Callable[[str, str], bool]
    max_prompt: int | None = None
    max_reference: int | None = None
    max_answer: int | None = None
    expected: Callable[[Example], str] = attrgetter("answer")
    max_pixels: int | None = None
    image_tokens: Callable[[tuple[int, int]], int] | None = None


@dataclass
class Preflight:
    """The counts of one dataset before it is used. Everything but `bad_rows` is written to preflight.json."""

    dataset: str
    rows: dict[str, Any]  # read, used, dropped {reason: rows}
    pictures: dict[str, Any]  # opened, unreadable, equal, near_duplicates, and the first of each
    texts: dict[str, Any]  # languages, control_tokens, not_a_number, constant, repeated, contradictions, unseen
    grouped_by: list[str]  # columns that name patients, cases or studies
    leaks: list[Leak]
    limits: dict[str, Any] = field(default_factory=dict)  # of prompts, references and answers; the score ceiling
    losses: dict[str, int] = field(default_factory=dict)  # what is lost -> rows; empty if nothing is
    memory: dict[str, Any] = field(default_factory=dict)  # of training; see `memory_plan.plan.estimate_memory`
    bad_rows: dict[str, str] = field(default_factory=dict)  # id of an example that cannot be used -> why
    seconds: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """The contents of preflight.json. Ids and reasons of bad rows are the first few."""
        first = dict(list(self.bad_rows.items())[:_FIRST])
        counts = asdict(self) | {"leaks": list(map(str, self.leaks))}
        return counts | {"bad_rows": {"count": len(self.bad_rows), "first": first}}

    def require_no_loss(self) -> None:
        """Apply `--strict`.

        Raises:
            InputError: there is a loss; the message counts all of them.
        """
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
                lines.append(f"{what:<15} {_limit_text(self.limits[name])}")
        if "texts_tried" in self.limits:
            tried, texts = self.limits["texts_tried"], self.limits["texts"]
            lines.append(f"{'':16}estimated from {tried:,} of {texts:,} different texts (--strict: from all)")
        if "images" in self.limits:
            lines.append(f"{'images':<15} {_image_text(self.limits)}")
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
        dataset: the dataset.
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
    of_all = alike if len(pictures) == len(dataset.pictures) else None
    result = Preflight(
        dataset=dataset.name,
        rows={"read": len(rows) + sum(dropped.values()), "used": len(rows), "dropped": dropped},
        pictures=_count_pictures(pictures, equal, alike, bad_rows),
        texts=count_texts(dataset, rows, cluster(equal)),
        grouped_by=list(columns),
        leaks=find_leaks(dataset, columns, of_all),
        losses={reason: n for reason, n in dataset.dropped.items() if not reason.startswith(_CHOSEN)},
        bad_rows=bad_rows,
    )
    if bad_rows:
        result.losses["picture cannot be decoded"] = len(bad_rows)
    if limits is not None:
        _count_tokens(result, rows, limits, exact=exact)
        if limits.max_pixels is not None:
            result.limits["max_pixels"] = limits.max_pixels
        if limits.image_tokens is not None:
            result.limits |= _count_image_tokens(pictures, limits)
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
        first = " ".join(f"{id}: {_sentence(why)}" for id, why in list(result.bad_rows.items())[:_FIRST])
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


def _count_tokens(result: Preflight, rows: Examples, limits: TextLimits, exact: bool) -> None:
    """Add what the limits cut to `result`: `limits`, `losses`, and the rows that cannot be tokenised.

    Rows with the same question and answer are tokenised once. Of more than `_MAX_TEXTS` such texts, the longest ones
    are tokenised, those that may contain a control token, and a random sample of the others, which then count for all
    of these; unless one without such characters cannot be tokenised, or the count must be exact.
    """
    columns = history_hashes(rows), option_hashes(rows), rows.hashes("question"), rows.hashes("answer")
    texts = combine_hashes(rows.codes("kind")[0], *columns)
    _, first, counts = np.unique(texts, return_index=True, return_counts=True)
    order = np.argsort(first)
    first, counts, distinct = first[order], counts[order], len(first)
    ordinary = np.zeros(0, np.int64)  # the first rows of texts without special characters, if not all are tried
    if len(first) > _MAX_TEXTS and not exact:
        tried, special, counts = _sample_texts(rows, first, counts)
        first, ordinary = first[tried], first[tried & ~special]
    lengths: list[tuple[int, int, int]] = []  # tokens of the prompt, of the reference, number of rows
    right: Counter[str] = Counter()
    totals: Counter[str] = Counter()
    failed: list[int] = []
    for row, example, count in zip(first.tolist(), rows.take(first), counts.tolist(), strict=True):
        try:
            prompt, reference = limits.tokenize(example)
        except InputError:
            failed.append(row)
            continue
        lengths.append((len(prompt), len(reference), count))
        if limits.max_answer is not None:
            # the end token need not fit: an answer may end at the limit
            written = limits.decode(reference[:-1][: limits.max_answer])
            expected = limits.expected(example)
            correct = written == expected or limits.is_right(written, expected)
            for name in ("all", example.kind):
                totals[name] += count
                right[name] += count * correct
    if np.isin(failed, ordinary).any():  # others may fail too
        _count_tokens(result, rows, limits, exact=True)
        return
    for example in rows.where(is_in(texts, texts[failed])) if failed else ():
        try:
            limits.tokenize(example)
        except InputError as error:
            result.bad_rows.setdefault(example.id, str(error))
            result.losses["text cannot be tokenised"] = result.losses.get("text cannot be tokenised", 0) + 1
    prompts, references, weights = np.array(lengths, np.int64).reshape(-1, 3).T
    of_texts = {"texts": distinct, "texts_tried": len(first)} if len(first) < distinct else {}
    result.limits = {"model": limits.model, **of_texts, "prompts": _cut(np.repeat(prompts, weights), limits.max_prompt)}
    if limits.max_reference is not None:
        result.limits["references"] = _cut(np.repeat(references, weights), limits.max_reference)
    if limits.max_answer is not None:
        result.limits["answers"] = _cut(np.repeat(references - 1, weights), limits.max_answer)
        result.limits["score_ceiling"] = {name: right[name] / totals[name] for name in totals}
    losses = {"prompts": "question is cut", "references": "reference is cut in training", "answers": "answer is cut"}
    for name, loss in losses.items():
        if result.limits.get(name, {}).get("cut"):
            result.losses[loss] = result.limits[name]["cut"]


def _sample_texts(
    rows: Examples, first: NDArray[np.int64], counts: NDArray[np.int64]
) -> tuple[NDArray[np.bool_], NDArray[np.bool_], NDArray[np.int64]]:
    """Select the texts that are tokenised.

    Args:
        first: the first row of each text.
        counts: the number of its rows.

    Returns:
        Which texts are tokenised, and which have special characters, both [texts]; and for how many rows each of the
        tokenised ones counts.
    """
    special = rows.flags("question", _has_special) | rows.flags("answer", _has_special)
    lengths = rows.numbers("question", len, np.int32) + rows.numbers("answer", len, np.int32)
    selected = special[first]
    others = np.flatnonzero(~selected)
    others = others[np.argsort(-lengths[first[others]], kind="stable")]
    longest, others = others[: _MAX_TEXTS // 4], others[_MAX_TEXTS // 4 :]
    selected[longest] = True
    sample = np.random.default_rng(0).permutation(others)[: _MAX_TEXTS // 4]
    weights = counts.copy()
    if len(sample):
        # shares of the rows of all others, rounded so that the sum is theirs
        ends = np.cumsum(counts[sample]) * int(counts[others].sum()) // int(counts[sample].sum())
        weights[sample] = np.diff(ends, prepend=0)
    selected[sample] = True
    return selected, special[first], weights[selected]


def _has_special(text: str) -> bool:
    return _SPECIAL.search(text) is not None


def _count_image_tokens(pictures: dict[str, Picture], limits: TextLimits) -> dict[str, Any]:
    """Percentiles of the tokens of an image. Of many different sizes, some are tried: others count as the next one."""
    assert limits.image_tokens is not None
    counts = Counter(picture.size for picture in pictures.values() if not picture.error)
    sizes = sorted(counts, key=lambda size: (size[0] * size[1], size))
    if not sizes:
        return {}
    tried = np.unique(np.linspace(len(sizes) - 1, 0, min(_MAX_SIZES, len(sizes))).round().astype(int))
    tokens = [limits.image_tokens(sizes[index]) for index in tried.tolist()]
    of_size = [tokens[place] for place in np.searchsorted(tried, np.arange(len(sizes))).tolist()]
    lengths = np.repeat(np.array(of_size, np.int64), [counts[size] for size in sizes])
    shares = {name: value for name, value in _cut(lengths, None).items() if name not in ("limit", "cut", "rows")}
    return {"images": {"sizes": len(sizes), "sizes_tried": len(tried), **shares}}


def _image_text(limits: dict[str, Any]) -> str:
    counts = limits["images"]
    limit = f"; --max-pixels {limits['max_pixels']}" if "max_pixels" in limits else ""
    tried = "" if counts["sizes"] == counts["sizes_tried"] else f" ({counts['sizes_tried']} sizes tried)"
    return f"median {counts['median']:g}, 95% {counts['p95']:g}, longest {counts['longest']} tokens{tried}{limit}"


def _cut(lengths: NDArray[np.int64], limit: int | None) -> dict[str, Any]:
    """Percentiles of lengths in tokens, the limit, and how many lengths are above it."""
    ordered = np.sort(lengths) if len(lengths) else np.zeros(1, np.int64)

    def percentile(percent: int) -> float | int:
        """As `statistics.quantiles` with the inclusive method."""
        if len(ordered) == 1:
            return int(ordered[0])
        low, part = divmod(percent * (len(ordered) - 1), 100)
        following = int(ordered[min(low + 1, len(ordered) - 1)])
        return (int(ordered[low]) * (100 - part) + following * part) / 100

    return {
        "limit": limit,
        "cut": 0 if limit is None else int((lengths > limit).sum()),
        "rows": len(lengths),
        "median": percentile(50),
        "p95": percentile(95),
        "p99": percentile(99),
        "longest": int(ordered[-1]),
    }


def _limit_text(counts: dict[str, Any]) -> str:
    lengths = f"median {counts['median']:g}, 95% {counts['p95']:g}, longest {counts['longest']} tokens"
    if counts["limit"] is None:
        return f"{lengths}; no limit"
    return f"{lengths}; {counts['cut'] or 'none'} of {counts['rows']} cut at the limit of {counts['limit']}"


def _pictures_text(pictures: dict[str, Any]) -> str:
    if not pictures["opened"]:
        return "not opened"
    unreadable = f"{pictures['unreadable']} cannot be decoded" if pictures["unreadable"] else "all can be decoded"
    return (
        f"{pictures['opened']} opened, {unreadable}; {pictures['equal'] or 'none'} under several names; "
        f"{pictures['near_duplicates'] or 'no'} pairs look alike"
    )


def _sentence(text: str) -> str:
    return text if text.endswith(".") else f"{text}."


def _joined(counts: dict[str, int] | Iterable[str]) -> str:
    if isinstance(counts, dict):
        return ", ".join(f"{name} {count}" for name, count in counts.items())
    return ", ".join(counts)
