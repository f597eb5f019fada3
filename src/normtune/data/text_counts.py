"""Counts over the texts of a dataset: languages, control tokens, empty values, repeated rows and contradictions."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from normtune.data.examples import (
    META,
    Examples,
    combine_hashes,
    compact,
    count_values,
    history_hashes,
    is_in,
    option_hashes,
    repeated_rows,
)
from normtune.data.reading.cells import NOT_A_NUMBER
from normtune.data.records import Dataset

_CONTROL = re.compile(
    r"<\|[^|<>]{1,40}\|>|</?s>|<(?:image|bos|eos|pad|unk|start_of_turn|end_of_turn)>|\[/?INST\]|\[SEP\]"
)


def count_texts(dataset: Dataset, rows: Examples, equal: dict[str, str]) -> dict[str, Any]:
    """Counts over the texts of `rows`; see `normtune.data.preflight`."""
    split_codes, splits = rows.codes("split")
    image_codes, images = rows.codes("images")
    pictures = np.array([hash(tuple(equal.get(key, key) for key in keys)) for keys in images], np.int64)
    answers = rows.hashes("answer", _plain)
    before = combine_hashes(history_hashes(rows), option_hashes(rows))
    questions = combine_hashes(split_codes, pictures[image_codes], before, rows.hashes("question", _plain))
    repeated, contradictions = _count_repeats(questions, answers)
    training = dataset.examples.flags("split", "train".__eq__)
    all_answers = answers if rows is dataset.examples else dataset.examples.hashes("answer", _plain)
    trained = all_answers[training]
    unseen = rows.flags("kind", lambda kind: kind == "closed" and len(trained) > 0)
    unseen[unseen] = ~is_in(answers[unseen], trained)
    constant = []
    for code, split in enumerate(splits):
        split_answers = answers[split_codes == code]
        if len(split_answers) > 1 and split_answers.min() == split_answers.max():
            constant.append(split)
    return {
        "languages": _most_common(*rows.codes(f"{META}language")),
        "control_tokens": _count_controls(rows),
        "not_a_number": int(rows.flags("answer", lambda text: _plain(text) in NOT_A_NUMBER).sum()),
        "constant": constant,
        "repeated": repeated,
        "contradictions": contradictions,
        "unseen": count_values(*compact(split_codes[unseen], splits)),
    }


def _count_repeats(questions: NDArray[np.int64], answers: NDArray[np.int64]) -> tuple[int, int]:
    """Rows with the question and answer of an earlier row, and rows of a question that has several answers."""
    repeated = repeated_rows(questions)
    if not len(repeated):
        return 0, 0
    questions, answers = questions[repeated], answers[repeated]
    order = np.lexsort((answers, questions))
    questions, answers = questions[order], answers[order]
    new_question = np.append(True, questions[1:] != questions[:-1])
    new_answer = new_question | np.append(True, answers[1:] != answers[:-1])
    starts = np.flatnonzero(new_question)
    rows, different = np.diff(np.append(starts, len(order))), np.add.reduceat(new_answer, starts, dtype=np.int64)
    return len(order) - int(new_answer.sum()), int(rows[different > 1].sum())


def _count_controls(rows: Examples) -> dict[str, int]:
    """Control token -> rows with it in question or answer, the most frequent first."""
    sets: dict[frozenset[str], int] = {frozenset(): 0}

    def number(text: str) -> int:
        return sets.setdefault(frozenset(_CONTROL.findall(text)), len(sets))

    questions, answers = rows.numbers("question", number, np.int32), rows.numbers("answer", number, np.int32)
    token_sets = list(sets)
    counts: Counter[str] = Counter()
    with_tokens = (questions > 0) | (answers > 0)
    pairs = Counter(zip(questions[with_tokens].tolist(), answers[with_tokens].tolist(), strict=True))
    for (question, answer), count in pairs.items():
        counts.update(dict.fromkeys(token_sets[question] | token_sets[answer], count))
    return dict(counts.most_common())


def _most_common(codes: NDArray[np.int32], values: Sequence[str]) -> dict[str, int]:
    return dict(Counter(count_values(codes, values)).most_common())


def _plain(text: str) -> str:
    return " ".join(text.lower().split()).rstrip(".")
