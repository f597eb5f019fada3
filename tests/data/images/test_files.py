from __future__ import annotations

import io
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from normtune.data.images.files import ImageFolder, open_image
from normtune.errors import InputError


def encoded(picture: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def grey(picture: Image.Image) -> list[list[int]]:
    """Grey values of an RGB picture, after checking that its three channels are equal."""
    pixels = np.asarray(picture)
    assert picture.mode == "RGB"
    assert (pixels == pixels[..., :1]).all()
    return pixels[..., 0].tolist()


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size but has almost no data."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")


def test_grey_pictures_of_1_and_8_bits_keep_their_values() -> None:
    eight = np.array([[0, 17, 200], [255, 1, 99]], np.uint8)
    assert grey(open_image(encoded(Image.fromarray(eight)))) == eight.tolist()
    assert grey(open_image(encoded(Image.fromarray(eight).convert("1", dither=0)))) == [[0, 0, 255], [255, 0, 0]]


def test_16_bit_images_are_scaled_by_the_smallest_sufficient_depth_and_not_clipped() -> None:
    twelve = np.array([[0, 2048, 4095]], np.uint16)
    full = np.array([[0, 32768, 65535]], np.uint16)
    assert grey(open_image(encoded(Image.fromarray(twelve)))) == [[0, 128, 255]]
    assert grey(open_image(encoded(Image.fromarray(full)))) == [[0, 128, 255]]


def test_a_window_selects_the_grey_range_of_a_16_bit_image() -> None:
    values = np.array([[900, 1000, 1100, 3000]], np.uint16)
    # Linear window (PS3.3 C.11.2.1.2): black up to 1000 - 0.5 - 200/2, white above 1000 - 0.5 + 200/2.
    expected = [round(255 * min(1, max(0, (v - 999.5) / 200 + 0.5))) for v in (900, 1000, 1100, 3000)]
    opened = open_image(encoded(Image.fromarray(values)), window=(1000, 201))
    assert grey(opened) == [expected]


def test_palettes_are_converted_and_their_transparent_entry_is_white() -> None:
    picture = Image.new("P", (2, 1))
    picture.putpalette([255, 0, 0, 0, 255, 0])
    picture.putpixel((1, 0), 1)
    assert np.asarray(open_image(encoded(picture))).tolist() == [[[255, 0, 0], [0, 255, 0]]]
    assert np.asarray(open_image(encoded(picture, transparency=1))).tolist() == [[[255, 0, 0], [255, 255, 255]]]


def test_transparent_pixels_become_white() -> None:
    picture = Image.new("RGBA", (2, 1), (200, 100, 50, 255))
    picture.putpixel((1, 0), (255, 255, 255, 0))
    assert np.asarray(open_image(encoded(picture))).tolist() == [[[200, 100, 50], [255, 255, 255]]]


@pytest.mark.parametrize("mode", ["L", "RGB", "CMYK"])
def test_jpeg_of_every_colour_mode_opens_as_rgb(mode: str) -> None:
    picture = Image.new("L", (16, 16), 90).convert("RGB").convert(mode)
    opened = np.asarray(open_image(encoded(picture, "JPEG", quality=95))).astype(int)
    assert opened.shape == (16, 16, 3)
    assert abs(opened - 90).max() <= 3


def test_a_photograph_is_rotated_by_its_exif_orientation() -> None:
    picture = Image.new("L", (8, 4))
    exif = Image.Exif()
    exif[0x0112] = 6
    assert open_image(encoded(picture, "JPEG", exif=exif)).size == (4, 8)


def test_a_frame_can_be_selected_and_a_missing_frame_is_an_error() -> None:
    frames = [Image.new("L", (4, 4), shade) for shade in (10, 20)]
    data = encoded(frames[0], "TIFF", save_all=True, append_images=frames[1:])
    assert grey(open_image(data, frame=1))[0][0] == 20
    with pytest.raises(InputError, match=r"scan\.tif: there is no frame 2\. The file has 2"):
        open_image(data, name="scan.tif", frame=2)


def test_errors_name_truncated_images() -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64), np.uint8))
    for kind in ("PNG", "JPEG"):
        data = encoded(noise, kind)
        with pytest.raises(InputError, match=r"cut\.png: the image is damaged or cut short"):
            open_image(data[: len(data) // 2], name="cut.png")


@pytest.mark.parametrize("data", [b"", b"hello", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"])
def test_errors_name_files_that_are_not_images(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(data)
    with pytest.raises(InputError, match=r"^a\.png: not an image that can be read"):
        open_image(tmp_path / "a.png")


def test_errors_name_missing_files_and_folders(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"deep/no\.png: no such image file"):
        ImageFolder(tmp_path)("deep/no.png")
    with pytest.raises(InputError, match="cannot read the image file"):
        open_image(tmp_path)
    with pytest.raises(InputError, match="not a path"):
        open_image("a\0b.png")


@pytest.mark.parametrize("side", [10_000, 60_000])
def test_images_with_too_many_pixels_are_refused_without_a_warning(side: int) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with pytest.raises(InputError, match=r"huge\.png: .*than the limit of 89,478,485"):
            open_image(png_header(side, side), name="huge.png")
    assert not caught


@settings(max_examples=150)
@given(st.data())
def test_damaged_pictures_open_or_are_refused_but_never_crash(data: st.DataObject) -> None:
    kind = data.draw(st.sampled_from(["PNG", "JPEG", "TIFF", "GIF", "BMP", "WEBP", "PPM"]))
    whole = bytearray(encoded(Image.linear_gradient("L").resize((24, 24)).convert("RGB"), kind))
    for _ in range(data.draw(st.integers(1, 8))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(whole)))
    for picture in (bytes(whole), bytes(whole[:cut])):
        try:
            assert open_image(picture, name="x.png").mode == "RGB"
        except InputError as error:
            assert str(error).startswith("x.png: ")
            assert "\n" not in str(error)


@pytest.mark.parametrize("values", [np.array([[0, 1000, 4095]], np.uint16), np.array([[0, 0.5, 1]], np.float32)])
def test_a_tiff_in_which_0_is_white_is_inverted(values: np.ndarray) -> None:
    picture = Image.fromarray(values)
    black, white = (grey(open_image(encoded(picture, "TIFF", tiffinfo={262: zero}))) for zero in (1, 0))
    assert black[0][0] == 0 and white[0][0] == 255
    assert np.add(black, white).max() - np.add(black, white).min() <= 1  # half values round up in both


def deep_png(values: np.ndarray) -> bytes:
    """A PNG with 16-bit RGB values [rows, columns, 3], which Pillow cannot write."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    header = struct.pack(">IIBBBBB", values.shape[1], values.shape[0], 16, 2, 0, 0, 0)
    pieces = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + pieces


def test_deep_colours_that_would_be_almost_black_are_refused() -> None:
    full = np.full((2, 2, 3), 65535, np.uint16)
    assert np.asarray(open_image(deep_png(full))).min() == 255
    with pytest.raises(InputError, match="of which only the lower 12 are used"):
        open_image(deep_png(full // 16), name="scan.png")
