"""What two splits share and should not, and new splits that share no image."""

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
    """Images or whole rows of one part of a dataset that stand in an earlier part too."""

    what: Literal["image", "row"]
    part: str  # the later part, "test" or "test (en)"
    other: str  # the earlier part, "train" or "train (zh)"
    shared: int
    total: int  # images or rows of `part`
    examples: tuple[str, ...]  # the first few: image keys, or ids of rows in `part`

    def __str__(self) -> str:
        if self.what == "image":
            return f"{self.shared} of {self.total} images of {self.part} stand in {self.other} too"
        return f"{self.shared} of {self.total} rows of {self.part} stand word for word in {self.other} too"


def split_group_of(dataset: Dataset) -> Callable[[Example], str]:
    """Names the part that an example belongs to: its split, with the language where there are several."""
    languages = {example.meta.get("language", "") for example in dataset.examples}
    if len(languages) < 2:
        return lambda example: example.split
    return lambda example: f"{example.split} ({example.meta.get('language', 'no language')})"


def split_groups(dataset: Dataset) -> dict[str, list[Example]]:
    """The usable examples of each part; train, validate and test come first, in this order."""
    name = split_group_of(dataset)
    found: dict[str, list[Example]] = {}
    for example in dataset.examples:
        found.setdefault(name(example), []).append(example)
    return dict(sorted(found.items(), key=lambda item: _rank(item[1][0].split)))


def leaks(dataset: Dataset) -> list[Leak]:
    """Images, and rows word for word, that a later split shares with an earlier one.

    A row is shared where image, question and answer are the same, whatever their case and blanks. Different
    languages of one split are no leak; different splits of different languages are.
    """
    found = []
    members = list(split_groups(dataset).items())
    images = {name: {key: key for example in part for key in example.images} for name, part in members}
    rows = {name: {_row_key(example): example.id for example in part} for name, part in members}
    for later in range(len(members)):
        part = members[later][0]
        for other, earlier in members[:later]:
            if earlier[0].split == members[later][1][0].split:
                continue
            shared = sorted(images[part].keys() & images[other].keys())
            if shared:
                found.append(Leak("image", part, other, len(shared), len(images[part]), tuple(shared[:3])))
            again = [e.id for e in members[later][1] if _row_key(e) in rows[other]]
            if again:
                total = len(members[later][1])
                found.append(Leak("row", part, other, len(again), total, tuple(again[:3])))
    return found


def image_disjoint(
    dataset: Dataset,
    fractions: tuple[float, float, float] = (0.7, 0.1, 0.2),
    seed: int = 0,
    same: Iterable[Sequence[str]] = (),
) -> Dataset:
    """The dataset with new splits train, validate and test, none of which shares an image with another.

    Every image goes to one split with all its examples, in `fractions` of the number of images. Which one
    depends on the seed and the images' keys, not on the order of the rows. Images of one study stay together,
    and so do those of one patient or case where `meta` names it, and the keys of each item of `same` (see
    `same_pixels`).

    Raises:
        InputError: the fractions are negative or do not add up to 1.
    """
    if min(fractions) < 0 or abs(sum(fractions) - 1) > 1e-6:
        raise InputError(f"fractions {fractions} must be at least 0 and add up to 1.")
    images = (example.images for example in dataset.examples)
    clusters = _clusters([*images, *_by_patient(dataset.examples), *same])
    heads = _drawn(clusters.values(), seed)
    train = round(fractions[0] * len(heads))
    learn = round((fractions[0] + fractions[1]) * len(heads))
    split = {
        head: SPLITS[0] if index < train else SPLITS[1] if index < learn else SPLITS[2]
        for index, head in enumerate(heads)
    }

    def moved(example: Example) -> Example:
        head = clusters.get(example.images[0]) if example.images else None
        return replace(example, split=split[head]) if head else example

    return replace(
        dataset,
        examples=[moved(example) for example in dataset.examples],
        skipped=[moved(example) for example in dataset.skipped],
    )


def share_of_images(examples: Sequence[Example], share: float, seed: int) -> list[Example]:
    """The examples of a share of the images (at least one), in their order.

    Which images depends on the seed and their keys alone, so that a larger share holds a smaller one. Images
    that stand in one example, or are of one patient or case, stay together.
    """
    clusters = _clusters([*(example.images for example in examples), *_by_patient(examples)])
    heads = _drawn(clusters.values(), seed)
    kept = set(heads[: max(1, round(share * len(heads)))])
    return [example for example in examples if example.images and clusters[example.images[0]] in kept]


def same_pixels(dataset: Dataset) -> list[tuple[str, ...]]:
    """Keys of images that are the same picture under several names: every image is opened once.

    Raises:
        InputError: an image cannot be read.
    """
    by_content: dict[bytes, list[str]] = {}
    for key in dict.fromkeys(key for example in dataset.examples for key in example.images):
        image = dataset.open_image(key)
        digest = hashlib.sha256(repr(image.size).encode() + image.tobytes()).digest()
        by_content.setdefault(digest, []).append(key)
    return [tuple(keys) for keys in by_content.values() if len(keys) > 1]


def patients(examples: Sequence[Example]) -> dict[str, str]:
    """Image key -> one key for all images of its patient or case, as far as studies and `meta` tell them."""
    return _clusters([*(example.images for example in examples), *_by_patient(examples)])


def _drawn(keys: Iterable[str], seed: int) -> list[str]:
    """The keys in an order that the seed and they alone decide."""
    return sorted(set(keys), key=lambda key: hashlib.sha256(f"{seed}:{key}".encode()).digest())


def _by_patient(examples: Iterable[Example]) -> list[list[str]]:
    """The images of each patient, or of each case where the files name cases."""
    found: dict[tuple[str, str], list[str]] = {}
    for example in examples:
        for field in ("patient", "case"):
            if field in example.meta:
                found.setdefault((field, example.meta[field]), []).extend(example.images)
    return [keys for keys in found.values() if keys]


def _rank(split: str) -> int:
    return SPLITS.index(split) if split in SPLITS else len(SPLITS)


def _row_key(example: Example) -> tuple[object, ...]:
    return (
        example.images,
        " ".join(example.question.lower().split()),
        " ".join(example.answer.lower().split()),
    )


def _clusters(groups: Iterable[Sequence[str]]) -> dict[str, str]:
    """Image key -> the least key of all images that stand in one group with it, directly or in steps."""
    parent: dict[str, str] = {}

    def head(key: str) -> str:
        parent.setdefault(key, key)
        while parent[key] != key:
            parent[key] = parent[parent[key]]
            key = parent[key]
        return key

    for group in groups:
        for key in group:
            low, high = sorted((head(group[0]), head(key)))
            parent[high] = low
    return {key: head(key) for key in parent}
