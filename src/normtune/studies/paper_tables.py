"""A study's results as the tables of a paper: the same `Table` objects in Markdown and in LaTeX."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from operator import itemgetter
from statistics import mean
from typing import Any

from normtune.runtime.number_format import format_interval, format_p_number
from normtune.runtime.text_table import markdown_table
from normtune.studies.pooling import Row, Tables, fold_note, group_by, group_runs
from normtune.studies.spec import SEARCH, Study
from normtune.studies.statistics import format_rates

# The metrics of a score table with their headings, for each task.
COLUMNS = {
    "vqa": {
        "choice_accuracy": "choice",
        "closed_label": "closed",
        "open_exact": "open",
        "open_recall": "open recall",
        "global_exact": "global",
    },
    "report": {"bleu_1/none": "BLEU-1", "bleu_4/none": "BLEU-4", "rouge_l/none": "ROUGE-L", "cider_d/none": "CIDEr-D"},
}
# The end of a score table's caption, by the role of the evaluated data set (see `plan.Role`).
ROLES = {
    "in": "on {0}",
    "out": "out of distribution: on {0}",
    "home": "the base's own task: {0}",
    "zero-shot": "on {0}",
}


@dataclass(frozen=True)
class Table:
    """A table of formatted cells; the first `left` columns are aligned left, the others right."""

    caption: str
    head: list[str]
    rows: list[list[str]]
    left: int


def markdown(study: Study, tables: Tables) -> str:
    """All tables of a study in Markdown, each below its caption."""
    parts = [f"# {study.study}", *([study.about] if study.about else []), _format_note(tables)]
    for table in all_tables(study, tables):
        lines = markdown_table(table.head, table.rows, "l" * table.left + "r")
        parts.append("\n".join([f"**{table.caption}**", "", *lines]))
    return "\n\n".join(parts) + "\n"


_LATEX_ESCAPES = {character: rf"\{character}" for character in "&%_#${}"}
_LATEX_ESCAPES |= {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "–": "--",
    "<": "$<$",
    ">": "$>$",
}


def escape_latex(text: str) -> str:
    """The text with LaTeX's special characters escaped."""
    return "".join(_LATEX_ESCAPES.get(character, character) for character in text)


def latex(study: Study, tables: Tables) -> str:
    r"""All tables of a study in LaTeX; the document needs `\usepackage{booktabs}`."""
    parts = [f"% study {study.study}; needs \\usepackage{{booktabs}}"]
    for table in all_tables(study, tables):
        columns = "l" * table.left + "r" * (len(table.head) - table.left)
        lines = [" & ".join(map(escape_latex, row)) + r" \\" for row in (table.head, *table.rows)]
        body = [rf"\begin{{tabular}}{{{columns}}}", r"\toprule", lines[0], r"\midrule", *lines[1:], r"\bottomrule"]
        caption = rf"\caption{{{escape_latex(table.caption)}}}"
        parts.append("\n".join([r"\begin{table}", r"\centering", caption, *body, r"\end{tabular}", r"\end{table}"]))
    return "\n\n".join(parts) + "\n"


def all_tables(study: Study, tables: Tables) -> Iterator[Table]:
    """All tables: scores, costs and tests of each grid, then forgetting, then learning-rate searches."""
    tests = [row for row in tables["evaluations"] if row["role"] != "validate"]
    tasks = {row["dataset"]: row["task"] for row in tests}
    by_dataset = group_by([*tests, *tables["seeds"]], itemgetter("dataset"))
    # the most of a metric and of all folds: a metric of some kinds of questions has fewer images
    images = {name: f"{max(row['images'] for row in rows):,} images" for name, rows in by_dataset.items()}
    for grid in study.grids:
        yield from _score_tables(grid, tasks, images, tables)
        yield from _cost_tables(grid, tables)
        yield from _test_tables(grid, tables)
    yield from _forgetting_tables(images, tables)
    yield from _search_tables(tables)


def _format_note(tables: Tables) -> str:
    """The sentence below the title: how many cells are done, and how to read the scores."""
    states = [cell["status"] for cell in tables["cells"]]
    counts = ", ".join(f"{states.count(state)} {state}" for state in ("done", "failed", "missing") if state in states)
    note = (
        f"{len(states)} cells: {counts}. Scores are % (CIDEr-D: times 100) with 95% intervals: of a mean over seeds "
        "for new seeds and new images, of one seed for new images."
    )
    return " ".join(filter(None, [note, fold_note(tables["cells"])]))


def _score_tables(grid: str, tasks: Mapping[str, str], images: Mapping[str, str], tables: Tables) -> Iterator[Table]:
    """A table for each model, training set, share and evaluated set; a row a recipe, the base first."""
    grid_rows = [row for row in tables["seeds"] if row["grid"] == grid]
    trained_rows = [row for row in grid_rows if row["trained_on"] is not None]
    groups = group_by(trained_rows, itemgetter("model", "trained_on", "share", "dataset", "role"))
    base_rows = [row for row in grid_rows if row["trained_on"] is None]
    # A table of the base only is left out if another table has the base together with trained recipes.
    trained_for = {(row["model"], row["dataset"]) for row in tables["seeds"] if row["trained_on"] is not None}
    for row in base_rows:
        if (row["model"], row["dataset"]) not in trained_for:
            groups.setdefault((row["model"], None, 1.0, row["dataset"], row["role"]), [])
    for (model, trained_on, share, dataset, role), rows in groups.items():
        base = [row for row in base_rows if (row["model"], row["dataset"]) == (model, dataset)]
        columns = COLUMNS[tasks[dataset]]
        lines: dict[tuple[str, str], dict[str, Row]] = {}
        for row in (*base, *rows):
            lines.setdefault((row["recipe"], row["rate"]), {})[row["metric"]] = row
        metrics = [name for name in columns if any(name in line for line in lines.values())]
        trained = f"trained on {trained_on}{_share_note(share)}, " if trained_on else "not trained, "
        body = [
            [recipe, rate or "–", str(max(row["seeds"] for row in line.values()))]
            + [format_interval(line[name] | {"value": line[name]["mean"]}) if name in line else "–" for name in metrics]
            for (recipe, rate), line in lines.items()
        ]
        yield Table(
            f"{grid}: {model}, {trained}{ROLES[role].format(dataset)}, {images[dataset]}",
            ["recipe", "learning rate", "seeds", *(columns[name] for name in metrics)],
            body,
            2,
        )


def _share_note(share: float) -> str:
    """The share of the training images, for a caption; "" for all of them."""
    return "" if share == 1 else f" ({100 * share:g}% of the images)"


def _cost_tables(grid: str, tables: Tables) -> Iterator[Table]:
    """Trainable parameters, memory and time of each recipe; means over seeds."""
    groups: dict[tuple[str, str, float], dict[str, list[Row]]] = {}
    for cell in tables["cells"]:
        if grid in cell["grids"] and cell["status"] == "done" and cell["trained_on"] is not None:
            key = (cell["model"], cell["trained_on"], cell["share"])
            groups.setdefault(key, {}).setdefault(cell["recipe"], []).append(cell)
    for (model, trained_on, share), recipes in groups.items():
        if share != max(key[2] for key in groups if key[:2] == (model, trained_on)):
            continue  # a cost table is made for the largest share only
        costs = [
            cost for cost in _COSTS if any(cell.get(cost) is not None for cells in recipes.values() for cell in cells)
        ]
        body = []
        for recipe, cells in recipes.items():
            trained = f"{cells[0]['trainable']:,}", f"{100 * cells[0]['trainable_share']:.4f}"
            means = (_COSTS[cost][1].format(_mean(cells, cost)) for cost in costs)
            body.append([recipe, str(len(group_runs(cells))), *trained, *means])
        head = ["recipe", "seeds", "trainable", "%", *(_COSTS[cost][0] for cost in costs)]
        over = "seeds" if all(cell.get("fold") is None for cells in recipes.values() for cell in cells) else "all folds"
        yield Table(f"{grid}: {model} on {trained_on}, what training takes (means over {over})", head, body, 1)


# Costs in a cost table: column of `cells` -> heading and format. Columns in bytes are shown in MiB.
_COSTS = {
    "train_bytes_above_base": ("above base MiB", "{:,.0f}"),
    "train_peak_bytes": ("peak MiB", "{:,.0f}"),
    "passes": ("passes", "{:,.1f}"),
    "train_seconds": ("seconds", "{:,.0f}"),
    "train_pairs_per_second": ("pairs/s", "{:,.1f}"),
}


def _mean(cells: Sequence[Row], column: str) -> float:
    """The mean of a column over the cells that have it; NaN if none has. Bytes are in MiB."""
    values = [cell[column] for cell in cells if cell.get(column) is not None]
    unit = 2**20 if "bytes" in column else 1
    return sum(values) / len(values) / unit if values else math.nan


def _test_tables(grid: str, tables: Tables) -> Iterator[Table]:
    """The differences of each recipe to the reference recipe, with p-values."""
    grid_rows = [row for row in tables["tests"] if row["grid"] == grid]
    groups = group_by(grid_rows, itemgetter("model", "trained_on", "share", "dataset", "against"))
    for (model, trained_on, share, dataset, against), rows in groups.items():
        body = []
        for row in rows:
            points = (row.get(name) for name in ("smallest_difference", "margin"))
            answers = (row.get(name) for name in ("equivalent", "no_worse"))
            body.append(
                [
                    *(row["recipe"], row["metric"], row.get("question") or "–"),
                    *(format_interval({**row, "value": row["difference"]}, sign="+"), format_p_number(row["p_holm"])),
                    *("–" if value is None else f"{100 * value:.1f}" for value in points),
                    *("–" if answer is None else "yes" if answer else "no" for answer in answers),
                    *(str(row["images"]), str(row["seeds"])),
                ]
            )
        head = ["recipe", "metric", "compares", "difference", "p (Holm)", "can show"]
        head += ["margin", "equivalent", "no worse", "images", "seeds"]
        if all(row.get("margin") is None for row in rows):
            head, body = [*head[:6], *head[9:]], [[*line[:6], *line[9:]] for line in body]
        caption = (
            f"{grid}: {model}, trained on {trained_on}{_share_note(share)}, on {dataset}: difference to {against}, "
            "p corrected over recipes (Holm); can show: the true difference that 80% of such comparisons find"
        )
        yield Table(caption, head, body, 3)


def _forgetting_tables(images: Mapping[str, str], tables: Tables) -> Iterator[Table]:
    """Points lost on the base's own task, for models trained on all images; means over seeds."""
    cells = {cell["key"]: cell for cell in tables["cells"]}
    groups: dict[tuple[str, str, str], dict[tuple[str, str, str, str], dict[Any, list[float]]]] = {}
    base_scores: dict[tuple[str, str, str], float] = {}
    for row in tables["forgetting"]:
        cell = cells[row["key"]]
        if row["metric"] not in ("global_exact", "rouge_l/none") or cell["share"] < 1:
            continue
        key = (cell["model"], row["dataset"], row["metric"])
        base_scores[key] = row["base"]
        for grid in cell["grids"]:
            if grid != SEARCH:
                run = (grid, cell["trained_on"], cell["recipe"], format_rates(cell["rates"]))
                groups.setdefault(key, {}).setdefault(run, {}).setdefault(cell["seed"], []).append(row["forgotten"])
    for (model, dataset, metric), lost_by_run in groups.items():
        body = [
            [*run, str(len(by_seed)), f"{100 * mean(chain(*by_seed.values())):+.1f}"]
            for run, by_seed in lost_by_run.items()
        ]
        before = 100 * base_scores[model, dataset, metric]
        task = f"{dataset} ({images[dataset]}), its own task, where the base has {before:.1f}"
        caption = f"{model}: points of {metric} lost on {task}"
        yield Table(caption, ["grid", "trained on", "recipe", "learning rate", "seeds", "lost"], body, 4)


def _search_tables(tables: Tables) -> Iterator[Table]:
    """The validation score of every learning-rate trial."""
    scores = {
        row["key"]: row
        for row in tables["metrics"]
        if row["role"] == "validate" and row["metric"] in ("global_exact", "rouge_l/none")
    }
    body = [
        [
            *(cell["model"], cell["trained_on"], cell["recipe"], f"{min(cell['rates'].values()):g}"),
            *(format_interval(scores[cell["key"]]), str(scores[cell["key"]]["images"])),
        ]
        for cell in sorted(tables["cells"], key=lambda cell: min(cell["rates"].values(), default=0.0))
        if SEARCH in cell["grids"] and cell["key"] in scores
    ]
    if body:
        body.sort(key=lambda row: row[:3])
        head = ["model", "trained on", "recipe", "learning rate", "validation", "images"]
        yield Table(
            "Learning rates tried on the validation split (global exact, or ROUGE-L), one seed each", head, body, 3
        )
