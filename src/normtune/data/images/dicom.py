"""DICOM -> 8-bit RGB. Only elements that describe pixels are read, so that no patient data can leak."""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import numpy as np
import pydicom
from numpy.typing import NDArray
from PIL import Image
from pydicom.pixels import apply_color_lut, get_decoder, pixel_array
from pydicom.tag import BaseTag, Tag
from pydicom.uid import ExplicitVRBigEndian, ExplicitVRLittleEndian, ImplicitVRLittleEndian

from normtune.data.images.intensity import Window, apply_window, check_size, grey_to_rgb, stretch_full_range
from normtune.errors import InputError

# The elements outside that group which are read; the first three hold pixels.
_PIXEL_KEYWORDS = (
    "PixelData", "FloatPixelData", "DoubleFloatPixelData", "ExtendedOffsetTable", "ExtendedOffsetTableLengths",
    "SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence", "PresentationLUTShape",
)  # fmt: skip
_IMAGE_GROUP = 0x0028  # rows, columns, bit depths, rescale, windows, look-up tables; no patient data


@dataclass(frozen=True)
class GreyFrame:
    """The stored grey values of one DICOM frame, for windows that are chosen later."""

    pixels: NDArray[np.generic]  # [rows, columns], as stored
    # converts them to physical units, Hounsfield units for CT
    to_units: Callable[[NDArray[np.generic]], NDArray[np.floating]]
    inverted: bool  # the smallest value is white
    window: Window  # the window in the file, else a window from the smallest to the largest value
    range: tuple[float, float]  # smallest and largest value in physical units

    def render(self, window: Window) -> Image.Image:
        """The frame as 8-bit RGB, as `open_dicom` renders it with this window."""
        grey = apply_window(self.to_units(self.pixels), window)
        return grey_to_rgb(1 - grey if self.inverted else grey)


def open_dicom(data: bytes, *, name: str, frame: int | None = None, window: Window | None = None) -> Image.Image:
    """One frame of a DICOM file as 8-bit RGB.

    Grey values are converted in two steps. The modality table, or rescale slope and intercept, gives values
    in physical units. The first of these that is present then maps them to 8 bits: `window`, the file's VOI
    table, the file's (first) window, or the range from the smallest to the largest value. MONOCHROME1 is
    inverted, as are images with the PresentationLUTShape INVERSE. Colour may be RGB, YBR or a palette, and `window`
    does not apply to it. An optional element that cannot be read is ignored. Enhanced files may have
    these settings for each frame.

    Source: DICOM PS3.3, C.7.6.3 (pixels), C.11.1 (modality table), C.11.2 (VOI table).

    Args:
        name: name of the file in errors. Errors contain nothing from inside the file.
        frame: index from 0; None is the middle frame.
        window: (centre, width), in Hounsfield units for CT.

    Raises:
        InputError: the file is damaged, has no pixels or no such frame, is too large, or has a compression
            that no installed decoder reads.
    """
    return read_dicom(data, name=name, frame=frame, window=window)[0]


def read_dicom(
    data: bytes, *, name: str, frame: int | None = None, window: Window | None = None
) -> tuple[Image.Image, GreyFrame | None]:
    """The image of `open_dicom`, and its grey values; None for colour."""
    silence_pydicom()
    try:
        return _open_frame(data, name, frame, window)
    except InputError:
        raise
    except Exception as error:
        # `from None`: pydicom's messages may quote values of the file
        raise InputError(
            f"{name}: not a DICOM file that can be read ({type(error).__name__}): damaged or cut short. "
            "Replace the file."
        ) from None


def silence_pydicom() -> None:
    """Silence pydicom's warnings, as they may quote values of a file; repeated calls have no effect."""
    logging.getLogger("pydicom").setLevel(logging.CRITICAL)
    warnings.filterwarnings("ignore", module=r"(pydicom|normtune\.data\.images\.dicom)")


def _open_frame(
    data: bytes, name: str, frame: int | None, window: Window | None
) -> tuple[Image.Image, GreyFrame | None]:
    file = _read_pixel_elements(data, name)
    frames = int(file.get("NumberOfFrames") or 1)
    index = frames // 2 if frame is None else frame
    if not 0 <= index < frames:
        raise InputError(f"{name}: there is no frame {frame}. The file has {frames}, counted from 0.")
    check_size(int(file.Columns), int(file.Rows), name)
    pixels = pixel_array(file, index=index)  # [rows, columns] or [rows, columns, 3]
    photometric = str(file.PhotometricInterpretation)
    if photometric == "PALETTE COLOR":
        pixels = apply_color_lut(pixels, file)
        return Image.fromarray(_to_eight_bits(pixels, 8 * pixels.dtype.itemsize), "RGB"), None
    if pixels.ndim == 3:
        return Image.fromarray(_to_eight_bits(pixels, int(file.BitsStored)), "RGB"), None
    settings = _FrameSettings(file, index)
    to_units = _conversion(settings)
    values = to_units(pixels)
    grey = _grey_values(pixels, values, settings, window)
    inverted = photometric == "MONOCHROME1" or settings.find("", "PresentationLUTShape") == "INVERSE"
    finite = values[np.isfinite(values)]
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 0.0)
    full_range = (low + high + 1) / 2, high - low + 1  # maps `low` to 0 and `high` to 1
    file_window = full_range if settings.table("VOILUTSequence") else (settings.window() or full_range)
    picture = grey_to_rgb(1 - grey if inverted else grey)
    return picture, GreyFrame(pixels, to_units, inverted, file_window, (low, high))


@cache
def _tags_to_read() -> list[int | BaseTag]:
    """The tags of all elements that are read."""
    group = [Tag(tag) for tag in pydicom.datadict.DicomDictionary if tag >> 16 == _IMAGE_GROUP]
    return [*group, *(Tag(keyword) for keyword in _PIXEL_KEYWORDS)]


def _read_pixel_elements(data: bytes, name: str) -> pydicom.Dataset:
    """Read the elements that describe pixels, and check that the file's transfer syntax can be decoded."""
    file = pydicom.dcmread(io.BytesIO(data), force=True, specific_tags=_tags_to_read())
    if not any(keyword in file for keyword in _PIXEL_KEYWORDS[:3]):
        raise InputError(f"{name}: a DICOM file without pixel data, or no image at all. Use one with an image.")
    # An old file has no header: use the encoding that the parser found.
    if "TransferSyntaxUID" not in file.file_meta:
        implicit, little = file.original_encoding
        plain = ExplicitVRLittleEndian if little else ExplicitVRBigEndian
        file.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian if implicit else plain
    syntax = file.file_meta.TransferSyntaxUID
    try:
        available = get_decoder(syntax).is_available
    except NotImplementedError:
        available = False
    if not available:
        compression = syntax.name if syntax.is_transfer_syntax else "unknown"
        raise InputError(
            f"{name}: no decoder is installed for its compression ({compression}). "
            "Install normtune[dicom], or decompress the file."
        )
    return file


class _FrameSettings:
    """Looks up the display settings of one frame.

    The first place with a value counts: the frame's own functional groups, the shared groups, the file.
    """

    def __init__(self, file: pydicom.Dataset, index: int) -> None:
        self._file = file
        self._little = file.original_encoding[1] is not False
        per_frame = file.get("PerFrameFunctionalGroupsSequence") or []
        shared = file.get("SharedFunctionalGroupsSequence") or []
        self._groups = [*per_frame[index : index + 1], *shared[:1]]

    def find(self, sequence: str, keyword: str) -> Any:
        """The value of `keyword`: in `sequence` of a functional group, else at the top level of the file."""
        for group in self._groups:
            for item in (group.get(sequence) or [])[:1]:
                if item.get(keyword) not in (None, ""):
                    return item.get(keyword)
        try:
            value = self._file.get(keyword)
        except (ValueError, TypeError, OverflowError):  # an optional element that cannot be read, such as "20,4"
            return None
        return None if value == "" else value

    def number(self, sequence: str, keyword: str) -> float | None:
        """The value of `keyword` as a number; the first one if the element has several values."""
        value = self.find(sequence, keyword)
        if isinstance(value, list | pydicom.multival.MultiValue):
            value = value[0] if len(value) else None
        try:
            return None if value is None else float(value)
        except (ValueError, TypeError):
            return None

    def window(self) -> Window | None:
        """The file's window, if it is valid."""
        centre = self.number("FrameVOILUTSequence", "WindowCenter")
        width = self.number("FrameVOILUTSequence", "WindowWidth")
        if centre is None or width is None or not (width >= 1 or (width > 0 and self.function() != "LINEAR")):
            return None
        return centre, width

    def function(self) -> str:
        """The VOI function of the file's window."""
        return str(self.find("FrameVOILUTSequence", "VOILUTFunction") or "LINEAR")

    def table(self, keyword: str) -> tuple[NDArray[np.integer], int, int] | None:
        """Read a look-up table: (entries, value that maps to the first entry, bits per entry), or None."""
        sequence = self._file.get(keyword)
        if not sequence:
            return None
        item = sequence[0]
        count, first, bits = (int(value) for value in item.LUTDescriptor)
        count = count or 65536  # 0 means 2**16: the field has 16 bits
        entries: NDArray[np.integer]
        if isinstance(item.LUTData, bytes):
            two_bytes = "<u2" if self._little else ">u2"
            entries = np.frombuffer(item.LUTData, "u1" if len(item.LUTData) < 2 * count else two_bytes)
        else:
            entries = np.atleast_1d(np.asarray(item.LUTData, dtype=np.int64))
        return entries[:count].astype(np.int64), first, bits


def _look_up(values: NDArray[np.generic], entries: NDArray[np.integer], first: int) -> NDArray[np.floating]:
    """Map values through a look-up table; values outside it take its first or last entry.

    Source: DICOM PS3.3 C.11.1.1.1.
    """
    index = np.clip(np.round(values.astype(np.float64)) - first, 0, len(entries) - 1).astype(np.int64)
    return entries[index].astype(np.float64)


def _conversion(settings: _FrameSettings) -> Callable[[NDArray[np.generic]], NDArray[np.floating]]:
    """A function from stored grey values to physical units; it holds nothing else of the file."""
    if (modality := settings.table("ModalityLUTSequence")) is not None:
        return partial(_look_up, entries=modality[0], first=modality[1])
    sequence = "PixelValueTransformationSequence"
    slope = settings.number(sequence, "RescaleSlope")
    intercept = settings.number(sequence, "RescaleIntercept")
    return partial(_rescale, slope=1.0 if slope is None else slope, intercept=intercept or 0.0)


def _rescale(values: NDArray[np.generic], slope: float, intercept: float) -> NDArray[np.floating]:
    return values.astype(np.float64) * slope + intercept


def _grey_values(
    pixels: NDArray[np.generic], values: NDArray[np.floating], settings: _FrameSettings, window: Window | None
) -> NDArray[np.floating]:
    """Map grey values to [0, 1]; 0 is black for MONOCHROME2.

    Args:
        pixels, values: [rows, columns], as stored and in physical units.
    """
    if window is not None:
        return apply_window(values, window)
    voi = settings.table("VOILUTSequence")
    if voi is not None:
        return np.clip(_look_up(values, voi[0], voi[1]) / (2 ** voi[2] - 1), 0, 1)
    if (file_window := settings.window()) is not None:
        return apply_window(values, file_window, settings.function())
    padding = settings.number("", "PixelPaddingValue")  # pixels outside the scanned field
    if padding is None:
        return stretch_full_range(values)
    limit = settings.number("", "PixelPaddingRangeLimit")
    low, high = sorted((padding, padding if limit is None else limit))
    stored = pixels.astype(np.float64)
    return stretch_full_range(np.where((stored >= low) & (stored <= high), np.nan, values))


def _to_eight_bits(pixels: NDArray[np.generic], bits: int) -> NDArray[np.uint8]:
    """Convert colour samples of `bits` bits to 8 bits."""
    if bits == 8:
        return pixels.astype(np.uint8)
    return np.round(pixels.astype(np.float64) * (255 / (2**bits - 1))).clip(0, 255).astype(np.uint8)
