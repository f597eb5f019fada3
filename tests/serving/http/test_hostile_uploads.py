"""Hundreds of hostile uploads: each is accepted, or refused with one sentence that reveals nothing."""

from __future__ import annotations

import io
import logging
import re
import struct
import zlib
from base64 import b64encode
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from pydicom.encaps import encapsulate
from pydicom.uid import UID, JPEG2000Lossless, JPEGBaseline8Bit, RLELossless

from normtune.serving.http.limits import Limits
from normtune.serving.http.state import Settings
from tests.support.dataset_samples import dicom_bytes, make_dicom
from tests.support.fake_engine import FakeEngine
from tests.support.test_server import call, chat_body, data_url, image_bytes, serving, upload, upload_form

NAMES = ("../../etc/passwd", "a.png", "..\\..\\boot.ini", "/etc/shadow", "%00.dcm", "doe^jane.dcm", "x" * 400)
PLAIN = dicom_bytes(make_dicom(np.arange(64, dtype=np.uint16).reshape(8, 8), PatientName="Doe^Jane"))
WHOLE = {
    "png": image_bytes((32, 24)),
    "jpeg": image_bytes((32, 24), "JPEG"),
    "webp": image_bytes((32, 24), "WEBP"),
    "dicom": PLAIN,
}


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    limits = Limits(per_minute=60_000, burst=60_000)
    with serving(FakeEngine(), Settings(base="nano", limits=limits)) as server_url:
        yield server_url


def upload_status(url: str, data: bytes, name: str = "a.png") -> int:
    response = upload(url, data, name)
    assert response.status in (200, 400), (response.status, response.body)
    text = response.body.decode()
    assert not any(word in text for word in ("passwd", "boot.ini", "shadow", "Doe", "doe^", "site-packages"))
    if response.status == 400:
        assert (
            response.error_message.endswith(".")
            and "\n" not in response.error_message
            and "/" not in response.error_message
        )
    return response.status


@settings(max_examples=125, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), kind=st.sampled_from(sorted(WHOLE)), name=st.sampled_from(NAMES))
def test_damaged_files_are_refused_or_read(url: str, data: st.DataObject, kind: str, name: str) -> None:
    damaged = bytearray(WHOLE[kind])
    for index in data.draw(st.lists(st.integers(0, len(damaged) - 1), max_size=12)):
        damaged[index] = data.draw(st.integers(0, 255))
    end = data.draw(st.integers(0, len(damaged)) | st.just(len(damaged)))
    upload_status(url, bytes(damaged[:end]), name)


def png(width: int, height: int, *chunks: tuple[bytes, bytes]) -> bytes:
    """Return a PNG with this size in its header, and any chunks."""
    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    body = b"".join(
        struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
        for kind, content in ((b"IHDR", head), *chunks, (b"IEND", b""))
    )
    return b"\x89PNG\r\n\x1a\n" + body


def saved(kind: str, **options: object) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (16, 16)).save(out, kind, **options)  # type: ignore[arg-type]
    return out.getvalue()


def nested(depth: int) -> bytes:
    """Return DICOM with sequences nested to a depth, before its pixels."""
    begin = b"\x00\x52\x29\x92SQ\0\0\xff\xff\xff\xff" + b"\xfe\xff\x00\xe0\xff\xff\xff\xff"
    end = b"\xfe\xff\x0d\xe0\0\0\0\0" + b"\xfe\xff\xdd\xe0\0\0\0\0"
    pixels = PLAIN.index(b"\xe0\x7f\x10\x00")
    return PLAIN[:pixels] + begin * depth + end * depth + PLAIN[pixels:]


def compressed(stream: bytes, syntax: UID) -> bytes:
    """Return DICOM with 4 x 4 pixels by its tags, around any compressed stream."""
    file = make_dicom(np.zeros((4, 4), np.uint8))
    file.file_meta.TransferSyntaxUID = syntax
    file.PixelData = encapsulate([stream])
    file["PixelData"].is_undefined_length = True
    return dicom_bytes(file)


def swapped(data: bytes, marker: bytes, skip: int, new: bytes) -> bytes:
    """Return `data` with `new` in place of the bytes `skip` after `marker`."""
    index = data.index(marker) + len(marker) + skip
    return data[:index] + new + data[index + len(new) :]


BOMB = zlib.compress(b"\0" * 50_000_000, 9)
JP2 = saved("JPEG2000", no_jp2=True)
JPEG = saved("JPEG")
HUGE = struct.pack(">2H", 60_000, 60_000)
HOSTILE = {
    "empty": b"",
    "text": b"<svg onload=alert(1)>",
    "gif": saved("GIF"),
    "tiff": saved("TIFF"),
    "bmp": saved("BMP"),
    "eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nquit\n",
    "zip": b"PK\x03\x04" + b"\0" * 100,
    "pickle": b"\x80\x04cposix\nsystem\n.",
    "a PNG of four gigapixels": png(65_535, 65_535, (b"IDAT", BOMB)),
    "a PNG of more pixels than an int": png(2**31 - 1, 2**31 - 1, (b"IDAT", BOMB)),
    "a PNG without pixels": png(0, 0, (b"IDAT", zlib.compress(b""))),
    "a PNG with a text that unpacks": png(9, 9, *[(b"zTXt", b"a\0\0" + BOMB)] * 3, (b"IDAT", b"")),
    "a PNG with a profile that unpacks": png(9, 9, (b"iCCP", b"a\0\0" + BOMB), (b"IDAT", b"")),
    "a JPEG of 3.6 gigapixels": swapped(JPEG, b"\xff\xc0", 3, HUGE),
    "a JPEG of many scans": JPEG[:-2] + b"\xff\xda\0\x08\1\1\0\0\x3f\0" * 5_000 + b"\xff\xd9",
    "DICOM of four gigapixels": dicom_bytes(
        make_dicom(np.zeros((4, 4), np.uint8), Rows=65_535, Columns=65_535)
    ),
    "DICOM of many frames": dicom_bytes(make_dicom(np.zeros((4, 4), np.uint8), NumberOfFrames=2**31 - 1)),
    "DICOM of frames below zero": dicom_bytes(make_dicom(np.zeros((4, 4), np.uint8), NumberOfFrames=-1)),
    "DICOM nested deep": nested(10_000),
    "DICOM nested deeper": nested(30_000),
    "DICOM that is deflated": PLAIN[:340] + b"1.2.840.10008.1.2.1.99" + BOMB,
    "DICOM around a JPEG of 3.6 gigapixels": compressed(
        swapped(JPEG, b"\xff\xc0", 3, HUGE), JPEGBaseline8Bit
    ),
    "DICOM around a JPEG 2000 of four gigapixels": compressed(
        swapped(JP2, b"\xff\x4f\xff\x51", 4, struct.pack(">2I", 65_535, 65_535)), JPEG2000Lossless
    ),
    "DICOM around runs": compressed(struct.pack("<16I", 1, 64, *[0] * 14) + b"\x81\0" * 100_000, RLELossless),
    "DICOM with no pixels": PLAIN[:400],
    "DICOM mark alone": b"\0" * 128 + b"DICM",
    "DICOM of an endless length": PLAIN[:132] + b"\xff" * 4_000,
}  # fmt: skip


HARMLESS = ("DICOM nested deep", "DICOM around runs")  # these contain an image that can be read


@pytest.mark.parametrize("what", sorted(HOSTILE))
def test_hostile_files_are_refused(url: str, what: str) -> None:
    for name in NAMES[:3]:
        status = upload_status(url, HOSTILE[what], name)
        assert status == 400 or what in HARMLESS


def test_valid_files_are_accepted(url: str) -> None:
    assert [upload_status(url, data) for data in WHOLE.values()] == [200] * 4


@pytest.mark.parametrize("kind", ["multipart/form-data", "multipart/form-data; boundary=x", "text/plain"])
def test_broken_forms_are_refused(url: str, kind: str) -> None:
    for body in (b"", b"--x\r\n", b"--x\r\n\r\n" * 2_000, b"\xff" * 1_000):
        assert call(url, "POST", "/v1/files", body, {"Content-Type": kind}).status == 400


TRAVERSALS = (
    *("../" * depth + "etc/passwd" for depth in (1, 3, 9)),
    *("..\\" * depth + "boot.ini" for depth in (1, 4)),
    *("/etc/shadow", "C:\\Windows\\win.ini", "\\\\host\\share\\doe", "file:///etc/passwd", "~/doe.dcm"),
    *("..%2f..%2fetc%2fpasswd", "%2e%2e/%2e%2e/doe", "..%c0%af..%c0%afetc/passwd", "....//....//etc/passwd"),
    *("doe.png\0.html", "%00", "CON", "NUL.dcm", ".htaccess", "..", ".", "/", " ", "$HOME/doe"),
    *("doe;rm -rf ~", "$(id) doe", "`id` doe", "'; drop table doe; --", "{{doe}}", "%s%s%n doe"),
    *("<script>doe</script>.png", "doe\u202egnp.exe", "Doe^Jane^^^.dcm", "doe" * 300, "\U0001f600 doe.png"),
)
SECRET = ("passwd", "shadow", "boot.ini", "win.ini", "doe", "jane", "htaccess", "site-packages", "/home")
LIMITS = Limits(body_bytes=2 << 20, per_minute=60_000, burst=60_000)


def cut(data: bytes) -> Iterator[bytes]:
    """Yield truncated files: the magic bytes, parts of the header, and up to 80% of the file."""
    limit = len(data) * 8 // 10
    sizes = (1, 4, 8, 12, 20, 33, 64, 131, 132, 133, 200, *(limit * tenths // 10 for tenths in range(1, 11)))
    yield from (data[:size] for size in sizes if size <= limit)


def claims() -> Iterator[bytes]:
    """Yield small files with a huge size in their headers."""
    sides = (0, 5_001, 16_384, 40_000, 65_535)
    for width, height in ((w, h) for w in sides for h in sides[1:] if w * h == 0 or w * h > LIMITS.pixels):
        size_bytes = struct.pack(">2H", height, width)
        yield png(width, height, (b"IDAT", BOMB))
        yield swapped(JPEG, b"\xff\xc0", 3, size_bytes)
        yield dicom_bytes(make_dicom(np.zeros((4, 4), np.uint8), Rows=height, Columns=width))
        yield compressed(swapped(JPEG, b"\xff\xc0", 3, size_bytes), JPEGBaseline8Bit)


def mixtures() -> Iterator[bytes]:
    """Yield files with another format's magic bytes, files within files, and very long files."""
    for kind, whole in WHOLE.items():
        magic = whole[: 140 if kind == "dicom" else 12]
        yield from (magic + other[12:] for other in WHOLE.values() if other != whole)
        yield whole + b"\0" * LIMITS.body_bytes
        yield b"PK\x03\x04" + whole
        yield upload_form(upload_form(whole)[0])[0]
        yield b64encode(whole)
        yield whole[::-1]


def hostile() -> dict[tuple[str, bytes], bool]:
    """Return for each (name, file) whether it must be refused; the others may be accepted or refused."""
    files = {("a.png", data): what not in HARMLESS for what, data in HOSTILE.items()}
    files |= {("a.dcm", part): True for whole in WHOLE.values() for part in cut(whole)}
    files |= {("a.jpg", data): True for data in claims()}
    files |= {("a.webp", data): False for data in mixtures()}
    files |= {(name, data): data is not PLAIN for name in TRAVERSALS for data in (PLAIN, PLAIN[:300])}
    return files


def test_hostile_uploads_cause_no_error_and_reveal_nothing(caplog: pytest.LogCaptureFixture) -> None:
    files = hostile()
    answers = []
    with caplog.at_level(logging.DEBUG), serving(FakeEngine(), Settings(base="nano", limits=LIMITS)) as url:
        for (name, data), refused in files.items():
            response = upload(url, data, name)  # times out after 30 s
            assert response.status in ((400, 413) if refused else (200, 400, 413)), (name, data[:40], response.body)
            answers.append(response)
        for what, data in HOSTILE.items():
            response = call(url, "POST", "/v1/chat/completions", chat_body(image=data_url(data)))
            assert response.status == 400 or (what in HARMLESS and response.status == 200), what
            answers.append(response)
        assert upload(url, image_bytes()).status == 200, "the server still works"
        metrics = call(url, "GET", "/metrics").body.decode()
    assert len({data for _, data in files}) >= 200, "different contents"
    assert len(answers) >= 300 and sum(item.status != 200 for item in answers) >= 250
    lines = [item.getMessage() for item in caplog.records if item.name == "normtune.serve"]
    assert len(lines) == len(answers) + 2
    log_line = r"(POST|GET) (/v1/files|/v1/chat/completions|/metrics|-) \d{3} [\d.]+s -"
    assert all(re.fullmatch(log_line, line) for line in lines), "the log has routes and times only"
    for text in (*(f"{item.headers} {item.body.decode()}" for item in answers), caplog.text, metrics):
        assert [word for word in SECRET if word in text.lower()] == []
