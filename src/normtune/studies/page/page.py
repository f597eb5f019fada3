"""Writes the page of a study, `report.html`: one file without scripts that loads no other file."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from normtune.runtime.files import read_json, write_text
from normtune.runtime.number_format import join_names
from normtune.runtime.templates import render_template
from normtune.studies.page import curves, figures, palette
from normtune.studies.page.about import FOLDED_FACTS, datasets_table, facts, notice, warnings
from normtune.studies.page.examples import Roots, read_examples
from normtune.studies.page.figures import Panel
from normtune.studies.page.norm_maps import heat_maps
from normtune.studies.page.results import Record, Results
from normtune.studies.page.sentences import findings
from normtune.studies.page.strata import strata_tables
from normtune.studies.page.tables import Cell, Table, models_table, setting_table, text_cells
from normtune.studies.pooling import fold_note

FIGURES = (
    figures.differences,
    figures.seed_scores,
    figures.transfer,
    figures.forgetting,
    figures.against_share,
    figures.against_memory,
    curves.learning_curves,
    curves.loss_curves,
    curves.rate_curves,
)
# the figures of settings that compare shares of the data
CURVE_FIGURES = (curves.share_curves, figures.differences, figures.seed_scores)
OPEN_FIGURES = 12  # the figures of further settings are folded
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
    return render_page(
        title=study.study,
        about=study.about,
        kind="study report",
        warnings=warnings(study),
        sections=[section for section in _sections(study, folder, examples) if section[2]],
        source="normtune study from results.json",
    )


def render_page(
    *, title: str, about: str, sections: list[Section], warnings: Sequence[str], source: str, kind: str = ""
) -> str:
    """A page as HTML: one file without scripts that loads no other file.

    Args:
        title: the heading.
        about: the text below it; "" for none.
        sections: id, heading and content of each section.
        warnings: sentences in a box before the first section.
        source: what made the page, from which file.
        kind: what the browser's title says after the heading.
    """
    style = render_template("studies/page/page.css", light=palette.css_variables(0), dark=palette.css_variables(1))
    return render_template(
        "studies/page/page.html.j2",
        title=title,
        about=about,
        kind=kind,
        notice=notice(),
        warnings=warnings,
        sections=sections,
        source=source,
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
    entries = facts(study)
    first = [entry for entry in entries if entry[0] not in FOLDED_FACTS]
    rest = [entry for entry in entries if entry[0] in FOLDED_FACTS]
    yield "run", "What was run", [("facts", first), *_fold("Machine and versions", [("facts", rest)] if rest else [])]
    yield "failed", "Cells that failed", _failed(study)
    short: list[Block] = []
    for name, sentences in findings(study):
        short += [("heading", name), ("findings", sentences)]
    yield "short", "In short", short
    if table := models_table(study):
        yield "models", "All models", [("table", table)]
    figure_count = 0
    for number, setting in enumerate(study.settings(), 1):
        makers = CURVE_FIGURES if study.is_curve(setting) else FIGURES
        panels = [panel for make in makers for panel in make(study, setting)]
        figure_count += len(panels)
        drawn = [_legend(study), panel_block(panels)] if panels else []
        if figure_count > OPEN_FIGURES and number > 1:
            drawn = _fold(f"{len(panels)} figures: {', '.join(panel.title for panel in panels)}", drawn)
        norms = list(heat_maps(study, setting))
        strata = list(strata_tables(study, setting, folder))
        blocks = [
            ("table", setting_table(study, setting)),
            *drawn,
            *_fold(
                f"Scores by {join_names([table.header[0].text for table in strata])}", [("table", t) for t in strata]
            ),
            *_fold("How far each norm moved", [panel_block(norms)] if norms else []),
        ]
        yield f"setting-{number}", study.title(setting), blocks
    if examples is not None:
        blocks = []
        for dataset, sentence, answered in read_examples(study, folder, examples):
            blocks += [("heading", dataset), ("text", sentence), *([("examples", answered)] if answered else [])]
        yield "examples", "Examples", blocks
    yield "terms", "Data, licences, and how the numbers were made", _terms(study, folder)


def _fold(summary: str, blocks: list[Block]) -> list[Block]:
    """The blocks below a line that opens them; nothing if there are none."""
    return [("folded", (summary, blocks))] if blocks else []


def _failed(study: Results) -> list[Block]:
    """The failed cells, each with its error."""
    failed = [cell for cell in study.cells if cell.get("status") == "failed"]
    text = "These cells are in no table and no figure. The next run of the study tries them again."
    return [("text", text), ("failed", list(map(_describe_failure, failed)))] if failed else []


def _describe_failure(cell: Record) -> str:
    """A failed cell and its error as text."""
    seed = f"seed {cell['seed']}" if cell.get("seed") is not None else None
    fold = f"fold {cell['fold']}" if cell.get("fold") is not None else None
    names = [cell["model"], cell["recipe"], cell.get("trained_on"), seed, fold]
    return f"{', '.join(filter(None, names))}: {cell.get('error') or 'no reason is recorded'}"


def _legend(study: Results) -> Block:
    """The families of methods in the study: name, character and label."""
    families = {arm.family for setting in study.settings() for arm in study.arms(setting)} - {"frozen"}
    return "legend", [(name, item.character, item.label) for name, item in palette.FAMILIES.items() if name in families]


def panel_block(panels: list[Panel]) -> Block:
    """Charts with their titles and their folded tables of numbers."""
    numbers = []
    for panel in panels:
        css = "code" if panel.header[0] == "recipe" else ""
        rows = [[Cell(row[0], css), *text_cells(row[1:])] for row in panel.rows]
        numbers.append(Table(f"numbers of {panel.title}", text_cells(panel.header), rows))
    return "panels", list(zip(panels, numbers, strict=True))


def _terms(study: Results, folder: Path) -> list[Block]:
    """The data sets with their licences, and how intervals and tests are computed."""
    table = datasets_table(study, folder)
    text = (
        "Intervals are 95%: of a mean over seeds for new seeds and new images, of a single run for new images. Tests "
        "compare recipes if each has three seeds or more (Obuchowski and Rockette's method, with seeds as readers), "
        "else their trained models, paired by image. Their p-values are corrected by Holm's method within a grid, "
        "model, pair of data sets and metric; tables.md has all tests. Where a learning rate was searched, it was on "
        "the validation split, never on the test split. An arrowhead at the end of an interval means that it "
        "continues beyond the axis."
    )
    texts = [text, *filter(None, [fold_note(study.cells)]), notice()]
    return [*([("table", table)] if table else []), *(("text", text) for text in texts)]
