"""The images of some rows as small JPEG files in data URLs, each image once."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from PIL import Image

from normtune.errors import InputError

Progress = Callable[[int, int], None]  # images done, images in all
_QUALITY = 82


@dataclass(frozen=True)
class Thumbnail:
    """An image of the page; `name` is its anchor there. One that could not be read has no `url`."""

    name: str
    url: str
    width: int
    height: int


def thumbnails(
    keys: Iterable[str],
    open_image: Callable[[str], Image.Image],
    *,
    pixels: int,
    progress: Progress | None = None,
) -> dict[str, Thumbnail]:
    """Image key -> thumbnail of at most `pixels` a side; an image that cannot be read stays empty."""
    keys = list(dict.fromkeys(keys))
    found = {}
    for number, key in enumerate(keys):
        try:
            found[key] = _thumbnail(f"image-{number}", open_image(key), pixels)
        except InputError:
            found[key] = Thumbnail(f"image-{number}", "", pixels, pixels)
        if progress is not None:
            progress(number + 1, len(keys))
    return found


def _thumbnail(name: str, image: Image.Image, pixels: int) -> Thumbnail:
    small = image.convert("RGB")
    small.thumbnail((pixels, pixels))
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=_QUALITY, optimize=True)
    url = "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
    return Thumbnail(name, url, small.width, small.height)
