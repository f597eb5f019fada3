"""Writes docs/results.md from the study's results: every table, and every sentence that draws a conclusion.

`scripts/write_docs.py` calls it. A claim of the paper "holds", "does not hold" or is "undecided" by a rule over
tests that were corrected for multiple comparisons; the rule is the docstring of the claim's function.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
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
from normtune.studies.spec import SEARCH
from normtune.studies.statistics import format_rates

Row = dict[str, Any]
MAIN_METRIC = "global_exact"
METRICS = {"closed_label": "closed", "open_exact": "open", "open_recall": "open recall", MAIN_METRIC: "global"}
NAMES = {"slake": "SLAKE", "vqa-rad": "VQA-RAD", "phantom-a": "the phantoms that the base was trained on"}
NAMES |= {"phantom-b": "the phantoms of another hospital"}
REAL = ("slake", "vqa-rad")  # the sets of real images
GRIDS = (*REAL, "phantom-b")  # each grid has the name of its training set
SMALL_GRIDS = ("vqa-rad", "slake", "phantom-b")
SMALL_SHARE = 0.012  # a recipe that trains less is small


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
    interval = difference_text(test)
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


def difference_text(test: Row) -> str:
    """The difference of a test with its interval and corrected p-value."""
    return f"{points(test)}, {format_p_value(test['p_holm'])}"


def points(row: Mapping[str, Any]) -> str:
    """A difference as `+3.1 points [+1.0, +5.2]`."""
    return f"{format_points(row['difference'])} points [{format_points(row['low'])}, {format_points(row['high'])}]"


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
    results = Results(study)
    sections = []
    for grid in SMALL_GRIDS:
        tests = sorted(results.tests(grid, grid).values(), key=lambda test: -test["difference"])
        comparisons = "\n".join(f"- {_capital(sentence(test, grid))}." for test in tests)
        sections.append(f"{score_table(results, grid, grid)}\n{comparisons}\n")
    return _render(
        "small_methods.md.j2",
        line=study_line(results),
        findings="\n".join(_small_findings(results)),
        sections="\n".join(sections),
        rates="\n".join(rate_table(results)),
    )


def _small_findings(results: Results) -> Iterator[str]:
    """What the study of small methods shows, each sentence with its comparisons."""
    for recipe, text in (
        ("lora-1", "LoRA with as many parameters as `ln`"),
        ("lora-8", "LoRA with eight times as many"),
        ("full", "Full tuning"),
    ):
        comparisons = "; ".join(sentence(results.tests(grid, grid)[recipe], grid) for grid in SMALL_GRIDS)
        yield f"- **{text}:** {comparisons}."
    for grid in SMALL_GRIDS:
        shares = {recipe: results.cells(recipe, grid)[0]["trainable_share"] for recipe in results.scores(grid, grid)}
        small = [test for recipe, test in results.tests(grid, grid).items() if 0 < shares.get(recipe, 0) < SMALL_SHARE]
        better = [test for test in small if is_significant(test) and test["difference"] > 0]
        best = max(small, key=lambda test: test["difference"])
        text = "; ".join(sentence(test, grid) for test in better) or (
            f"none is significantly above `ln`; the highest is `{best['recipe']}` ({difference_text(best)})"
        )
        yield f"- **The {len(small)} other recipes that train less than {SMALL_SHARE:.1%}, on {NAMES[grid]}:** {text}."


def rate_table(results: Results) -> list[str]:
    """The learning rate that the search chose for each recipe; bold if it is the lowest or highest that was tried."""
    tried: dict[tuple[str, str], set[float]] = {}
    for cell in results.tables["cells"]:
        if SEARCH in cell["grids"] and cell["rates"]:
            tried.setdefault((cell["recipe"], cell["trained_on"]), set()).update(cell["rates"].values())
    rows = []
    for recipe in dict.fromkeys(recipe for recipe, _ in tried):
        row = [f"`{recipe}`"]
        for grid in SMALL_GRIDS:
            cells = results.cells(recipe, grid)
            rates, known = (cells[0]["rates"] if cells else {}), tried.get((recipe, grid), set())
            is_edge = bool(known) and set(rates.values()) <= {min(known), max(known)}
            text = format_rates(rates).split()[-1] if rates else "–"
            row.append(f"**{text}**" if is_edge else text)
        rows.append(row)
    return markdown_table(["recipe", *(NAMES[grid] for grid in SMALL_GRIDS)], rows, "l")


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
