"""Hundreds of hostile uploads: each refused with 400 and one sentence, or taken; no fault, no path told."""

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
from tests.support.dataset_samples import dicom, dicom_bytes
from tests.support.fake_engine import FakeEngine
from tests.support.test_server import call, data_url, form, picture, question, serving, upload

NAMES = (
    "../../etc/passwd",
    "a.png",
    "..\\..\\boot.ini",
    "/etc/shadow",
    "%00.dcm",
    "doe^jane.dcm",
    "x" * 400,
)
PLAIN = dicom_bytes(dicom(np.arange(64, dtype=np.uint16).reshape(8, 8), PatientName="Doe^Jane"))
WHOLE = {
    "png": picture((32, 24)),
    "jpeg": picture((32, 24), "JPEG"),
    "webp": picture((32, 24), "WEBP"),
    "dicom": PLAIN,
}


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    limits = Limits(per_minute=60_000, burst=60_000)
    with serving(FakeEngine(), Settings(base="nano", limits=limits)) as found:
        yield found


def sent(url: str, data: bytes, name: str = "a.png") -> int:
    found = upload(url, data, name)
    assert found.status in (200, 400), (found.status, found.body)
    told = found.body.decode()
    assert not any(word in told for word in ("passwd", "boot.ini", "shadow", "Doe", "doe^", "site-packages"))
    if found.status == 400:
        assert found.sentence.endswith(".") and "\n" not in found.sentence and "/" not in found.sentence
    return found.status


@settings(
    max_examples=125,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data(), kind=st.sampled_from(sorted(WHOLE)), name=st.sampled_from(NAMES))
def test_damaged_files_are_refused_or_read(url: str, data: st.DataObject, kind: str, name: str) -> None:
    whole = bytearray(WHOLE[kind])
    for place in data.draw(st.lists(st.integers(0, len(whole) - 1), max_size=12)):
        whole[place] = data.draw(st.integers(0, 255))
    end = data.draw(st.integers(0, len(whole)) | st.just(len(whole)))
    sent(url, bytes(whole[:end]), name)


def png(width: int, height: int, *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG that says it has a size, with any chunks."""
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
    """DICOM with a sequence in a sequence, and so on, before its pixels."""
    begin = b"\x00\x52\x29\x92SQ\0\0\xff\xff\xff\xff" + b"\xfe\xff\x00\xe0\xff\xff\xff\xff"
    end = b"\xfe\xff\x0d\xe0\0\0\0\0" + b"\xfe\xff\xdd\xe0\0\0\0\0"
    pixels = PLAIN.index(b"\xe0\x7f\x10\x00")
    return PLAIN[:pixels] + begin * depth + end * depth + PLAIN[pixels:]


def compressed(stream: bytes, syntax: UID) -> bytes:
    """DICOM that says it has 4 x 4 pixels, around any compressed stream."""
    file = dicom(np.zeros((4, 4), np.uint8))
    file.file_meta.TransferSyntaxUID = syntax
    file.PixelData = encapsulate([stream])
    file["PixelData"].is_undefined_length = True
    return dicom_bytes(file)


def swapped(data: bytes, mark: bytes, skip: int, new: bytes) -> bytes:
    """`data` with `new` some bytes after `mark`."""
    place = data.index(mark) + len(mark) + skip
    return data[:place] + new + data[place + len(new) :]


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
    "DICOM of four gigapixels": dicom_bytes(dicom(np.zeros((4, 4), np.uint8), Rows=65_535, Columns=65_535)),
    "DICOM of many frames": dicom_bytes(dicom(np.zeros((4, 4), np.uint8), NumberOfFrames=2**31 - 1)),
    "DICOM of frames below zero": dicom_bytes(dicom(np.zeros((4, 4), np.uint8), NumberOfFrames=-1)),
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


HARMLESS = ("DICOM nested deep", "DICOM around runs")  # they hold an image, and it is read


@pytest.mark.parametrize("what", sorted(HOSTILE))
def test_hostile_files_are_refused(url: str, what: str) -> None:
    for name in NAMES[:3]:
        status = sent(url, HOSTILE[what], name)
        assert status == 400 or what in HARMLESS


def test_whole_files_are_taken(url: str) -> None:
    assert [sent(url, data) for data in WHOLE.values()] == [200] * 4


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
    """The beginnings of a file: its mark, parts of its head, and most of it."""
    most = len(data) * 8 // 10
    sizes = (1, 4, 8, 12, 20, 33, 64, 131, 132, 133, 200, *(most * tenths // 10 for tenths in range(1, 11)))
    yield from (data[:size] for size in sizes if size <= most)


def claims() -> Iterator[bytes]:
    """Files that say they are huge, and hold next to nothing."""
    sides = (0, 5_001, 16_384, 40_000, 65_535)
    for width, height in ((w, h) for w in sides for h in sides[1:] if w * h == 0 or w * h > LIMITS.pixels):
        two = struct.pack(">2H", height, width)
        yield png(width, height, (b"IDAT", BOMB))
        yield swapped(JPEG, b"\xff\xc0", 3, two)
        yield dicom_bytes(dicom(np.zeros((4, 4), np.uint8), Rows=height, Columns=width))
        yield compressed(swapped(JPEG, b"\xff\xc0", 3, two), JPEGBaseline8Bit)


def mixtures() -> Iterator[bytes]:
    """One kind's mark before another's rest, one file within another, and files that go on and on."""
    for kind, whole in WHOLE.items():
        mark = whole[: 140 if kind == "dicom" else 12]
        yield from (mark + other[12:] for other in WHOLE.values() if other != whole)
        yield whole + b"\0" * LIMITS.body_bytes
        yield b"PK\x03\x04" + whole
        yield form(form(whole)[0])[0]
        yield b64encode(whole)
        yield whole[::-1]


def hostile() -> dict[tuple[str, bytes], bool]:
    """(name, file): whether it must be refused; the rest may be read, as an image under a bad name is."""
    found = {("a.png", data): what not in HARMLESS for what, data in HOSTILE.items()}
    found |= {("a.dcm", part): True for whole in WHOLE.values() for part in cut(whole)}
    found |= {("a.jpg", data): True for data in claims()}
    found |= {("a.webp", data): False for data in mixtures()}
    found |= {(name, data): data is not PLAIN for name in TRAVERSALS for data in (PLAIN, PLAIN[:300])}
    return found


def test_two_hundred_hostile_uploads_get_no_fault_and_tell_nothing(caplog: pytest.LogCaptureFixture) -> None:
    files = hostile()
    answers = []
    with (
        caplog.at_level(logging.DEBUG),
        serving(FakeEngine(), Settings(base="nano", limits=LIMITS)) as url,
    ):
        for (name, data), refused in files.items():
            found = upload(url, data, name)  # it gives up after 30 s
            assert found.status in ((400, 413) if refused else (200, 400, 413)), (name, data[:40], found.body)
            answers.append(found)
        for what, data in HOSTILE.items():
            found = call(url, "POST", "/v1/chat/completions", question(image=data_url(data)))
            assert found.status == 400 or (what in HARMLESS and found.status == 200), what
            answers.append(found)
        assert upload(url, picture()).status == 200, "it goes on"
        told = call(url, "GET", "/metrics").body.decode()
    assert len({data for _, data in files}) >= 200, "of different content"
    assert len(answers) >= 300 and sum(one.status != 200 for one in answers) >= 250
    lines = [one.getMessage() for one in caplog.records if one.name == "normtune.serve"]
    assert len(lines) == len(answers) + 2
    known = r"(POST|GET) (/v1/files|/v1/chat/completions|/metrics|-) \d{3} [\d.]+s -"
    assert all(re.fullmatch(known, line) for line in lines), "routes and times alone"
    for text in (*(f"{one.headers} {one.body.decode()}" for one in answers), caplog.text, told):
        assert [word for word in SECRET if word in text.lower()] == []
