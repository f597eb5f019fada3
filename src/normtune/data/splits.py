"""Finds what several splits share (leaks), and makes new splits that share no picture and no patient."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from normtune.data.examples import (
    META,
    Codes,
    Example,
    Examples,
    as_examples,
    combine_hashes,
    compact,
    history_hashes,
    image_keys,
    is_in,
)
from normtune.data.pictures import cluster, equal_pictures, near_duplicates, read_pictures
from normtune.data.records import Dataset
from normtune.data.split_names import SPLITS
from normtune.errors import InputError, did_you_mean

GROUP_BY = "the --group-by column"  # the meta field that `--group-by COLUMN` fills; then it is the only one that counts
# Columns that name a patient, and columns that name a part of one patient's data; in lower case, letters only.
_PATIENTS = frozenset(
    ("patient", "patientid", "subject", "subjectid", "person", "personid", "participant", "case", "caseid")
)
_STUDIES = frozenset(
    {"study", "studyid", "studyuid", "studyinstanceuid", "exam", "examid", "accession", "accessionnumber"}
    | {"encounter", "encounterid", "group", "groupid"}
)
_LEAK_TEXTS = {
    "image": "images of {split} are in {earlier} too",
    "picture": "images of {split} are in {earlier} too, pixel for pixel, under another name",
    "near-duplicate": "images of {split} look like one of {earlier} (re-encoded, resized, or the next slice?)",
    "patient": "values of {column} in {split} are in {earlier} too",
    "row": "rows of {split} are word for word in {earlier} too",
}


@dataclass(frozen=True)
class Leak:
    """Images, patients or whole rows of one split that an earlier split contains too.

    Splits are ordered train, validate, test, others. They are named as `split_label` names them.
    """

    what: Literal["image", "picture", "near-duplicate", "patient", "row"]
    split: str  # the later split, such as "test" or "test (en)"
    earlier_split: str  # such as "train" or "train (zh)"
    shared: int  # number of shared images, patients or rows
    total: int  # number of images, patients or rows of `split`
    examples: tuple[str, ...]  # the first three image keys, or ids of rows, of `split`; for patients, image keys
    column: str = ""  # for patients: the column that names them

    def __str__(self) -> str:
        text = _LEAK_TEXTS[self.what].format(split=self.split, earlier=self.earlier_split, column=self.column)
        return f"{self.shared} of {self.total} {text}"


def split_label(dataset: Dataset) -> Callable[[Example], str]:
    """Return a function that names an example's split, with several languages "test (en)" or "test (zh)"."""
    if not _has_languages(*dataset.examples.codes(f"{META}language")):
        return lambda example: example.split
    return lambda example: _label(example.split, example.meta.get("language"))


def rows_by_split(rows: Examples) -> dict[str, NDArray[np.int32]]:
    """Split label -> the positions of its examples; train, validate and test come first, in this order."""
    codes, splits = rows.codes("split")
    names = list(splits)
    languages, tags = rows.codes(f"{META}language")
    if _has_languages(languages, tags):
        both = codes.astype(np.int64) * (len(tags) + 1) + languages + 1
        labels = [(split, tag) for split in splits for tag in (None, *tags)]
        codes, pairs = compact(both.astype(np.int32), labels)
        splits, names = [split for split, _ in pairs], [_label(split, tag) for split, tag in pairs]
    usual_place = {split: place for place, split in enumerate(SPLITS)}
    order = sorted(range(len(names)), key=lambda number: usual_place.get(splits[number], len(SPLITS)))
    return {names[number]: np.flatnonzero(codes == number).astype(np.int32) for number in order}


def _has_languages(codes: NDArray[np.int32], tags: Sequence[str]) -> bool:
    return len({*tags, ""} if -1 in codes else tags) > 1


def _label(split: str, language: str | None) -> str:
    return f"{split} ({'no language' if language is None else language})"


def find_leaks(
    dataset: Dataset, columns: Sequence[str] | None = None, alike: Sequence[tuple[str, str]] | None = None
) -> list[Leak]:
    """Find the images, patients and rows that a later split shares with an earlier one.

    Pictures with the same pixels under another name, and near-duplicates, are found among `dataset.pictures`; see
    `read_pictures`. Patients are those that the columns of `group_columns` name. Two rows are the same if image,
    question and answer are the same; case and blanks do not count. The languages of one split may share images:
    that is no leak. Languages of different splits may not.

    Args:
        columns, alike: `group_columns` of its examples and `near_duplicates` of its pictures, if these are known.
    """
    leaks: list[Leak] = []
    positions_of = rows_by_split(dataset.examples)
    splits = [(name, dataset.examples.take(positions)) for name, positions in positions_of.items()]
    if len(splits) < 2:
        return leaks
    columns = group_columns(dataset.examples) if columns is None else columns
    alike = near_duplicates(dataset.pictures) if alike is None else alike
    images = {name: dict.fromkeys(image_keys(members)) for name, members in splits}
    hashes = _row_hashes(dataset.examples)
    rows = {name: hashes[positions] for name, positions in positions_of.items()}
    del hashes  # as large as the rows
    patients = {name: {column: _by_patient(members, column) for column in columns} for name, members in splits}
    equal = cluster(equal_pictures(dataset.pictures))
    similar: dict[str, set[str]] = {}
    for pair in alike:
        for key, other in (pair, pair[::-1]):
            similar.setdefault(equal.get(key, key), set()).add(equal.get(other, other))
    for later, (name, members) in enumerate(splits):
        for earlier, earlier_members in splits[:later]:
            if earlier_members[0].split == members[0].split:
                continue  # the same split in another language
            pictures = {equal.get(key, key) for key in images[earlier]}
            shared, same, close = [], [], []  # image keys of the later split, by what the earlier one has of them
            for key in images[name]:
                picture = equal.get(key, key)
                if key in images[earlier]:
                    shared.append(key)
                elif picture in pictures:
                    same.append(key)
                elif not pictures.isdisjoint(similar.get(picture, ())):
                    close.append(key)
            repeated = np.flatnonzero(is_in(rows[name], rows[earlier]))
            for what, items, count, total in (
                ("image", sorted(shared), len(shared), len(images[name])),
                ("picture", same, len(same), len(images[name])),
                ("near-duplicate", close, len(close), len(images[name])),
                ("row", [example.id for example in members.take(repeated[:3])], len(repeated), len(members)),
            ):
                if items:
                    leaks.append(Leak(what, name, earlier, count, total, tuple(items[:3])))  # type: ignore[arg-type]
            for column in columns:
                here, there = patients[name][column], patients[earlier][column]
                both = [value for value in here if value in there]
                if both:
                    keys = tuple(here[value][0] for value in both[:3] if here[value])
                    leaks.append(Leak("patient", name, earlier, len(both), len(here), keys, column))
    return leaks


def image_disjoint(dataset: Dataset, seed: int = 0, identical: Iterable[Sequence[str]] = ()) -> Dataset:
    """Make new splits train, validate and test that share no image: 70, 10 and 20% of the images.

    Every image goes to one split, with all its examples. These images stay together: the images of one example, the
    images of one patient, case or study that `meta` names (see `group_columns`), and those in one item of
    `identical`. The split of an image depends on the seed and on the image keys, not on the order of the rows.

    Args:
        dataset: the dataset; its own splits are ignored.
        seed: another seed gives other splits.
        identical: keys of the same picture, from `find_identical_images`.

    Returns:
        The dataset with the new splits, also for its skipped rows.
    """
    clusters = cluster_pictures(dataset.examples, identical)
    names = _shuffled(clusters.values(), seed)
    train_end, validate_end = round(0.7 * len(names)), round(0.8 * len(names))  # images that stay together count as one
    split = {
        name: SPLITS[0] if index < train_end else SPLITS[1] if index < validate_end else SPLITS[2]
        for index, name in enumerate(names)
    }

    def move(examples: Examples) -> Examples:
        codes, images = examples.codes("images")
        old, old_names = examples.codes("split")
        moved = {name: number for number, name in enumerate(SPLITS)}
        new = [moved[split[clusters[keys[0]]]] if keys and keys[0] in clusters else -1 for keys in images]
        new_codes = np.array(new, np.int32)[codes]
        all_codes = np.where(new_codes >= 0, new_codes, old + len(SPLITS))  # a row without an image keeps its split
        return examples.with_column("split", all_codes, [*SPLITS, *old_names])

    return replace(dataset, examples=move(dataset.examples), skipped=list(move(Examples(dataset.skipped))))


def share_of_images(examples: Examples, share: float, seed: int) -> Examples:
    """The examples of a random share of the images (at least one image), in their order.

    The selection depends only on the seed and the image keys, so that a larger share contains every smaller
    one. Images of one example, patient or case stay together.
    """
    clusters = cluster_pictures(examples, ())
    names = _shuffled(clusters.values(), seed)
    return _with_clusters(examples, clusters, names[: max(1, round(share * len(names)))])


def part_of_images(examples: Examples, part: int, parts: int) -> Examples:
    """The examples of one of several parts of the images, in their order; the parts have no image in common.

    Images of one example, patient or case stay together.

    Args:
        part: number of the part, from 1.
        parts: number of parts.
    """
    clusters = cluster_pictures(examples, ())
    return _with_clusters(examples, clusters, _shuffled(clusters.values(), seed=0)[part - 1 :: parts])


def _with_clusters(examples: Examples, clusters: Mapping[str, str], names: Iterable[str]) -> Examples:
    """The examples with images of the named clusters."""
    selected = set(names)
    return examples.where(examples.flags("images", lambda keys: bool(keys) and clusters[keys[0]] in selected))


def find_identical_images(dataset: Dataset) -> list[tuple[str, ...]]:
    """Find pictures that occur under several image keys; each item holds the keys of one picture.

    Every image is opened once, but not of phantoms: no two are equal. An image that cannot be decoded equals no other.
    """
    if dataset.name.startswith("phantom-"):
        return []
    return equal_pictures(read_pictures(dataset))


def cluster_pictures(examples: Iterable[Example], identical: Iterable[Sequence[str]]) -> dict[str, str]:
    """Image key -> the name of its cluster: the images of one example, patient or picture, which stay in one split.

    Args:
        examples: name the images and, in `meta`, their patients.
        identical: keys of the same picture, from `find_identical_images`.
    """
    return cluster([*_images_together(as_examples(examples)), *identical])


def patient_of_image(examples: Iterable[Example]) -> dict[str, str]:
    """Image key -> a name for its patient: the smallest key of all images of that patient.

    Images are of one patient if they are in one example, or if `meta` names the same patient or case.
    """
    return cluster_pictures(examples, ())


def _shuffled(keys: Iterable[str], seed: int) -> list[str]:
    """The distinct keys in a random order that depends only on the keys and the seed."""
    return sorted(set(keys), key=lambda key: hashlib.sha256(f"{seed}:{key}".encode()).digest())


def group_columns(examples: Examples) -> tuple[str, ...]:
    """The fields of `meta` that name the patient, case or study of a row, by their usual names.

    With `--group-by COLUMN`, that column alone. A column such as `group` or `study`, which may also name an arm of a
    trial, is left out if one of its values covers more than half of the images.
    """
    image_codes, images = examples.codes("images")
    first_rows: dict[str, int] = {}  # column -> the first row in which it is filled
    for column in filter(is_group_column, examples.meta_columns):
        codes, values = _filled(examples, column)
        if not values:
            continue
        names_patients = column == GROUP_BY or _letters(column) in _PATIENTS
        if names_patients or _covers_little(codes, image_codes, images, len(values)):
            first_rows[column] = int(np.argmax(codes >= 0))
    if GROUP_BY in first_rows:
        return (GROUP_BY,)
    return tuple(sorted(first_rows, key=first_rows.__getitem__))


def _covers_little(
    codes: NDArray[np.int32], image_codes: NDArray[np.int32], images: Sequence[tuple[str, ...]], values: int
) -> bool:
    """Whether there are several values, and none covers more than half of the images (an image counts once a value)."""
    if values < 2:
        return False
    pairs = np.unique(codes.astype(np.int64) * len(images) + image_codes)
    keys: list[set[str]] = [set() for _ in range(values)]
    for pair in pairs[pairs >= 0].tolist():
        keys[pair // len(images)].update(images[pair % len(images)])
    return 2 * max(map(len, keys)) <= sum(map(len, keys))


def _filled(examples: Examples, column: str) -> Codes:
    """The codes of a field of `meta`, without empty texts: these have the code -1."""
    codes, values = examples.codes(META + column)
    if "" in values:
        codes = np.where(codes == values.index(""), -1, codes)
    return compact(codes, values)


def is_group_column(column: str) -> bool:
    """Whether a column has one of the usual names of patients, cases and studies."""
    return column == GROUP_BY or _letters(column) in _PATIENTS or _letters(column) in _STUDIES


def check_column(examples: Examples, column: str, option: str) -> None:
    """Check that a row has a field of `meta`, which an option names. Raises `InputError` if none has."""
    if not any(examples.codes(META + column)[1]):
        columns = sorted(examples.meta_columns)
        hint = did_you_mean(column, columns) or "."
        raise InputError(f"{option}: no row has a column '{column}'{hint} Columns: {', '.join(columns) or 'none'}.")


def with_groups(dataset: Dataset, column: str) -> Dataset:
    """The dataset with its images grouped by a column of the files (`--group-by`), and by nothing else.

    Raises:
        InputError: no row has that column.
    """
    check_column(dataset.examples, column, "--group-by")

    def name_groups(examples: Examples) -> Examples:
        return examples.with_column(META + GROUP_BY, *_filled(examples, column))

    return replace(
        dataset, examples=name_groups(dataset.examples), skipped=list(name_groups(Examples(dataset.skipped)))
    )


def _letters(column: str) -> str:
    return re.sub(r"[\W_]", "", column).lower()


def _by_patient(examples: Examples, column: str) -> dict[str, list[str]]:
    """The value that names a patient, case or study -> its image keys, each once."""
    image_codes, images = examples.codes("images")
    codes, values = _filled(examples, column)
    keys: list[dict[str, None]] = [{} for _ in values]
    rows = codes >= 0
    pairs = codes[rows].astype(np.int64) * max(1, len(images)) + image_codes[rows]
    distinct, first = np.unique(pairs, return_index=True)
    for pair in distinct[np.argsort(first)].tolist():
        keys[pair // len(images)].update(dict.fromkeys(images[pair % len(images)]))
    return {value: list(value_keys) for value, value_keys in zip(values, keys, strict=True)}


def _images_together(examples: Examples) -> list[Sequence[str]]:
    """Groups of images that stay in one split: the images of each example, and of each patient, case or study."""
    patients = (_by_patient(examples, column) for column in group_columns(examples))
    return [*examples.codes("images")[1], *(keys for values in patients for keys in values.values() if keys)]


def _row_hashes(examples: Examples) -> NDArray[np.int64]:
    """Equal for rows with the same images, turns, question and answer; case and blanks do not count."""

    def plain(text: str) -> str:
        return " ".join(text.lower().split())

    codes, images = examples.codes("images")
    keys = np.array([*map(hash, images)], np.int64)[codes]
    texts = examples.hashes("question", plain), examples.hashes("answer", plain)
    return combine_hashes(keys, history_hashes(examples, plain), *texts)
