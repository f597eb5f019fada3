"""Finds images and rows that several splits share (leaks), and makes new splits that share no image."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from normtune.data.reading.cells import SPLITS
from normtune.data.records import Dataset, Example
from normtune.errors import InputError


@dataclass(frozen=True)
class Leak:
    """Images, or whole rows, of one split that an earlier split contains too.

    Splits are ordered train, validate, test, others. They are named as `split_label` names them.
    """

    what: Literal["image", "row"]
    split: str  # the later split, such as "test" or "test (en)"
    earlier_split: str  # such as "train" or "train (zh)"
    shared: int  # number of shared images or rows
    total: int  # number of images or rows of `split`
    examples: tuple[str, ...]  # the first three: image keys, or ids of rows in `split`

    def __str__(self) -> str:
        unit, exact = ("images", "") if self.what == "image" else ("rows", "word for word ")
        return f"{self.shared} of {self.total} {unit} of {self.split} are {exact}in {self.earlier_split} too"


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
    """Find the images and the rows that a later split shares with an earlier one.

    Two rows are the same if image, question and answer are the same; case and blanks do not count. The
    languages of one split may share images: that is no leak. Languages of different splits may not.
    """
    leaks = []
    splits = list(examples_by_split(dataset).items())
    images = {name: {key for example in members for key in example.images} for name, members in splits}
    rows = {name: {_row_key(example) for example in members} for name, members in splits}
    for later, (name, members) in enumerate(splits):
        for earlier_name, earlier_members in splits[:later]:
            if earlier_members[0].split == members[0].split:
                continue  # the same split in another language
            shared = sorted(images[name] & images[earlier_name])
            if shared:
                leaks.append(Leak("image", name, earlier_name, len(shared), len(images[name]), tuple(shared[:3])))
            repeated = [example.id for example in members if _row_key(example) in rows[earlier_name]]
            if repeated:
                leaks.append(Leak("row", name, earlier_name, len(repeated), len(members), tuple(repeated[:3])))
    return leaks


def image_disjoint(
    dataset: Dataset,
    fractions: tuple[float, float, float] = (0.7, 0.1, 0.2),
    seed: int = 0,
    identical: Iterable[Sequence[str]] = (),
) -> Dataset:
    """Make new splits train, validate and test that share no image.

    Every image goes to one split, with all its examples. Images of one study (one example) stay together, as
    do those of one patient or case that `meta` names, and those of one item of `identical`. The split of an
    image depends on the seed and on the image keys, not on the order of the rows.

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
    images = (example.images for example in dataset.examples)
    clusters = _cluster_images([*images, *_by_patient(dataset.examples), *identical])
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
    clusters = _cluster_images([*(example.images for example in examples), *_by_patient(examples)])
    names = _shuffled(clusters.values(), seed)
    selected = set(names[: max(1, round(share * len(names)))])
    return [example for example in examples if example.images and clusters[example.images[0]] in selected]


def find_identical_images(dataset: Dataset) -> list[tuple[str, ...]]:
    """Find pictures that occur under several image keys; each item holds the keys of one picture.

    Every image is opened once.

    Raises:
        InputError: an image cannot be read.
    """
    by_content: dict[bytes, list[str]] = {}
    for key in dict.fromkeys(key for example in dataset.examples for key in example.images):
        image = dataset.open_image(key)
        digest = hashlib.sha256(repr(image.size).encode() + image.tobytes()).digest()
        by_content.setdefault(digest, []).append(key)
    return [tuple(keys) for keys in by_content.values() if len(keys) > 1]


def patient_of_image(examples: Sequence[Example]) -> dict[str, str]:
    """Image key -> a name for its patient: the smallest key of all images of that patient.

    Images are of one patient if they are in one example, or if `meta` names the same patient or case.
    """
    return _cluster_images([*(example.images for example in examples), *_by_patient(examples)])


def _shuffled(keys: Iterable[str], seed: int) -> list[str]:
    """The distinct keys in a random order that depends only on the keys and the seed."""
    return sorted(set(keys), key=lambda key: hashlib.sha256(f"{seed}:{key}".encode()).digest())


def _by_patient(examples: Iterable[Example]) -> list[list[str]]:
    """The image keys of each patient and of each case that `meta` names."""
    images: dict[tuple[str, str], list[str]] = {}
    for example in examples:
        for field in ("patient", "case"):
            if field in example.meta:
                images.setdefault((field, example.meta[field]), []).extend(example.images)
    return [keys for keys in images.values() if keys]


def _split_order(split: str) -> int:
    return SPLITS.index(split) if split in SPLITS else len(SPLITS)


def _row_key(example: Example) -> tuple[object, ...]:
    """Equal for rows with the same images, question and answer; case and blanks do not count."""
    return (example.images, " ".join(example.question.lower().split()), " ".join(example.answer.lower().split()))


def _cluster_images(groups: Iterable[Sequence[str]]) -> dict[str, str]:
    """Merge groups that share an image: image key -> the name of its cluster, which is its smallest key.

    Example: the groups (a, b), (b, c), (d,) and (e, d) make the two clusters {a: a, b: a, c: a} and
    {d: d, e: d}. The images a and c are in no common group, but b connects them.

    A union-find structure: each key points to another key of its cluster, and the smallest key, the root,
    points to itself.
    """
    parent: dict[str, str] = {}

    def root(key: str) -> str:
        parent.setdefault(key, key)
        while parent[key] != key:
            parent[key] = parent[parent[key]]  # path halving: shortens the path for later calls
            key = parent[key]
        return key

    for group in groups:
        for key in group:
            # The smaller root stays the root, so that names do not depend on the order of the groups.
            low, high = sorted((root(group[0]), root(key)))
            parent[high] = low
    return {key: root(key) for key in parent}
