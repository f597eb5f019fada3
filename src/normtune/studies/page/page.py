"""Writes the page of a study, `report.html`: one file without scripts that loads no other file."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from normtune.runtime.files import read_json, write_text
from normtune.runtime.templates import render_template
from normtune.studies.page import figures, palette
from normtune.studies.page.about import datasets_table, facts, notice
from normtune.studies.page.examples import Roots, read_examples
from normtune.studies.page.figures import Panel
from normtune.studies.page.norm_maps import heat_maps
from normtune.studies.page.results import Record, Results
from normtune.studies.page.sentences import findings
from normtune.studies.page.tables import Table, models_table, paired_table, setting_table, text_cells

FIGURES = (  # id, heading, explanation, and the function that makes the panels
    (
        "share",
        "Score against trained share",
        "Each mark is a recipe: the mean over seeds with its 95% interval. The dashed line is the frozen "
        "base. A chart with many recipes labels only those that no other beats with less; point at a mark to "
        "see its name.",
        figures.against_share,
    ),
    (
        "memory",
        "Score against memory",
        "Peak memory of the process that trains: weights, gradients, optimizer state, activations, and the libraries.",
        figures.against_memory,
    ),
    (
        "transfer",
        "In and out of distribution",
        "Solid: trained on this data set. Hollow: trained on another, and never on this one. Dashed: the "
        "frozen base, zero-shot.",
        figures.transfer,
    ),
    (
        "forgetting",
        "Forgetting",
        "The frozen base's score on its own task minus the trained model's score there, in percentage "
        "points: farther right means more forgotten.",
        figures.forgetting,
    ),
    (
        "small-data",
        "Scores with less training data",
        "Each seed trains on its own random sample of the images.",
        figures.share_curves,
    ),
    (
        "loss",
        "Training loss",
        "The mean over bins of steps and over seeds. Learning rates differ by method, so the order of the "
        "curves is not the order of the scores.",
        figures.loss_curves,
    ),
    (
        "rates",
        "Sensitivity to the learning rate",
        "The trials of the learning-rate search, one seed each, scored on the validation split; their "
        "intervals are in the tables of numbers. Solid: the rate that the search chose.",
        figures.rate_curves,
    ),
)
Block = tuple[str, Any]  # a kind of content that page.html.j2 renders, and its values
Section = tuple[str, str, list[Block]]  # id, heading, content


def render_study_report(results: Mapping[str, Any], folder: Path, *, examples: Roots | None = None) -> str:
    """The page of a study as HTML.

    Args:
        results: the contents of `results.json` (docs/study.md).
        folder: the study's folder, for the licences that its evaluations have recorded and for examples.
        examples: show some images with their answers, of data sets with a licence that permits it. The dict
            holds the folders of the data sets, by their names in the study's file. None: show no examples.

    Raises:
        InputError: examples are requested and an evaluation's files are damaged.
    """
    study = Results(results)
    style = render_template("studies/page/page.css", light=palette.css_variables(0), dark=palette.css_variables(1))
    return render_template(
        "studies/page/page.html.j2",
        study=study,
        notice=notice(),
        sections=[section for section in _sections(study, folder, examples) if section[2]],
        style=re.sub(r"\n\s*", "\n", style),
    )


def write_study_report(folder: Path, *, examples: Roots | None = None) -> Path:
    """Read `results.json` in a study's folder and write `report.html` next to it; see `render_study_report`.

    Raises:
        InputError: there are no results, or the page cannot be written.
    """
    path = folder / "report.html"
    write_text(path, render_study_report(read_json(folder / "results.json"), folder, examples=examples))
    return path


def _sections(study: Results, folder: Path, examples: Roots | None) -> Iterator[Section]:
    """The sections of the page in their order; a section without content is left out."""
    yield "run", "What was run", [("facts", facts(study))]
    yield "failed", "Cells that failed", _failed(study)
    yield "short", "In short", _findings(study)
    yield "tables", "Tables", _tables(study)
    has_legend = False
    for id, heading, text, make_panels in FIGURES:
        if panels := list(make_panels(study)):
            legend: list[Block] = [] if has_legend else [("legend", _legend(study))]
            yield id, heading, [("text", text), *legend, _panels(panels)]
            has_legend = True
    yield "norms", "How far each norm moved", _norms(study)
    if examples is not None:
        blocks: list[Block] = []
        for dataset, sentence, answered in read_examples(study, folder, examples):
            blocks += [("heading", dataset), ("text", sentence), *([("examples", answered)] if answered else [])]
        yield "examples", "Examples", blocks
    yield "terms", "Data, licences, and how the numbers were made", _terms(study, folder)


def _failed(study: Results) -> list[Block]:
    """The failed cells, each with its error."""
    failed = [cell for cell in study.cells if cell.get("status") == "failed"]
    text = "These cells are in no table and no figure. The next run of the study tries them again."
    return [("text", text), ("failed", list(map(_describe_failure, failed)))] if failed else []


def _describe_failure(cell: Record) -> str:
    """A failed cell and its error as text."""
    seed = f"seed {cell['seed']}" if cell.get("seed") is not None else None
    names = [cell["model"], cell["recipe"], cell.get("trained_on"), seed]
    return f"{', '.join(filter(None, names))}: {cell.get('error') or 'no reason is recorded'}"


def _findings(study: Results) -> list[Block]:
    """The findings of each setting as sentences."""
    blocks: list[Block] = []
    for name, sentences in findings(study):
        blocks += [("heading", name), ("list", sentences)]
    text = "Computed from the tables below. 'Above' and 'below' mean that a paired test is significant."
    return [("text", text), *blocks] if blocks else []


def _tables(study: Results) -> list[Block]:
    """The tables of models and settings, and the folded table of paired tests."""
    tables = [models_table(study), *(setting_table(study, setting) for setting in study.settings())]
    blocks: list[Block] = [("table", table) for table in tables if table]
    if blocks and (tests := paired_table(study)):
        blocks.append(("folded", ("All paired tests", [("table", tests)])))
    return blocks


def _legend(study: Results) -> list[tuple[str, str, str]]:
    """The families of methods in the study: name, character and label."""
    families = {arm.family for setting in study.settings() for arm in study.arms(setting)} - {"frozen"}
    return [(name, item.character, item.label) for name, item in palette.FAMILIES.items() if name in families]


def _panels(panels: list[Panel]) -> Block:
    """Charts with their titles and their folded tables of numbers."""
    return "panels", [
        (panel, Table(f"numbers of {panel.title}", text_cells(panel.header), [text_cells(row) for row in panel.rows]))
        for panel in panels
    ]


def _norms(study: Results) -> list[Block]:
    """Heat maps of norms; visible for each setting's first recipe that trains only norms, else folded."""
    visible: list[Block] = []
    folded: list[Block] = []
    settings_seen = set()
    for arm, panels in heat_maps(study):
        title = f"{arm.name}, {figures.setting_title(study, arm.setting)}"
        if arm.family == "ln" and arm.setting not in settings_seen:
            settings_seen.add(arm.setting)
            visible += [("heading", title), _panels(panels)]
        else:
            folded.append(("folded", (title, [_panels(panels)])))
    if not visible and not folded:
        return []
    text = (
        "The stronger a cell's colour, the farther that norm moved from its start, mean over seeds; each map "
        "has its own scale. A column is a layer; norms outside the layers are under 'other'."
    )
    if visible and folded:
        visible.append(("heading", "Other recipes that train norms"))
    return [("text", text), *visible, *folded]


def _terms(study: Results, folder: Path) -> list[Block]:
    """The data sets with their licences, and how intervals and tests are computed."""
    table = datasets_table(study, folder)
    text = (
        "Means over seeds have Student's t intervals; a single run has a percentile bootstrap over images. Tests "
        "pair the answers of two recipes to the same questions and resample by image, all common seeds together; "
        "their p-values are corrected by Holm's method within a grid, model, pair of data sets and metric. Where a "
        "learning rate was searched, it was on the validation split, never on the test split. An arrowhead at the "
        "end of an interval means that it continues beyond the axis."
    )
    return [*([("table", table)] if table else []), ("text", text), ("text", notice())]
