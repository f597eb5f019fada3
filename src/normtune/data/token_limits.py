"""Tokens of the rows of a dataset as a model reads them, and what its limits cut."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from normtune.data.examples import Example, Examples, combine_hashes, history_hashes, is_in, option_hashes
from normtune.data.pictures import Picture
from normtune.errors import InputError

_MAX_TEXTS = 40_000  # up to this number of different texts, all are tokenised; of more, a sample
_SPECIAL = re.compile(r"[<>\[\]|]")  # what the texts of control tokens contain, which a model may refuse
_MAX_SIZES = 50  # sizes of images of which the tokens are counted


@dataclass(frozen=True)
class TextLimits:
    """How a model tokenises a row, and the most tokens that it takes. None: no limit."""

    model: str  # its name, for messages
    # example -> (tokens of the prompt, tokens of the reference with its end token), both uncut. Raises InputError for a
    # row that the model cannot use
    tokenize: Callable[[Example], tuple[Sequence[int], Sequence[int]]]
    decode: Callable[[Sequence[int]], str]  # tokens -> text
    is_right: Callable[[str, str], bool]  # (prediction, reference) -> whether the exact match counts it
    max_prompt: int | None = None  # tokens of a question with its frame
    # tokens of a reference in training, end token included; None also without training
    max_reference: int | None = None
    max_answer: int | None = None  # tokens that are generated
    # the text of an example's reference as the model is to write it
    expected: Callable[[Example], str] = attrgetter("answer")
    max_pixels: int | None = None  # most pixels of an image
    # (width, height) of an image -> tokens that it takes, with the frame of the prompt
    image_tokens: Callable[[tuple[int, int]], int] | None = None


@dataclass
class TokenCounts:
    """What the limits of a model cut."""

    # `model`, and for `prompts`, `references` and `answers` the lengths in tokens and how many are cut; of answers also
    # the `score_ceiling`; `texts` and `texts_tried` if only a sample was tokenised
    limits: dict[str, Any]
    losses: dict[str, int]  # reason -> number of rows
    bad_rows: dict[str, str]  # id of a row that cannot be tokenised -> why


def count_tokens(rows: Examples, limits: TextLimits, *, exact: bool) -> TokenCounts:
    """Count the tokens of rows and what the limits cut of them.

    Rows with the same question and answer are tokenised once. If there are more than `_MAX_TEXTS` different texts,
    three groups are tokenised: the longest texts, texts that may contain a control token, and a random sample of the
    rest, which counts for the whole rest. All texts are tokenised if the count must be exact, or if a text of the
    sample cannot be tokenised.
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
        return count_tokens(rows, limits, exact=True)
    bad_rows: dict[str, str] = {}
    for example in rows.where(is_in(texts, texts[failed])) if failed else ():
        try:
            limits.tokenize(example)
        except InputError as error:
            bad_rows[example.id] = str(error)
    losses = {"text cannot be tokenised": len(bad_rows)} if bad_rows else {}
    prompts, references, weights = np.array(lengths, np.int64).reshape(-1, 3).T
    sample_sizes = {"texts": distinct, "texts_tried": len(first)} if len(first) < distinct else {}
    counted: dict[str, Any] = {
        "model": limits.model,
        **sample_sizes,
        "prompts": _cut(np.repeat(prompts, weights), limits.max_prompt),
    }
    if limits.max_reference is not None:
        counted["references"] = _cut(np.repeat(references, weights), limits.max_reference)
    if limits.max_answer is not None:
        counted["answers"] = _cut(np.repeat(references - 1, weights), limits.max_answer)
        counted["score_ceiling"] = {name: right[name] / totals[name] for name in totals}
    reasons = {"prompts": "question is cut", "references": "reference is cut in training", "answers": "answer is cut"}
    losses |= {reason: counted[name]["cut"] for name, reason in reasons.items() if counted.get(name, {}).get("cut")}
    return TokenCounts(counted, losses, bad_rows)


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


def count_image_tokens(pictures: dict[str, Picture], limits: TextLimits) -> dict[str, Any]:
    """Percentiles of the tokens of an image. Only some sizes are tried; another size counts as the next larger one."""
    assert limits.image_tokens is not None
    counts = Counter(picture.size for picture in pictures.values() if not picture.error)
    sizes = sorted(counts, key=lambda size: (size[0] * size[1], size))
    if not sizes:
        return {}
    tried = np.unique(np.linspace(len(sizes) - 1, 0, min(_MAX_SIZES, len(sizes))).round().astype(int))
    tokens = [limits.image_tokens(sizes[index]) for index in tried.tolist()]
    size_tokens = [tokens[place] for place in np.searchsorted(tried, np.arange(len(sizes))).tolist()]
    lengths = np.repeat(np.array(size_tokens, np.int64), [counts[size] for size in sizes])
    shares = {name: value for name, value in _cut(lengths, None).items() if name not in ("limit", "cut", "rows")}
    return {"images": {"sizes": len(sizes), "sizes_tried": len(tried), **shares}}


def image_text(limits: dict[str, Any]) -> str:
    """The tokens of an image as text."""
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


def limit_text(counts: dict[str, Any]) -> str:
    """The tokens of a kind of text, and how many of them are cut, as text."""
    lengths = f"median {counts['median']:g}, 95% {counts['p95']:g}, longest {counts['longest']} tokens"
    if counts["limit"] is None:
        return f"{lengths}; no limit"
    return f"{lengths}; {counts['cut'] or 'none'} of {counts['rows']} cut at the limit of {counts['limit']}"
