"""What the image encoder made of images that were asked about, by the digest of their pixels."""

from __future__ import annotations

import hashlib
from collections import OrderedDict

from PIL import Image

from normtune.models.image_cache import size_of
from normtune.models.types import Pixels

Key = tuple[str, str]  # by whose gains it is seen (`Entry.images`), and the digest of its pixels


def digest_of(image: Image.Image) -> str:
    """64 hex digits of an RGB image's size and pixels, and of nothing else that its file tells."""
    found = hashlib.sha256(f"{image.mode} {image.size} ".encode())
    found.update(image.tobytes())
    return found.hexdigest()


class ImageStates:
    """States that fit in `limit_bytes`, those that were asked for last. One thread's own.

    Adapters that leave the image encoder alone share what it makes of an image.
    """

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self.bytes = 0
        self._held: OrderedDict[Key, Pixels] = OrderedDict()

    def get(self, key: Key) -> Pixels | None:
        """The states of an image, if they are held."""
        if key in self._held:
            self._held.move_to_end(key)
        return self._held.get(key)

    def put(self, key: Key, states: Pixels) -> None:
        """Hold states; those that were idle for the longest time go."""
        size = size_of(states)
        if size > self.limit_bytes:
            return
        self._held[key] = states
        self.bytes += size
        while self.bytes > self.limit_bytes:
            _, idle = self._held.popitem(last=False)
            self.bytes -= size_of(idle)
