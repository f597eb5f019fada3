"""How far confidence and right answers agree on SLAKE, and how large conformal sets of its closed questions are.

    python benchmarks/confidence.py --root SLAKE --adapters ln=runs/ln full=runs/full --out benchmarks/confidence.json

The base and each adapter answer the validation split, which calibrates the sets, and the test split. Closed questions
choose between yes and no by probability. `benchmarks/reliance.py` trains adapters that fit.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from record import record

import normtune
from normtune.runtime.number_format import format_interval
from normtune.runtime.text_table import markdown_table

LEVELS = ("0.9", "0.95")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--root", type=Path, required=True, help="folder of SLAKE")
    parser.add_argument("--model", default="nano")
    parser.add_argument("--adapters", nargs="*", default=[], metavar="NAME=DIR", help="adapters beside the base")
    parser.add_argument("--limit", type=int, help="the first rows of each split only")
    options = parser.parse_args()
    data = normtune.open_dataset("slake", root=options.root)
    model = normtune.load(options.model)
    adapters: dict[str, Path | None] = {"frozen": None}
    adapters |= {name: Path(folder) for name, _, folder in (text.partition("=") for text in options.adapters)}
    rows = []
    for recipe, adapter in adapters.items():
        with TemporaryDirectory() as folder:
            common: dict[str, Any] = {"adapter": adapter, "candidates": "yes/no", "limit": options.limit}
            normtune.evaluate(model, data, split="validate", out=folder, **common)
            result = normtune.evaluate(model, data, conformal=folder, **common).to_dict()
        rows += [
            {"recipe": recipe, "questions": kind, **{key: value for key, value in report.items() if key != "bins"}}
            for kind, report in result["confidence"].items()
        ]
        rows.append({"recipe": recipe, "questions": "sets", **result["conformal"]})
    table = confidence_table(rows)
    print(table)
    if options.out:
        record(options.out, "confidence", rows, model=options.model, dataset=data.name, limit=options.limit)
        options.out.with_suffix(".md").write_text(table, encoding="utf-8")


def confidence_table(rows: list[dict[str, Any]]) -> str:
    """Two Markdown tables, in %: confidence by kind of question, and the sets."""
    head = ["recipe", "questions", "mean confidence", "right", "ECE", "AURC", "right among the surer half"]
    lines = []
    for row in rows:
        if row["questions"] != "sets":
            half = next(point for point in row["risk_coverage"] if point["coverage"] == 0.5)
            mean, surer = f"{100 * row['mean_confidence']:.1f}", f"{100 * (1 - half['risk']):.1f}"
            scores = [format_interval(row[name]) for name in ("right", "ece", "aurc")]
            lines.append([row["recipe"], row["questions"], mean, *scores, surer])
    sets = []
    for row in rows:
        for level in LEVELS if row["questions"] == "sets" else ():
            sets_at_level, size = row["levels"][level], row["test"]
            share = sets_at_level["sizes"].get("1", 0) / size["rows"]
            sets.append(
                [
                    row["recipe"],
                    f"{100 * float(level):g}",
                    format_interval(sets_at_level["coverage"]),
                    f"{sets_at_level['mean_size']:.2f}",
                    f"{100 * share:.1f}",
                ]
            )
    set_head = ["recipe", "level", "contain the answer", "candidates in a set", "sets of one"]
    return (
        "\n\n".join("\n".join(markdown_table(*table)) for table in ((head, lines, "ll"), (set_head, sets, "l"))) + "\n"
    )


if __name__ == "__main__":
    main()
