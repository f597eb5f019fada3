from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate
from pydicom.filewriter import dcmwrite
from pydicom.sequence import Sequence
from pydicom.uid import (
    UID,
    ExplicitVRBigEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLosslessSV1,
    RLELossless,
)

from normtune.data.images.files import open_image
from normtune.errors import InputError
from tests.support.dataset_samples import dicom, dicom_bytes

RAMP = np.array([[0, 100], [200, 255]], np.uint8)
CT = np.array([[0, 1024], [1064, 2048]], np.uint16)  # stored values; Hounsfield units are these - 1024


def shown(file: Dataset | bytes, **options: object) -> list[list[int]]:
    data = file if isinstance(file, bytes) else dicom_bytes(file)
    picture = open_image(data, name="scan.dcm", **options)
    assert picture.mode == "RGB"
    return np.asarray(picture)[..., 0].tolist()


def item(**elements: object) -> Sequence:
    one = Dataset()
    for keyword, value in elements.items():
        setattr(one, keyword, value)
    return Sequence([one])


def test_grey_values_run_from_the_least_to_the_greatest_where_there_is_no_window() -> None:
    assert shown(dicom(np.array([[10, 20], [30, 50]], np.uint8))) == [[0, 64], [128, 255]]


def test_monochrome1_is_shown_inverted() -> None:
    assert shown(dicom(RAMP, PhotometricInterpretation="MONOCHROME1")) == [[255, 155], [55, 0]]


def test_the_window_is_taken_after_the_rescale() -> None:
    file = dicom(CT, RescaleSlope=1, RescaleIntercept=-1024, WindowCenter=40.5, WindowWidth=81)
    assert shown(file) == [[0, 0], [128, 255]]


def test_a_window_of_the_callers_goes_before_the_files_and_the_first_of_several_counts() -> None:
    file = dicom(CT, RescaleSlope=1, RescaleIntercept=-1024, WindowCenter=[40.5, 500], WindowWidth=[81, 10])
    assert shown(file)[1][0] == 128
    assert shown(file, window=(0.5, 2049))[1][0] == round(255 * (40 / 2048 + 0.5))


@pytest.mark.parametrize(
    ("function", "expected"), [("SIGMOID", 1 / (1 + np.exp(-4 * 20 / 80))), ("LINEAR_EXACT", 20 / 80 + 0.5)]
)
def test_the_voi_function_of_the_file_is_followed(function: str, expected: float) -> None:
    window = {"WindowCenter": 20, "WindowWidth": 80, "VOILUTFunction": function}
    assert shown(dicom(CT, RescaleSlope=1, RescaleIntercept=-1024, **window))[1][0] == round(255 * expected)


def test_a_voi_table_maps_values_and_its_ends_hold_beyond_it() -> None:
    table = item(LUTDescriptor=[3, 100, 8], LUTData=[10, 20, 30])
    file = dicom(np.array([[0, 100], [101, 250]], np.uint8), VOILUTSequence=table)
    file["VOILUTSequence"][0]["LUTDescriptor"].VR = file["VOILUTSequence"][0]["LUTData"].VR = "US"
    assert shown(file) == [[10, 10], [20, 30]]


def test_a_modality_table_comes_before_the_window() -> None:
    table = item(LUTDescriptor=[2, 0, 16], LUTData=[1000, 2000], ModalityLUTType="US")
    file = dicom(np.array([[0, 1]], np.uint8), ModalityLUTSequence=table, WindowCenter=1500, WindowWidth=1)
    file["ModalityLUTSequence"][0]["LUTDescriptor"].VR = file["ModalityLUTSequence"][0]["LUTData"].VR = "US"
    assert shown(file) == [[0, 255]]


def test_signed_values_and_padding_are_told_apart_from_tissue() -> None:
    values = np.array([[-2000, -100], [0, 100]], np.int16)
    padded = dicom(values)
    padded.add_new(0x00280120, "SS", -2000)
    assert shown(padded) == [[0, 0], [128, 255]]
    assert shown(dicom(values))[0] == [0, round(255 * 1900 / 2100)]


def test_the_middle_frame_is_shown_unless_one_is_chosen() -> None:
    frames = np.stack([np.array([[0, shade]], np.uint8) for shade in (50, 100, 200)])
    file = dicom(frames, WindowCenter=128, WindowWidth=256)
    assert [shown(file, frame=index)[0][1] for index in (0, 1, 2)] == [50, 100, 200]
    assert shown(file)[0][1] == 100
    with pytest.raises(InputError, match=r"scan\.dcm: there is no frame 3\. The file has 3"):
        shown(file, frame=3)


def test_an_enhanced_file_gives_each_frame_its_own_window() -> None:
    groups = [item(FrameVOILUTSequence=item(WindowCenter=c, WindowWidth=1))[0] for c in (50, 150)]
    shared = item(PixelValueTransformationSequence=item(RescaleSlope=2, RescaleIntercept=0))
    file = dicom(
        np.stack([np.array([[10, 60]], np.uint8)] * 2),
        PerFrameFunctionalGroupsSequence=Sequence(groups),
        SharedFunctionalGroupsSequence=shared,
    )
    assert shown(file, frame=0) == [[0, 255]]  # 20 and 120 about 50
    assert shown(file, frame=1) == [[0, 0]]  # 20 and 120 about 150


def test_colour_is_kept() -> None:
    rgb = np.array([[[255, 0, 10], [3, 4, 5]]], np.uint8)
    file = dicom(rgb[..., 0], SamplesPerPixel=3, PhotometricInterpretation="RGB", PlanarConfiguration=0)
    file.PixelData = rgb.tobytes()
    assert np.asarray(open_image(dicom_bytes(file))).tolist() == rgb.tolist()


@pytest.mark.parametrize("syntax", [JPEG2000Lossless, RLELossless])
def test_compressed_files_show_the_same_as_plain_ones(syntax: UID) -> None:
    noise = np.random.default_rng(0).integers(0, 4096, (32, 32), np.uint16)
    assert shown(dicom_bytes(dicom(noise), syntax)) == shown(dicom(noise))


def test_a_compression_without_a_decoder_is_named_with_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Undecodable:
        is_available = False

    monkeypatch.setattr("normtune.data.images.dicom.get_decoder", lambda syntax: Undecodable())
    file = dicom(RAMP)
    file.file_meta.TransferSyntaxUID = JPEGLosslessSV1
    file.PixelData = encapsulate([RAMP.tobytes()])
    file["PixelData"].is_undefined_length = True
    with pytest.raises(InputError, match=r"no decoder is installed .*JPEG Lossless.*normtune\[dicom\]"):
        shown(file)


@pytest.mark.parametrize("syntax", [ImplicitVRLittleEndian, ExplicitVRBigEndian])
def test_files_of_old_without_a_preamble_are_read(syntax: UID, tmp_path: Path) -> None:
    values = np.array([[10, 20], [30, 50]], np.uint16)
    big = syntax == ExplicitVRBigEndian
    file = dicom(values)
    file.PixelData = values.astype(">u2" if big else "<u2").tobytes()
    del file.file_meta
    buffer = io.BytesIO()
    dcmwrite(buffer, file, implicit_vr=not big, little_endian=not big, enforce_file_format=False)
    data = buffer.getvalue()
    assert data[128:132] != b"DICM"
    (tmp_path / "IM0001").write_bytes(data)
    assert np.asarray(open_image(tmp_path / "IM0001"))[..., 0].tolist() == [[0, 64], [128, 255]]
    assert shown(data) == [[0, 64], [128, 255]]


def test_a_file_without_pixels_is_refused() -> None:
    file = dicom(RAMP)
    del file.PixelData
    with pytest.raises(InputError, match=r"scan\.dcm: a DICOM file without pixel data"):
        shown(file)


def test_too_many_pixels_are_refused_before_they_are_decoded() -> None:
    with pytest.raises(InputError, match="more than the"):
        shown(dicom(RAMP, Rows=60_000, Columns=60_000))


def test_errors_never_quote_what_stands_in_the_file() -> None:
    whole = dicom_bytes(dicom(RAMP))
    named = dicom(RAMP, PhotometricInterpretation="DOE JANE 4711")
    broken = [dicom(RAMP, Rows=9), named, dicom(RAMP, BitsAllocated=7)]
    for data in (whole[:-3], whole[:400], *(dicom_bytes(file) for file in broken)):
        with pytest.raises(InputError) as caught:
            shown(data)
        assert str(caught.value).startswith("scan.dcm: ")
        assert caught.value.__cause__ is None
        assert not any(secret in str(caught.value) for secret in ("Doe", "DOE", "JANE", "Jane", "4711"))


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_damaged_files_open_or_are_refused_but_never_crash(data: st.DataObject) -> None:
    whole = bytearray(
        dicom_bytes(dicom(CT, WindowCenter=40, WindowWidth=80, RescaleSlope=1, RescaleIntercept=0))
    )
    for _ in range(data.draw(st.integers(1, 6))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(whole)))
    for file in (bytes(whole), bytes(whole[:cut])):
        try:
            assert open_image(file, name="x.dcm").mode == "RGB"
        except InputError as error:
            assert str(error).startswith("x.dcm: ")
            assert not any(secret in str(error) for secret in ("Doe", "Jane", "4711"))
