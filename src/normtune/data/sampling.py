"""How often training takes each row: weights of datasets (`--data a:0.7,b:0.3`) and `--sample balanced`.

The rows of a run are divided into strata: by dataset, by answer type, or both. Each stratum has a share of the
questions of every epoch, and an epoch has as many questions as there are rows. A stratum's questions are taken in turn:
its pass 0 has all of its rows in a random order, then pass 1 follows in another order, and so on; each epoch continues
where the epoch before it stopped. So a row of a stratum is taken at most once more than another one, over any number
of epochs, and the rows of an epoch depend only on the seed and the epoch.

Example: 6 rows of a and 2 of b with weights 0.5 and 0.5. Each epoch has 4 questions of a and 4 of b: epoch 0 leaves out
two rows of a and has both rows of b twice.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from normtune.data.examples import META, Examples
from normtune.data.groups import cut_groups
from normtune.data.reading.cells import is_yes_no
from normtune.errors import InputError

DATASET = f"{META}dataset"  # the column that names the dataset of a mixture's rows


@dataclass(frozen=True)
class Strata:
    """Rows in strata, with the share of each stratum."""

    names: list[str]  # the name of each stratum
    codes: NDArray[np.int32]  # the stratum of each row, [rows]
    shares: list[float]  # the part of the questions that each stratum has, [strata]; their sum is 1


def find_strata(examples: Examples, weights: Mapping[str, float], balanced: bool) -> Strata | None:
    """The strata of a run's rows; None if every row is taken once an epoch.

    With `balanced`, the kinds of question (open, closed) of a dataset have equal shares. Yes and no have equal shares
    of those closed questions that one of them answers; other closed questions keep their part.

    Args:
        weights: dataset of a mixture -> its weight; empty for a single dataset.
        balanced: whether answer types are balanced (`--sample balanced`).

    Raises:
        InputError: a dataset has no row, or there is one answer type only.
    """
    if not weights and not balanced:
        return None
    codes, parts = examples.codes(DATASET) if weights else (np.zeros(len(examples), np.int32), [""])
    if missing := sorted(weights.keys() - set(parts)):
        raise InputError(
            f"--data: {', '.join(missing)} has no row in the training split, or --limit leaves out its rows. Choose "
            "another split, use --share in place of --limit, or remove it."
        )
    if not balanced:
        total = sum(weights[part] for part in parts)
        return Strata(parts, codes, [weights[part] / total for part in parts])
    kinds, types = _answer_types(examples)
    if len(types) < 2:
        raise InputError(f"--sample balanced: all answers are of one type ({types[0]}). Leave it out.")
    both = codes.astype(np.int64) * len(types) + kinds
    numbers, strata, counts = np.unique(both, return_inverse=True, return_counts=True)
    pairs = [divmod(number, len(types)) for number in numbers.tolist()]  # (dataset, answer type) of each stratum
    rows_by_type: dict[int, dict[str, int]] = {}  # dataset -> answer type -> rows
    for (part, type), count in zip(pairs, counts.tolist(), strict=True):
        rows_by_type.setdefault(part, {})[types[type]] = count
    names, shares = [], []
    for part, type in pairs:
        weight = weights[parts[part]] / sum(weights[name] for name in parts) if weights else 1.0
        names.append(f"{parts[part]}: {types[type]}" if weights else types[type])
        shares.append(weight * _share(types[type], rows_by_type[part]))
    return Strata(names, strata.astype(np.int32), shares)


def _answer_types(examples: Examples) -> tuple[NDArray[np.int64], list[str]]:
    """The answer type of each row: open, closed, or of closed rows yes or no; and the types."""
    kinds, names = examples.codes("kind")
    words = examples.numbers("answer", _yes_or_no, np.int64)
    closed = np.array([name == "closed" for name in names])[kinds]
    types = [*names, "yes", "no"]
    numbers, codes = np.unique(np.where(closed & (words >= 0), len(names) + words, kinds), return_inverse=True)
    return codes, [types[number] for number in numbers.tolist()]


def _yes_or_no(answer: str) -> int:
    """0 for yes, 1 for no, -1 for another answer."""
    return -1 if not is_yes_no(answer) else int(answer.strip().lower().startswith("n"))


def _share(type: str, counts: Mapping[str, int]) -> float:
    """The share of the questions that an answer type gets among all types of its dataset; see `find_strata`."""
    closed = [name for name in ("yes", "no", "closed") if name in counts]
    kind_share = 1 / (len(counts.keys() - set(closed)) + bool(closed))
    if type not in closed:
        return kind_share
    words = [name for name in closed if name != "closed"]
    rows = [type] if type == "closed" else words
    return kind_share * sum(counts[n] for n in rows) / sum(counts[n] for n in closed) / len(rows)


class RowSampler:
    """The rows of each epoch; see the module's docstring.

    Args:
        examples: the rows of the run.
        strata: their strata.
        seed: seed of the order.
    """

    def __init__(self, examples: Examples, strata: Strata, seed: int) -> None:
        self.strata, self.seed, self.size = strata, seed, len(examples)
        codes, images = examples.codes("images")
        self._images, self._image_count = codes, len(images)
        self._rows = [np.flatnonzero(strata.codes == number) for number in range(len(strata.names))]
        self.quotas = _whole_numbers([share * self.size for share in strata.shares], self.size)

    def rows_of_epoch(self, epoch: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The rows of an epoch, and for each row the number of its pass, counted from the first pass of the epoch."""
        rows, passes = [], []
        for number, (members, quota) in enumerate(zip(self._rows, self.quotas, strict=True)):
            first, start = divmod(epoch * quota, len(members))
            for turn in range(-(-(start + quota) // len(members))):
                taken = self._pass(number, first + turn)[
                    start if turn == 0 else 0 : start + quota - turn * len(members)
                ]
                rows.append(taken)
                passes.append(np.full(len(taken), turn))
        return np.concatenate(rows), np.concatenate(passes)

    def groups_of_epoch(self, epoch: int, max_group_size: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The rows of an epoch group by group, and the ends of the groups; see `normtune.data.groups.RowGroups`.

        A group has the rows of one image, each once.
        """
        rows, passes = self.rows_of_epoch(epoch)
        images = passes * self._image_count + self._images[rows]
        noise = self._generator("order", epoch).permutation(len(rows))
        order = np.lexsort((noise, images))
        counts = np.unique(images, return_counts=True)[1]
        return rows[order], cut_groups(np.append(0, np.cumsum(counts)), max_group_size)

    def counts(self, epochs: int) -> dict[str, dict[str, Any]]:
        """What the first epochs take of each stratum.

        Returns:
            Stratum -> its `rows`, its `share` and `questions` of an epoch, and for each epoch how many of its rows are
            `left_out` and how many questions are `repeated` ones.
        """
        result: dict[str, dict[str, Any]] = {
            name: {"rows": len(rows), "share": share, "questions": quota, "left_out": [], "repeated": []}
            for name, rows, share, quota in zip(
                self.strata.names, self._rows, self.strata.shares, self.quotas, strict=True
            )
        }
        for epoch in range(epochs):
            taken = np.unique(self.rows_of_epoch(epoch)[0])
            distinct = np.bincount(self.strata.codes[taken], minlength=len(self._rows)).tolist()
            for counts, number in zip(result.values(), distinct, strict=True):
                counts["left_out"].append(counts["rows"] - number)
                counts["repeated"].append(counts["questions"] - number)
        return result

    def _pass(self, stratum: int, number: int) -> NDArray[np.int64]:
        """All rows of a stratum in the order of one pass: by image, the images in an order that all strata share."""
        rows = self._rows[stratum]
        places = self._generator("images", number).permutation(self._image_count)
        noise = self._generator(f"rows-{stratum}", number).permutation(len(rows))
        return rows[np.argsort(places[self._images[rows]] * len(rows) + noise)]

    def _generator(self, what: str, number: int) -> np.random.Generator:
        return np.random.default_rng(random.Random(f"{self.seed}-{what}-{number}").getrandbits(64))


def sampling_text(counts: Mapping[str, Mapping[str, Any]]) -> str:
    """The result of `RowSampler.counts` in one line, with the numbers of the first epoch."""
    parts = []
    for name, of in counts.items():
        left_out, repeated = of["left_out"][0], of["repeated"][0]
        change = f", {left_out:,} left out" if left_out else f", {repeated:,} repeated" if repeated else ""
        parts.append(f"{name} {100 * of['share']:.1f}% ({of['questions']:,} questions of {of['rows']:,} rows{change})")
    return f"sampling, first epoch: {'; '.join(parts)}"


def _whole_numbers(values: Sequence[float], total: int) -> list[int]:
    """Round values to whole numbers with this sum: the largest fractions are rounded up."""
    numbers = [int(value) for value in values]
    for index in sorted(range(len(values)), key=lambda index: numbers[index] - values[index])[: total - sum(numbers)]:
        numbers[index] += 1
    return numbers
