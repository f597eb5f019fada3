"""The HTML page of an advice, `report.html`: the recommendation, the recipes, and charts of scores."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from normtune.advice.advice import COSTS, FRONT_NAMES, Advice, Candidate, candidate_cells
from normtune.advice.trials import ESTIMATE, SELECT
from normtune.runtime.files import write_text
from normtune.runtime.number_format import (
    format_bytes,
    format_duration,
    format_interval,
    format_percent,
    format_share,
    format_tick,
)
from normtune.studies.page import charts
from normtune.studies.page.about import notice
from normtune.studies.page.charts import Point, Series
from normtune.studies.page.drawing import Axis, Level
from normtune.studies.page.figures import Panel, percent_tick, score_axis
from normtune.studies.page.page import Block, Section, panel_block, render_page
from normtune.studies.page.palette import recipe_family
from normtune.studies.page.tables import Cell, Table

_HEAD = ("recipe", "learning rate", "passes", "trained", "memory", "time per pass", "on the rows chosen on")


def write_page(advice: Advice) -> Path:
    """Write `report.html` to the folder of the search."""
    sections: list[Section] = [("advice", "Advice", _summary(advice)), ("recipes", "Recipes", _recipes(advice))]
    sections.append(("search", "How it was searched", _search(advice)))
    text = render_page(
        title=f"Advice for {advice.model} on {advice.data}",
        about=f"Which recipe, at which learning rate: {advice.metric} on the validation rows.",
        sections=sections,
        warnings=[f"{item.recipe}: {item.warning}" for item in advice.candidates if item.warning],
        source="normtune advise from advice.json",
    )
    write_text(advice.page, text)
    return advice.page


def _summary(advice: Advice) -> list[Block]:
    item = advice.candidate
    assert item.estimate is not None
    facts = [
        ("recipe", f"`{item.recipe}`: {item.trainable:,} parameters, {format_share(item.share)}"),
        ("rate", f"{item.lr:g}"),
        ("score", f"{format_interval(item.estimate)} on rows that were not used for the choice"),
    ]
    return [("facts", facts), ("findings", advice.reasons()), ("heading", "The command"), ("text", advice.command)]


def _recipes(advice: Advice) -> list[Block]:
    header = [
        Cell(name, "" if number == 0 else "number") for number, name in enumerate((*_HEAD, "on the others", "front"))
    ]
    rows = []
    for item in advice.candidates:
        name, *cells = candidate_cells(item)
        rows.append(
            [Cell(name, "code", bold=item.recipe == advice.recommended), *(Cell(text, "number") for text in cells)]
        )
    frozen = ["", "", "0%", "", "", *(format_interval(advice.base[half]) for half in (SELECT, ESTIMATE)), ""]
    rows.insert(0, [Cell("frozen base"), *(Cell(text, "number") for text in frozen)])
    passes = f"{max(item.epochs for item in advice.candidates):g}"
    caption = (
        f"Scores times 100 with 95% intervals. Bold: the recommended recipe. A recipe with fewer passes than {passes} "
        "was stopped there, so that its score is not comparable with the others. Front: no recipe of the last round is "
        "as good and takes less of this cost."
    )
    return [("table", Table("recipes", header, rows, caption=caption, base=True)), panel_block(list(_charts(advice)))]


_COST_AXES: dict[str, tuple[Axis, float, Callable[[float], str]]] = {  # cost -> axis, unit, format
    "trainable": (Axis("trained share of the parameters (log scale)", percent_tick, log=True), 1, format_share),
    "memory_bytes": (Axis("planned memory of training (MiB)", format_tick), 2**20, format_bytes),
    "seconds_per_pass": (Axis("seconds per pass", format_tick), 1, format_duration),
}


def _charts(advice: Advice) -> Iterator[Panel]:
    y = score_axis(advice.metric, advice.data, ", rows chosen on")
    base = advice.base[SELECT]
    level = Level("frozen base", base["value"], base["low"], base["high"])
    last = max(item.round for item in advice.candidates)
    for cost in COSTS:
        axis, unit, as_text = _COST_AXES[cost]
        values = [item.share if cost == "trainable" else getattr(item, cost) for item in advice.candidates]
        marks = [
            Series(item.recipe, recipe_family(item.resolved), (_point(item, value / unit, as_text(value), last),))
            for item, value in zip(advice.candidates, values, strict=True)
        ]
        rows = tuple(
            (item.recipe, as_text(value), format_interval(item.score))
            for item, value in zip(advice.candidates, values, strict=True)
        )
        text = "Each recipe at its best rate. Hollow: stopped before the last round. Dashed: the frozen base."
        chart = charts.draw_scatter(f"{y.title} against {axis.title}", marks, axis, y, level)
        name = FRONT_NAMES[cost]
        yield Panel(f"Score against {name}", "", chart, text, ("recipe", name, y.title), rows)
    lines = [
        Series(
            item.recipe,
            recipe_family(item.resolved),
            tuple(
                Point(rate, score, score, score, f"{item.recipe} at {rate:g}: {format_percent(score)}")
                for rate, score in item.rates
            ),
        )
        for item in advice.candidates
    ]
    axis = Axis("learning rate (log scale)", format_tick, log=True)
    epochs = advice.search["rounds"][0]["epochs"]
    rates = tuple(
        (item.recipe, f"{rate:g}", format_percent(score)) for item in advice.candidates for rate, score in item.rates
    )
    text = "Every trial of the first round. Dashed: the base."
    chart = charts.draw_lines("Score against learning rate", lines, axis, y, level)
    yield Panel(f"Learning rates, {epochs:g} passes", "", chart, text, ("recipe", "rate", y.title), rates)


def _point(item: Candidate, value: float, text: str, last: int) -> Point:
    tooltip = f"{item.recipe}: {format_interval(item.score)} at {text}, {item.epochs:g} passes"
    style = "solid" if item.round == last else "hollow"
    return Point(value, item.score["value"], item.score["low"], item.score["high"], tooltip, style)  # type: ignore[arg-type]


def _search(advice: Advice) -> list[Block]:
    search = advice.search
    rounds = ", then ".join(f"{item['trials']} trials of {item['epochs']:g} passes" for item in search["rounds"])
    facts = [
        ("budget", f"{search['pairs']:,} pairs, of which {search['pairs_trained']:,} were trained on"),
        ("rounds", rounds),
        ("training data", f"{search['pairs_per_pass']:,} pairs, {search['images']:,} images"),
        ("time", f"{format_duration(search['training_seconds'])} of training steps"),
        ("seed", str(advice.seed)),
        *((f"without {recipe}", reason) for recipe, reason in advice.left_out.items()),
    ]
    text = (
        "The first round tries rates for each recipe, the second compares the recipes at their best rates, and the "
        f"last trains the best ones for longest. All answer the same {advice.rows[SELECT]:,} validation rows; those of "
        f"the last round then answer {advice.rows[ESTIMATE]:,} others, of other images. The test split is not read."
    )
    return [("facts", facts), ("text", text), ("text", notice())]
