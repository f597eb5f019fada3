"""DICOM -> 8-bit RGB. Only elements that describe pixels are read, so no identifier of a patient can leak."""

from __future__ import annotations

import io
import logging
import warnings
from functools import cache
from typing import Any

import numpy as np
import pydicom
from numpy.typing import NDArray
from PIL import Image
from pydicom.pixels import apply_color_lut, get_decoder, pixel_array
from pydicom.tag import BaseTag, Tag
from pydicom.uid import ExplicitVRBigEndian, ExplicitVRLittleEndian, ImplicitVRLittleEndian

from normtune.data.images.intensity import Window, check_size, full_range, grey_image, window_values
from normtune.errors import InputError

_PIXEL_KEYWORDS = (
    "PixelData",
    "FloatPixelData",
    "DoubleFloatPixelData",
    "ExtendedOffsetTable",
    "ExtendedOffsetTableLengths",
    "SharedFunctionalGroupsSequence",
    "PerFrameFunctionalGroupsSequence",
)
_IMAGE_GROUP = 0x0028  # rows, columns, depths, rescale, windows, look-up tables: nothing of a person


def open_dicom(
    data: bytes, *, name: str, frame: int | None = None, window: Window | None = None
) -> Image.Image:
    """One frame of a DICOM file as 8-bit RGB.

    Grey values go through the modality table or rescale, then through `window`, else the file's VOI table or
    window (its first), else from their least to their greatest; MONOCHROME1 is inverted. Colour in RGB, YBR
    and palettes is read; `window` does not touch it. Enhanced files may give these for each frame.

    Source: DICOM PS3.3, C.7.6.3 (pixels), C.11.1 (modality table), C.11.2 (VOI table).

    Args:
        data: the file's bytes.
        name: how errors call the file; nothing from inside the file stands in a message.
        frame: from 0; by default the middle frame.
        window: (centre, width), in Hounsfield units for CT.

    Raises:
        InputError: the file is damaged, has no pixels or no such frame, is too large, or is compressed in a
            way that no installed decoder reads.
    """
    _hush_pydicom()
    try:
        return _open(data, name, frame, window)
    except InputError:
        raise
    except Exception as error:
        # `from None`: pydicom's messages may quote values of the file
        raise InputError(
            f"{name}: not a DICOM file that can be read ({type(error).__name__}): damaged or cut short. "
            "Replace the file."
        ) from None


def _hush_pydicom() -> None:
    """Silence pydicom's warnings, which may quote a file's values; repeated calls change nothing."""
    logging.getLogger("pydicom").setLevel(logging.CRITICAL)
    warnings.filterwarnings("ignore", module=r"(pydicom|normtune\.data\.dicom)")


def _open(data: bytes, name: str, frame: int | None, window: Window | None) -> Image.Image:
    file = _read(data, name)
    frames = int(file.get("NumberOfFrames") or 1)
    index = frames // 2 if frame is None else frame
    if not 0 <= index < frames:
        raise InputError(f"{name}: there is no frame {frame}. The file has {frames}, counted from 0.")
    check_size(int(file.Columns), int(file.Rows), name)
    pixels = pixel_array(file, index=index)  # [rows, columns] or [rows, columns, 3]
    photometric = str(file.PhotometricInterpretation)
    if photometric == "PALETTE COLOR":
        pixels = apply_color_lut(pixels, file)
        return Image.fromarray(_eight_bits(pixels, 8 * pixels.dtype.itemsize), "RGB")
    if pixels.ndim == 3:
        return Image.fromarray(_eight_bits(pixels, int(file.BitsStored)), "RGB")
    grey = _grey(pixels, _Settings(file, index), window)
    return grey_image(1 - grey if photometric == "MONOCHROME1" else grey)


@cache
def _wanted_tags() -> list[int | BaseTag]:
    group = [Tag(tag) for tag in pydicom.datadict.DicomDictionary if tag >> 16 == _IMAGE_GROUP]
    return [*group, *(Tag(keyword) for keyword in _PIXEL_KEYWORDS)]


def _read(data: bytes, name: str) -> pydicom.Dataset:
    """The pixel-describing elements of the file, with a transfer syntax that a decoder is there for."""
    file = pydicom.dcmread(io.BytesIO(data), force=True, specific_tags=_wanted_tags())
    if not any(keyword in file for keyword in _PIXEL_KEYWORDS[:3]):
        raise InputError(
            f"{name}: a DICOM file without pixel data, or no image at all. Use one with an image."
        )
    if "TransferSyntaxUID" not in file.file_meta:  # a file of old, without a header: as it was parsed
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


class _Settings:
    """How one frame's values are shown: its own functional groups, then the shared ones, then the file."""

    def __init__(self, file: pydicom.Dataset, index: int) -> None:
        self._file = file
        self._little = file.original_encoding[1] is not False
        own = file.get("PerFrameFunctionalGroupsSequence") or []
        shared = file.get("SharedFunctionalGroupsSequence") or []
        self._groups = [*own[index : index + 1], *shared[:1]]

    def find(self, sequence: str, keyword: str) -> Any:
        """The value of `keyword`, in `sequence` of the functional groups or at the top of the file."""
        for group in self._groups:
            for item in (group.get(sequence) or [])[:1]:
                if item.get(keyword) not in (None, ""):
                    return item.get(keyword)
        value = self._file.get(keyword)
        return None if value == "" else value

    def number(self, sequence: str, keyword: str) -> float | None:
        """The first number of a possibly many-valued element."""
        value = self.find(sequence, keyword)
        if isinstance(value, list | pydicom.multival.MultiValue):
            value = value[0] if len(value) else None
        return None if value is None else float(value)

    def table(self, keyword: str) -> tuple[NDArray[np.integer], int, int] | None:
        """(entries, the value that the first entry stands for, bits an entry) of a look-up table sequence."""
        sequence = self._file.get(keyword)
        if not sequence:
            return None
        item = sequence[0]
        count, first, bits = (int(value) for value in item.LUTDescriptor)
        count = count or 65536
        entries: NDArray[np.integer]
        if isinstance(item.LUTData, bytes):
            wide = "<u2" if self._little else ">u2"
            entries = np.frombuffer(item.LUTData, "u1" if len(item.LUTData) < 2 * count else wide)
        else:
            entries = np.atleast_1d(np.asarray(item.LUTData, dtype=np.int64))
        return entries[:count].astype(np.int64), first, bits


def _look_up(values: NDArray[np.floating], entries: NDArray[np.integer], first: int) -> NDArray[np.floating]:
    """Values below or beyond the table take its first or last entry (PS3.3 C.11.1.1.1)."""
    index = np.clip(np.round(values) - first, 0, len(entries) - 1).astype(np.int64)
    return entries[index].astype(np.float64)


def _grey(pixels: NDArray[np.generic], settings: _Settings, window: Window | None) -> NDArray[np.floating]:
    """Stored grey values, shape [rows, columns] -> [0, 1], dark to bright for MONOCHROME2."""
    values: NDArray[np.floating] = pixels.astype(np.float64)
    modality = settings.table("ModalityLUTSequence")
    if modality is not None:
        values = _look_up(values, modality[0], modality[1])
    else:
        sequence = "PixelValueTransformationSequence"
        slope = settings.number(sequence, "RescaleSlope")
        intercept = settings.number(sequence, "RescaleIntercept")
        values = values * (1.0 if slope is None else slope) + (intercept or 0.0)
    if window is not None:
        return window_values(values, window)
    voi = settings.table("VOILUTSequence")
    if voi is not None:
        return np.clip(_look_up(values, voi[0], voi[1]) / (2 ** voi[2] - 1), 0, 1)
    centre = settings.number("FrameVOILUTSequence", "WindowCenter")
    width = settings.number("FrameVOILUTSequence", "WindowWidth")
    if centre is not None and width is not None:
        function = str(settings.find("FrameVOILUTSequence", "VOILUTFunction") or "LINEAR")
        if width >= 1 or (width > 0 and function != "LINEAR"):
            return window_values(values, (centre, width), function)
    padding = settings.number("", "PixelPaddingValue")
    return (
        full_range(np.where(pixels == padding, np.nan, values)) if padding is not None else full_range(values)
    )


def _eight_bits(pixels: NDArray[np.generic], bits: int) -> NDArray[np.uint8]:
    """Colour of `bits` bits a sample -> 8 bits."""
    if bits == 8:
        return pixels.astype(np.uint8)
    return np.round(pixels.astype(np.float64) * (255 / (2**bits - 1))).clip(0, 255).astype(np.uint8)
