"""Opens a dataset by its name, and selects the examples of one task and language."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

from normtune.data.examples import META, Examples, count_values
from normtune.data.formats import FORMATS, PUBLISHED, SUFFIXES, MixtureEntry, name_and_root, parse_mixture
from normtune.data.options import DataOptions
from normtune.data.reading.cells import language_tag
from normtune.data.reading.columns import columns_option
from normtune.data.reading.radiology import Sections
from normtune.data.records import Dataset
from normtune.data.split_names import SPLITS
from normtune.errors import InputError, did_you_mean

Task = Literal["vqa", "report"]
ROOTS = PUBLISHED | FORMATS  # dataset name -> what --root must point at; messages quote it
# Drawn when they are opened, without files; no two images are equal.
PHANTOMS = ("phantom-a", "phantom-b", "phantom-acquisition", "phantom-wording", "phantom-knowledge")
WITH_SECTIONS = ("openi", "mimic-cxr")  # datasets that separate findings and impression
WITH_HISTORY = ("messages",)  # datasets of conversations
_ON_THE_HUB = ("parquet", "path-vqa", "kvasir-vqa", "medpix-vqa")  # --root may be a hub name, owner/name
_TABLES = tuple(name for name in FORMATS if name != "messages")
NAMES = (*ROOTS, *PHANTOMS)


def open_configured(options: DataOptions) -> Dataset:
    """Open the dataset that a command's options select.

    Raises:
        InputError: see `open_dataset`.
    """
    fields = [name for name in DataOptions.model_fields if name not in ("data", "root", "strict")]
    return open_dataset(options.data, options.root, **{name: getattr(options, name) for name in fields})


def open_dataset(
    name: Any,
    root: str | Path | None = None,
    *,
    language: str = "en",
    image_disjoint: bool = False,
    group_by: str | None = None,
    task: Task = "vqa",
    columns: str | Mapping[str, str] | None = None,
    slices: int | None = None,
    montage: bool = False,
    split_ratio: str | None = None,
    split_seed: int | None = None,
    split_column: str | None = None,
    splits: str | Path | None = None,
    fold: int | None = None,
    sections: Sections = "findings",
    text_only: bool = False,
    skip_bad: bool = False,
    history: bool = False,
) -> Dataset:
    """Open a dataset: a known one by its name, a file or folder of your own, or rows that are in memory.

    ```python
    data = normtune.open_dataset("slake", root="SLAKE")
    data = normtune.open_dataset("rows.xlsx", columns={"image": "scan"})
    data = normtune.open_dataset(data_frame, split_ratio="80/10/10")
    ```

    Args:
        name: one of `NAMES`; or a file or folder, of which the format is recognised; or a pandas data frame, a
            `datasets.Dataset`, a list of dicts, a torch dataset of dicts, or a dict of these by split. For phantoms a
            number of images may follow: `phantom-b:240` has 240 training images, `phantom-b:240/60/120` gives the
            images of train, validate and test. Or several datasets with weights for training, each with its root:
            `slake=SLAKE:0.7,rows.csv:0.3`; the options of reading then hold for each of them, and those of splits for
            all rows together.
        root: folder or file of the dataset; phantoms are drawn and need none.
        language: language of the questions, as a tag (en, zh, fr) or a name; `all` reads every language. Rows
            without a language are part of every language.
        image_disjoint: make new splits that share no picture (with seed 0).
        group_by: column that names the patient or study of a row; such rows stay in one split.
        task: questions or reports. A dataset that has only reports returns them for either task.
        columns: column of each field, for a table of your own: `{"image": "scan"}`; the others are found by name.
        slices, montage: how volumes become images: number of slices, and whether they are one picture.
        split_ratio: make new splits train/validate/test in this ratio, such as "80/10/10".
        split_seed: the seed of `split_ratio`.
        split_column: column that names the split of a row.
        splits, fold: a file of splits that `normtune split` wrote, and the fold in it that is the test split.
        sections: sections that a report consists of; only for the datasets in `WITH_SECTIONS`.
        text_only: keep the rows with missing image files.
        history: let each later question of a conversation see the turns before it; only for `messages`.
        skip_bad: skip and list the bad rows of your own data, instead of raising an error.

    Raises:
        InputError: the name is unknown; the root is needed but missing, or is not this dataset; the dataset
            has no examples of that task or language; or it does not separate sections.
    """
    # not checked again: the functions below check what they use
    options = DataOptions.model_construct(
        data="",  # below, with the root
        language=language,
        image_disjoint=image_disjoint,
        group_by=group_by,
        task=task,
        columns=columns_option(columns),
        slices=slices,
        montage=montage,
        split_ratio=split_ratio,
        split_seed=split_seed,
        split_column=split_column,
        splits=None if splits is None else Path(splits),
        fold=fold,
        sections=sections,
        text_only=text_only,
        skip_bad=skip_bad,
        history=history,
    )
    named, mixture = isinstance(name, str | Path), parse_mixture(str(name)) if isinstance(name, str) else []
    location = None if root is None else Path(root)
    if mixture:
        from normtune.data.mixtures import open_mixture

        if root is not None:
            raise InputError("--root: several datasets have a root each. Write for example --data slake=FOLDER:0.7,...")

        def open_entry(entry: MixtureEntry) -> Dataset:
            return _open_one(entry.data, entry.root, options)[0]

        dataset, name = open_mixture(mixture, open_entry, group_by), ",".join(map(str, mixture))
    elif named:
        dataset, name, location = _open_one(name, location, options)
    else:
        from normtune.data.datasets.memory import read

        _refuse_history(history, "in memory")
        dataset = read(name, strict=not skip_bad, **_table_options(options))
        dataset = _select_task_and_language(dataset, language, task)
    if group_by is not None:
        from normtune.data.splits import with_groups

        dataset = with_groups(dataset, group_by)
    if image_disjoint:
        dataset = _split_by_picture(dataset, group_by)
    if split_ratio or split_column or splits or fold is not None:
        from normtune.data.split_files import apply_splits

        if image_disjoint:
            raise InputError("--image-disjoint makes splits of its own. Remove it, or the other options of splits.")
        dataset = apply_splits(dataset, split_ratio, split_seed, split_column, options.splits, fold)
    if not named:
        return dataset
    recorded = options.model_dump(exclude={"strict"} if history else {"strict", "history"})
    return replace(dataset, options=recorded | {"data": name, "root": location})


def _table_options(options: DataOptions) -> dict[str, Any]:
    """The options of tables of the user's own."""
    return options.model_dump(include={"columns", "slices", "montage", "task", "text_only"})


def _open_one(given: str | Path, root: Path | None, reading: DataOptions) -> tuple[Dataset, str, Path | None]:
    """Open a dataset by its name, or a file or folder; see `open_dataset`. Also return its name and root."""
    name, location = name_and_root(str(given), root)
    if name == "messages" and reading.columns is not None and location == Path(given):
        name = SUFFIXES.get(location.suffix, name)  # the columns say that it is a table
    if root is None and location is not None and not location.exists():
        raise InputError(f"--data {given}: no such file or folder. {name} needs {ROOTS[name]}.")
    if name not in WITH_HISTORY:
        _refuse_history(reading.history, name)
    return _open_named(name, location, reading), name, location


def _refuse_history(history: bool, name: str) -> None:
    if history:
        raise InputError(
            f"dataset {name} has no conversations: --history works with {' and '.join(WITH_HISTORY)} only. Remove it."
        )


def _split_by_picture(dataset: Dataset, group_by: str | None) -> Dataset:
    """New splits that share no picture and, where the data names patients or studies, none of these."""
    from normtune.data.splits import find_identical_images, group_columns, image_disjoint

    identical = find_identical_images(dataset)
    columns = ", ".join(group_by or column for column in group_columns(dataset.examples))
    note = (
        f"new splits by picture; {len(identical)} pictures have several names; patients by column: {columns or 'none'}"
    )
    return replace(image_disjoint(dataset, seed=0, identical=identical), notes=[*dataset.notes, note])


def _open_named(name: str, root: Path | None, reading: DataOptions) -> Dataset:
    """Open a dataset with its own splits; see `open_dataset`."""
    family, colon, images = name.partition(":")
    if family not in NAMES:
        if "/" in name or Path(name).suffix:
            raise InputError(f"--data {name}: no such file or folder. Check the path.")
        raise InputError(
            f"no dataset '{name}'{did_you_mean(family, NAMES) or '.'} "
            f"Known datasets: {', '.join(NAMES)} (phantom-b:240 has 240 training images); or a file or folder."
        )
    given = [option for option in ("columns", "slices", "montage") if getattr(reading, option)]
    if given and family not in _TABLES:
        raise InputError(f"dataset {family} does not take --{given[0]}: it is for tables of your own. Remove it.")
    if reading.sections != "findings" and family not in WITH_SECTIONS:
        raise InputError(
            f"dataset {family} does not separate the sections of a report: --sections works with "
            f"{' and '.join(WITH_SECTIONS)} only. Remove it."
        )
    if family in PHANTOMS:
        from normtune.data.phantom import phantom_dataset as phantom

        counts = _image_counts(name, images) if colon else None
        return phantom(family.removeprefix("phantom-"), images=counts, task=reading.task)
    if colon:
        raise InputError(f"dataset '{name}': only phantoms take a number of images. Write --data {family}.")
    if root is None:
        raise InputError(f"dataset {family} needs --root: {ROOTS[family]}.")
    return _select_task_and_language(_open_files(family, root, reading), reading.language, reading.task)


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


def _open_files(family: str, root: Path, reading: DataOptions) -> Dataset:
    """Call `read` of the module named after the dataset.

    The module is imported only here, as pyarrow takes half a second to import.
    """
    if not root.exists() and family not in _ON_THE_HUB:
        raise InputError(f"--root {root}: no such file or folder. {family} needs {ROOTS[family]}.")
    options: dict[str, Any] = {"text_only": reading.text_only}
    if family in FORMATS:
        options["strict"] = not reading.skip_bad
    if family in WITH_HISTORY:
        options["history"] = reading.history
    if family in _TABLES:
        options |= _table_options(reading) | {"format": family}
    if family == "slake":
        options["language"] = language_tag(reading.language)
    if family in WITH_SECTIONS:
        options["sections"] = reading.sections
    module = "table" if family in _TABLES else family.replace("-", "_")
    read: Callable[..., Dataset] = import_module(f"normtune.data.datasets.{module}").read
    return read(root, **options)


def _select_task_and_language(dataset: Dataset, language: str, task: Task) -> Dataset:
    """The dataset with only the examples and skipped rows of one task and language; the others are counted."""
    language = language_tag(language)
    if {*dataset.examples.codes("kind")[1]} <= {"report"}:
        task = "report"

    def is_other_task(kind: str) -> bool:
        return (kind == "report") != (task == "report")

    def is_other_language(tag: str) -> bool:
        return bool(tag) and language not in ("all", tag)

    kinds = count_values(*dataset.examples.codes("kind"))
    reason = "is a question (--task vqa)" if task == "report" else "is a report (--task report)"
    dropped = Counter({reason: sum(rows for kind, rows in kinds.items() if is_other_task(kind))})
    dataset = _without(dataset, "kind", is_other_task, dropped)
    if not dataset.examples:
        needed = "reports" if task == "report" else "questions"
        raise InputError(f"dataset {dataset.name} has no {needed}. Check --task and --language.")
    tags = count_values(*dataset.examples.codes(f"{META}language"))
    dropped = Counter({f"language {tag}": rows for tag, rows in tags.items() if is_other_language(tag)})
    dataset = _without(dataset, f"{META}language", is_other_language, dropped)
    if not dataset.examples:
        raise InputError(
            f"dataset {dataset.name} has no rows of language '{language}'. Its languages: {', '.join(sorted(tags))}. "
            "Check --task and --language."
        )
    others = {reason: rows for reason, rows in dataset.dropped.items() if reason.startswith(("language ", "is a "))}
    if others:
        names = ", ".join(f"{reason}: {rows}" for reason, rows in others.items())
        dataset = replace(
            dataset, notes=[*dataset.notes, f"{sum(others.values())} rows are of another language or task ({names})"]
        )
    return dataset


def _without(dataset: Dataset, column: str, is_other: Callable[[str], bool], dropped: Counter[str]) -> Dataset:
    """The dataset without the rows in which a condition holds for a column; `dropped` counts them by reason."""

    def select(examples: Examples) -> Examples:
        return examples.where(~examples.flags(column, is_other))

    skipped = list(select(Examples(dataset.skipped)))
    return replace(dataset, examples=select(dataset.examples), skipped=skipped, dropped=dataset.dropped + dropped)
