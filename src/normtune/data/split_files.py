"""New splits by ratio, as folds or by a column, and the file that keeps them.

No picture and no patient is in two splits, and each split has its share of every kind of answer. `normtune split`
writes a file, id -> split or fold, which the other commands read with `--splits`.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from normtune.data.examples import KINDS, META, count_values, image_keys
from normtune.data.records import Dataset
from normtune.data.split_names import SPLITS, split_name
from normtune.data.splits import check_column, cluster_pictures, find_identical_images, group_columns
from normtune.errors import InputError
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


def divide(dataset: Dataset, shares: Sequence[float], seed: int) -> NDArray[np.int32]:
    """Divide the examples into parts, so that no picture and no patient is in two of them.

    Groups of pictures are assigned one after the other, in an order that depends on the seed and the image keys. Each
    goes where it increases least the squared difference between the parts' shares of the pictures, and of the
    examples of each kind, and `shares`.

    Args:
        dataset: the dataset; its own splits are ignored.
        shares: share of each part; they add up to 1.
        seed: another seed gives other parts.

    Returns:
        The index of each example's part, [rows].

    Raises:
        InputError: there are fewer groups of pictures than parts.
    """
    examples = dataset.examples
    cluster_of = cluster_pictures(examples, find_identical_images(dataset))
    numbers = {name: number for number, name in enumerate(dict.fromkeys(cluster_of.values()))}
    image_codes, images = examples.codes("images")
    group_of_row = np.array([numbers[cluster_of[keys[0]]] for keys in images], np.int32)[image_codes]
    kind_codes, kinds = examples.codes("kind")
    counts = np.zeros((len(numbers), 1 + len(kinds)))  # group -> its pictures, and its examples of each kind
    np.add.at(counts[:, 0], [numbers[name] for name in cluster_of.values()], 1)
    np.add.at(counts, (group_of_row, kind_codes + 1), 1)
    counts /= counts.sum(axis=0)
    parts = [index for index, share in enumerate(shares) if share > 0]
    targets = np.array([shares[index] for index in parts])[:, None]
    excess = np.repeat(-targets, counts.shape[1], axis=1)  # [parts, 1 + kinds]: shares so far above the targets
    part_of_group = np.zeros(len(numbers), np.int32)
    for name in sorted(numbers, key=lambda name: hashlib.sha256(f"{seed}:{name}".encode()).digest()):
        added = counts[numbers[name]]
        increase = (added * (2 * excess + added) / targets).sum(axis=1)
        best = int(np.argmin(np.round(increase, 12)))  # equal ones must not depend on rounding
        part_of_group[numbers[name]] = parts[best]
        excess[best] += added
    if empty := set(parts) - {*part_of_group.tolist()}:
        raise InputError(
            f"dataset {dataset.name}: {len(numbers)} groups of pictures (by picture and patient) are too few for "
            f"{len(parts)} parts: {len(empty)} would be empty. Use fewer parts, or shares that are closer."
        )
    return part_of_group[group_of_row]


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
        codes, names = _by_column(dataset, column)
        return about | {"column": column, "splits": _by_id(dataset, codes, names)}
    about |= {"seed": seed, "grouped_by": ["picture", *group_columns(dataset.examples)], "stratified_by": "kind"}
    if folds is not None:
        codes = divide(dataset, [1 / folds] * folds, seed)
        return about | {"folds": folds, "splits": _by_id(dataset, codes, range(folds))}
    ratio = ratio or DEFAULT_RATIO
    codes = divide(dataset, parse_ratio(ratio), seed)
    return about | {"ratio": ratio, "splits": _by_id(dataset, codes, SPLITS)}


def apply_splits(
    dataset: Dataset, ratio: str | None, seed: int | None, column: str | None, file: Path | None, fold: int | None
) -> Dataset:
    """The dataset with the splits that the options name; see `normtune.data.options.DataOptions`.

    Raises:
        InputError: the options contradict each other; the file is no file of splits, or lacks rows of the dataset.
    """
    if file is not None and (ratio is not None or column is not None):
        raise InputError("--splits contains the splits. Remove --split-ratio and --split-column.")
    names: list[str | int]
    notes: list[str] = []
    if file is not None:
        source = f"splits of {file.name}"
        codes, names, notes = _by_file(dataset, file)
    elif column is not None and ratio is None:
        source = f"splits by column {column}"
        codes, names = _by_column(dataset, column)
    elif ratio is not None and column is None:
        source = f"new splits {ratio}, seed {seed or 0}"
        codes, names = divide(dataset, parse_ratio(ratio), seed or 0), list(SPLITS)
    else:
        raise InputError("give one of --splits, --split-ratio and --split-column.")
    folds = sorted(name for name in names if isinstance(name, int))
    if folds and fold is None:
        raise InputError(f"{source}: it holds folds {folds[0]} to {folds[-1]}. Choose the test fold with --fold.")
    if not folds and fold is not None:
        raise InputError(f"{source}: it holds no folds. Remove --fold, or make some with normtune split --folds 5.")
    if fold is not None:
        if fold not in folds:
            raise InputError(f"--fold {fold}: {source} has folds {folds[0]} to {folds[-1]}.")
        following = folds[(folds.index(fold) + 1) % len(folds)]
        names_of_folds = dict.fromkeys(folds, "train") | {following: "validate", fold: "test"}
        names = [names_of_folds.get(name, name) if isinstance(name, int) else name for name in names]
        source += f", fold {fold} is test and {following} validate"
    examples = dataset.examples.with_column("split", codes, [str(name) for name in names])
    return replace(dataset, examples=examples, notes=[*dataset.notes, source, *notes])


def _by_file(dataset: Dataset, file: Path) -> tuple[NDArray[np.int32], list[str | int], list[str]]:
    """The index of each example's split in a file of splits, the splits, and notes."""
    made = read_split_file(file)
    splits: dict[str, str | int] = made["splits"]
    names = list(dict.fromkeys(splits.values()))
    numbers = {id: names.index(name) for id, name in splits.items()} if len(names) < 100 else {}
    if not numbers:
        raise InputError(f"{file}: {len(names)} different splits. Use one of train, validate and test, or a fold.")
    codes = np.array([numbers.get(id, -1) for id in dataset.examples.texts("id")], np.int32)
    if (missing := np.flatnonzero(codes < 0)).size:
        raise InputError(
            f"{file}: {len(missing)} of {len(codes)} rows of {dataset.name} are not in it (first: "
            f"{dataset.examples[int(missing[0])].id}). Make it again with normtune split."
        )
    changed = made.get("digest") not in (None, rows_digest(dataset))
    unused = len(splits) - len(codes)
    note = f"{file.name} was made of other rows: some have changed since, or are not selected ({unused} ids)"
    return codes, names, [note] if changed else []


def _by_id(dataset: Dataset, codes: NDArray[np.int32], names: Sequence[Any]) -> dict[str, Any]:
    return {id: names[code] for id, code in zip(dataset.examples.texts("id"), codes.tolist(), strict=True)}


def rows_digest(dataset: Dataset) -> str:
    """A digest of the rows' ids, images, questions and answers, in any order and split."""
    columns = [dataset.examples.texts(name) for name in ("id", "question", "answer")]
    codes, images = dataset.examples.codes("images")
    digest = 0
    for code, *texts in zip(codes.tolist(), *columns, strict=True):
        row = json.dumps([images[code], *texts]).encode()
        digest ^= int.from_bytes(hashlib.blake2b(row, digest_size=8).digest(), "big")  # in any order
    return f"{digest:016x}"


def split_counts(dataset: Dataset, made: Mapping[str, Any]) -> dict[str | int, dict[str, int]]:
    """Split or fold -> its rows, images, patients and rows of each kind."""
    splits = made["splits"]
    names = sorted({*splits.values()}, key=lambda name: (SPLITS.index(name) if name in SPLITS else 9, str(name)))
    codes = np.array([names.index(splits[id]) for id in dataset.examples.texts("id")], np.int32)
    columns = group_columns(dataset.examples)
    counts: dict[str | int, dict[str, int]] = {}
    for number, name in enumerate(names):
        members = dataset.examples.where(codes == number)
        patients = (members.codes(META + column)[1] for column in columns)
        kinds = count_values(*members.codes("kind"))
        counts[name] = {
            "rows": len(members),
            "images": len(image_keys(members)),
            "patients": sum(len([value for value in values if value]) for values in patients),
            **{kind: kinds.get(kind, 0) for kind in KINDS},
        }
    return counts


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
    """Read a file of splits, JSON or CSV. Raises `InputError` if it cannot be read, or holds no splits."""
    made: Any = _read_csv(file) if file.suffix == ".csv" else read_json(file)
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


def _by_column(dataset: Dataset, column: str) -> tuple[NDArray[np.int32], list[str | int]]:
    """The index of each example's split in a column of its table, and the splits."""
    check_column(dataset.examples, column, "--split-column")
    codes, values = dataset.examples.codes(META + column)
    if empty := int((codes < 0).sum()):
        what = f"{empty} of {len(codes)} rows have no value in column '{column}'"
        raise InputError(f"--split-column: {what}. Fill it in.")
    return codes, [_split_or_fold(value) for value in values]
