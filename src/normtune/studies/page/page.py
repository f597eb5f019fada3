"""Writes the page of a study, `report.html`: one file without scripts that loads no other file."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

from normtune.runtime.files import read_json, write_text
from normtune.studies.page import figures, palette
from normtune.studies.page.about import facts, notice, terms
from normtune.studies.page.examples import Roots, examples_section
from normtune.studies.page.figures import Panel
from normtune.studies.page.html import Child, Html, join_children, tag
from normtune.studies.page.norm_maps import heat_maps
from normtune.studies.page.results import Results
from normtune.studies.page.sentences import findings
from normtune.studies.page.tables import models_table, numbers_table, paired_table, settings_tables

_CONTENT_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"
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
    sections = [section for section in _sections(study, folder, examples) if section is not None]
    links = [tag("li", tag("a", title, href=f"#{id}")) for id, title, _ in sections]
    body = [
        tag("section", tag("h2", title, id=f"{id}-title"), *content, id=id, aria_labelledby=f"{id}-title")
        for id, title, content in sections
    ]
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", http_equiv="Content-Security-Policy", content=_CONTENT_POLICY),
        tag("meta", name="robots", content="noindex"),
        tag("title", f"{study.study}: study report"),
        tag("link", rel="icon", href="data:,"),
        tag("style", _style()),
    )
    top = tag(
        "header",
        tag("a", "To the results", href="#main", class_="skip"),
        _theme_switch(),
        tag("h1", study.study),
        tag("p", study.about, class_="about") if study.about else None,
        tag("p", notice(), class_="notice"),
        tag("nav", tag("ul", *links), aria_label="Sections"),
    )
    page = tag("html", head, tag("body", top, tag("main", *body, id="main"), _footer()), lang="en")
    return f"<!DOCTYPE html>\n{page}\n"


def write_study_report(folder: Path, *, examples: Roots | None = None) -> Path:
    """Read `results.json` in a study's folder and write `report.html` next to it; see `render_study_report`.

    Raises:
        InputError: there are no results, or the page cannot be written.
    """
    path = folder / "report.html"
    write_text(path, render_study_report(read_json(folder / "results.json"), folder, examples=examples))
    return path


Section = tuple[str, str, list[Child]]


def _sections(study: Results, folder: Path, examples: Roots | None) -> Iterator[Section | None]:
    """The sections of the page in their order; None for a section without content."""
    yield "run", "What was run", facts(study)
    yield _failed(study)
    yield _findings(study)
    yield _tables(study)
    has_legend = False
    for id, heading, text, make_panels in FIGURES:
        panels = [_panel(panel) for panel in make_panels(study)]
        if panels:
            yield (
                id,
                heading,
                [tag("p", text), None if has_legend else _legend(study), tag("div", *panels, class_="panels")],
            )
            has_legend = True
    yield _norms(study)
    if examples is not None:
        yield examples_section(study, folder, examples)
    yield "terms", "Data, licences, and how the numbers were made", terms(study, folder)


def _failed(study: Results) -> Section | None:
    """The failed cells, each with its error."""
    failed = [cell for cell in study.cells if cell.get("status") == "failed"]
    if not failed:
        return None
    rows = [
        tag(
            "li",
            f"{cell['model']}, {cell['recipe']}"
            + (f", {cell['trained_on']}" if cell.get("trained_on") else "")
            + (f", seed {cell['seed']}" if cell.get("seed") is not None else "")
            + f": {cell.get('error') or 'no reason is recorded'}",
        )
        for cell in failed
    ]
    text = tag("p", "These cells are in no table and no figure. The next run of the study tries them again.")
    return "failed", "Cells that failed", [text, tag("ul", *rows, class_="failed")]


def _findings(study: Results) -> Section | None:
    """The findings of each setting as sentences."""
    titled_sentences = list(findings(study))
    if not titled_sentences:
        return None
    content: list[Child] = [
        tag("p", "Computed from the tables below. 'Above' and 'below' mean that a paired test is significant.")
    ]
    for name, sentences in titled_sentences:
        content += [tag("h3", name), tag("ul", *(tag("li", sentence) for sentence in sentences))]
    return "short", "In short", content


def _tables(study: Results) -> Section | None:
    """The tables of models and settings, and the folded table of paired tests."""
    content: list[Child] = []
    if table_of_models := models_table(study):
        content.append(table_of_models)
    content += [table for _, table in settings_tables(study)]
    if not content:
        return None
    if tests := paired_table(study):
        content.append(tag("details", tag("summary", "All paired tests"), tests))
    return "tables", "Tables", content


def _legend(study: Results) -> Html:
    """The colour and shape of each family of methods in the study."""
    families = {arm.family for setting in study.settings() for arm in study.arms(setting)}
    items = [
        tag("li", _swatch(family), palette.FAMILY_LABELS[family])
        for family in palette.COLOURS
        if family in families and family != "frozen"
    ]
    return tag("ul", *items, class_="key", aria_label="Colours and shapes of the methods")


def _swatch(family: str) -> Html:
    """The mark of a family, for the legend."""
    mark = palette.draw_marker(family, 8.0, 8.0, size=5.5)
    return tag("svg", mark, role="img", aria_label=f"mark of {palette.FAMILY_LABELS[family]}", viewBox="0 0 16 16")


def _panel(panel: Panel) -> Html:
    """A chart with its title and its folded table of numbers."""
    table = numbers_table(panel.header, panel.rows, f"numbers of {panel.title}")
    return tag(
        "figure",
        tag("figcaption", panel.title),
        tag("div", panel.chart, class_="drawing"),
        tag("details", tag("summary", "Numbers"), table, class_="numbers"),
    )


def _norms(study: Results) -> Section | None:
    """Heat maps of norms; visible for each setting's first recipe that trains only norms, else folded."""
    visible: list[Child] = []
    folded: list[Child] = []
    settings_seen = set()
    for arm, panels in heat_maps(study):
        title = f"{arm.name}, {figures.setting_title(study, arm.setting)}"
        maps = tag("div", *map(_panel, panels), class_="panels")
        if arm.family == "ln" and arm.setting not in settings_seen:
            settings_seen.add(arm.setting)
            visible += [tag("h3", title), maps]
        else:
            folded.append(tag("details", tag("summary", title), maps))
    if not visible and not folded:
        return None
    text = (
        "The stronger a cell's colour, the farther that norm moved from its start, mean over seeds; each map "
        "has its own scale. A column is a layer; norms outside the layers are under 'other'."
    )
    if folded and not visible:
        visible, folded = folded, []
    others: list[Child] = [tag("h3", "Other recipes that train norms"), *folded] if folded else []
    return "norms", "How far each norm moved", [tag("p", text), *visible, *others]


def _theme_switch() -> Html:
    """The switch between the reader's theme, light and dark; it needs no script (see page.css)."""
    choices: list[Child] = [tag("legend", "Colours of the page", class_="hidden")]
    for name, label in (("auto", "Auto"), ("light", "Light"), ("dark", "Dark")):
        id = f"theme-{name}"
        choices.append(tag("input", type="radio", name="theme", id=id, checked=name == "auto"))
        choices.append(tag("label", label, for_=id))
    return tag("fieldset", *choices, class_="theme")


def _footer() -> Html:
    return tag("footer", tag("p", f"Made by normtune study from results.json. {notice()}"))


def _style() -> Html:
    """The style sheet with the colours of all families filled in."""
    text = files("normtune.studies.page").joinpath("page.css").read_text(encoding="utf-8")
    for placeholder, rules in (
        ("/*light*/", palette.css_variables(0)),
        ("/*dark*/", palette.css_variables(1)),
        ("/*classes*/", palette.css_classes()),
    ):
        text = text.replace(placeholder, rules)
    return join_children([Html(re.sub(r"\n\s*", "\n", text))])
