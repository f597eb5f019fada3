"""Volumes as images: evenly spaced slices of a NIfTI file, a DICOM series or a DICOM file of several frames, or their
montage.

The key of such an image is the path of the volume with what is shown of it: `ct.nii.gz#slice 3/9` is the third of nine
evenly spaced slices, `ct.nii.gz#montage 9` all nine of them in one picture.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from math import ceil, sqrt
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from normtune.data.formats import DICOM_SUFFIXES
from normtune.data.images.intensity import Window, apply_window, check_size, grey_to_rgb, stretch_full_range
from normtune.errors import InputError

VOLUME_SUFFIXES = (".nii", ".nii.gz")
DEFAULT_SLICES = 9
_KEY = re.compile(r"(?P<path>.+)#(slice (?P<slice>\d+)/|montage )(?P<count>\d+)", re.DOTALL)
_POSITION = ("ImagePositionPatient", "ImageOrientationPatient", "InstanceNumber", "SeriesInstanceUID")


def expand_volumes(
    folder: Path, names: Sequence[str], slices: int | None, montage: bool
) -> tuple[dict[str, tuple[str, ...]], list[str]]:
    """Choose the images of each volume.

    Args:
        folder: names are relative to it.
        names: NIfTI files, folders of one DICOM series each, and DICOM files of several frames.
        slices: number of evenly spaced slices; None: 9 as a montage. A volume with fewer shows all that it has.
        montage: show the slices as one picture instead of one image each.

    Returns:
        Name -> image keys, and the note that shows the choice.

    Raises:
        InputError: `slices` or `montage` is set and there is no volume, or a volume cannot be read.
    """
    if not names:
        if slices is not None or montage:
            raise InputError(
                f"--{'montage' if montage else 'slices'} needs volumes: no row names a .nii or .nii.gz file, the "
                "folder of a DICOM series or a DICOM file of several frames. Remove it."
            )
        return {}, []
    montage = montage or slices is None
    keys, fewer = {}, 0
    for name in names:
        count = min(slices or DEFAULT_SLICES, _depth(folder / name, name))
        fewer += count < (slices or DEFAULT_SLICES)
        keys[name] = (
            (f"{name}#montage {count}",)
            if montage
            else tuple(f"{name}#slice {number}/{count}" for number in range(1, count + 1))
        )
    form = "as a montage" if montage else "one image a slice"
    choice = f"{slices or DEFAULT_SLICES} evenly spaced slices each, {form}"
    few = f" ({fewer} have fewer slices)" if fewer else ""
    change = "" if slices else "; --slices N without --montage gives one image a slice"
    return keys, [f"{len(names)} volumes: {choice}{few}{change}"]


def open_volume(folder: Path, key: str, window: Window | None = None) -> Image.Image | None:
    """Open the slices that a key names; None if it is no key of a volume, an `InputError` if it cannot be read."""
    match = _KEY.fullmatch(key)
    if match is None:
        return None
    name, count = match["path"], int(match["count"])
    path = folder / name
    depth = _depth(path, name)
    indices = [int((number + 0.5) * depth / count) for number in range(count)]
    if match["slice"]:
        indices = [indices[int(match["slice"]) - 1]]
    pictures = [_open_slice(path, name, index, window) for index in indices]
    return pictures[0] if match["slice"] else _join(pictures, name)


def has_frames(path: Path) -> bool:
    """Whether a file is a DICOM file of several frames, by its ending and its header."""
    return path.suffix.lower() in DICOM_SUFFIXES and _frames(path, path.stat().st_mtime_ns) > 1


def series_order(files: Iterable[Path], keyword: str) -> Iterator[tuple[Path, str]]:
    """Yield (file, value of an element) of DICOM files in order of series and position; "" if there is no value.

    Files that are no DICOM files are left out. The values are for joining and are not shown.
    """
    headers = []
    for file in files:
        header = _read_header(file, (*_POSITION, *((keyword,) if keyword else ())))
        if header is not None:
            headers.append((str(header.get("SeriesInstanceUID", "")), _position(header), file.name, file, header))
    for *_, file, header in sorted(headers, key=lambda item: (str(item[3].parent), *item[:3])):
        yield file, str(header.get(keyword, "") or "").strip() if keyword else ""


def _depth(path: Path, name: str) -> int:
    modified = path.stat().st_mtime_ns
    if path.is_dir():
        return len(_series(path, modified))
    return _frames(path, modified) if path.suffix.lower() in DICOM_SUFFIXES else _nifti(path, name, modified).shape[2]


def _open_slice(path: Path, name: str, index: int, window: Window | None) -> Image.Image:
    from normtune.data.images.files import open_image

    if path.is_dir():
        file = _series(path, path.stat().st_mtime_ns)[index]
        return open_image(file, name=f"{name}/{file.name}", window=window)
    if path.suffix.lower() in DICOM_SUFFIXES:
        return open_image(path, name=name, frame=index, window=window)
    volume = _nifti(path, name, path.stat().st_mtime_ns)
    if window is not None:
        values = apply_window(volume[:, :, index], window)
    else:
        low, high = _range(path, name, path.stat().st_mtime_ns)
        values = volume[:, :, index]
        values = np.clip((values - low) / (high - low), 0, 1) if low < high else stretch_full_range(values)
    # rows from anterior to posterior, columns from the patient's right to left, as radiologists view axial slices
    return grey_to_rgb(values[::-1, ::-1].T)


@lru_cache(maxsize=2)
def _nifti(path: Path, name: str, modified: int) -> NDArray[np.float32]:
    """The first volume of a NIfTI file, shape [right, anterior, superior]; `modified` renews the cache."""
    try:
        import nibabel
    except ImportError as error:
        raise InputError(f"{name}: a NIfTI volume needs nibabel. Install normtune[volumes].") from error
    try:
        image: Any = nibabel.as_closest_canonical(nibabel.load(path))
        if len(image.shape) not in (3, 4):
            raise InputError(f"{name}: the volume has {len(image.shape)} dimensions, not 3. Give a volume of slices.")
        values = np.asarray(image.dataobj[..., 0] if len(image.shape) == 4 else image.dataobj, dtype=np.float32)
    except InputError:
        raise
    except Exception as error:  # nibabel's errors, zlib, EOF
        raise InputError(f"{name}: not a NIfTI volume that can be read: damaged or cut short. Replace it.") from error
    check_size(values.shape[0], values.shape[1], name)
    if values.ndim != 3 or not values.shape[2]:
        raise InputError(f"{name}: the volume has no slices. Replace it.")
    return np.nan_to_num(values)


@lru_cache(maxsize=64)
def _frames(path: Path, modified: int) -> int:
    """The number of frames of a DICOM file; `modified` as above."""
    header = _read_header(path, ("NumberOfFrames",))
    try:
        return int(header.NumberOfFrames or 1)
    except (AttributeError, TypeError, ValueError):  # no header, no such element, or a damaged one
        return 1


@lru_cache(maxsize=64)
def _range(path: Path, name: str, modified: int) -> tuple[float, float]:
    """The 0.5th and the 99.5th percentile of a NIfTI volume: they become black and white."""
    low, high = np.percentile(_nifti(path, name, modified), (0.5, 99.5))
    return float(low), float(high)


@lru_cache(maxsize=64)
def _series(folder: Path, modified: int) -> tuple[Path, ...]:
    """The files of a DICOM series, ordered by their position along the normal of the slices; `modified` as above."""
    files = sorted(p for p in folder.iterdir() if p.is_file() and (not p.suffix or p.suffix.lower() in DICOM_SUFFIXES))
    ordered = list(series_order(files, "SeriesInstanceUID"))
    if not ordered:
        raise InputError(f"{folder.name}: the folder holds no DICOM file. Name an image, or the folder of a series.")
    if len(series := {value for _, value in ordered}) > 1:
        raise InputError(f"{folder.name}: the folder holds {len(series)} DICOM series. Put each into its own folder.")
    return tuple(file for file, _ in ordered)


def _read_header(file: Path, keywords: Sequence[str]) -> Any:
    import pydicom

    try:
        header = pydicom.dcmread(file, stop_before_pixels=True, force=True, specific_tags=list(keywords))
    except Exception:  # pydicom's errors, on files that are no DICOM files
        return None
    return header if header or header.file_meta else None


def _position(header: Any) -> float:
    """The position of a slice along the normal of its plane, or else its number."""
    try:
        right, down = np.reshape([float(value) for value in header.ImageOrientationPatient], (2, 3))
        return float(np.dot(np.cross(right, down), [float(value) for value in header.ImagePositionPatient]))
    except Exception:  # the elements are missing or damaged
        number = header.get("InstanceNumber")
        return float(number) if number is not None else 0.0


def _join(pictures: Sequence[Image.Image], name: str) -> Image.Image:
    """Pictures in rows of a grid that is as square as possible, each as large as the first."""
    width, height = pictures[0].size
    columns = ceil(sqrt(len(pictures)))
    rows = ceil(len(pictures) / columns)
    check_size(columns * width, rows * height, name)
    sheet = Image.new("RGB", (columns * width, rows * height))
    for number, picture in enumerate(pictures):
        picture = picture if picture.size == (width, height) else picture.resize((width, height))
        sheet.paste(picture, (number % columns * width, number // columns * height))
    return sheet
