"""A study's results as the tables of a paper: the same `Table` objects in Markdown and in LaTeX."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from normtune.runtime.number_format import format_interval
from normtune.runtime.text_table import markdown_table
from normtune.studies.spec import SEARCH, Study
from normtune.studies.statistics import format_rates

Row = dict[str, Any]
Tables = Mapping[str, list[Row]]
# The metrics of a score table with their headings, for each task.
COLUMNS = {
    "vqa": {"closed_label": "closed", "open_exact": "open", "open_recall": "open recall", "global_exact": "global"},
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


_LATEX_ESCAPES = {
    "\\": r"\textbackslash{}",
    "&": r"\&",
    "%": r"\%",
    "_": r"\_",
    "#": r"\#",
    "$": r"\$",
    "{": r"\{",
    "}": r"\}",
}
_LATEX_ESCAPES |= {"~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "–": "--"}


def latex(study: Study, tables: Tables) -> str:
    r"""All tables of a study in LaTeX; the document needs `\usepackage{booktabs}`."""

    def escape(text: str) -> str:
        return "".join(_LATEX_ESCAPES.get(character, character) for character in text)

    parts = [f"% study {study.study}; needs \\usepackage{{booktabs}}"]
    for table in all_tables(study, tables):
        columns = "l" * table.left + "r" * (len(table.head) - table.left)
        lines = [" & ".join(map(escape, row)) + r" \\" for row in (table.head, *table.rows)]
        body = [rf"\begin{{tabular}}{{{columns}}}", r"\toprule", lines[0], r"\midrule", *lines[1:], r"\bottomrule"]
        caption = rf"\caption{{{escape(table.caption)}}}"
        parts.append("\n".join([r"\begin{table}", r"\centering", caption, *body, r"\end{tabular}", r"\end{table}"]))
    return "\n\n".join(parts) + "\n"


def all_tables(study: Study, tables: Tables) -> Iterator[Table]:
    """All tables: scores, costs and tests of each grid, then forgetting, then learning-rate searches."""
    tasks = {row["dataset"]: row["task"] for row in tables["evaluations"]}
    for grid in study.grids:
        yield from _score_tables(grid, tasks, tables)
        yield from _cost_tables(grid, tables)
        yield from _test_tables(grid, tables)
    yield from _forgetting_tables(tables)
    yield from _search_tables(tables)


def _format_note(tables: Tables) -> str:
    """The sentence below the title: how many cells are done, and how to read the scores."""
    states = [cell["status"] for cell in tables["cells"]]
    counts = ", ".join(f"{states.count(state)} {state}" for state in ("done", "failed", "missing") if state in states)
    return (
        f"{len(states)} cells: {counts}. Scores are % (CIDEr-D: times 100): mean over seeds with its 95% "
        "interval for new seeds and new images; of one seed, that run's own, for new images."
    )


def _score_tables(grid: str, tasks: Mapping[str, str], tables: Tables) -> Iterator[Table]:
    """A table for each model, training set, share and evaluated set; a row a recipe, the base first."""
    grid_rows = [row for row in tables["seeds"] if row["grid"] == grid]
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in grid_rows:
        if row["trained_on"] is not None:
            key = (row["model"], row["trained_on"], row["share"], row["dataset"], row["role"])
            groups.setdefault(key, []).append(row)
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
        share_note = "" if share == 1 else f" ({100 * share:g}% of the images)"
        trained = f"trained on {trained_on}{share_note}, " if trained_on else "not trained, "
        body = [
            [recipe, rate or "–", str(max(row["seeds"] for row in line.values()))]
            + [format_interval(line[name] | {"value": line[name]["mean"]}) if name in line else "–" for name in metrics]
            for (recipe, rate), line in lines.items()
        ]
        yield Table(
            f"{grid}: {model}, {trained}{ROLES[role].format(dataset)}",
            ["recipe", "learning rate", "seeds", *(columns[name] for name in metrics)],
            body,
            2,
        )


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
        body = [
            [
                recipe,
                f"{cells[0]['trainable']:,}",
                f"{100 * cells[0]['trainable_share']:.4f}",
                f"{_mean(cells, 'train_peak_bytes') / 2**20:,.0f}",
                _above_base(cells),
                f"{_mean(cells, 'train_seconds'):,.0f}",
                f"{_mean(cells, 'train_pairs_per_second'):,.1f}",
            ]
            for recipe, cells in recipes.items()
        ]
        head = ["recipe", "trainable", "%", "peak MiB", "above base MiB", "seconds", "pairs/s"]
        yield Table(f"{grid}: {model} on {trained_on}, what training takes", head, body, 1)


def _above_base(cells: Sequence[Row]) -> str:
    """Peak memory above the loaded base in MiB; a dash if version 0.1 ran a cell, which did not measure it."""
    if any(cell["train_bytes_above_base"] is None for cell in cells):
        return "–"
    return f"{_mean(cells, 'train_bytes_above_base') / 2**20:,.0f}"


def _mean(cells: Sequence[Row], column: str) -> float:
    return float(sum(cell[column] for cell in cells) / len(cells))


def _test_tables(grid: str, tables: Tables) -> Iterator[Table]:
    """The differences of each recipe to the reference recipe, with p-values."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in tables["tests"]:
        if row["grid"] == grid:
            key = (row["model"], row["trained_on"], row["share"], row["dataset"], row["against"])
            groups.setdefault(key, []).append(row)
    for (model, trained_on, share, dataset, against), rows in groups.items():
        share_note = "" if share == 1 else f" ({100 * share:g}% of the images)"
        body = [
            [
                row["recipe"],
                row["metric"],
                format_interval({**row, "value": row["difference"]}, sign="+"),
                f"{row['p_holm']:.4f}",
                row["question"],
                str(row["seeds"]),
                f"{100 * row['smallest_difference']:.1f}",
            ]
            for row in rows
        ]
        caption = (
            f"{grid}: {model}, trained on {trained_on}{share_note}, on {dataset}: difference to {against}; p (Holm) "
            "says whether the recipes differ, with fewer than three seeds only whether these trained models do; "
            "can show: the difference found in 80% of such comparisons"
        )
        yield Table(caption, ["recipe", "metric", "difference", "p (Holm)", "of", "seeds", "can show"], body, 2)


def _forgetting_tables(tables: Tables) -> Iterator[Table]:
    """Points lost on the base's own task, for models trained on all images; means over seeds."""
    cells = {cell["key"]: cell for cell in tables["cells"]}
    groups: dict[tuple[str, str, str], dict[tuple[str, str, str, str], list[float]]] = {}
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
                groups.setdefault(key, {}).setdefault(run, []).append(row["forgotten"])
    for (model, dataset, metric), lost_by_run in groups.items():
        body = [
            [*run, str(len(values)), f"{100 * sum(values) / len(values):+.1f}"] for run, values in lost_by_run.items()
        ]
        before = 100 * base_scores[model, dataset, metric]
        caption = f"{model}: points of {metric} lost on {dataset}, its own task, where the base has {before:.1f}"
        yield Table(caption, ["grid", "trained on", "recipe", "learning rate", "seeds", "lost"], body, 4)


def _search_tables(tables: Tables) -> Iterator[Table]:
    """The validation score of every learning-rate trial."""
    scores = {
        row["key"]: row["value"]
        for row in tables["metrics"]
        if row["role"] == "validate" and row["metric"] in ("global_exact", "rouge_l/none")
    }
    body = [
        [
            cell["model"],
            cell["trained_on"],
            cell["recipe"],
            f"{min(cell['rates'].values()):g}",
            f"{100 * scores[cell['key']]:.1f}",
        ]
        for cell in sorted(tables["cells"], key=lambda cell: min(cell["rates"].values(), default=0.0))
        if SEARCH in cell["grids"] and cell["key"] in scores
    ]
    if body:
        body.sort(key=lambda row: row[:3])
        head = ["model", "trained on", "recipe", "learning rate", "validation"]
        yield Table("Learning rates tried on the validation split (global exact, or ROUGE-L)", head, body, 3)
