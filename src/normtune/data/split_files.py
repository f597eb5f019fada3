"""New splits by ratio, as folds or by a column, and the file that keeps them.

No picture and no patient is in two splits, and each split has its share of every kind of answer. `normtune split`
writes a file, id -> split or fold, which the other commands read with `--splits`.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from normtune.data.examples import Examples
from normtune.data.records import KINDS, Dataset, Example
from normtune.data.split_names import SPLITS, split_name
from normtune.data.splits import cluster_pictures, find_identical_images, group_columns
from normtune.errors import InputError, did_you_mean
from normtune.runtime.files import read_json, write_text

FORMAT = 1
DEFAULT_RATIO = "80/10/10"


def parse_ratio(text: str) -> tuple[float, ...]:
    """The shares of train, validate and test, which add up to 1, from a text such as 80/10/10 or 8/2.

    Raises:
        InputError: it is not two or three numbers that are at least 0, with a sum above 0.
    """
    try:
        numbers = [float(number) for number in text.split("/")]
    except ValueError:
        numbers = []
    if len(numbers) not in (2, 3) or not all(0 <= number < 1e9 for number in numbers) or sum(numbers) <= 0:
        raise InputError(f"--split-ratio {text}: write train/validate/test, such as 80/10/10, or train/test, as 80/20.")
    numbers = numbers if len(numbers) == 3 else [numbers[0], 0.0, numbers[1]]
    return tuple(number / sum(numbers) for number in numbers)


def divide(dataset: Dataset, shares: Sequence[float], seed: int) -> dict[str, int]:
    """Divide the examples into parts, so that no picture and no patient is in two of them.

    Groups of pictures are assigned one after the other, in an order that depends on the seed and the image keys. Each
    goes where it increases least the squared difference between the parts' shares of the pictures, and of the
    examples of each kind, and `shares`.

    Args:
        dataset: the dataset; its own splits are ignored.
        shares: share of each part; they add up to 1.
        seed: another seed gives other parts.

    Returns:
        Id of an example -> index of its part.

    Raises:
        InputError: there are fewer groups of pictures than parts.
    """
    cluster_of = cluster_pictures(dataset.examples, find_identical_images(dataset))
    contents: dict[str, Counter[str]] = {}  # group -> its pictures, and its examples of each kind
    for name in cluster_of.values():
        contents.setdefault(name, Counter())["picture"] += 1
    for example in dataset.examples:
        contents[cluster_of[example.images[0]]][example.kind] += 1
    totals: Counter[str] = Counter()
    for counts in contents.values():
        totals.update(counts)
    parts = [index for index, share in enumerate(shares) if share > 0]
    assigned = {index: dict.fromkeys(totals, 0.0) for index in parts}
    part_of: dict[str, int] = {}
    for name in sorted(contents, key=lambda name: hashlib.sha256(f"{seed}:{name}".encode()).digest()):
        added = {what: count / totals[what] for what, count in contents[name].items()}

        def increase(index: int, added: Mapping[str, float] = added) -> float:
            excess = ((assigned[index][what] - shares[index], share) for what, share in added.items())
            return sum(share * (2 * over + share) for over, share in excess) / shares[index]

        best = min(parts, key=increase)
        part_of[name] = best
        for what, share in added.items():
            assigned[best][what] += share
    if empty := [index for index in parts if index not in part_of.values()]:
        raise InputError(
            f"dataset {dataset.name}: {len(contents)} groups of pictures (by picture and patient) are too few for "
            f"{len(parts)} parts: {len(empty)} would be empty. Use fewer parts, or shares that are closer."
        )
    return {example.id: part_of[cluster_of[example.images[0]]] for example in dataset.examples}


def make_split_file(
    dataset: Dataset, *, ratio: str | None = None, folds: int | None = None, column: str | None = None, seed: int = 0
) -> dict[str, Any]:
    """Make splits in one of the three ways, as the contents of a file of splits.

    Raises:
        InputError: not exactly one way is given, or see `divide`.
    """
    values = {"--split-ratio": ratio, "--folds": folds, "--split-column": column}
    given = [option for option, value in values.items() if value is not None]
    if len(given) > 1:
        raise InputError(f"{' and '.join(given)} are different ways to split. Give one of them.")
    about: dict[str, Any] = {"format": FORMAT, "dataset": dataset.name, "digest": rows_digest(dataset)}
    if column is not None:
        return about | {"column": column, "splits": _by_column(dataset, column)}
    about |= {"seed": seed, "grouped_by": ["picture", *group_columns(dataset.examples)], "stratified_by": "kind"}
    if folds is not None:
        return about | {"folds": folds, "splits": divide(dataset, [1 / folds] * folds, seed)}
    ratio = ratio or DEFAULT_RATIO
    parts = divide(dataset, parse_ratio(ratio), seed)
    return about | {"ratio": ratio, "splits": {id: SPLITS[part] for id, part in parts.items()}}


def apply_splits(
    dataset: Dataset, ratio: str | None, seed: int | None, column: str | None, file: Path | None, fold: int | None
) -> Dataset:
    """The dataset with the splits that the options name; see `normtune.data.options.DataOptions`.

    Raises:
        InputError: the options contradict each other; the file is no file of splits, or lacks rows of the dataset.
    """
    if file is not None and (ratio is not None or column is not None):
        raise InputError("--splits contains the splits. Remove --split-ratio and --split-column.")
    if file is not None:
        made = read_split_file(file)
        source = f"splits of {file.name}"
    else:
        made = make_split_file(dataset, ratio=ratio, column=column, seed=seed or 0)
        source = f"splits by column {column}" if column else f"new splits {ratio}, seed {seed or 0}"
    splits: dict[str, Any] = made["splits"]
    missing = [example.id for example in dataset.examples if example.id not in splits]
    if missing:
        raise InputError(
            f"{file}: {len(missing)} of {len(dataset.examples)} rows of {dataset.name} are not in it (first: "
            f"{missing[0]}). Make it again with normtune split."
        )
    numbers = sorted({value for value in splits.values() if isinstance(value, int)})
    if numbers and fold is None:
        raise InputError(f"{source}: it holds folds {numbers[0]} to {numbers[-1]}. Choose the test fold with --fold.")
    if not numbers and fold is not None:
        raise InputError(f"{source}: it holds no folds. Remove --fold, or make some with normtune split --folds 5.")
    if fold is not None:
        if fold not in numbers:
            raise InputError(f"--fold {fold}: {source} has folds {numbers[0]} to {numbers[-1]}.")
        following = numbers[(numbers.index(fold) + 1) % len(numbers)]
        names = dict.fromkeys(numbers, "train") | {following: "validate", fold: "test"}
        splits = {id: names.get(value, value) for id, value in splits.items()}
        source += f", fold {fold} is test and {following} validate"
    notes = [source]
    unused = len(splits.keys() - {example.id for example in (*dataset.examples, *dataset.skipped)})
    if file is not None and made.get("digest") not in (None, rows_digest(dataset)):
        notes.append(f"{file.name} was made of other rows: some have changed since, or are not selected ({unused} ids)")

    def move(example: Example) -> Example:
        return replace(example, split=splits.get(example.id, example.split))

    return replace(
        dataset,
        examples=Examples(map(move, dataset.examples)),
        skipped=list(map(move, dataset.skipped)),
        notes=[*dataset.notes, *notes],
    )


def rows_digest(dataset: Dataset) -> str:
    """A digest of the rows' ids, images, questions and answers, in any order and split."""
    rows = sorted(json.dumps([e.id, e.images, e.question, e.answer]) for e in dataset.examples)
    return hashlib.blake2b("\n".join(rows).encode(), digest_size=8).hexdigest()


def split_counts(dataset: Dataset, made: Mapping[str, Any]) -> dict[str | int, dict[str, int]]:
    """Split or fold -> its rows, images, patients and rows of each kind."""
    columns = group_columns(dataset.examples)
    examples: dict[str | int, list[Example]] = {}
    for example in dataset.examples:
        examples.setdefault(made["splits"][example.id], []).append(example)
    order = {name: index for index, name in enumerate(SPLITS)}
    return {
        name: {
            "rows": len(members),
            "images": len({key for example in members for key in example.images}),
            "patients": len({example.meta.get(c) for example in members for c in columns if example.meta.get(c)}),
            **{kind: sum(example.kind == kind for example in members) for kind in KINDS},
        }
        for name, members in sorted(examples.items(), key=lambda item: (order.get(str(item[0]), 9), str(item[0])))
    }


def split_file_text(made: Mapping[str, Any], suffix: str) -> str:
    """The contents of a file of splits: JSON, or for .csv the columns id and split below a line with the rest."""
    if suffix != ".csv":
        return json.dumps(made, indent=1, ensure_ascii=False) + "\n"
    about = {name: value for name, value in made.items() if name != "splits"}
    text = io.StringIO()
    text.write(f"# {json.dumps(about, ensure_ascii=False)}\n")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerows([("id", "split"), *made["splits"].items()])
    return text.getvalue()


def write_split_file(file: Path, made: Mapping[str, Any]) -> None:
    """Write a file of splits.

    Raises:
        InputError: there is a file with other splits already, or it cannot be written.
    """
    text = split_file_text(made, file.suffix)
    if file.exists() and file.read_text(encoding="utf-8", errors="replace") != text:
        raise InputError(f"{file} exists and is different. Choose another --out, or delete it.")
    write_text(file, text)


def read_split_file(file: Path) -> dict[str, Any]:
    """Read a file of splits, JSON or CSV.

    Raises:
        InputError: it cannot be read, or holds no splits.
    """
    made: Any
    if file.suffix == ".csv":
        made = _read_csv(file)
    else:
        made = read_json(file)
    splits = made.get("splits") if isinstance(made, dict) else None
    if not isinstance(splits, dict) or not splits or not all(isinstance(v, str | int) for v in splits.values()):
        raise InputError(f"{file} holds no splits: it needs ids with a split or a fold. Write it with normtune split.")
    made["splits"] = {id: _split_or_fold(value) for id, value in splits.items()}
    return made  # type: ignore[no-any-return]


def _read_csv(file: Path) -> dict[str, Any]:
    try:
        first, _, rest = file.read_text(encoding="utf-8-sig").partition("\n")
        made = json.loads(first[1:]) if first.startswith("#") else {}
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "damaged"
        raise InputError(f"cannot read {file}: {reason}. Write it with normtune split.") from error
    rows = list(csv.reader(io.StringIO(rest if first.startswith("#") else f"{first}\n{rest}")))
    if not rows or rows[0][:2] not in (["id", "split"], ["id", "fold"]) or any(len(row) < 2 for row in rows[1:] if row):
        raise InputError(f"{file} needs the columns id and split (or fold). Write it with normtune split.")
    return dict(made) | {"splits": {row[0]: row[1] for row in rows[1:] if row}}


def _split_or_fold(value: str | int) -> str | int:
    text = str(value).strip()
    return int(text) if text.isascii() and text.isdecimal() else split_name(text)


def _by_column(dataset: Dataset, column: str) -> dict[str, str | int]:
    values = {example.id: example.meta.get(column, "") for example in dataset.examples}
    if not any(values.values()):
        columns = sorted({name for example in dataset.examples for name in example.meta})
        hint = did_you_mean(column, columns) or "."
        known = ", ".join(columns) or "none"
        raise InputError(f"--split-column: no row has a column '{column}'{hint} Columns: {known}.")
    if empty := sum(not value for value in values.values()):
        what = f"{empty} of {len(values)} rows have no value in column '{column}'"
        raise InputError(f"--split-column: {what}. Fill it in.")
    return {id: _split_or_fold(value) for id, value in values.items()}
