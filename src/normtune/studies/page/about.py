"""What a study's page says of the study itself: what ran, where, on which data, and how numbers were made."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from normtune.adapters.info import NOTICE
from normtune.runtime.files import read_json
from normtune.studies.page.html import Child, tag
from normtune.studies.page.number_format import duration, memory, several
from normtune.studies.page.results import Record, Results, values_of
from normtune.studies.page.tables import boxed


def facts(study: Results) -> list[Child]:
    """What was run, when, on what, by which versions."""
    cells = study.cells
    count = {
        state: sum(cell.get("status") == state for cell in cells) for state in ("done", "failed", "missing")
    }
    trained = [cell for cell in study.done.values() if cell.get("trained_on") is not None]
    states = [f"{number} {state}" for state, number in count.items() if number or state == "done"]
    dates = sorted(str(cell[end])[:10] for cell in cells for end in ("started", "finished") if cell.get(end))
    days = " to ".join(dict.fromkeys((dates[0], dates[-1]))) if dates else ""
    versions = [f"{name} {value}" for name, value in _merged(cells, "versions")]
    seeds = sorted({cell["seed"] for cell in trained if cell.get("seed") is not None})
    pairs: list[tuple[str, str]] = [
        ("cells", f"{several(states)} (a cell is one training with its evaluations)"),
        ("models", several(values_of(cells, "model"))),
        ("recipes", several(values_of(cells, "recipe"))),
        ("trained on", several(values_of(cells, "trained_on"))),
        ("evaluated on", several(values_of(study.tables["evaluations"], "dataset"))),
        ("seeds", several([str(seed) for seed in seeds])),
        ("training time", f"{duration(sum(cell.get('train_seconds') or 0 for cell in trained))} in all"),
        ("date", days),
        ("hardware", "; ".join(_machines(cells))),
        ("versions", ", ".join(versions)),
        (
            "commit",
            several([str(one)[:12] + "+" * str(one).endswith("+") for one in values_of(cells, "commit")]),
        ),
        ("bases", several(_bases(cells))),
    ]
    return [
        tag(
            "dl",
            *(
                tag(kind, text)
                for f in pairs
                if f[1] not in ("", "none")
                for kind, text in zip(("dt", "dd"), f, strict=True)
            ),
            class_="facts",
        )
    ]


def _merged(cells: Iterable[Record], column: str) -> Iterator[tuple[str, str]]:
    """Each key of a JSON column with all its values."""
    found: dict[str, dict[str, None]] = {}
    for cell in cells:
        value = cell.get(column)
        if isinstance(value, Mapping):
            for name, one in value.items():
                found.setdefault(name, {})[str(one)] = None
    for name, values in found.items():
        yield name, several(list(values))


def _machines(cells: Iterable[Record]) -> list[str]:
    """Each different machine in words."""
    found: dict[str, None] = {}
    for cell in cells:
        value = cell.get("hardware")
        if isinstance(value, Mapping):
            parts = [
                memory(float(one)) + " " + name.replace("_bytes", "").replace("_", " ")
                if name.endswith("_bytes") and one
                else f"{one} {name.removesuffix('s') if one == 1 else name}"
                if isinstance(one, int) and not isinstance(one, bool)
                else str(one)
                for name, one in value.items()
                if one not in (None, "", [], False)
            ]
            found[", ".join(parts)] = None
        elif value:
            found[str(value)] = None
    return list(found)


def _bases(cells: Iterable[Record]) -> list[str]:
    return list(
        dict.fromkeys(
            f"{cell['model']} {str(cell['base_fingerprint'])[:12]}"
            for cell in cells
            if cell.get("base_fingerprint")
        )
    )


def terms(study: Results, folder: Path) -> list[Child]:
    """Licences, the test splits, and how intervals and tests were made."""
    found: dict[str, Record] = {}
    for row in study.tables["evaluations"]:
        if row["role"] != "validate":
            found.setdefault(row["dataset"], row)
    rows = [
        tag(
            "tr",
            tag("th", dataset, scope="row"),
            tag("td", row["split"]),
            tag("td", f"{row['rows']:,}", class_="number"),
            tag("td", f"{row['images']:,}", class_="number"),
            tag("td", licence(study, folder, dataset)),
            tag("td", tag("code", str(row.get("split_hash") or "")[:12])),
        )
        for dataset, row in found.items()
    ]
    heads = [
        tag("th", head, scope="col", class_="number" if head in ("rows", "images") else None)
        for head in ("data set", "split", "rows", "images", "licence", "rows' hash")
    ]
    table = tag("table", tag("thead", tag("tr", *heads)), tag("tbody", *rows))
    return [
        boxed(table, "data sets and licences") if rows else None,
        tag(
            "p",
            "Means over seeds have Student's t intervals; a single run has a percentile bootstrap over "
            "images. Tests pair the answers of two recipes to the same questions and resample by image, all "
            "common seeds together; their p-values are corrected by Holm's method within a grid, model, pair "
            "of data sets and metric. Where a learning rate was searched, it was on the validation split, "
            "never on the test split. An arrowhead at an interval's end says that it goes on past the axis.",
        ),
        tag("p", notice()),
    ]


def licence(study: Results, folder: Path, dataset: str) -> str:
    """The licence that an evaluation of a data set has recorded."""
    for row in study.tables["evaluations"]:
        path = folder / str(row.get("folder") or "") / "metrics.json"
        if row["dataset"] == dataset and row.get("folder") and path.is_file():
            return str(read_json(path).get("licence") or "unknown")
    return "unknown"


def notice() -> str:
    """That it is for research alone, as a sentence."""
    return f"{NOTICE[0].upper()}{NOTICE[1:]}."
