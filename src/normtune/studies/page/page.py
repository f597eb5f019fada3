"""`report.html` of a study: one file, no script, nothing fetched."""

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
from normtune.studies.page.html import Child, Html, joined, tag
from normtune.studies.page.norm_maps import heat_maps
from normtune.studies.page.results import Results
from normtune.studies.page.sentences import findings
from normtune.studies.page.tables import models_table, numbers_table, paired_table, settings_tables

_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"
FIGURES = (  # id, heading, what to see, and the function that draws it
    (
        "share",
        "Score against what is trained",
        "Each mark is a recipe, the mean over seeds with its 95% interval; the dashed line is the frozen "
        "base. Of many recipes those are named that none beats with less; the pointer names the others.",
        figures.against_share,
    ),
    (
        "memory",
        "Score against memory",
        "Peak memory of the process that trains: weights, gradients, optimizer state, activations, and the "
        "libraries.",
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
        "What is forgotten",
        "The frozen base's score on its own task less the tuned model's, in percentage points: farther right "
        "is more forgotten.",
        figures.forgetting,
    ),
    (
        "small-data",
        "How much data it takes",
        "Each share is drawn anew for each seed, by image.",
        figures.share_curves,
    ),
    (
        "loss",
        "Training loss",
        "The mean over bins of steps and over seeds. Rates differ by method, so the curves' order is not the "
        "order of the scores.",
        figures.loss_curves,
    ),
    (
        "rates",
        "Sensitivity to the learning rate",
        "The search's trials, one seed each, scored on the validation split; intervals are among the "
        "numbers. Solid: the rate that was taken.",
        figures.rate_curves,
    ),
)


def study_report(results: Mapping[str, Any], folder: Path, *, examples: Roots | None = None) -> str:
    """The page of a study as HTML.

    Args:
        results: what `results.json` holds (docs/study.md).
        folder: the study's folder, for the licences that its evaluations record and for examples.
        examples: show some images with their answers, of data sets whose licence lets one pass them on; the
            folders of the data sets by their names in the study's file, where they have one.

    Raises:
        InputError: examples are asked for and an evaluation's files are damaged.
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
        tag("meta", http_equiv="Content-Security-Policy", content=_POLICY),
        tag("meta", name="robots", content="noindex"),
        tag("title", f"{study.study}: study report"),
        tag("link", rel="icon", href="data:,"),
        tag("style", _style()),
    )
    top = tag(
        "header",
        tag("a", "To the results", href="#main", class_="skip"),
        _themes(),
        tag("h1", study.study),
        tag("p", study.about, class_="about") if study.about else None,
        tag("p", notice(), class_="notice"),
        tag("nav", tag("ul", *links), aria_label="Sections"),
    )
    page = tag("html", head, tag("body", top, tag("main", *body, id="main"), _footer()), lang="en")
    return f"<!DOCTYPE html>\n{page}\n"


def write_study_report(folder: Path, *, examples: Roots | None = None) -> Path:
    """Read `results.json` of a study's folder and write `report.html` beside it; see `study_report`.

    Raises:
        InputError: there are no results, or the page cannot be written.
    """
    path = folder / "report.html"
    write_text(path, study_report(read_json(folder / "results.json"), folder, examples=examples))
    return path


Section = tuple[str, str, list[Child]]


def _sections(study: Results, folder: Path, examples: Roots | None) -> Iterator[Section | None]:
    yield "run", "What was run", facts(study)
    yield _failed(study)
    yield _in_short(study)
    yield _tables(study)
    keyed = False
    for id, heading, words, draw in FIGURES:
        panels = [_panel(panel) for panel in draw(study)]
        if panels:
            yield (
                id,
                heading,
                [tag("p", words), None if keyed else _key(study), tag("div", *panels, class_="panels")],
            )
            keyed = True
    yield _norms(study)
    if examples is not None:
        yield examples_section(study, folder, examples)
    yield "terms", "Data, licences, and how the numbers were made", terms(study, folder)


def _failed(study: Results) -> Section | None:
    """The cells that failed, each with its sentence."""
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
    words = tag("p", "These cells are in no table and no figure. The next run of the study tries them again.")
    return "failed", "Cells that failed", [words, tag("ul", *rows, class_="failed")]


def _in_short(study: Results) -> Section | None:
    found = list(findings(study))
    if not found:
        return None
    content: list[Child] = [
        tag(
            "p",
            "Sentences computed from the tables below. Above and below are said only where a test says so.",
        )
    ]
    for name, sentences in found:
        content += [tag("h3", name), tag("ul", *(tag("li", sentence) for sentence in sentences))]
    return "short", "In short", content


def _tables(study: Results) -> Section | None:
    content: list[Child] = []
    if beside := models_table(study):
        content.append(beside)
    content += [table for _, table in settings_tables(study)]
    if not content:
        return None
    if tests := paired_table(study):
        content.append(tag("details", tag("summary", "All paired tests"), tests))
    return "tables", "Tables", content


def _key(study: Results) -> Html:
    """Which colour and shape is which family of methods."""
    kinds = {arm.family for setting in study.settings() for arm in study.arms(setting)}
    items = [
        tag("li", _swatch(kind), palette.TOLD[kind])
        for kind in palette.COLOURS
        if kind in kinds and kind != "frozen"
    ]
    return tag("ul", *items, class_="key", aria_label="Colours and shapes of the methods")


def _swatch(kind: str) -> Html:
    mark = palette.marker(kind, 8.0, 8.0, size=5.5)
    return tag("svg", mark, role="img", aria_label=f"mark of {palette.TOLD[kind]}", viewBox="0 0 16 16")


def _panel(panel: Panel) -> Html:
    table = numbers_table(panel.header, panel.rows, f"numbers of {panel.title}")
    return tag(
        "figure",
        tag("figcaption", panel.title),
        tag("div", panel.chart, class_="drawing"),
        tag("details", tag("summary", "Numbers"), table, class_="numbers"),
    )


def _norms(study: Results) -> Section | None:
    """Heat maps: of each setting the first recipe that trains norms alone in sight, the others folded."""
    shown: list[Child] = []
    folded: list[Child] = []
    seen = set()
    for arm, panels in heat_maps(study):
        title = f"{arm.name}, {figures.title(study, arm.setting)}"
        drawn = tag("div", *map(_panel, panels), class_="panels")
        if arm.family == "ln" and arm.setting not in seen:
            seen.add(arm.setting)
            shown += [tag("h3", title), drawn]
        else:
            folded.append(tag("details", tag("summary", title), drawn))
    if not shown and not folded:
        return None
    words = (
        "The stronger a cell's colour, the farther that norm went from its start, mean over seeds; each map "
        "has its own scale. A column is a layer; norms that stand in no layer are under 'other'."
    )
    if folded and not shown:
        shown, folded = folded, []
    others: list[Child] = [tag("h3", "Other recipes that train norms"), *folded] if folded else []
    return "norms", "How far each norm moved", [tag("p", words), *shown, *others]


def _themes() -> Html:
    choices: list[Child] = [tag("legend", "Colours of the page", class_="hidden")]
    for name, told in (("auto", "Auto"), ("light", "Light"), ("dark", "Dark")):
        id = f"theme-{name}"
        choices.append(tag("input", type="radio", name="theme", id=id, checked=name == "auto"))
        choices.append(tag("label", told, for_=id))
    return tag("fieldset", *choices, class_="theme")


def _footer() -> Html:
    return tag("footer", tag("p", f"Made by normtune study from results.json. {notice()}"))


def _style() -> Html:
    text = files("normtune.studies.page").joinpath("page.css").read_text(encoding="utf-8")
    for place, rules in (
        ("/*light*/", palette.variables(0)),
        ("/*dark*/", palette.variables(1)),
        ("/*classes*/", palette.classes()),
    ):
        text = text.replace(place, rules)
    return joined([Html(re.sub(r"\n\s*", "\n", text))])
