"""The paper's tables of a study's page: recipe by part, what it takes, what it scores."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from normtune.methods.registry import METHODS
from normtune.models.part_names import PARTS
from normtune.studies.page.figures import forgotten_by, score
from normtune.studies.page.html import Child, Html, joined, tag
from normtune.studies.page.number_format import NONE, duration, fixed, memory, p_value, points, share
from normtune.studies.page.results import (
    FROZEN,
    Arm,
    Estimate,
    Record,
    Results,
    Setting,
    is_fraction,
    metric_name,
)

SIGNIFICANT = 0.05
ABOVE, BELOW = "▲", "▼"
Column = tuple[str, str]  # data set, metric
_ONE_METHOD = re.compile(r"([a-z0-9]+)(?:\(([^)]*)\))?(\[[^]]*\])?")
_BETWEEN_METHODS = re.compile(r"\+(?![^(]*\))")


def settings_tables(results: Results) -> Iterator[tuple[Setting, Html]]:
    """The table of every setting, in the study's order."""
    for setting in results.settings():
        yield setting, setting_table(results, setting)


def setting_table(results: Results, setting: Setting) -> Html:
    """One row a recipe (and share, of curves): its methods by part, trained share, memory, time, scores."""
    arms = results.arms(setting)
    parts = [part for part in PARTS if any(part in arm.parts for arm in arms)]
    parts += [part for arm in arms for part in arm.parts if part not in parts]
    parts = list(dict.fromkeys(parts))
    curve = results.is_curve(setting)
    columns = _columns(results, setting, curve)
    best = {column: _best(results, arms, column) for column in columns}
    fixed_heads = ["recipe", *(["data"] if curve else []), *parts, "trained", "memory", "time"]
    groups = [tag("td", colspan=len(fixed_heads))] + [
        tag(
            "th", dataset, colspan=sum(one == dataset for one, _ in columns), scope="colgroup", class_="group"
        )
        for dataset in dict.fromkeys(dataset for dataset, _ in columns)
    ]
    heads = [tag("th", head, scope="col", class_=_side(head)) for head in fixed_heads]
    heads += [tag("th", _unit(column[1]), scope="col", class_="number") for column in columns]
    if homes := _homes(results):
        groups.append(tag("th", homes[0], scope="colgroup", class_="group"))
        heads.append(tag("th", "forgotten, points", scope="col", class_="number"))
    rows = []
    if base := _frozen_row(results, setting, curve, parts, columns, homes):
        rows.append(base)
    for arm in arms:
        cells: list[Html] = [tag("th", arm.name, scope="row")]
        if curve:
            cells.append(tag("td", share(arm.share), class_="number"))
        cells += [_method(arm.parts.get(part, "")) for part in parts]
        trained, peak, seconds = (
            arm.mean(c) for c in ("trainable_share", "train_peak_bytes", "train_seconds")
        )
        cells += [
            tag("td", text, class_="number") for text in (share(trained), memory(peak), duration(seconds))
        ]
        for column in columns:
            one = results.estimate(arm, *column)
            test = results.test(arm, *column)
            cells.append(_score(column[1], one, one is not None and one.value == best[column], test))
        if homes:
            cells.append(_forgotten(results, arm, homes[0]))
        rows.append(tag("tr", *cells))
    head = tag("thead", tag("tr", *groups), tag("tr", *heads))
    return boxed(
        tag("table", tag("caption", _caption(results, setting, arms)), head, tag("tbody", *rows)),
        setting.told,
    )


def boxed(table: Html, label: str) -> Html:
    """A table in a box of its own that scrolls sideways, by keys too."""
    return tag("div", table, class_="scroll", tabindex=0, role="region", aria_label=f"Table: {label}")


def models_table(results: Results) -> Html | None:
    """The models side by side: a row a recipe, a column a model and data set; None of a single model."""
    settings = [setting for setting in results.settings() if not results.is_curve(setting)]
    if len({setting.model for setting in settings}) < 2:
        return None
    columns = [(s, dataset) for s in settings for dataset in results.datasets(s, "in")]
    arms = {(setting, arm.name): arm for setting in settings for arm in results.full_data(setting)}
    order = results.recipe_order()
    recipes = {arm.name: arm.recipe for arm in arms.values()}
    body = []
    base = [results.frozen(s.model, dataset, results.primary(dataset)) for s, dataset in columns]
    if any(base):
        found = zip(columns, base, strict=True)
        cells = [_score(results.primary(dataset), one, False, None) for (_, dataset), one in found]
        body.append(tag("tr", tag("th", "frozen base", scope="row"), *cells))
    for name in sorted(recipes, key=lambda name: order.index(recipes[name])):
        cells = []
        for setting, dataset in columns:
            arm, metric = arms.get((setting, name)), results.primary(dataset)
            one = None if arm is None else results.estimate(arm, dataset, metric)
            test = None if arm is None else results.test(arm, dataset, metric)
            cells.append(_score(metric, one, False, test))
        body.append(tag("tr", tag("th", name, scope="row"), *cells))
    heads = [
        tag(
            "th",
            s.model,
            tag("br"),
            tag("span", f"{dataset}, {_unit(results.primary(dataset))}", class_="quiet"),
            scope="col",
            class_="number",
        )
        for s, dataset in columns
    ]
    head = tag("thead", tag("tr", tag("th", "recipe", scope="col"), *heads))
    caption = tag(
        "caption", "The models side by side, each trained and tested on the data set of its column."
    )
    return boxed(tag("table", caption, head, tag("tbody", *body)), "models side by side")


def paired_table(results: Results) -> Html | None:
    """Every paired test, in full."""
    rows = [
        tag(
            "tr",
            tag("th", row["recipe"], scope="row"),
            *(tag("td", str(row[name])) for name in ("model", "trained_on")),
            tag("td", share(float(row.get("share") or 1)), class_="number"),
            tag("td", row["dataset"]),
            tag("td", metric_name(row["metric"])),
            tag("td", _difference(row), class_="number"),
            tag("td", p_value(row["p"]).removeprefix("p ").removeprefix("= "), class_="number"),
            tag("td", p_value(row["p_holm"]).removeprefix("p ").removeprefix("= "), class_="number"),
            tag("td", f"{row['images']:,}", class_="number"),
            tag("td", str(row["seeds"]), class_="number"),
        )
        for row in results.tables["tests"]
    ]
    if not rows:
        return None
    against = list(dict.fromkeys(row["against"] for row in results.tables["tests"]))
    heads = ["recipe", "model", "trained on", "data", "tested on", "metric"]
    numbers = [f"less {' or '.join(against)}", "p", "p, Holm", "images", "seeds"]
    head = tag(
        "tr",
        *(tag("th", h, scope="col", class_="number" if h == "data" else None) for h in heads),
        *(tag("th", h, scope="col", class_="number") for h in numbers),
    )
    caption = tag("caption", "Paired tests, all common seeds together, resampled by image.")
    return boxed(tag("table", caption, tag("thead", head), tag("tbody", *rows)), "paired tests")


def numbers_table(header: Sequence[str], rows: Sequence[Sequence[str]], label: str) -> Html:
    """The numbers behind a figure."""
    head = tag("tr", *(tag("th", text, scope="col") for text in header))
    body = [tag("tr", tag("th", row[0], scope="row"), *(tag("td", text) for text in row[1:])) for row in rows]
    return boxed(tag("table", tag("thead", head), tag("tbody", *body)), label)


def _columns(results: Results, setting: Setting, curve: bool) -> list[Column]:
    columns: list[Column] = []
    for dataset in results.datasets(setting, "in"):
        shown = results.shown(dataset) or [results.primary(dataset)]
        columns += [(dataset, metric) for metric in ([results.primary(dataset)] if curve else shown)]
    columns += [(dataset, results.primary(dataset)) for dataset in results.datasets(setting, "out")]
    return columns


def _unit(metric: str) -> str:
    unit = "\u00a0%" if is_fraction(metric) else ""
    return metric_name(metric).replace("-", "\u2011") + unit  # neither breaks: BLEU-1, exact %


def _best(results: Results, arms: Sequence[Arm], column: Column) -> float | None:
    """The highest mean of a column; none where a single recipe has one."""
    values = [one.value for arm in arms if (one := results.estimate(arm, *column))]
    return max(values) if len(values) > 1 else None


def _score(metric: str, one: Estimate | None, best: bool, test: Record | None) -> Html:
    if one is None:
        return tag("td", NONE, class_="number")
    value: Child = score(metric, one.value)
    mark: Html | None = None
    if test and test.get("p_holm") is not None and test["p_holm"] < SIGNIFICANT:
        above = test["difference"] > 0
        told = f"{'above' if above else 'below'} {test['against']}: {_difference(test)}"
        told += f", {p_value(test['p_holm'])} after Holm"
        mark = tag("span", ABOVE if above else BELOW, title=told, role="img", aria_label=told, class_="mark")
    return tag(
        "td",
        joined([tag("strong", value) if best else value, mark]),
        tag("span", f"{score(metric, one.low)} to {score(metric, one.high)}", class_="ends"),
        class_="number",
    )


def _difference(test: Record) -> str:
    """A difference with its interval, in points where the metric is a fraction."""
    if is_fraction(test["metric"]):
        return f"{points(test['difference'])} [{points(test['low'])}, {points(test['high'])}]"
    return f"{fixed(test['difference'], 2)} [{fixed(test['low'], 2)}, {fixed(test['high'], 2)}]"


def _method(text: str) -> Html:
    """A part's methods in short, in full under the pointer."""
    if text in ("", FROZEN):
        return tag("td", FROZEN, class_="quiet")
    return tag("td", short_methods(text), title=text)


def short_methods(text: str) -> str:
    """`lora(r=4,alpha=32)[2:]+ln` as `lora r=4 [2:] + ln`: of each method its size alone."""
    return " + ".join(_ONE_METHOD.sub(_short, one) for one in _BETWEEN_METHODS.split(text))


def _short(found: re.Match[str]) -> str:
    name, options, layers = found.groups()
    size = next((option for option in ("r", "n", "width") if option in METHODS.get(name, {})), None)
    given = dict(pair.split("=", 1) for pair in (options or "").split(",") if "=" in pair)
    shown = [name]
    if size is not None and (name == "lora" or size in given):
        shown.append(f"{size}={given.get(size, METHODS[name][size])}")
    if name == "ln" and given:  # gains or biases alone
        shown.append("biases" if given.get("gain") == "0" else "gains")
    return " ".join([*shown, *([layers] if layers else [])])


def _frozen_row(
    results: Results,
    setting: Setting,
    curve: bool,
    parts: Sequence[str],
    columns: Sequence[Column],
    homes: Sequence[str],
) -> Html | None:
    found = [results.frozen(setting.model, *column) for column in columns]
    if not any(found):
        return None
    cells = [tag("th", "frozen base", scope="row"), *([tag("td", NONE, class_="number")] if curve else [])]
    cells += [_method("") for _ in parts]
    cells += [tag("td", text, class_="number") for text in ("0%", NONE, NONE)]
    largest = results.arms(setting)[0].share
    for column, one in zip(columns, found, strict=True):
        cells.append(_score(column[1], one, False, results.tested(setting, largest, FROZEN, *column)))
    cells += [tag("td", "0", class_="number")] if homes else []
    return tag("tr", *cells, class_="base")


def _homes(results: Results) -> list[str]:
    return list(dict.fromkeys(row["dataset"] for row in results.tables["forgetting"]))


def _forgotten(results: Results, arm: Arm, home: str) -> Html:
    one = forgotten_by(results, arm, home)
    if one is None:
        return tag("td", NONE, class_="number")
    ends = tag("span", f"{points(one.low)} to {points(one.high)}", class_="ends") if one.seeds > 1 else None
    return tag("td", points(one.value), ends, class_="number")


def _caption(results: Results, setting: Setting, arms: Sequence[Arm]) -> Html:
    seeds = sorted({len(arm.cells) for arm in arms})
    many = f"{seeds[0]}" if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]}"
    over = "one seed" if seeds == [1] else f"means over {many} seeds"
    text = f"Grid {setting.grid}, {over}, with 95% intervals; bold: the highest."
    if against := results.reference(setting):
        text += f" {ABOVE} above, {BELOW} below {against} (paired by image, p < {SIGNIFICANT} after Holm)."
    return joined([tag("strong", f"{setting.told[0].upper()}{setting.told[1:]}."), f" {text}"])


def _side(head: str) -> str | None:
    return "number" if head in ("data", "trained", "memory", "time") else None
