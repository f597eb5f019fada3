"""The command that writes a file of splits."""

from __future__ import annotations

from typing import Any

from normtune.commands.app import app, emit, options_from
from normtune.data.options import SplitOptions


@app.command()
@options_from(SplitOptions, positional="data")
def split(*, as_json: bool, **options: Any) -> None:
    """Split a dataset into train, validate and test, or into folds, and write the splits to a file.

    No picture and no patient is in two splits, and each has its share of every kind of answer. The other commands
    read the file with --splits, and --fold for folds.
    """
    from normtune.data.registry import open_dataset
    from normtune.data.split_files import make_split_file, split_counts, write_split_file
    from normtune.errors import InputError
    from normtune.runtime.text_table import text_table

    out, folds, _ = options.pop("out"), options.pop("folds"), options.pop("strict")
    if options["splits"] is not None or options["fold"] is not None or options["image_disjoint"]:
        raise InputError("normtune split makes new splits. Remove --splits, --fold and --image-disjoint.")
    ratio, column = options.pop("split_ratio"), options.pop("split_column")
    seed = options.pop("split_seed") or 0
    dataset = open_dataset(options.pop("data"), **options)
    made = make_split_file(dataset, ratio=ratio, folds=folds, column=column, seed=seed)
    write_split_file(out, made)
    about = {name: value for name, value in made.items() if name != "splits"} | {"out": str(out)}
    counts = split_counts(dataset, made)
    header = ("split", *next(iter(counts.values())))
    rows = [header, *((str(name), *(str(count) for count in row.values())) for name, row in counts.items())]
    notes = [f"{name}: {', '.join(value) if isinstance(value, list) else value}" for name, value in about.items()]
    emit(as_json, about | {"counts": counts}, "\n".join([*text_table(rows, "l" + "r" * 9), "", *notes]))
