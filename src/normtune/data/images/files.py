"""One image of any common file kind as 8-bit RGB: PNG, JPEG, TIFF, BMP, GIF, WebP, JPEG 2000, DICOM."""

from __future__ import annotations

import io
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from normtune.data.images.intensity import (
    MAX_PIXELS,
    Window,
    check_size,
    full_range,
    grey_image,
    window_values,
)
from normtune.errors import InputError

# Formats that only decode pixels: Pillow would run Ghostscript for EPS and follow links in others.
_FORMATS = ("PNG", "JPEG", "TIFF", "BMP", "GIF", "WEBP", "JPEG2000", "PPM")
_DICOM_ENDINGS = (".dcm", ".dicom", ".ima", "")


def open_image(
    source: Path | str | bytes,
    *,
    name: str | None = None,
    frame: int | None = None,
    window: Window | None = None,
) -> Image.Image:
    """Read one image as 8-bit RGB, upright.

    Grey images of more than 8 bits are scaled, not clipped: by `window` where given, else from zero to the
    largest value of the smallest depth (8, 10, 12, 14 or 16 bits) that holds them; signed and float ones from
    their least to their greatest value. Transparent pixels lie over black. DICOM: see `normtune.data.images.dicom`.

    Args:
        source: the file, or its bytes.
        name: how errors call the image; by default the file's name without its folder.
        frame: frame of a multi-frame file, from 0; by default the first, of a DICOM file the middle one.
        window: (centre, width) for images of more than 8 bits and DICOM files, instead of the file's own.

    Raises:
        InputError: the file is missing, damaged, of an unknown kind or too large, or has no such frame.
    """
    # Sizes are checked below, with an error of one line instead of Pillow's warning.
    warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
    if isinstance(source, bytes):
        name, data = name or "image", source
    else:
        path = Path(source)
        name = name or path.name
        data = _bytes_of(path, name)
    if data[128:132] == b"DICM":
        return _open_dicom(data, name, frame, window)
    if not _known_to_pillow(data) and Path(name).suffix.lower() in _DICOM_ENDINGS:
        return _open_dicom(data, name, frame, window)  # DICOM of old, without a preamble
    return _open_picture(data, name, frame, window)


@dataclass(frozen=True)
class ImageFolder:
    """Opens images by their path below a folder; what datasets of files give as `open_image`."""

    folder: Path
    frame: int | None = None
    window: Window | None = None

    def __call__(self, key: str) -> Image.Image:
        return open_image(self.folder / key, name=key, frame=self.frame, window=self.window)


def _bytes_of(path: Path, name: str) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError as error:
        raise InputError(f"{name}: no such image file. Check the path.") from error
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        reason = getattr(error, "strerror", None) or "not a path"
        raise InputError(f"{name}: cannot read the image file ({reason}).") from error


def _open_dicom(data: bytes, name: str, frame: int | None, window: Window | None) -> Image.Image:
    from normtune.data.images.dicom import open_dicom  # pydicom takes 0.2 s to import

    return open_dicom(data, name=name, frame=frame, window=window)


def _known_to_pillow(data: bytes) -> bool:
    try:
        with Image.open(io.BytesIO(data), formats=_FORMATS):
            return True
    except Image.UnidentifiedImageError:
        return False
    except Exception:  # recognised, yet too large or damaged: opening it again names the fault
        return True


def _open_picture(data: bytes, name: str, frame: int | None, window: Window | None) -> Image.Image:
    try:
        with Image.open(io.BytesIO(data), formats=_FORMATS) as picture:
            frames = getattr(picture, "n_frames", 1)
            if not 0 <= (frame or 0) < frames:
                raise InputError(f"{name}: there is no frame {frame}. The file has {frames}, counted from 0.")
            if frame:
                picture.seek(frame)
            check_size(*picture.size, name)
            picture.load()
            return _rgb(_upright(picture), window)
    except InputError:
        raise
    except Image.UnidentifiedImageError as error:
        raise InputError(
            f"{name}: not an image that can be read. Known are PNG, JPEG, TIFF, BMP, GIF, WebP, JPEG 2000, "
            "PPM and DICOM."
        ) from error
    except Image.DecompressionBombError as error:
        raise InputError(
            f"{name}: the image has more than the {MAX_PIXELS:,} pixels that are read. Make it smaller."
        ) from error
    except Exception as error:  # Pillow's decoders raise SyntaxError, struct.error, OverflowError and more
        raise InputError(f"{name}: the image is damaged or cut short. Replace the file.") from error


def _upright(picture: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(picture)
    except Exception:  # damaged EXIF does not make the pixels unreadable
        return picture


def _rgb(picture: Image.Image, window: Window | None) -> Image.Image:
    """Any Pillow mode -> RGB."""
    if picture.mode.startswith("I") or picture.mode == "F":
        return grey_image(_scaled(np.asarray(picture).astype(np.float64), picture.mode, window))
    if picture.mode in ("P", "PA") and "transparency" in picture.info:
        picture = picture.convert("RGBA")
    if picture.has_transparency_data:
        over = picture.convert("RGBA")
        black = Image.new("RGBA", over.size, (0, 0, 0, 255))
        return Image.alpha_composite(black, over).convert("RGB")
    return picture.convert("RGB")


def _scaled(values: NDArray[np.floating], mode: str, window: Window | None) -> NDArray[np.floating]:
    """Grey values of more than 8 bits, shape [rows, columns] -> [0, 1]."""
    if window is not None:
        return window_values(values, window)
    if mode == "F" or values.min() < 0 or values.max() > 65535:
        return full_range(values)
    top = next(2**bits - 1 for bits in (8, 10, 12, 14, 16) if values.max() < 2**bits)
    return values / top
