"""Reads every picture of a dataset once: can it be decoded, and which pictures are equal or almost equal?

Two image keys are *equal* if their decoded pixels are: a copy under another name, or the same pixels in another
lossless file format. They are *near-duplicates* if they look alike but are not equal: re-encoded or resized.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from normtune.data.examples import image_keys
from normtune.data.records import Dataset, Picture
from normtune.errors import InputError
from normtune.runtime.worker_pool import count_cores

DIGEST_BYTES = 8  # two of a million pictures share a digest with a probability of 3e-8
_THUMBNAIL = 16  # width and height of the grey thumbnail
_MAX_BIT_DISTANCE = 8  # near-duplicates differ in at most this many of the 64 bits
_MIN_CORRELATION = 0.998  # correlation of thumbnails: adjacent slices of a scan are below it, JPEG copies above
_MAX_PAIRWISE = 50_000  # with more pictures, only those with equal perceptual hashes are compared
_ROWS = 512  # hashes that are compared with all others at once


def read_pictures(
    dataset: Dataset, keys: Iterable[str] | None = None, progress: Callable[[int, int], None] | None = None
) -> dict[str, Picture]:
    """Open the pictures of a dataset in parallel, each once.

    Pictures that `dataset.pictures` has already are not opened again.

    Args:
        dataset: opens the pictures; `dataset.pictures` receives them.
        keys: image keys; None: the images of all examples.
        progress: called with (pictures opened, pictures in all).

    Returns:
        Image key -> picture, in the order of the keys.
    """
    if keys is None:
        keys = image_keys(dataset.examples)
    all_keys = list(dict.fromkeys(keys))
    new = [key for key in all_keys if key not in dataset.pictures]
    with ThreadPoolExecutor(count_cores()) as pool:  # decoders release the interpreter's lock
        for done, (key, picture) in enumerate(zip(new, pool.map(lambda key: _read(dataset, key), new), strict=True), 1):
            dataset.pictures[key] = picture
            if progress is not None:
                progress(done, len(new))
    return {key: dataset.pictures[key] for key in all_keys}


def _read(dataset: Dataset, key: str) -> Picture:
    try:
        image = dataset.open_image(key)
    except (InputError, OSError, SyntaxError, ValueError) as error:  # all but the first: a reader of the user's own
        return Picture("", error=str(error))
    digest = hashlib.blake2b(
        repr((image.mode, image.size)).encode() + image.tobytes(), digest_size=DIGEST_BYTES
    ).hexdigest()
    grey = image.convert("L")
    grid = np.asarray(grey.resize((9, 8), Image.Resampling.BOX))
    bits = np.packbits(grid[:, :-1] < grid[:, 1:])
    thumbnail = grey.resize((_THUMBNAIL, _THUMBNAIL), Image.Resampling.BOX)
    return Picture(digest, int.from_bytes(bits.tobytes(), "big"), thumbnail.tobytes(), size=image.size)


def equal_pictures(pictures: Mapping[str, Picture]) -> list[tuple[str, ...]]:
    """The keys of each picture that occurs under several keys."""
    keys_of: dict[str, list[str]] = {}
    for key, picture in pictures.items():
        if picture.digest:
            keys_of.setdefault(picture.digest, []).append(key)
    return [tuple(keys) for keys in keys_of.values() if len(keys) > 1]


def near_duplicates(pictures: Mapping[str, Picture]) -> list[tuple[str, str]]:
    """Pairs of pictures that look alike and are not equal. Pictures of a single grey value are not compared."""
    distinct = {picture.digest: key for key, picture in reversed(list(pictures.items())) if picture.digest}
    keys = [key for key in pictures if distinct.get(pictures[key].digest) == key]
    thumbnails = np.array([np.frombuffer(pictures[key].thumbnail, np.uint8) for key in keys], dtype=np.float32)
    if not keys:
        return []
    thumbnails -= thumbnails.mean(axis=1, keepdims=True)
    norms = np.linalg.norm(thumbnails, axis=1, keepdims=True)
    varied = norms[:, 0] > 0
    thumbnails /= np.where(norms > 0, norms, 1)
    hashes = np.array([pictures[key].perceptual_hash for key in keys], dtype=np.uint64)
    pairs = []
    for left, right in _similar_hashes(hashes):
        if varied[left] and varied[right] and float(thumbnails[left] @ thumbnails[right]) >= _MIN_CORRELATION:
            pairs.append((keys[left], keys[right]))
    return pairs


def _similar_hashes(hashes: NDArray[np.uint64]) -> list[tuple[int, int]]:
    """Index pairs (smaller first) of hashes that differ in few bits."""
    if len(hashes) > _MAX_PAIRWISE:
        order = np.argsort(hashes, kind="stable")
        equal = np.flatnonzero(hashes[order][1:] == hashes[order][:-1])
        return [(int(order[index]), int(order[index + 1])) for index in equal]
    pairs: list[tuple[int, int]] = []
    for start in range(0, len(hashes), _ROWS):
        rows = hashes[start : start + _ROWS]
        distance = np.bitwise_count(rows[:, None] ^ hashes[None, start:])  # [rows, rest]
        for row, column in zip(*np.nonzero(distance <= _MAX_BIT_DISTANCE), strict=True):
            if row < column:
                pairs.append((start + int(row), start + int(column)))
    return pairs


def cluster(groups: Iterable[Sequence[str]]) -> dict[str, str]:
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
