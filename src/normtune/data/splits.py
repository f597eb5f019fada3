"""Finds what several splits share (leaks), and makes new splits that share no picture and no patient."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from normtune.data.pictures import cluster, equal_pictures, near_duplicates, read_pictures
from normtune.data.records import Dataset, Example
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
    languages = {example.meta.get("language", "") for example in dataset.examples}
    if len(languages) < 2:
        return lambda example: example.split
    return lambda example: f"{example.split} ({example.meta.get('language', 'no language')})"


def examples_by_split(dataset: Dataset) -> dict[str, list[Example]]:
    """Split label -> its usable examples; train, validate and test come first, in this order."""
    label = split_label(dataset)
    examples: dict[str, list[Example]] = {}
    for example in dataset.examples:
        examples.setdefault(label(example), []).append(example)
    return dict(sorted(examples.items(), key=lambda item: _split_order(item[1][0].split)))


def find_leaks(dataset: Dataset) -> list[Leak]:
    """Find the images, patients and rows that a later split shares with an earlier one.

    Pictures with the same pixels under another name, and near-duplicates, are found among `dataset.pictures`; see
    `read_pictures`. Patients are those that the columns of `group_columns` name. Two rows are the same if image,
    question and answer are the same; case and blanks do not count. The languages of one split may share images:
    that is no leak. Languages of different splits may not.
    """
    leaks: list[Leak] = []
    splits = list(examples_by_split(dataset).items())
    images = {name: dict.fromkeys(key for example in members for key in example.images) for name, members in splits}
    rows = {name: {_row_key(example) for example in members} for name, members in splits}
    patients = {name: _by_patient(members, group_columns(dataset.examples)) for name, members in splits}
    equal = cluster(equal_pictures(dataset.pictures))
    alike: dict[str, set[str]] = {}
    for pair in near_duplicates(dataset.pictures):
        for key, other in (pair, pair[::-1]):
            alike.setdefault(equal.get(key, key), set()).add(equal.get(other, other))
    for later, (name, members) in enumerate(splits):
        for earlier, earlier_members in splits[:later]:
            if earlier_members[0].split == members[0].split:
                continue  # the same split in another language
            names = {equal.get(key, key) for key in images[earlier]}
            shared = [key for key in images[name] if key in images[earlier]]
            same = [key for key in images[name] if key not in images[earlier] and equal.get(key, key) in names]
            close = [
                key
                for key in images[name]
                if equal.get(key, key) not in names and alike.get(equal.get(key, key), set()) & names
            ]
            repeated = [example.id for example in members if _row_key(example) in rows[earlier]]
            for what, items, total in (
                ("image", sorted(shared), len(images[name])),
                ("picture", same, len(images[name])),
                ("near-duplicate", close, len(images[name])),
                ("row", repeated, len(members)),
            ):
                if items:
                    leaks.append(Leak(what, name, earlier, len(items), total, tuple(items[:3])))  # type: ignore[arg-type]
            for column in group_columns(dataset.examples):
                here, there = patients[name].get(column, {}), patients[earlier].get(column, {})
                both = [value for value in here if value in there]
                if both:
                    keys = tuple(here[value][0] for value in both[:3] if here[value])
                    leaks.append(Leak("patient", name, earlier, len(both), len(here), keys, column))
    return leaks


def image_disjoint(
    dataset: Dataset,
    fractions: tuple[float, float, float] = (0.7, 0.1, 0.2),
    seed: int = 0,
    identical: Iterable[Sequence[str]] = (),
) -> Dataset:
    """Make new splits train, validate and test that share no image.

    Every image goes to one split, with all its examples. Images of one study (one example) stay together, as
    do those of one patient, case or study that `meta` names (see `group_columns`), and those of one item of
    `identical`. The split of an image depends on the seed and on the image keys, not on the order of the rows.

    Args:
        dataset: the dataset; its own splits are ignored.
        fractions: shares of train, validate and test, of the number of images (those that stay together
            count as one).
        seed: another seed gives other splits.
        identical: keys of the same picture, from `find_identical_images`.

    Returns:
        The dataset with the new splits, also for its skipped rows.

    Raises:
        InputError: the fractions are negative or do not add up to 1.
    """
    if min(fractions) < 0 or abs(sum(fractions) - 1) > 1e-6:
        raise InputError(f"fractions {fractions} must be at least 0 and add up to 1.")
    clusters = cluster_pictures(dataset.examples, identical)
    names = _shuffled(clusters.values(), seed)
    train_end = round(fractions[0] * len(names))
    validate_end = round((fractions[0] + fractions[1]) * len(names))
    split = {
        name: SPLITS[0] if index < train_end else SPLITS[1] if index < validate_end else SPLITS[2]
        for index, name in enumerate(names)
    }

    def move(example: Example) -> Example:
        name = clusters.get(example.images[0]) if example.images else None
        return replace(example, split=split[name]) if name else example

    return replace(
        dataset,
        examples=[move(example) for example in dataset.examples],
        skipped=[move(example) for example in dataset.skipped],
    )


def share_of_images(examples: Sequence[Example], share: float, seed: int) -> list[Example]:
    """The examples of a random share of the images (at least one image), in their order.

    The selection depends only on the seed and the image keys, so that a larger share contains every smaller
    one. Images of one example, patient or case stay together.
    """
    clusters = cluster_pictures(examples, ())
    names = _shuffled(clusters.values(), seed)
    selected = set(names[: max(1, round(share * len(names)))])
    return [example for example in examples if example.images and clusters[example.images[0]] in selected]


def find_identical_images(dataset: Dataset) -> list[tuple[str, ...]]:
    """Find pictures that occur under several image keys; each item holds the keys of one picture.

    Every image is opened once, but not of phantoms: no two are equal. An image that cannot be decoded equals no other.
    """
    if dataset.name.startswith("phantom-"):
        return []
    return equal_pictures(read_pictures(dataset))


def cluster_pictures(examples: Sequence[Example], identical: Iterable[Sequence[str]]) -> dict[str, str]:
    """Image key -> a name for the images that must stay in one split: those of one example, patient or picture.

    Args:
        examples: name the images and, in `meta`, their patients.
        identical: keys of the same picture, from `find_identical_images`.
    """
    return cluster([*_images_together(examples), *identical])


def patient_of_image(examples: Sequence[Example]) -> dict[str, str]:
    """Image key -> a name for its patient: the smallest key of all images of that patient.

    Images are of one patient if they are in one example, or if `meta` names the same patient or case.
    """
    return cluster_pictures(examples, ())


def _shuffled(keys: Iterable[str], seed: int) -> list[str]:
    """The distinct keys in a random order that depends only on the keys and the seed."""
    return sorted(set(keys), key=lambda key: hashlib.sha256(f"{seed}:{key}".encode()).digest())


def group_columns(examples: Iterable[Example]) -> tuple[str, ...]:
    """The fields of `meta` that name the patient, case or study of a row, by their usual names.

    With `--group-by COLUMN`, that column alone. A column such as `group` or `study`, which may also name an arm of a
    trial, is left out if one of its values covers more than half of the images.
    """
    images: dict[str, dict[str, set[str]]] = {}  # column -> value -> images
    for example in examples:
        for column, value in example.meta.items():
            if value and is_group_column(column):
                images.setdefault(column, {}).setdefault(value, set()).update(example.images)
    if GROUP_BY in images:
        return (GROUP_BY,)
    return tuple(
        column
        for column, values in images.items()
        if _letters(column) in _PATIENTS
        or (len(values) > 1 and 2 * max(map(len, values.values())) <= sum(map(len, values.values())))
    )


def is_group_column(column: str) -> bool:
    """Whether a column has one of the usual names of patients, cases and studies."""
    return column == GROUP_BY or _letters(column) in _PATIENTS or _letters(column) in _STUDIES


def with_groups(dataset: Dataset, column: str) -> Dataset:
    """The dataset with its images grouped by a column of the files (`--group-by`), and by nothing else.

    Raises:
        InputError: no row has that column.
    """
    if not any(example.meta.get(column) for example in dataset.examples):
        columns = sorted({name for example in dataset.examples for name in example.meta})
        hint = did_you_mean(column, columns) or "."
        raise InputError(f"--group-by: no row has a column '{column}'{hint} Columns: {', '.join(columns) or 'none'}.")

    def name_group(example: Example) -> Example:
        group = {GROUP_BY: example.meta[column]} if example.meta.get(column) else {}
        return replace(example, meta=example.meta | group)

    return replace(
        dataset, examples=list(map(name_group, dataset.examples)), skipped=list(map(name_group, dataset.skipped))
    )


def _letters(column: str) -> str:
    return re.sub(r"[\W_]", "", column).lower()


def _by_patient(examples: Iterable[Example], columns: Sequence[str]) -> dict[str, dict[str, list[str]]]:
    """Column -> the value that names a patient, case or study -> its image keys."""
    images: dict[str, dict[str, list[str]]] = {column: {} for column in columns}
    for example in examples:
        for column in columns:
            if example.meta.get(column):
                images[column].setdefault(example.meta[column], []).extend(example.images)
    return images


def _images_together(examples: Sequence[Example]) -> list[Sequence[str]]:
    """Groups of images that belong together: those of one example, and those of one patient, case or study."""
    patients = _by_patient(examples, group_columns(examples))
    return [
        *(example.images for example in examples),
        *(keys for values in patients.values() for keys in values.values() if keys),
    ]


def _split_order(split: str) -> int:
    return SPLITS.index(split) if split in SPLITS else len(SPLITS)


def _row_key(example: Example) -> tuple[object, ...]:
    """Equal for rows with the same images, turns, question and answer; case and blanks do not count."""
    texts = (text for turn in (*example.history, (example.question, example.answer)) for text in turn)
    return (example.images, *(" ".join(text.lower().split()) for text in texts))
