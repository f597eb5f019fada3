"""A cache of preprocessed images in memory; if the image encoder is frozen, of encoded images, also on disk.

On disk an encoded image is found by two digests: one of all values and settings that the encoder depends on,
and one of the preprocessed image. If norms of the encoder are tuned, or an image is preprocessed differently,
the digests differ. They contain no file names and no patient data.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from normtune.data.records import Dataset
from normtune.errors import InputError
from normtune.models.part_names import IMAGE_PARTS
from normtune.models.parts import part_of
from normtune.runtime.tensor_cache import TensorCache, digest

if TYPE_CHECKING:
    from normtune.models.family import Family
    from normtune.models.types import Pixels


LIMIT_BYTES = 2 << 30  # the most that one cache uses in memory
PENDING_IMAGES = 256  # the most images that are read in advance
# entries of a model's config that do not influence what the model computes
_IRRELEVANT_SETTINGS = ("_name_or_path", "architectures", "transformers_version")


class ImageCache:
    """Preprocessed or encoded images by key.

    Images are kept in memory while they fit in `limit_bytes`; others are opened again each time.

    Args:
        family: preprocesses and encodes the images.
        dataset: opens the images.
        frozen: cache encoded images, so that the vision tower runs once an image and not once a step. The
            image encoder must not be trained then.
        store: a cache on disk (see `image_store`), so that the tower runs once for all runs that share it.
        limit_bytes: the most bytes in memory.
    """

    def __init__(
        self,
        family: Family,
        dataset: Dataset,
        *,
        frozen: bool = False,
        store: TensorCache | None = None,
        limit_bytes: int = LIMIT_BYTES,
    ) -> None:
        self.family, self.dataset, self.limit_bytes = family, dataset, limit_bytes
        self.frozen, self.store = frozen, store
        self.entries: dict[str, Pixels] = {}
        self.bytes = 0  # of all entries
        # images that are being read in the background, the oldest first
        self._pending: OrderedDict[str, Future[Pixels]] = OrderedDict()
        self._threads: ThreadPoolExecutor | None = None
        self._digests: dict[str, str] = {}  # image key -> digest of the preprocessed image

    def __call__(self, key: str) -> Pixels:
        """Get one image, from memory if possible. Raises `InputError` if the image cannot be read."""
        if key in self.entries:
            return self.entries[key]
        if self.frozen:
            pixels = self._encode(key)
        else:  # rounded to the model's dtype, as the model would do first: half the memory on a bf16 base
            dtype, read = self.family.dtype, self._read(key)
            pixels = {name: value.to(dtype) if name == "pixel_values" else value for name, value in read.items()}
        size = tensor_bytes(pixels)
        if self.bytes + size <= self.limit_bytes:
            self.entries[key] = pixels
            self.bytes += size
        return pixels

    def prefetch(self, keys: Iterable[str], workers: int) -> None:
        """Begin to read images in the background; the next calls for them take the results.

        Args:
            keys: images that will be needed soon. Those in memory or on disk are not read.
            workers: the number of threads.
        """
        if self._threads is None:
            self._threads = ThreadPoolExecutor(workers, "images")
        for key in keys:
            if key not in self.entries and key not in self._pending and self.store is None:
                self._pending[key] = self._threads.submit(read_pixels, self.family, self.dataset, key)
        # of batches that are skipped, such as those before a resume, images are never asked for
        while len(self._pending) > PENDING_IMAGES:
            self._pending.popitem(last=False)[1].cancel()

    def _read(self, key: str) -> Pixels:
        """The preprocessed image, from the background if it is read there already."""
        pending = self._pending.pop(key, None)
        return read_pixels(self.family, self.dataset, key) if pending is None else pending.result()

    def for_dataset(self, dataset: Dataset) -> ImageCache:
        """An empty cache for another dataset's images, with the same store on disk."""
        return ImageCache(self.family, dataset, frozen=self.frozen, store=self.store, limit_bytes=self.limit_bytes)

    def digest(self, key: str) -> str:
        """The digest of the preprocessed image; the first call opens it."""
        if key not in self._digests:
            self._digests[key] = _pixels_digest(self._read(key))
        return self._digests[key]

    def _encode(self, key: str) -> Pixels:
        """The encoded image, from the store if it is there."""
        if self.store is None:
            return self.family.encode_image(self._read(key))
        pixels = None
        if key not in self._digests:  # the image is read once for its digest and for the encoder
            pixels = self._read(key)
            self._digests[key] = _pixels_digest(pixels)
        if (stored := self.store.read(self._digests[key])) is not None:
            return stored
        encoded = self.family.encode_image(self._read(key) if pixels is None else pixels)
        self.store.write(self._digests[key], encoded)
        return encoded


def _pixels_digest(pixels: Pixels) -> str:
    return digest(dict(sorted(pixels.items())))


def read_pixels(family: Family, dataset: Dataset, key: str) -> Pixels:
    """Open and preprocess one image. Raises `InputError` if the image cannot be read."""
    try:
        return family.preprocess_image(dataset.open_image(key))
    except (OSError, SyntaxError) as error:  # PIL raises these for a damaged file
        raise InputError(
            f"cannot read image {key} of dataset {dataset.name} ({type(error).__name__}). "
            "Replace the file or remove its rows."
        ) from error


def tensor_bytes(tensors: dict[str, Tensor]) -> int:
    """The bytes of all values of the tensors."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def image_store(folder: Path | None, family: Family) -> TensorCache | None:
    """The cache on disk for images encoded by the family's encoder with its present values.

    Args:
        folder: where caches are; None gives no cache.

    Raises:
        InputError: the folder cannot be created.
    """
    if folder is None:
        return None
    part = part_of(family.model)
    return TensorCache(folder / f"images-{values_key(family, lambda name: part(name) in IMAGE_PARTS)[:32]}")


def values_key(family: Family, include: Callable[[str], bool], *extra: str) -> str:
    """A digest of some of a model's values and of everything else that its results depend on.

    All values are read, about a second for each gigabyte, since samples could miss a tuned norm.

    Args:
        include: whether a parameter or buffer of this name is part of the digest.
        extra: further texts to include.
    """
    model = family.model
    config: dict[str, Any] = model.config.to_dict()  # type: ignore[operator,union-attr]
    settings = {name: value for name, value in config.items() if name not in _IRRELEVANT_SETTINGS}
    return digest(
        {name: value for name, value in _values(model).items() if include(name)},
        type(family).__name__,
        json.dumps(settings, sort_keys=True, default=str),
        f"torch {torch.__version__} {torch.get_float32_matmul_precision()} on {family.device.type}",
        f"transformers {version('transformers')}",
        *extra,
    )


def _values(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name; also the buffers that are not saved, and the tensors of quantised weights."""
    values = {**dict(model.named_buffers(remove_duplicate=False)), **model.state_dict()}
    return {name: value for name, value in values.items() if isinstance(value, Tensor)}
