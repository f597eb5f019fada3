"""Opens a dataset by its name, and selects the examples of one task and language."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

from normtune.data.options import DataOptions, name_and_root
from normtune.data.reading.cells import SPLITS
from normtune.data.reading.radiology import Sections
from normtune.data.records import Dataset, Example
from normtune.errors import InputError, did_you_mean

Language = Literal["en", "zh", "all"]
Task = Literal["vqa", "report"]
# Dataset name -> what --root must point at; messages quote it.
ROOTS = {
    "slake": "the folder that holds train.json and imgs/",
    "vqa-rad": "the folder that holds 'VQA_RAD Dataset Public.json'",
    "path-vqa": "the folder that holds qas/ and images/, or parquet files, or the hub name owner/name",
    "openi": "the folder that holds annotation.json, indiana_reports.csv or ecgen-radiology/",
    "mimic-cxr": "the folder that holds mimic-cxr-2.0.0-split.csv and files/, or annotation.json",
    "medpix": "the folder that holds train.jsonl, dev.jsonl, test.jsonl and images/",
    "roco": "the folder that holds data/train/radiology/captions.txt, or another of its layouts",
    "messages": "a JSONL, JSON or parquet file of conversations, or a folder of them",
    "jsonl": "a JSONL file or a folder of them",
    "parquet": "a parquet file, a folder of them, or a hub name owner/name",
}
PHANTOMS = ("phantom-a", "phantom-b")  # drawn images, without files
WITH_SECTIONS = ("openi", "mimic-cxr")  # datasets that separate findings and impression
_ON_THE_HUB = ("parquet", "path-vqa")  # --root may be a hub name, owner/name
NAMES = (*ROOTS, *PHANTOMS)


def open_configured(options: DataOptions) -> Dataset:
    """Open the dataset that a command's options select.

    Raises:
        InputError: see `open_dataset`.
    """
    selected = {name: getattr(options, name) for name in DataOptions.model_fields if name not in ("data", "root")}
    return open_dataset(options.data, options.root, **selected)


def open_dataset(
    name: str | Path,
    root: str | Path | None = None,
    *,
    language: Language = "en",
    image_disjoint: bool = False,
    task: Task = "vqa",
    sections: Sections = "findings",
    text_only: bool = False,
) -> Dataset:
    """Open a dataset: a known one by its name, or a file of your own.

    ```python
    data = normtune.open_dataset("slake", root="SLAKE")
    data = normtune.open_dataset("rows.jsonl")
    ```

    Args:
        name: one of `NAMES`, or a .jsonl, .json or .parquet file. For phantoms a number of images may follow:
            `phantom-b:240` has 240 training images, `phantom-b:240/60/120` gives the images of train, validate
            and test.
        root: folder or file of the dataset; phantoms are drawn and need none.
        language: language of the questions. Rows without a language are part of every language.
        image_disjoint: make new splits that share no image (with seed 0).
        task: questions or reports. A dataset that has only reports returns them for either task.
        sections: sections that a report consists of; only for the datasets in `WITH_SECTIONS`.
        text_only: keep the rows with missing image files.

    Raises:
        InputError: the name is unknown; the root is needed but missing, or is not this dataset; the dataset
            has no examples of that task or language; or it does not separate sections.
    """
    name, root = name_and_root(str(name), None if root is None else Path(root))
    dataset = _open_named(name, root, language, task, sections, text_only)
    if image_disjoint:
        from normtune.data import splits

        dataset = splits.image_disjoint(dataset, seed=0)
    options = {"data": name, "root": root, "language": language, "image_disjoint": image_disjoint, "task": task}
    return replace(dataset, options={**options, "sections": sections, "text_only": text_only})


def _open_named(
    name: str, root: Path | None, language: Language, task: Task, sections: Sections, text_only: bool
) -> Dataset:
    """Open a dataset with its own splits; see `open_dataset`."""
    family, colon, images = name.partition(":")
    if family not in NAMES:
        raise InputError(
            f"no dataset '{name}'{did_you_mean(family, NAMES)} "
            f"Known datasets: {', '.join(NAMES)} (phantom-b:240 has 240 training images)."
        )
    if sections != "findings" and family not in WITH_SECTIONS:
        raise InputError(
            f"dataset {family} does not separate the sections of a report: --sections works with "
            f"{' and '.join(WITH_SECTIONS)} only. Remove it."
        )
    if family in PHANTOMS:
        from normtune.data.phantom import phantom_dataset as phantom

        return phantom(family[-1], images=_image_counts(name, images) if colon else None, task=task)
    if colon:
        raise InputError(f"dataset '{name}': only phantoms take a number of images. Write --data {family}.")
    if root is None:
        raise InputError(f"dataset {family} needs --root: {ROOTS[family]}.")
    dataset = _open_files(family, root, language, sections, text_only)
    if all(example.kind == "report" for example in dataset.examples):
        task = "report"
    return _select_task_and_language(dataset, language, task)


def _image_counts(name: str, numbers: str) -> int | dict[str, int]:
    """Parse "240" (images of the training split) or "240/60/120" (of train, validate and test)."""
    counts: list[int] = []
    for number in numbers.split("/"):
        if not (number.isascii() and number.isdecimal()) or (not counts and int(number) == 0):
            raise InputError(
                f"dataset '{name}': '{number}' is not a number of images. Write for example phantom-b:240."
            )
        counts.append(int(number))
    if len(counts) not in (1, len(SPLITS)):
        raise InputError(
            f"dataset '{name}': give one number (train) or three ({'/'.join(SPLITS)}): phantom-b:240/60/120."
        )
    return dict(zip(SPLITS, counts, strict=True)) if len(counts) > 1 else counts[0]


def _open_files(family: str, root: Path, language: Language, sections: Sections, text_only: bool) -> Dataset:
    """Call `read` of the module named after the dataset.

    The module is imported only here, as pyarrow takes half a second to import.
    """
    if not root.exists() and family not in _ON_THE_HUB:
        raise InputError(f"--root {root}: no such file or folder. {family} needs {ROOTS[family]}.")
    options: dict[str, Any] = {"text_only": text_only}
    if family == "slake":
        options["language"] = language
    if family in WITH_SECTIONS:
        options["sections"] = sections
    read: Callable[..., Dataset] = import_module(f"normtune.data.datasets.{family.replace('-', '_')}").read
    return read(root, **options)


def _select_task_and_language(dataset: Dataset, language: Language, task: Task) -> Dataset:
    """The dataset with only the examples and skipped rows of one task and language."""
    conditions: list[tuple[str, Callable[[Example], bool]]] = [
        ("reports" if task == "report" else "questions", lambda e: (e.kind == "report") == (task == "report"))
    ]
    if language != "all":
        conditions.append((f"rows of language '{language}'", lambda e: e.meta.get("language", language) == language))
    for what, keep in conditions:
        examples = [example for example in dataset.examples if keep(example)]
        if not examples:
            raise InputError(f"dataset {dataset.name} has no {what}. Check --task and --language.")
        dataset = replace(dataset, examples=examples, skipped=[e for e in dataset.skipped if keep(e)])
    return dataset
