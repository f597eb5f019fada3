"""Opens an image file as 8-bit RGB: PNG, JPEG, TIFF, BMP, GIF, WebP, JPEG 2000, PPM or DICOM."""

from __future__ import annotations

import io
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from normtune.data.images.intensity import MAX_PIXELS, Window, apply_window, check_size, grey_to_rgb, stretch_full_range
from normtune.errors import InputError

# Formats that only decode pixels: Pillow would run Ghostscript for EPS and follow links in others.
_FORMATS = ("PNG", "JPEG", "TIFF", "BMP", "GIF", "WEBP", "JPEG2000", "PPM")
_DICOM_ENDINGS = (".dcm", ".dicom", ".ima", "")  # files with these endings may be DICOM without its preamble


def open_image(
    source: Path | str | bytes | Image.Image,
    *,
    name: str | None = None,
    frame: int | None = None,
    window: Window | None = None,
) -> Image.Image:
    """Read one image as 8-bit RGB, upright.

    Grey images of more than 8 bits are scaled, not clipped: by `window` if given; signed and float images
    from their smallest to their largest value; others from 0 to the maximum of the smallest bit depth (8, 10,
    12, 14 or 16) that contains all values. TIFF files in which 0 is white are inverted. Transparent pixels are drawn
    on white. For DICOM see `normtune.data.images.dicom`.

    Args:
        source: the file, or its bytes, or an opened image.
        name: name of the image in errors; by default the file's name without its folder.
        frame: index in a file of several frames, from 0; by default the first, or for DICOM the middle one.
        window: (centre, width) for images of more than 8 bits and DICOM, instead of the file's own window.

    Raises:
        InputError: the file is missing, damaged, of an unknown kind or too large, or has no such frame.
    """
    # Sizes are checked below, with an error of one line instead of Pillow's warning.
    warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
    if isinstance(source, Image.Image):
        return _to_rgb(_upright(source), window)
    if isinstance(source, bytes):
        name, data = name or "image", source
    else:
        path = Path(source)
        name = name or path.name
        data = _read_file(path, name)
    if data[128:132] == b"DICM":
        return _open_dicom(data, name, frame, window)
    if not _is_known_to_pillow(data) and Path(name).suffix.lower() in _DICOM_ENDINGS:
        return _open_dicom(data, name, frame, window)  # old DICOM files have no preamble
    return _open_picture(data, name, frame, window)


@dataclass(frozen=True)
class ImageFolder:
    """Opens images by their path relative to a folder: the `open_image` of datasets with image files."""

    folder: Path
    frame: int | None = None
    window: Window | None = None

    def __call__(self, key: str) -> Image.Image:
        if "#" in key:
            from normtune.data.images.volumes import open_volume

            volume = open_volume(self.folder, key, self.window)
            if volume is not None:
                return volume
        return open_image(self.folder / key, name=key, frame=self.frame, window=self.window)


def _read_file(path: Path, name: str) -> bytes:
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


def _is_known_to_pillow(data: bytes) -> bool:
    try:
        with Image.open(io.BytesIO(data), formats=_FORMATS):
            return True
    except Image.UnidentifiedImageError:
        return False
    except Exception:  # recognised, but too large or damaged: opening it again reports the reason
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
            _check_depth(picture, data, name)
            # Pillow inverts 8-bit pictures only; tag 262 is PhotometricInterpretation, 0 where the value 0 is white
            is_deep_tiff = picture.format == "TIFF" and picture.mode not in ("1", "L")
            inverted = is_deep_tiff and picture.tag_v2.get(262) == 0  # type: ignore[attr-defined]
            return _to_rgb(_upright(picture), window, inverted)
    except InputError:
        raise
    except Image.UnidentifiedImageError as error:
        raise InputError(
            f"{name}: not an image that can be read. Supported are PNG, JPEG, TIFF, BMP, GIF, WebP, "
            "JPEG 2000, PPM and DICOM."
        ) from error
    except Image.DecompressionBombError as error:
        raise InputError(
            f"{name}: the image has more pixels than the limit of {MAX_PIXELS:,}. Make it smaller."
        ) from error
    except Exception as error:  # Pillow's decoders raise SyntaxError, struct.error, OverflowError and more
        raise InputError(f"{name}: the image is damaged or cut short. Replace the file.") from error


def _check_depth(picture: Image.Image, data: bytes, name: str) -> None:
    """Refuse a 16-bit colour PNG with values of fewer bits: Pillow keeps the upper 8 of 16, so it would be black."""
    bit_depth, colour_type = data[24:26]
    if picture.format != "PNG" or bit_depth != 16 or colour_type == 0:  # grey is read with all of its bits
        return
    largest = max(band[1] for band in picture.convert("RGB").getextrema())  # type: ignore[index]
    if 0 < largest < 64:
        raise InputError(
            f"{name}: a PNG with 16-bit colours of which only the lower {8 + int(largest).bit_length()} are used: it "
            "would be almost black. Save it as 8-bit colours, or as 16-bit grey."
        )


def _upright(picture: Image.Image) -> Image.Image:
    """Apply the rotation that the EXIF data names."""
    try:
        return ImageOps.exif_transpose(picture)
    except Exception:  # damaged EXIF does not make the pixels unreadable
        return picture


def _to_rgb(picture: Image.Image, window: Window | None, inverted: bool = False) -> Image.Image:
    """Convert any Pillow mode to RGB; with `inverted`, the smallest grey value is white."""
    if picture.mode.startswith("I") or picture.mode == "F":
        grey = _scale_grey(np.asarray(picture).astype(np.float64), picture.mode, window)
        return grey_to_rgb(1 - grey if inverted else grey)
    if picture.mode in ("P", "PA") and "transparency" in picture.info:
        picture = picture.convert("RGBA")
    if picture.has_transparency_data:
        rgba = picture.convert("RGBA")
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, rgba).convert("RGB")
    return picture.convert("RGB")


def _scale_grey(values: NDArray[np.floating], mode: str, window: Window | None) -> NDArray[np.floating]:
    """Scale grey values of more than 8 bits, shape [rows, columns], to [0, 1]; see `open_image`."""
    if window is not None:
        return apply_window(values, window)
    if mode == "F" or values.min() < 0 or values.max() > 65535:
        return stretch_full_range(values)
    top = next(2**bits - 1 for bits in (8, 10, 12, 14, 16) if values.max() < 2**bits)
    return values / top
