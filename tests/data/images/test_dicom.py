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
from pydicom.uid import UID, ExplicitVRBigEndian, ImplicitVRLittleEndian, JPEG2000Lossless, JPEGLosslessSV1, RLELossless

from normtune.data.images.dicom import read_dicom
from normtune.data.images.files import open_image
from normtune.errors import InputError
from tests.support.dataset_samples import dicom_bytes, make_dicom

RAMP = np.array([[0, 100], [200, 255]], np.uint8)
CT = np.array([[0, 1024], [1064, 2048]], np.uint16)  # stored values; Hounsfield units are these - 1024


def grey_values(file: Dataset | bytes, **options: object) -> list[list[int]]:
    data = file if isinstance(file, bytes) else dicom_bytes(file)
    picture = open_image(data, name="scan.dcm", **options)
    assert picture.mode == "RGB"
    return np.asarray(picture)[..., 0].tolist()


def item(**elements: object) -> Sequence:
    dataset = Dataset()
    for keyword, value in elements.items():
        setattr(dataset, keyword, value)
    return Sequence([dataset])


def test_without_a_window_grey_values_use_the_full_range() -> None:
    assert grey_values(make_dicom(np.array([[10, 20], [30, 50]], np.uint8))) == [[0, 64], [128, 255]]


def test_monochrome1_is_shown_inverted() -> None:
    assert grey_values(make_dicom(RAMP, PhotometricInterpretation="MONOCHROME1")) == [[255, 155], [55, 0]]


def test_the_window_is_applied_after_the_rescale() -> None:
    file = make_dicom(CT, RescaleSlope=1, RescaleIntercept=-1024, WindowCenter=40.5, WindowWidth=81)
    assert grey_values(file) == [[0, 0], [128, 255]]


def test_the_window_argument_overrides_the_file_and_the_first_of_several_windows_counts() -> None:
    file = make_dicom(CT, RescaleSlope=1, RescaleIntercept=-1024, WindowCenter=[40.5, 500], WindowWidth=[81, 10])
    assert grey_values(file)[1][0] == 128
    assert grey_values(file, window=(0.5, 2049))[1][0] == round(255 * (40 / 2048 + 0.5))


def test_kept_grey_values_are_rendered_as_the_file_is() -> None:
    rescaled = {"RescaleSlope": 0.5, "RescaleIntercept": -1024}
    table = item(LUTDescriptor=[2100, 0, 16], LUTData=np.arange(100, 2200, dtype="<u2").tobytes())
    for elements in (rescaled, {"PhotometricInterpretation": "MONOCHROME1"}, {"ModalityLUTSequence": table}):
        file = dicom_bytes(make_dicom(CT, **elements))
        image, grey = read_dicom(file, name="scan.dcm")
        assert grey is not None
        window = (grey.range[0] + 900, 700.5)
        assert grey.render(window).tobytes() == open_image(file, window=window).tobytes()
        assert grey.render(grey.window).tobytes() == image.tobytes() == open_image(file).tobytes()
    windowed = read_dicom(dicom_bytes(make_dicom(CT, WindowCenter=[40.5, 9], WindowWidth=[81, 9])), name="a")[1]
    assert windowed is not None and (windowed.window, windowed.range) == ((40.5, 81), (0, 2048))


@pytest.mark.parametrize(
    ("function", "expected"), [("SIGMOID", 1 / (1 + np.exp(-4 * 20 / 80))), ("LINEAR_EXACT", 20 / 80 + 0.5)]
)
def test_the_voi_function_of_the_file_is_applied(function: str, expected: float) -> None:
    window = {"WindowCenter": 20, "WindowWidth": 80, "VOILUTFunction": function}
    assert grey_values(make_dicom(CT, RescaleSlope=1, RescaleIntercept=-1024, **window))[1][0] == round(255 * expected)


def test_a_voi_table_maps_values_and_clamps_those_outside() -> None:
    table = item(LUTDescriptor=[3, 100, 8], LUTData=[10, 20, 30])
    file = make_dicom(np.array([[0, 100], [101, 250]], np.uint8), VOILUTSequence=table)
    file["VOILUTSequence"][0]["LUTDescriptor"].VR = file["VOILUTSequence"][0]["LUTData"].VR = "US"
    assert grey_values(file) == [[10, 10], [20, 30]]


def test_a_modality_table_comes_before_the_window() -> None:
    table = item(LUTDescriptor=[2, 0, 16], LUTData=[1000, 2000], ModalityLUTType="US")
    file = make_dicom(np.array([[0, 1]], np.uint8), ModalityLUTSequence=table, WindowCenter=1500, WindowWidth=1)
    file["ModalityLUTSequence"][0]["LUTDescriptor"].VR = file["ModalityLUTSequence"][0]["LUTData"].VR = "US"
    assert grey_values(file) == [[0, 255]]


def test_signed_values_are_read_and_padding_is_ignored() -> None:
    values = np.array([[-2000, -100], [0, 100]], np.int16)
    padded = make_dicom(values)
    padded.add_new(0x00280120, "SS", -2000)
    assert grey_values(padded) == [[0, 0], [128, 255]]
    assert grey_values(make_dicom(values))[0] == [0, round(255 * 1900 / 2100)]


def test_the_default_frame_is_the_middle_one() -> None:
    frames = np.stack([np.array([[0, shade]], np.uint8) for shade in (50, 100, 200)])
    file = make_dicom(frames, WindowCenter=128, WindowWidth=256)
    assert [grey_values(file, frame=index)[0][1] for index in (0, 1, 2)] == [50, 100, 200]
    assert grey_values(file)[0][1] == 100
    with pytest.raises(InputError, match=r"scan\.dcm: there is no frame 3\. The file has 3"):
        grey_values(file, frame=3)


def test_an_enhanced_file_gives_each_frame_its_own_window() -> None:
    groups = [item(FrameVOILUTSequence=item(WindowCenter=c, WindowWidth=1))[0] for c in (50, 150)]
    shared = item(PixelValueTransformationSequence=item(RescaleSlope=2, RescaleIntercept=0))
    file = make_dicom(
        np.stack([np.array([[10, 60]], np.uint8)] * 2),
        PerFrameFunctionalGroupsSequence=Sequence(groups),
        SharedFunctionalGroupsSequence=shared,
    )
    assert grey_values(file, frame=0) == [[0, 255]]  # 20 and 120 about 50
    assert grey_values(file, frame=1) == [[0, 0]]  # 20 and 120 about 150


def test_colour_is_kept() -> None:
    rgb = np.array([[[255, 0, 10], [3, 4, 5]]], np.uint8)
    file = make_dicom(rgb[..., 0], SamplesPerPixel=3, PhotometricInterpretation="RGB", PlanarConfiguration=0)
    file.PixelData = rgb.tobytes()
    assert np.asarray(open_image(dicom_bytes(file))).tolist() == rgb.tolist()


@pytest.mark.parametrize("syntax", [JPEG2000Lossless, RLELossless])
def test_compressed_files_show_the_same_as_plain_ones(syntax: UID) -> None:
    noise = np.random.default_rng(0).integers(0, 4096, (32, 32), np.uint16)
    assert grey_values(dicom_bytes(make_dicom(noise), syntax)) == grey_values(make_dicom(noise))


def test_an_unsupported_compression_is_named_with_the_package_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    class Undecodable:
        is_available = False

    monkeypatch.setattr("normtune.data.images.dicom.get_decoder", lambda syntax: Undecodable())
    file = make_dicom(RAMP)
    file.file_meta.TransferSyntaxUID = JPEGLosslessSV1
    file.PixelData = encapsulate([RAMP.tobytes()])
    file["PixelData"].is_undefined_length = True
    with pytest.raises(InputError, match=r"no decoder is installed .*JPEG Lossless.*normtune\[dicom\]"):
        grey_values(file)


@pytest.mark.parametrize("syntax", [ImplicitVRLittleEndian, ExplicitVRBigEndian])
def test_old_files_without_a_preamble_are_read(syntax: UID, tmp_path: Path) -> None:
    values = np.array([[10, 20], [30, 50]], np.uint16)
    big = syntax == ExplicitVRBigEndian
    file = make_dicom(values)
    file.PixelData = values.astype(">u2" if big else "<u2").tobytes()
    del file.file_meta
    buffer = io.BytesIO()
    dcmwrite(buffer, file, implicit_vr=not big, little_endian=not big, enforce_file_format=False)
    data = buffer.getvalue()
    assert data[128:132] != b"DICM"
    (tmp_path / "IM0001").write_bytes(data)
    assert np.asarray(open_image(tmp_path / "IM0001"))[..., 0].tolist() == [[0, 64], [128, 255]]
    assert grey_values(data) == [[0, 64], [128, 255]]


def test_a_file_without_pixels_is_refused() -> None:
    file = make_dicom(RAMP)
    del file.PixelData
    with pytest.raises(InputError, match=r"scan\.dcm: a DICOM file without pixel data"):
        grey_values(file)


def test_too_many_pixels_are_refused_before_they_are_decoded() -> None:
    with pytest.raises(InputError, match="more than the"):
        grey_values(make_dicom(RAMP, Rows=60_000, Columns=60_000))


def test_errors_never_quote_the_contents_of_the_file() -> None:
    whole = dicom_bytes(make_dicom(RAMP))
    named = make_dicom(RAMP, PhotometricInterpretation="DOE JANE 4711")
    broken = [make_dicom(RAMP, Rows=9), named, make_dicom(RAMP, BitsAllocated=7)]
    for data in (whole[:-3], whole[:400], *(dicom_bytes(file) for file in broken)):
        with pytest.raises(InputError) as caught:
            grey_values(data)
        assert str(caught.value).startswith("scan.dcm: ")
        assert caught.value.__cause__ is None
        assert not any(secret in str(caught.value) for secret in ("Doe", "DOE", "JANE", "Jane", "4711"))


@settings(max_examples=150)
@given(st.data())
def test_damaged_files_open_or_are_refused_but_never_crash(data: st.DataObject) -> None:
    whole = bytearray(dicom_bytes(make_dicom(CT, WindowCenter=40, WindowWidth=80, RescaleSlope=1, RescaleIntercept=0)))
    for _ in range(data.draw(st.integers(1, 6))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(whole)))
    for file in (bytes(whole), bytes(whole[:cut])):
        try:
            assert open_image(file, name="x.dcm").mode == "RGB"
        except InputError as error:
            assert str(error).startswith("x.dcm: ")
            assert not any(secret in str(error) for secret in ("Doe", "Jane", "4711"))


def test_an_optional_element_that_is_no_number_is_ignored() -> None:
    data = dicom_bytes(make_dicom(RAMP, WindowCenter="2048", WindowWidth="4096")).replace(b"2048", b"20,4")
    assert grey_values(data) == grey_values(make_dicom(RAMP))


def test_an_inverse_presentation_is_inverted() -> None:
    assert grey_values(make_dicom(RAMP, PresentationLUTShape="INVERSE")) == [[255, 155], [55, 0]]


def test_a_range_of_padding_values_is_left_out_of_the_grey_range() -> None:
    values = np.array([[1000, 1500, 2000], [60000, 62000, 65535]], np.uint16)
    file = make_dicom(values, PixelPaddingValue=60000, PixelPaddingRangeLimit=65535)
    assert grey_values(file)[0] == [0, 128, 255]
