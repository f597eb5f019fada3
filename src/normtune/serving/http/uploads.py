"""Images from strangers: looked at before they are decoded, and held for later questions.

PNG, JPEG, WebP and DICOM with its preamble are taken, and nothing that a decoder could blow up: sizes are
read from headers, of a DICOM file from the compressed stream inside it too.
"""

from __future__ import annotations

import base64
import binascii
import io
import logging
import re
import secrets
import struct
import time
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from PIL import Image

from normtune.data.images.files import open_image
from normtune.errors import InputError
from normtune.serving.http.errors import RequestRefused

_SCANS = 200  # of a progressive JPEG; each is a pass over all pixels
_ITEMS = 20_000  # of a DICOM file's sequences and fragments; reading one takes 25 microseconds
_ITEM_TAGS = (b"\xfe\xff\x00\xe0", b"\xff\xfe\xe0\x00")  # little and big endian
_DEFLATED = (b"1.2.840.10008.1.2.1.99", b"1.2.840.10008.1.2.4.95", b"1.2.840.10008.1.2.8.1")
_JPEG_2000 = re.compile(rb"1\.2\.840\.10008\.1\.2\.4\.(?:9|20)\d")
_JPEG = re.compile(rb"1\.2\.840\.10008\.1\.2\.4\.[5-8]\d")
_JPEG_2000_SIZE = re.compile(rb"\xff\x4f\xff\x51.{4}(.{16})", re.DOTALL)  # ISO 15444-1, A.5.1: SIZ
_JPEG_SIZE = re.compile(rb"\xff[\xc0-\xc3\xc5-\xc7\xc9-\xcb\xcd-\xcf\xf7].{3}(.{4})", re.DOTALL)  # SOF, LS
_DATA_URL = re.compile(r"data:[\w.+/-]{0,80}(?:;[\w.+=-]{1,80}){0,4}?;base64,", re.ASCII)


def open_upload(data: bytes, *, max_pixels: int, name: str = "the image") -> Image.Image:
    """Bytes of a stranger as 8-bit RGB; `name` stands in errors, nothing from the bytes does.

    Raises:
        InputError: another kind, damaged, or too large; decoding has not begun where it is too large.
    """
    kind = kind_of(data, name)
    if kind == "DICOM":
        _check_dicom(data, max_pixels, name)
    else:
        _check_picture(data, kind, max_pixels, name)
    return open_image(data, name=name)


def kind_of(data: bytes, name: str) -> str:
    """PNG, JPEG, WEBP or DICOM, by the first bytes.

    Raises:
        InputError: none of these.
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
    if kind == "JPEG" and data.count(b"\xff\xda") > _SCANS:
        raise InputError(f"{name}: a JPEG of more than {_SCANS} scans. Save it as a usual one.")
    try:
        with warnings.catch_warnings(), Image.open(io.BytesIO(data), formats=(kind,)) as picture:
            size = picture.size
    except Image.DecompressionBombError as error:
        raise _too_large(name, max_pixels) from error
    except Exception as error:  # Pillow's readers raise SyntaxError, struct.error, OverflowError and more
        raise InputError(f"{name}: the image is damaged or cut short. Replace the file.") from error
    _check_size(*size, max_pixels, name)


def _check_dicom(data: bytes, max_pixels: int, name: str) -> None:
    if any(uid in data for uid in _DEFLATED):
        raise InputError(f"{name}: a deflated DICOM file. Decompress it, as with dcmconv +te.")
    if sum(map(data.count, _ITEM_TAGS)) > _ITEMS:
        raise InputError(f"{name}: a DICOM file of more than {_ITEMS:,} items. Send one frame of it.")
    import pydicom  # takes 0.2 s

    logging.getLogger("pydicom").setLevel(logging.CRITICAL)  # its warnings quote values of the file
    warnings.filterwarnings("ignore", module="pydicom")
    try:
        tags = ["Rows", "Columns"]
        file = pydicom.dcmread(io.BytesIO(data), specific_tags=tags, stop_before_pixels=True)
        size = int(file.Columns), int(file.Rows)
    except Exception:  # `from None`: messages may quote the file
        raise InputError(f"{name}: a DICOM file that is damaged, or holds no image. Replace it.") from None
    _check_size(*size, max_pixels, name)
    for width, height in _stream_sizes(data):
        _check_size(width, height, max_pixels, name)


def _stream_sizes(data: bytes) -> Iterator[tuple[int, int]]:
    """(width, height) that compressed streams in a DICOM file say of themselves; decoders believe them."""
    if _JPEG_2000.search(data):
        for found in _JPEG_2000_SIZE.finditer(data):
            right, bottom, left, top = struct.unpack(">4I", found[1])
            yield max(right - left, 0), max(bottom - top, 0)
    if _JPEG.search(data):
        for found in _JPEG_SIZE.finditer(data):
            height, width = struct.unpack(">2H", found[1])
            yield width, height


def _check_size(width: int, height: int, max_pixels: int, name: str) -> None:
    if width * height > max_pixels:
        raise _too_large(name, max_pixels)
    if width < 1 or height < 1:
        raise InputError(f"{name}: the image has no pixels. Replace the file.")


def _too_large(name: str, max_pixels: int) -> InputError:
    return InputError(f"{name}: more than the {max_pixels:,} pixels that are taken. Make it smaller.")


def decode_data_url(url: str, name: str = "the image") -> bytes:
    """The bytes of `data:image/png;base64,...`; the media type it claims is not believed.

    Raises:
        InputError: not such a URL, or not base64.
    """
    head = _DATA_URL.match(url)
    if head is None:
        raise InputError(f"{name}: not a data URL in base64 (data:image/png;base64,...).")
    try:
        return base64.b64decode(url[head.end() :].replace("\n", "").encode("ascii"), validate=True)
    except (binascii.Error, UnicodeEncodeError) as error:
        raise InputError(f"{name}: its data URL is not base64. Encode the file anew.") from error


def png_bytes(image: Image.Image) -> bytes:
    """An RGB image as PNG: what is held and shown; grey ones as grey, a third of the size."""
    out = io.BytesIO()
    channels = image.split()
    grey = all(one.tobytes() == channels[0].tobytes() for one in channels[1:])
    (channels[0] if grey else image).save(out, "PNG", compress_level=1)
    return out.getvalue()


@dataclass(frozen=True)
class Upload:
    """An image that was sent before: decoded once, held as PNG without anything else of the file."""

    id: str
    owner: str
    png: bytes
    width: int
    height: int
    made: float  # seconds since the epoch


class Uploads:
    """Images held for their owners in bounded memory; used from the event loop's thread alone."""

    def __init__(
        self, count: int, total_bytes: int, seconds: float, now: Callable[[], float] = time.time
    ) -> None:
        self._count, self._bytes, self._seconds, self._now = count, total_bytes, seconds, now
        self._held: OrderedDict[str, Upload] = OrderedDict()
        self._size = 0

    def add(self, owner: str, png: bytes, width: int, height: int) -> Upload:
        """Hold an image; the oldest ones make room."""
        self._forget_old()
        found = Upload(f"file-{secrets.token_hex(12)}", owner, png, width, height, self._now())
        self._held[found.id] = found
        self._size += len(png)
        while len(self._held) > self._count or (self._size > self._bytes and len(self._held) > 1):
            self._drop(next(iter(self._held)))
        return found

    def get(self, owner: str, id: str) -> Upload:
        """An image of this owner.

        Raises:
            Refused: 404, there is none, it was forgotten, or it is another owner's.
        """
        self._forget_old()
        found = self._held.get(id)
        if found is None or found.owner != owner:
            raise RequestRefused(404, "no such file is held. Upload it anew.", code="file_not_found")
        return found

    def remove(self, owner: str, id: str) -> None:
        """Forget an image of this owner; Raises as `get`."""
        self._drop(self.get(owner, id).id)

    def of(self, owner: str) -> list[Upload]:
        """All that are held for an owner, the oldest first."""
        self._forget_old()
        return [one for one in self._held.values() if one.owner == owner]

    @property
    def size(self) -> int:
        """Bytes held."""
        return self._size

    def _drop(self, id: str) -> None:
        self._size -= len(self._held.pop(id).png)

    def _forget_old(self) -> None:
        end = self._now() - self._seconds
        while self._held and next(iter(self._held.values())).made < end:
            self._drop(next(iter(self._held)))
