"""Text for a manuscript, filled from a study's records: methods, data statement and reporting checklists.

`write_manuscript` writes `manuscript.md`, and `manuscript.tex` with the same text and all tables. What the records do
not contain is marked TODO. The checklists are MI-CLEAR-LLM (Park et al. 2024, Korean J Radiol 25(10)) and TRIPOD-LLM
(Gallifant et al. 2025, Nat Med 31). The topics that a study's records say nothing about are TODO.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import Any

from normtune.runtime.files import read_json, write_text
from normtune.runtime.number_format import format_share, join_names
from normtune.runtime.templates import render_template
from normtune.studies.page.about import facts, notice
from normtune.studies.page.results import Record, Results, distinct_values
from normtune.studies.paper_tables import escape_latex
from normtune.studies.pooling import group_by
from normtune.studies.spec import SEARCH

TODO = "TODO"
# topics of TRIPOD-LLM that a study's records say nothing about
OTHER_TOPICS = (
    "Title and abstract",
    "Clinical context and objectives",
    "Participants and dates",
    "Annotation",
    "Ethics",
    "Funding and conflicts of interest",
    "Public involvement",
    "Limitations and usability",
)
FOLDER = "manuscript"


@dataclass(frozen=True)
class Section:
    """A heading with items; `name` is the first word of an item in a checklist, or empty."""

    heading: str
    items: tuple[tuple[str, str], ...]


def write_manuscript(out: Path) -> list[Path]:
    """Write `manuscript/manuscript.md` and `.tex` in a study's folder, from its `results.json`; returns both paths."""
    study = Results(read_json(out / "results.json"))
    sections = list(manuscript_sections(study, out))
    paths = []
    for suffix in ("md", "tex"):
        path = out / FOLDER / f"manuscript.{suffix}"
        path.parent.mkdir(exist_ok=True)
        values = {"title": study.study, "about": study.about, "sections": sections, "escape": escape_latex}
        write_text(path, render_template(f"studies/manuscript.{suffix}.j2", **values))
        paths.append(path)
    return paths


def manuscript_sections(study: Results, out: Path) -> Iterator[Section]:
    """The sections of the text.

    Args:
        out: the study's folder, for the files of its evaluations and adapters.
    """
    records = list(_evaluations(study, out))
    prompts, about, models = _prompts(records), dict(facts(study)), _models(study)
    yield Section("Methods", tuple(("", " ".join(text)) for text in _methods(study, records, about, models) if text))
    yield Section("Prompts", tuple(prompts) or (("", f"{TODO}: the exact prompts; the records have none."),))
    yield Section("Data", tuple(_data(study, out, records)))
    yield Section("MI-CLEAR-LLM", tuple(_mi_clear(records, bool(prompts), about, models)))
    yield Section("TRIPOD-LLM, topics that the records cover", tuple(_tripod(about, models)))
    yield Section("Statement", (("", notice()),))


def _methods(study: Results, records: Sequence[Record], about: dict[str, str], models: str) -> Iterator[list[str]]:
    """The paragraphs of the methods: models and recipes, training, answers, statistics, software."""
    yield [f"Base models: {models}.", f"Recipes (which parameters are trained): {'; '.join(_recipes(study))}."]
    yield list(_training(study, about))
    yield list(_answering(records))
    yield list(_statistics(study, records))
    versions, hardware, date = (about.get(name, TODO) for name in ("versions", "hardware", "date"))
    yield [f"Software: {versions}. Hardware: {hardware}. The cells ran on {date}, {about['training time']}."]


def _models(study: Results) -> str:
    """Each model with its size and its fingerprint."""
    trained = [cell for cell in study.finished.values() if cell.get("total") and cell.get("base_fingerprint")]
    texts = []
    for model, cells in group_by(trained, itemgetter("model")).items():
        size = min(cell["total"] for cell in cells)  # without the layers that some recipes add
        texts.append(f"{model} ({size:,} parameters, fingerprint {str(cells[0]['base_fingerprint'])[:12]})")
    return join_names(texts) or TODO


def _recipes(study: Results) -> Iterator[str]:
    for cell in {cell["recipe"]: cell for cell in study.finished.values()}.values():
        trained = (
            f", {cell['trainable']:,} trained parameters ({format_share(cell['trainable_share'])})"
            if cell.get("trainable")
            else ""
        )
        yield f"{cell['recipe']} ({cell['recipe_text']}{trained})"


def _training(study: Results, about: dict[str, str]) -> Iterator[str]:
    """Seeds, options that all trainings share, budgets and learning rates."""
    trained = [cell for cell in study.finished.values() if cell.get("config")]
    if not trained:
        return
    shared = {
        name: values[0]
        for name in trained[0]["config"]
        if len(values := _distinct(c["config"].get(name) for c in trained)) == 1
    }
    yield f"Seeds: {about.get('seeds', TODO)}. Optimiser: AdamW, one learning rate for each method, on fp32 values."
    names = {
        "batch": "question-answer pairs in a step",
        "schedule": "learning-rate schedule",
        "warmup": "share of steps with a rising rate",
        "weight_decay": "weight decay",
        "max_grad_norm": "limit of the gradient's norm",
        "label_smoothing": "label smoothing",
        "dtype": "precision of the base",
    }
    options = [f"{text} {shared[name]}" for name, text in names.items() if shared.get(name) is not None]
    yield f"Options of every training: {', '.join(options)}."
    budgets = _distinct(cell["budget"] for cell in trained if cell["grids"] != [SEARCH])
    for budget in budgets:
        if budget and budget.get("until") == "plateau":
            yield (
                f"Each training validated on the validation split and kept the values of its best step, with at most "
                f"{budget['max_epochs']:g} passes and a patience of {budget['patience']} validations."
            )
        elif budget:
            yield f"Budget of a training: {', '.join(f'{value} {name}' for name, value in budget.items() if value)}."
    if any(cell.get("rate_source") == "search" for cell in trained):
        is_best = (study.spec.get("search") or {}).get("choose") == "best"
        rule = "that of the best trial" if is_best else "the lowest within one standard error of the best trial"
        yield (
            f"The learning rate of each recipe is {rule} of a search with one seed on the validation split; the test "
            "split was not used."
        )


def _answering(records: Sequence[Record]) -> Iterator[str]:
    """How answers were generated."""
    settings = {record["dataset_name"]: record["settings"] for record in records if record.get("settings")}
    if not settings:
        return
    beams = _distinct(setting.get("beams") for setting in settings.values())
    how = "greedily" if beams == [1] else f"by beam search (widths {join_names([str(beam) for beam in beams])})"
    if any((setting.get("generation") or {}).get("do_sample") for setting in settings.values()):
        how = "by sampling with the settings of the checkpoint"
    limits = join_names([f"{setting.get('max_new_tokens')} ({name})" for name, setting in settings.items()])
    yield f"Answers were generated {how}; the limits in tokens were {limits}."


def _statistics(study: Results, records: Sequence[Record]) -> Iterator[str]:
    """Intervals and tests."""
    for text in _distinct(record.get("intervals") for record in records):
        yield f"Intervals of a single run: {text}."
    yield "Intervals of a mean over seeds are for new seeds and new images."
    tests = study.tables["tests"]
    if methods := distinct_values(tests, "method"):
        yield f"Recipes were compared by: {'; '.join(methods)}; p-values were corrected by Holm's method."
    if margins := _distinct(test.get("margin") for test in tests):
        yield f"Equivalence was tested with a margin of {100 * margins[0]:g} points (TOST at 5%)."


def _prompts(records: Sequence[Record]) -> list[tuple[str, str]]:
    """The exact prompt of each base and data set, as the records have it."""
    prompts = {(record["base"], record["dataset"]): record["prompt"] for record in records if record.get("prompt")}
    return [(f"{base}, {dataset}", repr(prompt)) for (base, dataset), prompt in prompts.items()]


def _data(study: Results, out: Path, records: Sequence[Record]) -> Iterator[tuple[str, str]]:
    """For each data set: licence, rows and images, and what is known about leaks."""
    first = {record["dataset_name"]: record for record in reversed(records)}
    pairs = {cell["trained_on"]: cell.get("pairs_available") for cell in study.finished.values() if cell["trained_on"]}
    for name, record in first.items():
        texts = [f"licence {record.get('licence') or 'unknown'}"]
        texts += [f"{pairs[name]:,} training pairs"] if pairs.get(name) else []
        texts.append(f"{record['rows']:,} test rows on {record['images']:,} images (hash {record['split_hash'][:12]})")
        options = (study.spec.get("datasets") or {}).get(name) or {}
        if options.get("image_disjoint"):
            texts.append("split anew by image and patient")
        dropped = ((record.get("preflight") or {}).get("rows") or {}).get("dropped") or {}
        if dropped:
            texts.append("rows not used: " + ", ".join(f"{count:,} ({reason})" for reason, count in dropped.items()))
        leaks = _leaks(study, out, name)
        texts.append("; ".join(leaks) if leaks else "no training row or picture is known to be in the test split")
        yield name, "; ".join(texts) + f". Source and date of access: {TODO}"


def _leaks(study: Results, out: Path, dataset: str) -> list[str]:
    """What the preflights of trainings on a data set say about other splits, each once."""
    texts: dict[str, None] = {}
    for cell in study.finished.values():
        path = out / "cells" / cell["key"] / "adapter" / "preflight.json"
        if cell["trained_on"] == dataset and path.is_file():
            texts |= dict.fromkeys(map(str, read_json(path).get("leaks") or ()))
    return list(texts)


def _mi_clear(
    records: Sequence[Record], has_prompts: bool, about: dict[str, str], models: str
) -> Iterator[tuple[str, str]]:
    """The six items of MI-CLEAR-LLM."""
    seeds = about.get("seeds")
    overlaps = [record["trained_rows"] for record in records if record.get("trained_rows")]
    rows = sum(overlap["rows"] for overlap in overlaps)
    yield (
        "1. Model",
        (
            f"{models}; run locally without access to the web, on {about.get('date', TODO)}. "
            f"Manufacturer and date of the base's training data: {TODO}"
        ),
    )
    yield (
        "2. Stochasticity",
        (f"trainings with seeds {seeds}; " if seeds else "")
        + " ".join(_answering(records))
        + " Scores are means over seeds with 95% intervals.",
    )
    yield "3. Prompt wording", "see Prompts" if has_prompts else f"{TODO}: the exact prompts"
    yield "4. Prompt structure", _conversations(records)
    yield "5. Prompt testing", f"all recipes had the same prompts. How they were chosen: {TODO}"
    yield (
        "6. Independence of test data",
        (
            f"{rows:,} of the evaluated rows were in the training data of the evaluated adapter. Whether the base was "
            f"trained on the test data, and addresses of public data: {TODO}"
        ),
    )


def _conversations(records: Sequence[Record]) -> str:
    """What the model saw besides a question: nothing, or the turns before it (`--history`)."""
    single = (
        "every question was asked in a conversation of its own; questions about one image share its encoding and "
        "nothing else"
    )
    names = _distinct(record["dataset_name"] for record in records if (record.get("data") or {}).get("history"))
    if not names:
        return single
    others = any(record["dataset_name"] not in names for record in records)
    turns = "each later question of a conversation was asked after its earlier turns, with the answers of the data "
    return f"{turns}({join_names(names)})" + (f"; of the other data sets, {single}" if others else "")


def _tripod(about: dict[str, str], models: str) -> Iterator[tuple[str, str]]:
    """Topics of TRIPOD-LLM that the records say something about, and the others by name."""
    yield "Model name and version", models
    yield "Fine-tuning", f"see Methods; commit {about.get('commit', TODO)}"
    yield "Inference settings", "see Methods and Prompts"
    yield "Data sources and preparation", "see Data"
    yield "Performance and uncertainty", "see the tables"
    yield "Compute", f"{about['training time']}; {about.get('hardware', TODO)}"
    yield "Code and data sharing", f"results.json has every number and option; sharing of adapters and data: {TODO}"
    yield from ((topic, TODO) for topic in OTHER_TOPICS)


def _evaluations(study: Results, out: Path) -> Iterator[Record]:
    """`metrics.json` of each evaluation on a test split, with the study's name of the data set as `dataset_name`."""
    for row in study.tables["evaluations"]:
        path = out / str(row.get("folder") or "") / "metrics.json"
        if row["role"] != "validate" and row.get("folder") and path.is_file():
            yield {**read_json(path), "dataset_name": row["dataset"]}


def _distinct(values: Iterable[Any]) -> list[Any]:
    """Different values that are not None, in their order."""
    different: list[Any] = []
    for value in values:
        if value is not None and value not in different:
            different.append(value)
    return different
