"""Every dataset by its name: the reader or the phantom that is meant, with the options that narrow it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

from normtune.data.options import DataOptions
from normtune.data.reading.cells import SPLITS
from normtune.data.reading.radiology import Sections
from normtune.data.records import Dataset, Example
from normtune.errors import InputError, did_you_mean

Language = Literal["en", "zh", "all"]
Task = Literal["vqa", "report"]
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
PHANTOMS = ("phantom-a", "phantom-b")
SECTIONED = ("openi", "mimic-cxr")  # datasets that tell findings from impression
_ON_THE_HUB = ("parquet", "path-vqa")  # --root may be owner/name
NAMES = (*ROOTS, *PHANTOMS)


def open_configured(options: DataOptions) -> Dataset:
    """The dataset that a command's options name, split by image anew (seed 0) where they say so.

    Raises:
        InputError: see `open_dataset`.
    """
    dataset = open_dataset(
        options.data,
        options.root,
        language=options.language,
        task=options.task,
        sections=options.sections,
        text_only=options.text_only,
    )
    if not options.image_disjoint:
        return dataset
    from normtune.data.splits import image_disjoint

    return image_disjoint(dataset, seed=0)


def open_dataset(
    name: str,
    root: Path | None = None,
    *,
    language: Language = "en",
    task: Task = "vqa",
    sections: Sections = "findings",
    text_only: bool = False,
) -> Dataset:
    """A dataset by its name, with the examples of one task and, where it has several, of one language.

    Args:
        name: one of `NAMES`; `phantom-b:240` has 240 training images, `phantom-b:240/60/120` has those of
            train, validate and test.
        root: where its files lie; phantoms are drawn and need none.
        language: rows that name no language are of every language.
        task: a dataset that holds reports alone gives them whatever the task.
        sections: what a report is to hold; for the datasets `SECTIONED`.
        text_only: keep the rows whose image files are missing.

    Raises:
        InputError: the name is unknown, the root is missing where one is needed or is not the dataset's,
            the dataset holds nothing of that task or language, or tells no sections apart.
    """
    family, colon, images = name.partition(":")
    if family not in NAMES:
        raise InputError(
            f"no dataset '{name}'{did_you_mean(family, NAMES)} "
            f"Known are {', '.join(NAMES)} (phantom-b:240 has 240 training images)."
        )
    if sections != "findings" and family not in SECTIONED:
        raise InputError(
            f"dataset {family} tells no sections apart: --sections goes with {' and '.join(SECTIONED)}. "
            "Leave it out."
        )
    if family in PHANTOMS:
        from normtune.data.phantom import dataset as phantom

        return phantom(family[-1], images=_images(name, images) if colon else None, task=task)
    if colon:
        raise InputError(
            f"dataset '{name}': a number of images goes with phantoms only. Write --data {family}."
        )
    if root is None:
        raise InputError(f"dataset {family} needs --root: {ROOTS[family]}.")
    dataset = _read(family, root, language, sections, text_only)
    if all(example.kind == "report" for example in dataset.examples):
        task = "report"
    return _narrowed(dataset, language, task)


def _images(name: str, numbers: str) -> int | dict[str, int]:
    """Images of the training split, or of train/validate/test."""
    counts: list[int] = []
    for number in numbers.split("/"):
        if not (number.isascii() and number.isdecimal()) or (not counts and int(number) == 0):
            raise InputError(
                f"dataset '{name}': '{number}' is no number of images. Write for example phantom-b:240."
            )
        counts.append(int(number))
    if len(counts) not in (1, len(SPLITS)):
        raise InputError(
            f"dataset '{name}': give the images of train, or of {'/'.join(SPLITS)}: phantom-b:240/60/120."
        )
    return dict(zip(SPLITS, counts, strict=True)) if len(counts) > 1 else counts[0]


def _read(family: str, root: Path, language: Language, sections: Sections, text_only: bool) -> Dataset:
    """By `read` of the module that bears its name, imported when it is used: pyarrow takes half a second."""
    if not root.exists() and family not in _ON_THE_HUB:
        raise InputError(f"--root {root}: there is no such file or folder. {family} needs {ROOTS[family]}.")
    options: dict[str, Any] = {"text_only": text_only}
    if family == "slake":
        options["language"] = language
    if family in SECTIONED:
        options["sections"] = sections
    read: Callable[..., Dataset] = import_module(f"normtune.data.datasets.{family.replace('-', '_')}").read
    return read(root, **options)


def _narrowed(dataset: Dataset, language: Language, task: Task) -> Dataset:
    """The dataset with its examples of one task and language alone; rows that were left out likewise."""
    wanted: list[tuple[str, Callable[[Example], bool]]] = [
        ("reports" if task == "report" else "questions", lambda e: (e.kind == "report") == (task == "report"))
    ]
    if language != "all":
        wanted.append(
            (f"rows of language '{language}'", lambda e: e.meta.get("language", language) == language)
        )
    for what, keep in wanted:
        kept = [example for example in dataset.examples if keep(example)]
        if not kept:
            raise InputError(f"dataset {dataset.name} holds no {what}. Check --task and --language.")
        dataset = replace(dataset, examples=kept, skipped=[e for e in dataset.skipped if keep(e)])
    return dataset
