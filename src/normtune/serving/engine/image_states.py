"""A bounded cache of encoded images, by the digest of their pixels."""

from __future__ import annotations

import hashlib
from collections import OrderedDict

from PIL import Image

from normtune.models.image_cache import tensor_bytes
from normtune.models.types import Pixels

# (`RegisteredAdapter.image_digest`: which image encoder, `pixel_digest` of the image)
ImageKey = tuple[str, str]


def pixel_digest(image: Image.Image) -> str:
    """Return the SHA-256 (64 hex digits) of an RGB image's size and pixels, without file metadata."""
    digest = hashlib.sha256(f"{image.mode} {image.size} ".encode())
    digest.update(image.tobytes())
    return digest.hexdigest()


class EncodedImageCache:
    """An LRU cache of encoded images, of at most `limit_bytes`. Not thread-safe.

    Adapters that do not change the image encoder have the same `ImageKey`, and so share encoded images.
    """

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self.bytes = 0
        self._states: OrderedDict[ImageKey, Pixels] = OrderedDict()  # least recently used first

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
