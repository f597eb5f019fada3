"""Several datasets as one, with a weight for each: `--data slake=SLAKE:0.7,rows.csv:0.3`.

The rows of all datasets are one dataset. Ids and image keys begin with the name of their dataset, and the column
`dataset` of `meta` has it. Weights only decide how often training takes the rows; see `normtune.data.sampling`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING

from normtune.data.examples import Example, Examples
from normtune.data.formats import FORMATS, MixtureEntry
from normtune.data.records import Dataset
from normtune.data.splits import is_group_column
from normtune.errors import InputError

if TYPE_CHECKING:
    from PIL import Image

COLUMN = "dataset"  # the field of `meta` that names a row's dataset
_MANY_ROWS = 300_000  # from here on the rows are written to a memory-mapped table
_ROWS_AT_ONCE = 50_000


def open_mixture(
    entries: Sequence[MixtureEntry], open_entry: Callable[[MixtureEntry], Dataset], group_by: str | None
) -> Dataset:
    """Open the datasets of a mixture and join them.

    Patients and studies of two datasets are different ones even if they have the same name, except in the column
    `group_by`, which names the patients of all datasets.

    Args:
        group_by: the column of --group-by.

    Raises:
        InputError: a dataset cannot be opened, or only some of them are reports.
    """
    parts: dict[str, Dataset] = {}
    weights: dict[str, float] = {}
    for entry in entries:
        dataset = open_entry(entry)
        label = Path(entry.root or entry.data).stem if dataset.name in FORMATS else dataset.name
        numbered = (label if number == 1 else f"{label}-{number}" for number in range(1, len(entries) + 1))
        label = next(name for name in numbered if name not in parts)
        parts[label], weights[label] = dataset, entry.weight
    reports = [name for name, dataset in parts.items() if "report" in dataset.examples.codes("kind")[1]]
    if 0 < len(reports) < len(parts):
        raise InputError(f"--data: {', '.join(reports)} has reports, the others have questions. Mix one or the other.")
    notes = [f"{name}: {note}" for name, dataset in parts.items() for note in dataset.notes]
    if hidden := [name for name, dataset in parts.items() if COLUMN in dataset.examples.meta_columns]:
        notes.append(f"the column '{COLUMN}' of {', '.join(hidden)} is replaced by the name of the dataset")
    notes.append("weights apply to training only: " + ", ".join(f"{name} {w:g}" for name, w in weights.items()))
    return Dataset(
        name=f"mixture of {', '.join(parts)}",
        examples=_join({name: dataset.examples for name, dataset in parts.items()}, group_by),
        open_image=_Images({name: dataset.open_image for name, dataset in parts.items()}),
        problems=[
            replace(problem, file=f"{name}: {problem.file}")
            for name, dataset in parts.items()
            for problem in dataset.problems
        ],
        licence="; ".join(f"{name}: {dataset.licence}" for name, dataset in parts.items()),
        skipped=[row for name, dataset in parts.items() for row in _labelled(dataset.skipped, name, group_by)],
        notes=notes,
        dropped=sum((dataset.dropped for dataset in parts.values()), Counter()),
        mixture={name: {"name": parts[name].name, "weight": weights[name]} for name in parts},
    )


class _Images:
    """Opens the images of all datasets; a class, so that it can be pickled."""

    def __init__(self, openers: Mapping[str, Callable[[str], Image.Image]]) -> None:
        self._openers = openers

    def __call__(self, key: str) -> Image.Image:
        label, _, own_key = key.partition("/")
        return self._openers[label](own_key)


def _join(parts: Mapping[str, Examples], group_by: str | None) -> Examples:
    rows = chain.from_iterable(_labelled(examples, label, group_by) for label, examples in parts.items())
    has_history = any(examples.codes("history")[1] != [()] for examples in parts.values())
    if has_history or sum(map(len, parts.values())) < _MANY_ROWS:
        return Examples(rows)
    from normtune.data.row_table import RowTableWriter

    writer = RowTableWriter()
    while block := list(islice(rows, _ROWS_AT_ONCE)):
        writer.add_examples(block)
    return Examples(writer.finish())


def _labelled(examples: Sequence[Example], label: str, group_by: str | None) -> Iterator[Example]:
    for example in examples:
        meta = {
            column: f"{label}/{value}" if value and column != group_by and is_group_column(column) else value
            for column, value in example.meta.items()
        }
        images = tuple(f"{label}/{key}" for key in example.images)
        yield replace(example, id=f"{label}/{example.id}", images=images, meta=meta | {COLUMN: label})
