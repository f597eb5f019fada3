"""Finds the images that a table names: files, files without their ending, volumes, and identifiers of DICOM files."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from normtune.data.formats import dicom_files
from normtune.data.images.volumes import VOLUME_SUFFIXES, expand_volumes, has_frames, series_order
from normtune.data.reading.columns import letters
from normtune.data.reading.image_paths import missing_images
from normtune.errors import InputError

# Column of a table, letters only -> element of a DICOM file that it holds; the most specific first.
_IDENTIFIERS = {
    "sopinstanceuid": "SOPInstanceUID",
    "seriesinstanceuid": "SeriesInstanceUID",
    "seriesuid": "SeriesInstanceUID",
    "studyinstanceuid": "StudyInstanceUID",
    "studyuid": "StudyInstanceUID",
    "accessionnumber": "AccessionNumber",
    "accession": "AccessionNumber",
    "patientid": "PatientID",
}
_MAX_VIEWS = 4  # more files of one identifier are the slices of a volume
_IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".dcm", ".dicom", ".tif", ".tiff", ".bmp", ".webp", *VOLUME_SUFFIXES)


def identifier_of(column: str) -> str | None:
    """The element of DICOM files that a column holds, by its name; None if it holds none."""
    return _IDENTIFIERS.get(letters(column))


def identifier_column(columns: Iterable[str]) -> str | None:
    """The column that identifies DICOM files best, or None."""
    order = list(_IDENTIFIERS)
    present = [column for column in columns if identifier_of(column)]
    return min(present, key=lambda column: order.index(letters(column)), default=None)


def index_dicom(folder: Path, column: str) -> dict[str, tuple[str, ...]]:
    """Read the identifier that a column holds from the header of every DICOM file of a folder.

    Identifiers join the files with the table, and are neither stored nor shown.

    Args:
        folder: the folder; subfolders are searched too.
        column: such as SOPInstanceUID, AccessionNumber or patient_id.

    Returns:
        Identifier -> the paths of its images relative to `folder`: the files in order of series and position, or
        if there are more than four, the parents that hold them, each of which is a volume.

    Raises:
        InputError: one folder holds the slices of several identifiers.
    """
    keyword = identifier_of(column)
    files_of: dict[str, list[Path]] = {}
    for file, value in series_order(dicom_files(folder), keyword or ""):
        files_of.setdefault(value, []).append(file)
    names: dict[str, tuple[str, ...]] = {}
    volume_of: dict[Path, str] = {}  # folder of a volume -> its identifier
    for value, files in files_of.items():
        if not value:
            continue
        if len(files) > _MAX_VIEWS:
            parents = list(dict.fromkeys(file.parent for file in files))
            if any(volume_of.setdefault(parent, value) != value for parent in parents) or folder in parents:
                raise InputError(
                    f"{folder}: more than {_MAX_VIEWS} DICOM files have one value of {column}, beside files of "
                    "other values. Put each series into its own folder, or name files by SOPInstanceUID."
                )
            files = parents
        names[value] = tuple(file.relative_to(folder).as_posix() for file in files)
    return names


def find_image_keys(
    folder: Path, names: Iterable[str], slices: int | None, montage: bool, missing: set[str] | None = None
) -> tuple[dict[str, tuple[str, ...]], list[str]]:
    """Find volumes, and files that are named without their ending.

    Args:
        folder: names are relative to it.
        names: the names in the table.
        slices, montage: see `expand_volumes`.
        missing: the names that are not files, if this is known.

    Returns:
        Name -> keys of its images, for each name that is not simply a file; and notes.

    Raises:
        InputError: `slices` or `montage` is set, and there is no volume.
    """
    names = list(names)
    missing = missing_images(folder, names) if missing is None else missing
    volumes = [name for name in names if name.lower().endswith(VOLUME_SUFFIXES) and name not in missing]
    volumes += [name for name in sorted(missing) if os.path.isdir(folder / name)]
    volumes += [name for name in names if name not in missing and has_frames(folder / name)]
    without_ending = [name for name in missing if not name.lower().endswith(_IMAGE_SUFFIXES) and name not in volumes]
    completed: dict[str, tuple[str, ...]] = {}
    if without_ending:
        files: dict[str, list[str]] = {}
        for path in folder.rglob("*"):
            if path.name.lower().endswith(_IMAGE_SUFFIXES):
                relative = path.relative_to(folder).as_posix()
                for stem in {path.name.split(".")[0], path.stem, relative.removesuffix(path.suffix)}:
                    files.setdefault(stem, []).append(relative)
        completed = {name: (files[name][0],) for name in without_ending if len(files.get(name, ())) == 1}
    notes = [f"{len(completed)} images are named without their ending"] if completed else []
    files_of_names = [key for (key,) in completed.values()]
    inside = [key for key in files_of_names if key.lower().endswith(VOLUME_SUFFIXES) or has_frames(folder / key)]
    expanded, volume_notes = expand_volumes(folder, [*volumes, *inside], slices, montage)
    completed = {name: expanded.get(key, (key,)) for name, (key,) in completed.items()}
    return {name: keys for name, keys in expanded.items() if name not in inside} | completed, notes + volume_notes
