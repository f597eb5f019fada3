"""Encodes images in batches, and keeps encoded images in a bounded cache, by the digest of their pixels."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from itertools import groupby, islice
from operator import itemgetter

from PIL import Image

from normtune.adapters.multi.bank import AdapterBank
from normtune.adapters.multi.rows import RowAdapters
from normtune.models.family import Family
from normtune.models.image_cache import tensor_bytes
from normtune.models.types import Pixels
from normtune.serving.engine.queue import ImageKey, Job
from normtune.serving.engine.requests import is_device_failure

IMAGES_PER_PASS = 16  # the most images that are encoded together


def pixel_digest(image: Image.Image) -> str:
    """Return the SHA-256 (64 hex digits) of an RGB image's size and pixels, without file metadata."""
    digest = hashlib.sha256(f"{image.mode} {image.size} ".encode())
    digest.update(image.tobytes())
    return digest.hexdigest()


class EncodedImageCache:
    """An LRU cache of encoded images, of at most `limit_bytes`. Not thread-safe, except for `in`.

    Adapters that do not change the image encoder have the same `ImageKey`, and so share encoded images.
    """

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self.bytes = 0
        self._states: OrderedDict[ImageKey, Pixels] = OrderedDict()  # least recently used first

    def __contains__(self, key: ImageKey) -> bool:
        """Return whether an image is in the cache; any thread may ask."""
        return key in self._states

    def get(self, key: ImageKey) -> Pixels | None:
        """Return an encoded image, or None if it is not in the cache."""
        if key in self._states:
            self._states.move_to_end(key)
        return self._states.get(key)

    def add(self, key: ImageKey, states: Pixels) -> None:
        """Add an encoded image and evict the least recently used ones beyond the limit."""
        size = tensor_bytes(states)
        if size > self.limit_bytes:
            return
        self._states[key] = states
        self.bytes += size
        while self.bytes > self.limit_bytes:
            _, oldest = self._states.popitem(last=False)
            self.bytes -= tensor_bytes(oldest)


class ImageEncoder:
    """Encodes the images of a batch of jobs, unless they are in its cache. Only one thread may call `encode`.

    Attributes:
        computed, reused: how many images were encoded, and how many were found in the cache or the batch.
    """

    def __init__(self, family: Family, bank: AdapterBank, limit_bytes: int) -> None:
        self._family, self._bank = family, bank
        self.cache = EncodedImageCache(limit_bytes)
        self.computed = self.reused = 0

    def encode(self, jobs: Sequence[Job]) -> dict[Job, Exception]:
        """Set the encoded images of jobs with loaded adapters; return the errors of images that cannot be encoded."""
        views = [(job, *view) for job in jobs for view in zip(job.image_keys, job.images, strict=True)]
        # One object for each image: families recognise a shared image by its identity.
        states: dict[ImageKey, Pixels | Exception] = {
            key: cached for _, key, _ in views if (cached := self.cache.get(key)) is not None
        }
        missing = {key: (job, image) for job, key, image in views if key not in states}
        self.computed += len(missing)
        self.reused += len(views) - len(missing)
        encoder_of = itemgetter(0)  # adapters of one digest encode an image to the same states
        for _, keys in groupby(sorted(missing, key=encoder_of), key=encoder_of):
            while chunk := {key: missing[key] for key in islice(keys, IMAGES_PER_PASS)}:
                states |= self._encode(chunk)
        errors = {}
        for job in jobs:
            job.images = ()
            own_states = [states[key] for key in job.image_keys]
            job.encoded_images = tuple(entry for entry in own_states if not isinstance(entry, Exception))
            if len(job.encoded_images) < len(own_states):
                errors[job] = next(entry for entry in own_states if isinstance(entry, Exception))
        return errors

    def _encode(
        self, images: Mapping[ImageKey, tuple[Job, Pixels | Image.Image]]
    ) -> Mapping[ImageKey, Pixels | Exception]:
        """Encode images of one image encoder. If that fails, for example for memory, retry it in halves."""
        job, _ = next(iter(images.values()))
        assert job.adapter.slot is not None, "the adapter of a job in a batch is pinned"
        try:
            pixels = [
                self._family.preprocess_image(image) if isinstance(image, Image.Image) else image
                for _, image in images.values()
            ]
            with self._bank.use(RowAdapters([job.adapter.slot]), None):
                encoded = dict(zip(images, self._family.encode_images(pixels), strict=True))
        except Exception as error:
            if len(images) == 1 or is_device_failure(error):
                return dict.fromkeys(images, error)
        else:
            for key, states in encoded.items():
                self.cache.add(key, states)
            return encoded
        items = list(images.items())
        first, second = dict(items[: len(items) // 2]), dict(items[len(items) // 2 :])
        return {**self._encode(first), **self._encode(second)}
