"""Untrusted images: checked before they are decoded, and stored for later questions.

PNG, JPEG, WebP, and DICOM with its preamble are accepted. A small file must not take much memory or time in a
decoder, so sizes are read from the headers first; for DICOM also from the compressed stream in the file.
"""

from __future__ import annotations

import base64
import binascii
import io
import re
import secrets
import struct
import time
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING
from urllib.parse import unquote_to_bytes

from PIL import Image

from normtune.data.images.files import open_image
from normtune.data.images.intensity import Window
from normtune.errors import InputError
from normtune.serving.http.errors import RequestRefused

if TYPE_CHECKING:
    from normtune.data.images.dicom import GreyFrame

# Scans of a progressive JPEG; decoding each is a pass over all pixels.
_MAX_SCANS = 200
# Items of a DICOM file's sequences and fragments; reading one takes 25 microseconds.
_MAX_ITEMS = 20_000
_ITEM_TAGS = (b"\xfe\xff\x00\xe0", b"\xff\xfe\xe0\x00")  # little and big endian
# UIDs of DICOM transfer syntaxes.
_DEFLATED = (b"1.2.840.10008.1.2.1.99", b"1.2.840.10008.1.2.4.95", b"1.2.840.10008.1.2.8.1")
_JPEG_2000 = re.compile(rb"1\.2\.840\.10008\.1\.2\.4\.(?:9|20)\d")
_JPEG = re.compile(rb"1\.2\.840\.10008\.1\.2\.4\.[5-8]\d")
# The headers of compressed streams that contain the image size.
_JPEG_2000_SIZE = re.compile(rb"\xff\x4f\xff\x51.{4}(.{16})", re.DOTALL)  # ISO 15444-1, A.5.1: SIZ
_JPEG_SIZE = re.compile(rb"\xff[\xc0-\xc3\xc5-\xc7\xc9-\xcb\xcd-\xcf\xf7].{3}(.{4})", re.DOTALL)  # SOF, LS
_DATA_URL = re.compile(r"data:[\w.+/-]{0,80}(?:;[\w.+=-]{1,80}){0,4}?;base64,", re.ASCII | re.IGNORECASE)


def open_upload(data: bytes, *, max_pixels: int, name: str = "the image", window: Window | None = None) -> Image.Image:
    """Decode an untrusted image file to 8-bit RGB.

    Args:
        max_pixels: the most pixels; a larger image is refused before it is decoded.
        name: the image's name in error messages, which quote nothing from the file.
        window: (centre, width) for grey values of DICOM; None: the file's own.

    Raises:
        InputError: the file is of another format, damaged or too large, or has no values for the window.
    """
    image, grey = read_upload(data, max_pixels=max_pixels, name=name)
    return image if window is None else render(grey, window, name)


def read_upload(data: bytes, *, max_pixels: int, name: str = "the image") -> tuple[Image.Image, GreyFrame | None]:
    """The image of `open_upload`, and the grey values of a DICOM file."""
    kind = file_kind(data, name)
    if kind == "DICOM":
        _check_dicom(data, max_pixels, name)
        from normtune.data.images.dicom import read_dicom

        return read_dicom(data, name=name)
    _check_picture(data, kind, max_pixels, name)
    return open_image(data, name=name), None


def render(grey: GreyFrame | None, window: Window, name: str = "the image") -> Image.Image:
    """Return an image with this window. Raises `InputError` if it has no grey values, or the window is too small."""
    if grey is None:
        raise InputError(f"{name}: a window applies to DICOM files with grey values. Leave it out.")
    return grey.render(window)


def file_kind(data: bytes, name: str) -> str:
    """Return the format (PNG, JPEG, WEBP or DICOM), detected by the first bytes.

    Raises:
        InputError: the file has another format.
    """
    if data[128:132] == b"DICM":
        return "DICOM"
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return "PNG"
    if data.startswith(b"\xff\xd8\xff"):
        return "JPEG"
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "WEBP"
    raise InputError(f"{name}: not a PNG, JPEG, WebP or DICOM file. Convert it to one of these.")


def _check_picture(data: bytes, kind: str, max_pixels: int, name: str) -> None:
    if kind == "JPEG" and data.count(b"\xff\xda") > _MAX_SCANS:
        raise InputError(f"{name}: a JPEG with more than {_MAX_SCANS} scans. Save it as a baseline JPEG.")
    try:
        with warnings.catch_warnings(), Image.open(io.BytesIO(data), formats=(kind,)) as picture:
            size = picture.size
    except Image.DecompressionBombError as error:
        raise _too_large(name, max_pixels) from error
    except Exception as error:  # Pillow's readers raise SyntaxError, struct.error, OverflowError and more
        raise InputError(f"{name}: the image is damaged or truncated. Replace the file.") from error
    _check_size(*size, max_pixels, name)


def _check_dicom(data: bytes, max_pixels: int, name: str) -> None:
    if any(uid in data for uid in _DEFLATED):
        raise InputError(f"{name}: a deflated DICOM file. Decompress it, for example with dcmconv +te.")
    if sum(map(data.count, _ITEM_TAGS)) > _MAX_ITEMS:
        raise InputError(f"{name}: a DICOM file with more than {_MAX_ITEMS:,} items. Send one frame of it.")
    import pydicom  # the import takes 0.2 s

    from normtune.data.images.dicom import silence_pydicom

    silence_pydicom()
    try:
        tags = ["Rows", "Columns"]
        file = pydicom.dcmread(io.BytesIO(data), specific_tags=tags, stop_before_pixels=True)
        size = int(file.Columns), int(file.Rows)
    except Exception:  # `from None`: messages may quote the file
        raise InputError(f"{name}: a DICOM file that is damaged or has no image. Replace it.") from None
    _check_size(*size, max_pixels, name)
    for width, height in _stream_sizes(data):
        _check_size(width, height, max_pixels, name)


def _stream_sizes(data: bytes) -> Iterator[tuple[int, int]]:
    """Yield the (width, height) in the headers of a DICOM file's compressed streams.

    Decoders allocate by these sizes, which may be larger than the file's Rows and Columns.
    """
    if _JPEG_2000.search(data):
        for header in _JPEG_2000_SIZE.finditer(data):
            right, bottom, left, top = struct.unpack(">4I", header[1])
            yield max(right - left, 0), max(bottom - top, 0)
    if _JPEG.search(data):
        for header in _JPEG_SIZE.finditer(data):
            height, width = struct.unpack(">2H", header[1])
            yield width, height


def _check_size(width: int, height: int, max_pixels: int, name: str) -> None:
    if width * height > max_pixels:
        raise _too_large(name, max_pixels)
    if width < 1 or height < 1:
        raise InputError(f"{name}: the image has no pixels. Replace the file.")


def _too_large(name: str, max_pixels: int) -> InputError:
    return InputError(f"{name}: the image has more than {max_pixels:,} pixels. Make it smaller.")


def decode_data_url(url: str, name: str = "the image") -> bytes:
    """Decode a data URL such as `data:image/png;base64,...`. Its media type is ignored.

    As in browsers, white space in the data, missing padding and percent-encoding are accepted.

    Raises:
        InputError: it is not a data URL in base64.
    """
    url = url.strip()
    head = _DATA_URL.match(url)
    if head is None:
        raise InputError(f"{name}: not a data URL in base64 (data:image/png;base64,...).")
    try:
        data = url[head.end() :].encode("ascii").translate(None, b" \t\r\n\f")
        data = unquote_to_bytes(data).rstrip(b"=")
        return base64.b64decode(data + b"=" * (-len(data) % 4), validate=True)
    except (binascii.Error, UnicodeEncodeError) as error:
        raise InputError(f"{name}: its data URL is not base64. Encode the file again.") from error


def png_bytes(image: Image.Image) -> bytes:
    """Encode an RGB image as PNG. Grey images are saved with one channel, in a third of the size."""
    out = io.BytesIO()
    channels = image.split()
    is_grey = all(channel.tobytes() == channels[0].tobytes() for channel in channels[1:])
    (channels[0] if is_grey else image).save(out, "PNG", compress_level=1)
    return out.getvalue()


@dataclass(frozen=True)
class Upload:
    """An uploaded image, stored as PNG without the metadata of its file; of DICOM also the grey values."""

    id: str
    owner: str
    png: bytes
    width: int
    height: int
    created_at: float  # seconds since the epoch
    grey: GreyFrame | None = None

    @property
    def bytes(self) -> int:
        """The memory that it takes."""
        return len(self.png) + (self.grey.pixels.nbytes if self.grey else 0)


class Uploads:
    """Uploaded images in bounded memory. Not thread-safe: only the event loop uses it.

    Args:
        count, total_bytes: the most images, and the most bytes; beyond them the oldest are dropped.
        seconds: time after which an image expires.
        now: the clock, in seconds.

    Attributes:
        size: bytes of all stored images.
    """

    def __init__(self, count: int, total_bytes: int, seconds: float, now: Callable[[], float] = time.time) -> None:
        self._max_count, self._max_bytes, self._seconds, self._now = count, total_bytes, seconds, now
        self._uploads: OrderedDict[str, Upload] = OrderedDict()  # the oldest first
        self.size = 0

    def add(self, owner: str, png: bytes, width: int, height: int, grey: GreyFrame | None = None) -> Upload:
        """Store an image, and drop the oldest ones beyond the limits. The newest one is always kept."""
        self._drop_expired()
        upload = Upload(f"file-{secrets.token_hex(12)}", owner, png, width, height, self._now(), grey)
        self._uploads[upload.id] = upload
        self.size += upload.bytes
        while len(self._uploads) > self._max_count or (self.size > self._max_bytes and len(self._uploads) > 1):
            self._drop(next(iter(self._uploads)))
        return upload

    def get(self, owner: str, id: str) -> Upload:
        """Return an image of this owner.

        Raises:
            RequestRefused: 404, it does not exist, it expired, or it is another owner's.
        """
        self._drop_expired()
        upload = self._uploads.get(id)
        if upload is None or upload.owner != owner:
            raise RequestRefused(404, "no such file. Upload it again.", code="file_not_found")
        return upload

    def remove(self, owner: str, id: str) -> None:
        """Delete an image of this owner.

        Raises:
            RequestRefused: see `get`.
        """
        self._drop(self.get(owner, id).id)

    def list_for(self, owner: str) -> list[Upload]:
        """Return all images of an owner, the oldest first."""
        self._drop_expired()
        return [upload for upload in self._uploads.values() if upload.owner == owner]

    def _drop(self, id: str) -> None:
        self.size -= self._uploads.pop(id).bytes

    def _drop_expired(self) -> None:
        oldest_allowed = self._now() - self._seconds
        while self._uploads and next(iter(self._uploads.values())).created_at < oldest_allowed:
            self._drop(next(iter(self._uploads)))
