"""Volumes become evenly spaced slices or a montage, and DICOM files are joined with a table by their identifiers."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from normtune.data.images.files import ImageFolder
from normtune.data.registry import open_dataset
from normtune.data.summary import summarize
from normtune.errors import InputError
from tests.support.dataset_samples import dicom_bytes, make_dicom
from tests.support.own_data import write_delimited, write_nifti, write_series


def pixels(root: Path, key: str) -> np.ndarray:
    return np.asarray(ImageFolder(root)(key))[..., 0]


def report(root: Path, **cells: Any) -> Path:
    return write_delimited(root / "reports.csv", [cells | {"report": "Clear."}])


@pytest.mark.parametrize("name", ["ct.nii.gz", "ct.nii", "series"])
def test_slices_are_evenly_spaced_and_in_order(tmp_path: Path, name: str) -> None:
    if name == "series":
        write_series(tmp_path / name, 10)
    else:
        write_nifti(tmp_path / name, 10)
    dataset = open_dataset(report(tmp_path, image=name), slices=5)
    (example,) = dataset.examples
    assert example.images == tuple(f"{name}#slice {number}/5" for number in range(1, 6))
    assert dataset.notes[-1] == "1 volumes: 5 evenly spaced slices each, one image a slice"
    values = [int(np.asarray(dataset.open_image(key))[-1, -1, 0]) for key in example.images]
    low, high = np.percentile(expected_volume(10), (0.5, 99.5))
    scale = 1.0 if name == "series" else 255 / (high - low)
    assert values == [round(10 * z * scale) for z in (1, 3, 5, 7, 9)]


def expected_volume(depth: int) -> np.ndarray:
    values = np.broadcast_to(10.0 * np.arange(depth), (6, 4, depth)).astype(np.float32)
    values[-1, -1, :] = 255
    return values


def test_the_default_is_a_montage_and_says_so(tmp_path: Path) -> None:
    write_nifti(tmp_path / "ct.nii.gz", 20)
    dataset = open_dataset(report(tmp_path, image="ct.nii.gz"))
    assert dataset.examples[0].images == ("ct.nii.gz#montage 9",)
    assert "1 volumes: 9 evenly spaced slices each, as a montage; --slices N" in dataset.notes[-1]
    picture = pixels(tmp_path, "ct.nii.gz#montage 9")
    assert picture.shape == (3 * 4, 3 * 6)
    cells = picture.reshape(3, 4, 3, 6)[:, -1, :, -1].ravel()
    assert list(cells) == sorted(cells)
    assert len(set(cells)) == 9


def test_a_nifti_slice_is_shown_as_radiologists_view_it(tmp_path: Path) -> None:
    write_nifti(tmp_path / "ct.nii", 3)
    picture = pixels(tmp_path, "ct.nii#slice 1/3")  # 4 rows from anterior to posterior, 6 columns from right to left
    assert picture.shape == (4, 6)
    assert picture[0, 0] == 255
    assert np.count_nonzero(picture) == 1


def test_a_volume_with_fewer_slices_shows_all_of_them(tmp_path: Path) -> None:
    write_series(tmp_path / "series", 3)
    dataset = open_dataset(report(tmp_path, image="series"), slices=4, montage=True)
    assert dataset.examples[0].images == ("series#montage 3",)
    assert "(1 have fewer slices)" in dataset.notes[-1]
    assert pixels(tmp_path, "series#montage 3").shape == (8, 12)


def test_slices_without_a_volume_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.dcm").write_bytes(dicom_bytes(make_dicom(np.zeros((4, 4), np.uint8))))
    with pytest.raises(InputError, match="--slices needs volumes"):
        open_dataset(report(tmp_path, image="a.dcm"), slices=3)
    with pytest.raises(InputError, match="--montage needs volumes"):
        open_dataset(report(tmp_path, image="a.dcm"), montage=True)
    with pytest.raises(InputError, match="dataset slake does not take --slices"):
        open_dataset("slake", tmp_path, slices=3)


@pytest.mark.parametrize("content", [b"", b"text", b"\x1f\x8b\x08\x00"])
def test_a_damaged_volume_is_one_error(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "ct.nii.gz").write_bytes(content)
    with pytest.raises(InputError, match=r"ct\.nii\.gz: not a NIfTI volume that can be read"):
        open_dataset(report(tmp_path, image="ct.nii.gz"))


def test_a_folder_of_two_series_is_refused(tmp_path: Path) -> None:
    write_series(tmp_path / "series", 2)
    other = make_dicom(np.zeros((4, 6), np.uint8), SeriesInstanceUID="1.2.3")
    (tmp_path / "series" / "other.dcm").write_bytes(dicom_bytes(other))
    with pytest.raises(InputError, match="series: the folder holds 2 DICOM series"):
        open_dataset(report(tmp_path, image="series"))


@pytest.mark.parametrize(
    ("column", "keyword", "value"),
    [
        ("SOPInstanceUID", "SOPInstanceUID", "1.2.3.4"),
        ("study_uid", "StudyInstanceUID", "1.2.3.5"),
        ("Accession Number", "AccessionNumber", "A77"),
        ("patient_id", "PatientID", "MRN-99"),
    ],
)
def test_dicom_files_are_joined_with_a_table(
    tmp_path: Path, column: str, keyword: str, value: str, caplog: pytest.LogCaptureFixture
) -> None:
    for number, identifier in enumerate((value, "1.2.9")):
        file = make_dicom(np.full((4, 4), number, np.uint8), **{keyword: identifier})
        (tmp_path / "deep").mkdir(exist_ok=True)
        (tmp_path / "deep" / f"{number}.dcm").write_bytes(dicom_bytes(file))
    write_delimited(tmp_path / "reports.csv", [{column: value, "report": "Clear."}])
    with caplog.at_level(logging.DEBUG):
        dataset = open_dataset(tmp_path)
    assert dataset.name == "dicom"
    assert dataset.examples[0].images == ("deep/0.dcm",)
    assert value not in caplog.text + str(summarize(dataset))
    write_delimited(tmp_path / "reports.csv", [{column: "gone-1", "report": "Clear."}])
    with pytest.raises(InputError, match=f"row 2: no DICOM file has the value of {column}") as caught:
        open_dataset(tmp_path)
    assert "gone-1" not in str(caught.value)


def test_many_files_of_one_study_are_a_volume(tmp_path: Path) -> None:
    write_series(tmp_path / "one", 6, AccessionNumber="A1")
    write_series(tmp_path / "two", 2, AccessionNumber="A2")
    rows = [{"accession": "A1", "report": "Clear."}, {"accession": "A2", "report": "Clear too."}]
    write_delimited(tmp_path / "reports.csv", rows)
    dataset = open_dataset(tmp_path)
    assert [example.images for example in dataset.examples] == [
        ("one#montage 6",),
        ("two/000.dcm", "two/001.dcm"),  # two views
    ]
    write_series(tmp_path / "one" / "more", 1, AccessionNumber="A3")
    assert open_dataset(tmp_path).examples == dataset.examples
    (tmp_path / "one" / "more" / "000.dcm").rename(tmp_path / "one" / "x.dcm")
    with pytest.raises(InputError, match="the folder holds 2 DICOM series"):
        open_dataset(tmp_path)


def write_frames(file: Path, frames: int) -> Path:
    """A DICOM file of several frames; frame z has the value 10 z."""
    pixels = np.repeat(10 * np.arange(frames, dtype=np.uint8), 24).reshape(frames, 4, 6)
    file.write_bytes(dicom_bytes(make_dicom(pixels, WindowCenter=128, WindowWidth=256)))
    return file


def test_a_dicom_file_of_several_frames_is_a_volume(tmp_path: Path) -> None:
    write_frames(tmp_path / "cine.dcm", 10)
    write_frames(tmp_path / "one.dcm", 1)
    dataset = open_dataset(report(tmp_path, image="cine.dcm"), slices=5)
    assert dataset.examples[0].images == tuple(f"cine.dcm#slice {number}/5" for number in range(1, 6))
    shades = [pixels(tmp_path, key)[0, 0] for key in dataset.examples[0].images]
    write_series(tmp_path / "series", 10)
    assert shades == [pixels(tmp_path, f"series#slice {number}/5")[0, 0] for number in range(1, 6)]
    assert dataset.notes[-1] == "1 volumes: 5 evenly spaced slices each, one image a slice"
    for name in ("cine.dcm", "cine"):  # also without its ending
        montage = open_dataset(report(tmp_path, image=name))
        assert montage.examples[0].images == ("cine.dcm#montage 9",)
        assert montage.open_image("cine.dcm#montage 9").size == (18, 12)
        assert montage.notes[-1].startswith("1 volumes: 9 evenly spaced slices each, as a montage")
    single = open_dataset(report(tmp_path, image="one.dcm"))
    assert single.examples[0].images == ("one.dcm",)
    assert not any("volumes" in note for note in single.notes)


def test_views_of_a_study_may_have_several_frames(tmp_path: Path) -> None:
    for number, frames in enumerate((1, 4)):
        pixels_of_file = np.zeros((frames, 4, 6), np.uint8)
        file = make_dicom(pixels_of_file[0] if frames == 1 else pixels_of_file, AccessionNumber="A1")
        (tmp_path / f"{number}.dcm").write_bytes(dicom_bytes(file))
    write_delimited(tmp_path / "reports.csv", [{"accession": "A1", "report": "Clear."}])
    assert open_dataset(tmp_path).examples[0].images == ("0.dcm", "1.dcm#montage 4")
