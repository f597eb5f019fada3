"""The tables of a study's page: recipes by part of the model, their costs and their scores."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from normtune.methods.registry import METHODS
from normtune.models.part_names import PARTS
from normtune.studies.page.figures import forgetting_estimate, format_score
from normtune.studies.page.html import Child, Html, join_children, tag
from normtune.studies.page.number_format import (
    NONE,
    format_bytes,
    format_duration,
    format_fixed,
    format_p_value,
    format_points,
    format_share,
)
from normtune.studies.page.results import FROZEN, Arm, Estimate, Record, Results, Setting, is_fraction, metric_name

SIGNIFICANT = 0.05  # p-values below this are significant
ABOVE, BELOW = "▲", "▼"  # marks of scores that differ significantly from the reference
Column = tuple[str, str]  # data set, metric
# A method with its options and layers, such as `lora(r=4,alpha=32)[2:]`; and the + between two methods.
_ONE_METHOD = re.compile(r"([a-z0-9]+)(?:\(([^)]*)\))?(\[[^]]*\])?")
_BETWEEN_METHODS = re.compile(r"\+(?![^(]*\))")


def settings_tables(results: Results) -> Iterator[tuple[Setting, Html]]:
    """The table of every setting, in the study's order."""
    for setting in results.settings():
        yield setting, setting_table(results, setting)


def setting_table(results: Results, setting: Setting) -> Html:
    """A row for each recipe (and share, if the setting compares shares): methods by part, costs, and scores.

    Costs are the trained share of the parameters, the peak memory and the time. An arrow marks scores that
    differ significantly from the reference.
    """
    arms = results.arms(setting)
    parts = [part for part in PARTS if any(part in arm.parts for arm in arms)]
    parts += [part for arm in arms for part in arm.parts if part not in parts]
    parts = list(dict.fromkeys(parts))
    curve = results.is_curve(setting)
    columns = _columns(results, setting, curve)
    best = {column: _highest_mean(results, arms, column) for column in columns}
    fixed_heads = ["recipe", *(["data"] if curve else []), *parts, "trained", "memory", "time"]
    group_heads = [tag("td", colspan=len(fixed_heads))] + [
        tag("th", dataset, colspan=sum(column[0] == dataset for column in columns), scope="colgroup", class_="group")
        for dataset in dict.fromkeys(dataset for dataset, _ in columns)
    ]
    heads = [tag("th", head, scope="col", class_=_head_class(head)) for head in fixed_heads]
    heads += [tag("th", _metric_heading(column[1]), scope="col", class_="number") for column in columns]
    if homes := _home_datasets(results):
        group_heads.append(tag("th", homes[0], scope="colgroup", class_="group"))
        heads.append(tag("th", "forgotten, points", scope="col", class_="number"))
    rows = []
    if base := _frozen_row(results, setting, curve, parts, columns, homes):
        rows.append(base)
    for arm in arms:
        cells: list[Html] = [tag("th", arm.name, scope="row")]
        if curve:
            cells.append(tag("td", format_share(arm.share), class_="number"))
        cells += [_methods_cell(arm.parts.get(part, "")) for part in parts]
        share, peak, seconds = (arm.mean(c) for c in ("trainable_share", "train_peak_bytes", "train_seconds"))
        cells += [
            tag("td", text, class_="number")
            for text in (format_share(share), format_bytes(peak), format_duration(seconds))
        ]
        for column in columns:
            score = results.estimate(arm, *column)
            test = results.test_of_arm(arm, *column)
            is_best = score is not None and score.value == best[column]
            cells.append(_score_cell(column[1], score, is_best, test))
        if homes:
            cells.append(_forgotten_cell(results, arm, homes[0]))
        rows.append(tag("tr", *cells))
    head = tag("thead", tag("tr", *group_heads), tag("tr", *heads))
    return scroll_box(
        tag("table", tag("caption", _caption(results, setting, arms)), head, tag("tbody", *rows)), setting.description
    )


def scroll_box(table: Html, label: str) -> Html:
    """A table in a box that scrolls sideways, also with the keyboard."""
    return tag("div", table, class_="scroll", tabindex=0, role="region", aria_label=f"Table: {label}")


def models_table(results: Results) -> Html | None:
    """A table of all models: a row a recipe, a column a model and data set; None for a single model."""
    settings = [setting for setting in results.settings() if not results.is_curve(setting)]
    if len({setting.model for setting in settings}) < 2:
        return None
    columns = [(setting, dataset) for setting in settings for dataset in results.datasets(setting, "in")]
    arms = {(setting, arm.name): arm for setting in settings for arm in results.full_data_arms(setting)}
    order = results.recipe_order()
    recipes = {arm.name: arm.recipe for arm in arms.values()}
    body = []
    base_scores = [
        results.frozen_estimate(setting.model, dataset, results.primary_metric(dataset)) for setting, dataset in columns
    ]
    if any(base_scores):
        scored = zip(columns, base_scores, strict=True)
        cells = [_score_cell(results.primary_metric(dataset), score, False, None) for (_, dataset), score in scored]
        body.append(tag("tr", tag("th", "frozen base", scope="row"), *cells))
    for name in sorted(recipes, key=lambda name: order.index(recipes[name])):
        cells = []
        for setting, dataset in columns:
            arm, metric = arms.get((setting, name)), results.primary_metric(dataset)
            score = None if arm is None else results.estimate(arm, dataset, metric)
            test = None if arm is None else results.test_of_arm(arm, dataset, metric)
            cells.append(_score_cell(metric, score, False, test))
        body.append(tag("tr", tag("th", name, scope="row"), *cells))
    heads = [
        tag(
            "th",
            setting.model,
            tag("br"),
            tag("span", f"{dataset}, {_metric_heading(results.primary_metric(dataset))}", class_="quiet"),
            scope="col",
            class_="number",
        )
        for setting, dataset in columns
    ]
    head = tag("thead", tag("tr", tag("th", "recipe", scope="col"), *heads))
    caption = tag("caption", "All models, each trained and tested on the data set of its column.")
    return scroll_box(tag("table", caption, head, tag("tbody", *body)), "models side by side")


def paired_table(results: Results) -> Html | None:
    """All paired tests with their intervals and p-values; None if there are none."""
    rows = [
        tag(
            "tr",
            tag("th", row["recipe"], scope="row"),
            *(tag("td", str(row[name])) for name in ("model", "trained_on")),
            tag("td", format_share(float(row.get("share") or 1)), class_="number"),
            tag("td", row["dataset"]),
            tag("td", metric_name(row["metric"])),
            tag("td", _format_difference(row), class_="number"),
            tag("td", format_p_value(row["p"]).removeprefix("p ").removeprefix("= "), class_="number"),
            tag("td", format_p_value(row["p_holm"]).removeprefix("p ").removeprefix("= "), class_="number"),
            tag("td", f"{row['images']:,}", class_="number"),
            tag("td", str(row["seeds"]), class_="number"),
        )
        for row in results.tables["tests"]
    ]
    if not rows:
        return None
    against = list(dict.fromkeys(row["against"] for row in results.tables["tests"]))
    heads = ["recipe", "model", "trained on", "data", "tested on", "metric"]
    numbers = [f"minus {' or '.join(against)}", "p", "p, Holm", "images", "seeds"]
    head = tag(
        "tr",
        *(tag("th", text, scope="col", class_="number" if text == "data" else None) for text in heads),
        *(tag("th", text, scope="col", class_="number") for text in numbers),
    )
    caption = tag("caption", "Paired tests, all common seeds together, resampled by image.")
    return scroll_box(tag("table", caption, tag("thead", head), tag("tbody", *rows)), "paired tests")


def numbers_table(header: Sequence[str], rows: Sequence[Sequence[str]], label: str) -> Html:
    """The numbers of a figure."""
    head = tag("tr", *(tag("th", text, scope="col") for text in header))
    body = [tag("tr", tag("th", row[0], scope="row"), *(tag("td", text) for text in row[1:])) for row in rows]
    return scroll_box(tag("table", tag("thead", head), tag("tbody", *body)), label)


def _columns(results: Results, setting: Setting, curve: bool) -> list[Column]:
    """The score columns of a setting's table: data sets that it was trained on first, then others."""
    columns: list[Column] = []
    for dataset in results.datasets(setting, "in"):
        metrics = results.table_metrics(dataset) or [results.primary_metric(dataset)]
        columns += [(dataset, metric) for metric in ([results.primary_metric(dataset)] if curve else metrics)]
    columns += [(dataset, results.primary_metric(dataset)) for dataset in results.datasets(setting, "out")]
    return columns


def _metric_heading(metric: str) -> str:
    """A metric's name with its unit, without places where a line may break."""
    unit = "\u00a0%" if is_fraction(metric) else ""
    return metric_name(metric).replace("-", "\u2011") + unit  # no line break within "BLEU-1" or before "%"


def _highest_mean(results: Results, arms: Sequence[Arm], column: Column) -> float | None:
    """The highest mean in a column; None if only one recipe has a score."""
    values = [score.value for arm in arms if (score := results.estimate(arm, *column))]
    return max(values) if len(values) > 1 else None


def _score_cell(metric: str, score: Estimate | None, best: bool, test: Record | None) -> Html:
    """A score with its interval, in bold if it is the best, with an arrow if it differs significantly."""
    if score is None:
        return tag("td", NONE, class_="number")
    value: Child = format_score(metric, score.value)
    mark: Html | None = None
    if test and test.get("p_holm") is not None and test["p_holm"] < SIGNIFICANT:
        is_higher = test["difference"] > 0
        text = f"{'above' if is_higher else 'below'} {test['against']}: {_format_difference(test)}"
        text += f", {format_p_value(test['p_holm'])} after Holm"
        mark = tag("span", ABOVE if is_higher else BELOW, title=text, role="img", aria_label=text, class_="mark")
    ends = f"{format_score(metric, score.low)} to {format_score(metric, score.high)}"
    return tag(
        "td",
        join_children([tag("strong", value) if best else value, mark]),
        tag("span", ends, class_="ends"),
        class_="number",
    )


def _format_difference(test: Record) -> str:
    """A difference with its interval, in percentage points if the metric is a fraction."""
    numbers = [test[name] for name in ("difference", "low", "high")]
    if is_fraction(test["metric"]):
        difference, low, high = map(format_points, numbers)
    else:
        difference, low, high = (format_fixed(number, 2) for number in numbers)
    return f"{difference} [{low}, {high}]"


def _methods_cell(text: str) -> Html:
    """A part's methods, shortened; the tooltip shows them in full."""
    if text in ("", FROZEN):
        return tag("td", FROZEN, class_="quiet")
    return tag("td", shorten_methods(text), title=text)


def shorten_methods(text: str) -> str:
    """`lora(r=4,alpha=32)[2:]+ln` as `lora r=4 [2:] + ln`: only the size option of each method."""
    return " + ".join(_ONE_METHOD.sub(_shorten_method, method) for method in _BETWEEN_METHODS.split(text))


def _shorten_method(match: re.Match[str]) -> str:
    """One matched method with its size option and its layers."""
    name, options, layers = match.groups()
    size = next((option for option in ("r", "n", "width") if option in METHODS.get(name, {})), None)
    set_options = dict(pair.split("=", 1) for pair in (options or "").split(",") if "=" in pair)
    words = [name]
    if size is not None and (name == "lora" or size in set_options):
        words.append(f"{size}={set_options.get(size, METHODS[name][size])}")
    if name == "ln" and set_options:  # gains only, or biases only
        words.append("biases" if set_options.get("gain") == "0" else "gains")
    return " ".join([*words, *([layers] if layers else [])])


def _frozen_row(
    results: Results,
    setting: Setting,
    curve: bool,
    parts: Sequence[str],
    columns: Sequence[Column],
    homes: Sequence[str],
) -> Html | None:
    """The row of the frozen base; None if it was not evaluated on any of the columns."""
    scores = [results.frozen_estimate(setting.model, *column) for column in columns]
    if not any(scores):
        return None
    cells = [tag("th", "frozen base", scope="row"), *([tag("td", NONE, class_="number")] if curve else [])]
    cells += [_methods_cell("") for _ in parts]
    cells += [tag("td", text, class_="number") for text in ("0%", NONE, NONE)]
    largest = results.arms(setting)[0].share
    for column, score in zip(columns, scores, strict=True):
        test = results.test_of_recipe(setting, largest, FROZEN, *column)
        cells.append(_score_cell(column[1], score, False, test))
    cells += [tag("td", "0", class_="number")] if homes else []
    return tag("tr", *cells, class_="base")


def _home_datasets(results: Results) -> list[str]:
    """The data sets of the bases' own tasks."""
    return list(dict.fromkeys(row["dataset"] for row in results.tables["forgetting"]))


def _forgotten_cell(results: Results, arm: Arm, home: str) -> Html:
    """The points lost on the base's own task, with their interval if there are several seeds."""
    loss = forgetting_estimate(results, arm, home)
    if loss is None:
        return tag("td", NONE, class_="number")
    ends = f"{format_points(loss.low)} to {format_points(loss.high)}"
    span = tag("span", ends, class_="ends") if loss.seeds > 1 else None
    return tag("td", format_points(loss.value), span, class_="number")


def _caption(results: Results, setting: Setting, arms: Sequence[Arm]) -> Html:
    """A setting's description, its number of seeds, and what bold and arrows mean."""
    seeds = sorted({len(arm.cells) for arm in arms})
    count = f"{seeds[0]}" if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]}"
    averaged = "one seed" if seeds == [1] else f"means over {count} seeds"
    text = f"Grid {setting.grid}, {averaged}, with 95% intervals; bold: the highest."
    if against := results.reference_recipe(setting):
        text += f" {ABOVE} above, {BELOW} below {against} (paired by image, p < {SIGNIFICANT} after Holm)."
    title = f"{setting.description[0].upper()}{setting.description[1:]}."
    return join_children([tag("strong", title), f" {text}"])


def _head_class(head: str) -> str | None:
    """The CSS class of a heading: numbers are aligned right."""
    return "number" if head in ("data", "trained", "memory", "time") else None
