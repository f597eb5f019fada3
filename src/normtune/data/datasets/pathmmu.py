"""PathMMU (Sun et al. 2024, arXiv 2401.16355): multiple-choice questions on pathology images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from normtune.data.reading.row_reader import RowReader
from normtune.data.records import Dataset
from normtune.data.split_names import SPLITS, split_name
from normtune.errors import InputError
from normtune.runtime.files import read_json

LICENCE = "CC BY-ND 4.0; the images have the terms of their sources"
_FILE = "data.json"


def read(root: Path, *, text_only: bool = False) -> Dataset:
    """Read data.json of the hub (jamessyx/PathMMU), with images/.

    The rows were checked against data/socialpath_mapping.json of github.com/PathMMU-Benchmark/PathMMU (2,010 rows): No,
    img, question, options ("A) Macronucleoli", ...; three or four), answer (an option with its letter; in five rows
    only the letter), explanation. From that repository's code: data.json is an object of source (PubMed, SocialPath,
    EduContent, Atlas, PathCLS) -> split (val, test, test_tiny) -> rows. data.json itself was not at hand.

    test and test_tiny share no question, and their sum is the published test set: both are of the split test, and
    `subset` in `meta` distinguishes them. Images of some sources have to be fetched elsewhere (instructions.md
    of the repository); rows without an image are skipped and listed. Ids are `pathmmu-<source>-<split>-<No>`.

    Raises:
        InputError: data.json is missing or has another layout, or no row can be used.
    """
    sources = read_json(root / _FILE) if (root / _FILE).is_file() else None
    if sources is None:
        raise InputError(f"{root} holds no {_FILE}. Point --root at the folder with PathMMU's {_FILE} and images/.")
    reader = RowReader("pathmmu", text_only)
    for source, splits in (sources if isinstance(sources, dict) else {"": None}).items():
        if not isinstance(splits, dict) or not all(isinstance(rows, list) for rows in splits.values()):
            raise InputError(f"{_FILE}: no rows by split in '{source}'. Use PathMMU's original file.")
        for subset, rows in splits.items():
            split = split_name(subset.removesuffix("_tiny"))
            if split not in SPLITS:
                raise InputError(f"{_FILE}: '{subset}' in '{source}' is no split. Known: val, test, test_tiny.")
            for number, cells in enumerate(rows, start=1):
                _read_row(reader, source, subset, split, number, cells if isinstance(cells, dict) else {})
    return reader.finish(root, ("images", ""), LICENCE)


def _read_row(reader: RowReader, source: str, subset: str, split: str, number: int, cells: dict[str, Any]) -> None:
    place = f"{source} {subset} {number}"
    row = reader.start_row(_FILE, place, f"pathmmu-{source}-{subset}-{cells.get('No', number)}")
    options, answer = row.read_choice([cells.get("options")], cells.get("answer"), "letter")
    row.finish(
        images=(row.image_key(row.read_text("img", cells.get("img"))),),
        question=row.read_text("question", cells.get("question")),
        answer=answer,
        kind="open",
        split=split,
        meta={"language": "en", "source": source, "subset": subset},
        options=options,
    )
