"""Opens a dataset by its name, and selects the examples of one task and language."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

from normtune.data.options import DataOptions, name_and_root
from normtune.data.reading.cells import SPLITS, language_tag
from normtune.data.reading.radiology import Sections
from normtune.data.records import Dataset, Example
from normtune.errors import InputError, did_you_mean

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
PHANTOMS = ("phantom-a", "phantom-b")  # drawn when they are opened, without files; no two are equal
WITH_SECTIONS = ("openi", "mimic-cxr")  # datasets that separate findings and impression
WITH_STRICT = ("jsonl", "messages")  # their readers refuse bad rows, unless --skip-bad is set
WITH_HISTORY = ("messages",)  # datasets of conversations
_ON_THE_HUB = ("parquet", "path-vqa")  # --root may be a hub name, owner/name
NAMES = (*ROOTS, *PHANTOMS)


def open_configured(options: DataOptions) -> Dataset:
    """Open the dataset that a command's options select.

    Raises:
        InputError: see `open_dataset`.
    """
    fields = [name for name in DataOptions.model_fields if name not in ("data", "root", "strict")]
    return open_dataset(options.data, options.root, **{name: getattr(options, name) for name in fields})


def open_dataset(
    name: str | Path,
    root: str | Path | None = None,
    *,
    language: str = "en",
    image_disjoint: bool = False,
    group_by: str | None = None,
    task: Task = "vqa",
    sections: Sections = "findings",
    text_only: bool = False,
    skip_bad: bool = False,
    history: bool = False,
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
        language: language of the questions, as a tag (en, zh, fr) or a name; `all` reads every language. Rows
            without a language are part of every language.
        image_disjoint: make new splits that share no picture (with seed 0).
        group_by: column that names the patient or study of a row; such rows stay in one split.
        task: questions or reports. A dataset that has only reports returns them for either task.
        sections: sections that a report consists of; only for the datasets in `WITH_SECTIONS`.
        text_only: keep the rows with missing image files.
        history: let each later question of a conversation see the turns before it; only for `messages`.
        skip_bad: skip and list the bad rows of `jsonl` and `messages`, instead of raising an error.

    Raises:
        InputError: the name is unknown; the root is needed but missing, or is not this dataset; the dataset
            has no examples of that task or language; or it does not separate sections.
    """
    name, root = name_and_root(str(name), None if root is None else Path(root))
    reading = {"text_only": text_only} | ({"strict": False} if skip_bad and name in WITH_STRICT else {})
    if history:
        if name not in WITH_HISTORY:
            raise InputError(
                f"dataset {name} has no conversations: --history works with {' and '.join(WITH_HISTORY)} only. "
                "Remove it."
            )
        reading["history"] = True
    dataset = _open_named(name, root, language, task, sections, reading)
    if group_by is not None:
        from normtune.data.splits import with_groups

        dataset = with_groups(dataset, group_by)
    if image_disjoint:
        dataset = _split_by_picture(dataset, group_by)
    options = {"data": name, "root": root, "language": language, "image_disjoint": image_disjoint, "task": task}
    options |= {"group_by": group_by, "sections": sections, "text_only": text_only, "skip_bad": skip_bad}
    options |= {"history": True} if history else {}
    return replace(dataset, options=options)


def _split_by_picture(dataset: Dataset, group_by: str | None) -> Dataset:
    """New splits that share no picture and, where the data names patients or studies, none of these."""
    from normtune.data.splits import find_identical_images, group_columns, image_disjoint

    # phantoms are drawn from one seed each: drawing all of them would find no equal ones
    identical = [] if dataset.name in PHANTOMS else find_identical_images(dataset)
    columns = ", ".join(group_by or column for column in group_columns(dataset.examples))
    note = (
        f"new splits by picture; {len(identical)} pictures have several names; patients by column: {columns or 'none'}"
    )
    return replace(image_disjoint(dataset, seed=0, identical=identical), notes=[*dataset.notes, note])


def _open_named(
    name: str, root: Path | None, language: str, task: Task, sections: Sections, reading: dict[str, Any]
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
    dataset = _open_files(family, root, language, sections, reading)
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


def _open_files(family: str, root: Path, language: str, sections: Sections, reading: dict[str, Any]) -> Dataset:
    """Call `read` of the module named after the dataset.

    The module is imported only here, as pyarrow takes half a second to import.
    """
    if not root.exists() and family not in _ON_THE_HUB:
        raise InputError(f"--root {root}: no such file or folder. {family} needs {ROOTS[family]}.")
    options = dict(reading)
    if family == "slake":
        options["language"] = language_tag(language)
    if family in WITH_SECTIONS:
        options["sections"] = sections
    read: Callable[..., Dataset] = import_module(f"normtune.data.datasets.{family.replace('-', '_')}").read
    return read(root, **options)


def _select_task_and_language(dataset: Dataset, language: str, task: Task) -> Dataset:
    """The dataset with only the examples and skipped rows of one task and language; the others are counted."""
    language = language_tag(language)

    def other_task(example: Example) -> str:
        if (example.kind == "report") == (task == "report"):
            return ""
        return "is a question (--task vqa)" if task == "report" else "is a report (--task report)"

    def other_language(example: Example) -> str:
        named = example.meta.get("language", language)
        return "" if language in ("all", named) else f"language {named}"

    what = "reports" if task == "report" else "questions"
    for reason, needed in ((other_task, what), (other_language, f"rows of language '{language}'")):
        dropped = Counter(filter(None, map(reason, dataset.examples)))
        examples = [example for example in dataset.examples if not reason(example)]
        if not examples:
            present = f" Its languages: {', '.join(sorted(r.split()[-1] for r in dropped))}." if needed != what else ""
            raise InputError(f"dataset {dataset.name} has no {needed}.{present} Check --task and --language.")
        dataset = replace(
            dataset,
            examples=examples,
            skipped=[example for example in dataset.skipped if not reason(example)],
            dropped=dataset.dropped + dropped,
        )
    others = {reason: rows for reason, rows in dataset.dropped.items() if reason.startswith(("language ", "is a "))}
    if others:
        names = ", ".join(f"{reason}: {rows}" for reason, rows in others.items())
        dataset = replace(
            dataset, notes=[*dataset.notes, f"{sum(others.values())} rows are of another language or task ({names})"]
        )
    return dataset
