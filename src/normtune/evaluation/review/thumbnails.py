"""Converts images to small JPEG files in data URLs, each image once."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from PIL import Image

from normtune.errors import InputError

Progress = Callable[[int, int], None]  # (images done, images in all)
_QUALITY = 82  # quality of the JPEG files


@dataclass(frozen=True)
class Thumbnail:
    """An image of the page. `name` is its id in the page; `url` is empty if the image could not be read."""

    name: str
    url: str
    width: int
    height: int


def thumbnails(
    keys: Iterable[str], open_image: Callable[[str], Image.Image], *, pixels: int, progress: Progress | None = None
) -> dict[str, Thumbnail]:
    """Create a thumbnail of every image.

    Args:
        keys: image keys; repetitions are ignored.
        open_image: opens the image of a key.
        pixels: maximum length of a side.
        progress: called after each image.

    Returns:
        Image key -> thumbnail. An image that cannot be read has a thumbnail without `url`.
    """
    keys = list(dict.fromkeys(keys))
    images = {}
    for number, key in enumerate(keys):
        try:
            images[key] = _create_thumbnail(f"image-{number}", open_image(key), pixels)
        except InputError:
            images[key] = Thumbnail(f"image-{number}", "", pixels, pixels)
        if progress is not None:
            progress(number + 1, len(keys))
    return images


def _create_thumbnail(name: str, image: Image.Image, pixels: int) -> Thumbnail:
    small = image.convert("RGB")
    small.thumbnail((pixels, pixels))
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=_QUALITY, optimize=True)
    url = "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
    return Thumbnail(name, url, small.width, small.height)
