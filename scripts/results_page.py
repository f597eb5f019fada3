"""Writes docs/results.md from the study's results: every table, and every sentence that draws a conclusion.

`scripts/write_docs.py` calls it. A claim of the paper "holds", "does not hold" or is "undecided" by a rule over
tests that were corrected for multiple comparisons; the rule is the docstring of the claim's function.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import StrictUndefined, Template

from normtune.runtime.number_format import (
    format_duration,
    format_interval,
    format_p_value,
    format_percent,
    format_points,
    format_share,
)
from normtune.runtime.text_table import markdown_table
from normtune.studies.page.results import is_about_recipes, is_significant
from normtune.studies.statistics import format_rates

Row = dict[str, Any]
MAIN_METRIC = "global_exact"
METRICS = {"closed_label": "closed", "open_exact": "open", "open_recall": "open recall", MAIN_METRIC: "global"}
NAMES = {"slake": "SLAKE", "vqa-rad": "VQA-RAD", "phantom-a": "the phantoms that the base was trained on"}
NAMES |= {"phantom-b": "the phantoms of another hospital"}
REAL = ("slake", "vqa-rad")  # the sets of real images
GRIDS = (*REAL, "phantom-b")  # each grid has the name of its training set


@dataclass(frozen=True)
class Results:
    """The tables of a finished study, from its results.json."""

    tables: dict[str, list[Row]]

    def cells(self, recipe: str, trained_on: str | None) -> list[Row]:
        """The cells of one recipe in the grid, one per seed."""
        return [
            cell
            for cell in self.tables["cells"]
            if (trained_on is None or trained_on in cell["grids"])
            and (cell["recipe"], cell["trained_on"], cell["status"]) == (recipe, trained_on, "done")
        ]

    def scores(self, trained_on: str | None, dataset: str) -> dict[str, dict[str, Row]]:
        """Rows of the table `seeds` by recipe and metric; without `trained_on`, those of the frozen base."""
        scores: dict[str, dict[str, Row]] = {}
        for row in self.tables["seeds"]:
            in_grid = trained_on is None or row["grid"] == trained_on
            if in_grid and (row["trained_on"], row["dataset"]) == (trained_on, dataset):
                scores.setdefault(row["recipe"], {})[row["metric"]] = row
        return scores

    def tests(self, trained_on: str, dataset: str) -> dict[str, Row]:
        """Each recipe's test against LN by the main metric; recipes with fewer than three seeds have none."""
        group = (trained_on, trained_on, dataset, MAIN_METRIC)
        return {
            row["recipe"]: row
            for row in self.tables["tests"]
            if (row["grid"], row["trained_on"], row["dataset"], row["metric"]) == group and is_about_recipes(row)
        }


def score_table(results: Results, trained_on: str, dataset: str, baseline: Row | None = None) -> str:
    """The scores of every recipe: means over seeds with 95% intervals for new seeds and new images.

    Args:
        baseline: the metrics of the baseline that reads only the question, as the first row.
    """
    rows = []
    if baseline is not None:
        cells = [format_interval(baseline[metric]) for metric in METRICS]
        rows.append(["question only", "–", "–", "–", "–", "–", *cells])
    tuned, frozen = results.scores(trained_on, dataset), results.scores(None, dataset)
    for recipe, metrics in (frozen | tuned).items():
        cells = results.cells(recipe, None if recipe in frozen and recipe not in tuned else trained_on)
        trained = [cell for cell in cells if cell["trained_on"] is not None]
        rows.append(
            [
                f"`{recipe}`",
                format_share(cells[0]["trainable_share"]) if trained else "–",
                format_rates(trained[0]["rates"]) if trained else "–",
                str(metrics[MAIN_METRIC]["seeds"]) if trained else "–",
                f"{sum(cell['passes'] for cell in trained) / len(trained):.1f}" if trained else "–",
                format_duration(sum(cell["train_seconds"] for cell in trained) / len(trained)) if trained else "–",
                *(format_mean(row) for row in (metrics[metric] for metric in METRICS)),
            ]
        )
    images, questions = (next(iter(frozen.values()))[MAIN_METRIC][name] for name in ("images", "rows"))
    head = ["recipe", "trained", "learning rate", "seeds", "passes", "time", *METRICS.values()]
    caption = f"**Trained on {NAMES[trained_on]}, tested on {NAMES[dataset]}**"
    return (
        f"{caption} ({questions:,} questions, {images} images), %\n\n"
        + "\n".join(markdown_table(head, rows, "lllr"))
        + "\n"
    )


def format_mean(row: Row) -> str:
    """A mean over seeds with its interval, in %."""
    return format_interval({**row, "value": row["mean"]})


def sentence(test: Row, dataset: str) -> str:
    """One comparison with LN as a sentence, with its interval."""
    name = "the frozen base" if test["recipe"] == "frozen" else f"`{test['recipe']}`"
    interval = (
        f"{format_points(test['difference'])} points "
        f"[{format_points(test['low'])}, {format_points(test['high'])}], {format_p_value(test['p_holm'])}"
    )
    if is_significant(test):
        side = "above" if test["difference"] > 0 else "below"
        return f"{name} is {side} `ln` on {NAMES[dataset]} ({interval})"
    if test["equivalent"]:
        margin = format_percent(test["margin"], 0)
        return f"{name} and `ln` are equivalent on {NAMES[dataset]} within {margin} points ({interval})"
    power = format_percent(test["smallest_difference"])
    return (
        f"{name} and `ln` do not differ significantly on {NAMES[dataset]} ({interval}; a true difference of {power} "
        "points is found in four of five such comparisons)"
    )


def verdict(tests: list[Row], supports: str) -> str:
    """Judge a claim about LN by its tests against other recipes.

    Args:
        tests: each other recipe against LN.
        supports: "above" if the claim is that LN scores higher, "equal" if it is that LN is as good.

    Returns:
        "holds" if every test supports the claim; "does not hold" if a test contradicts it: the other recipe is
        significantly better (or, for "above", equivalent); else "undecided".
    """
    better = [is_significant(test) and test["difference"] > 0 for test in tests]
    worse = [is_significant(test) and test["difference"] < 0 for test in tests]
    equivalent = [bool(test["equivalent"]) for test in tests]
    if any(better) or (supports == "above" and any(equivalent)):
        return "does not hold"
    supported = worse if supports == "above" else [w or e for w, e in zip(worse, equivalent, strict=True)]
    return "holds" if tests and all(supported) else "undecided"


def claim(
    results: Results, text: str, settings: Sequence[tuple[str, str]], recipes: Sequence[str], supports: str
) -> str:
    """A claim of the paper with its verdict in each setting, and the comparisons behind it.

    Args:
        settings: (trained on, tested on).
        recipes: those that LN is compared with.
        supports: see `verdict`.
    """
    parts = [f"- **{text}:**"]
    for trained_on, dataset in settings:
        tests = results.tests(trained_on, dataset)
        known = [recipe for recipe in recipes if recipe in tests]
        comparisons = "; ".join(sentence(tests[recipe], dataset) for recipe in known) or "Too few seeds for a test"
        ruling = verdict([tests[recipe] for recipe in known], supports)
        parts.append(f"    - trained on {NAMES[trained_on]}: **{ruling}**. {_capital(comparisons)}.")
    return "\n".join(parts)


def gain(results: Results, trained_on: str) -> str:
    """What LN gains over the frozen base, and its share of full tuning's gain."""
    scores = {
        recipe: metrics[MAIN_METRIC]["mean"] for recipe, metrics in results.scores(trained_on, trained_on).items()
    }
    frozen = results.scores(None, trained_on)["frozen"][MAIN_METRIC]["mean"]
    trained = results.cells("ln", trained_on)[0]
    share = (scores["ln"] - frozen) / (scores["full"] - frozen)
    test = results.tests(trained_on, trained_on)["frozen"]
    verb = "raise" if is_significant(test) else "do not significantly raise"
    return (
        f"on {NAMES[trained_on]}, {format_share(trained['trainable_share'])} of the parameters {verb} global accuracy "
        f"from {format_percent(frozen)} to {format_percent(scores['ln'])} ({format_p_value(test['p_holm'])}), "
        f"{format_percent(share, 0)}% of the gain of full tuning"
    )


def page(study: dict[str, Any], questions_only: dict[str, Row]) -> str:
    """The Markdown of docs/results.md.

    Args:
        study: the study's results.json.
        questions_only: the metrics of the question-only baseline by data set.
    """
    results = Results(study)
    inside = [(name, name) for name in GRIDS]
    outside = list(zip(REAL, reversed(REAL), strict=True))
    home = [(name, "phantom-a") for name in GRIDS]
    others = [recipe for recipe in results.scores("slake", "slake") if recipe != "ln"]
    claims = [
        f"- **LN is cheap and learns.** {_capital('; '.join(gain(results, name) for name in GRIDS))}.",
        claim(results, "LN is as good as full tuning", inside, ["full"], "equal"),
        claim(results, "LN is better than LoRA", inside, ["lora-8"], "above"),
        claim(results, "LN generalises better: trained on one set of questions, tested on the other", outside,
              [*others, "frozen"], "above"),
        claim(results, "LN forgets less: after training, tested on the base's own task", home, others, "above"),
    ]  # fmt: skip
    tables = [score_table(results, name, name, questions_only.get(name)) for name in GRIDS]
    tables += [score_table(results, trained_on, dataset) for trained_on, dataset in (*outside, *home)]
    return _render(
        "results.md.j2",
        line=study_line(results),
        cap=cap_line(results),
        claims="\n".join(claims),
        tables="\n".join(tables),
    )


def small_methods_page(study: dict[str, Any]) -> str:
    """The Markdown of docs/small-methods.md, from the results.json of studies/tiny-budget.yaml."""
    results, dataset = Results(study), "phantom-b"
    tests = sorted(results.tests(dataset, dataset).values(), key=lambda test: -test["difference"])
    return _render(
        "small_methods.md.j2",
        line=study_line(results),
        table=score_table(results, dataset, dataset),
        comparisons="\n".join(f"- {_capital(sentence(test, dataset))}." for test in tests),
        other_rates=other_rates(results, dataset),
    )


def other_rates(results: Results, dataset: str) -> str:
    """The scores of `lora-1` at each learning rate, and that of `ln`."""
    main = [row for row in results.tables["seeds"] if (row["metric"], row["dataset"]) == (MAIN_METRIC, dataset)]
    rows = {row["rate"]: row for row in main if row["recipe"] == "lora-1"}
    texts = [
        f"{format_mean(row)} at {rate.removeprefix('lora ')}"
        for rate, row in sorted(rows.items(), key=lambda item: float(item[0].split()[1]))
    ]
    ln = results.scores(dataset, dataset)["ln"][MAIN_METRIC]
    return f"global accuracy of `lora-1` is {', '.join(texts)}, and that of `ln` {format_mean(ln)}"


def _render(template: str, **values: str) -> str:
    """Fill a template of this folder."""
    text = Path(__file__).with_name(template).read_text(encoding="utf-8")
    return Template(text, keep_trailing_newline=True, undefined=StrictUndefined).render(**values)


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def study_line(results: Results) -> str:
    """How large the study was."""
    cells = [cell for cell in results.tables["cells"] if cell["trained_on"] is not None and cell["status"] == "done"]
    seeds = sorted({cell["seed"] for cell in cells if {*GRIDS} & {*cell["grids"]}})
    seconds = sum(cell["train_seconds"] for cell in cells)
    return f"{len(cells)} trainings with {len(seeds)} seeds, {format_duration(seconds)} of training in all"


def cap_line(results: Results) -> str:
    """How many trainings were best in their last pass."""
    cells = [cell for cell in results.tables["cells"] if cell["best_step"] is not None]
    last = sum(cell["best_step"] > cell["steps"] * (1 - 1 / cell["passes"]) for cell in cells)
    return f"In {last} of {len(cells)} trainings the best step was in the last pass"
