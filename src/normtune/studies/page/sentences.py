"""The findings of a study as sentences that are computed from its numbers.

A difference is stated only if its test is significant after the correction, and of recipes only if the test compares
recipes: with few seeds it compares the trained models.
"""

from __future__ import annotations

from collections.abc import Iterator

from normtune.runtime.number_format import format_points, format_share, format_significant, join_names
from normtune.studies.page.figures import format_interval
from normtune.studies.page.results import (
    Record,
    Results,
    Setting,
    counted,
    is_about_recipes,
    is_significant,
    metric_name,
)
from normtune.studies.recipe_names import FROZEN

FULL = "full"  # the sentence about the reference names the score of this recipe too
_WHERE = {"in": "On {}", "out": "On {}, not trained on it", "home": "On {}, the base's own task"}


def findings(results: Results) -> Iterator[tuple[str, list[str]]]:
    """A title and sentences for each setting that has findings; names of recipes are between backticks."""
    for setting in results.settings():
        sentences = [*_scores(results, setting)] if not results.is_curve(setting) else []
        for role in _WHERE:
            for dataset in results.datasets(setting, role):
                sentences += _test_results(results, setting, dataset, _WHERE[role].format(dataset))
        if sentences:
            yield results.title(setting), sentences


def _scores(results: Results, setting: Setting) -> Iterator[str]:
    """What the reference recipe trains, and the scores of this recipe, the frozen base and full tuning."""
    arms = {arm.name: arm for arm in results.full_data_arms(setting)}
    reference = results.reference_recipe(setting) or ""
    if reference not in arms:
        return
    for dataset in results.datasets(setting, "in"):
        metric = results.primary_metric(dataset)
        scores = {
            f"`{name}`": results.estimate(arms[name], dataset, metric)
            for name in dict.fromkeys((reference, FULL))
            if name in arms
        }
        scores["the frozen base"] = results.frozen_estimate(setting.model, dataset, metric)
        texts = [f"{name} {format_interval(metric, score)}" for name, score in scores.items() if score]
        trained = format_share(arms[reference].mean("trainable_share"))
        text = f"`{reference}` trains {trained} of the parameters; {metric_name(metric)} on {dataset}: "
        yield f"{text}{join_names(texts)}."


def _test_results(results: Results, setting: Setting, dataset: str, where: str) -> Iterator[str]:
    """What the tests on a data set show, for each share of the training data."""
    for share in sorted({arm.share for arm in results.arms(setting)}):
        tests = results.tests_of(setting, share, dataset, results.primary_metric(dataset))
        place = f"{where}, {format_share(share)} of the training images" if results.is_curve(setting) else where
        for about_recipes in (True, False):
            if same := [test for test in tests if is_about_recipes(test) == about_recipes]:
                counts = f"{counted(same[0]['images'], 'image')}, {counted(min(t['seeds'] for t in same), 'seed')}"
                compared = f"compared with `{same[0]['against']}` ({counts}"
                if not about_recipes:
                    compared = f"these trained models {compared}; no test of their recipes"
                yield f"{place}, {compared}): {'; '.join(_clauses(same))}."


def _clauses(tests: list[Record]) -> Iterator[str]:
    """What some tests of one metric against one reference show."""
    rest = list(tests)
    for word, sign in (("higher", 1), ("lower", -1)):
        clear = [test for test in tests if is_significant(test) and test["difference"] * sign > 0]
        rest = [test for test in rest if test not in clear]
        if clear:
            clear.sort(key=lambda test: -abs(test["difference"]))
            gaps = [f"{_name(test)} ({_format_gap(test['metric'], test['difference'])})" for test in clear]
            yield f"{join_names(gaps)} {'scores' if len(clear) == 1 else 'score'} {word}"
    for column, words in (("equivalent", "equivalent within"), ("no_worse", "no worse by more than")):
        if passed := [test for test in rest if test.get(column)]:
            rest = [test for test in rest if test not in passed]
            margin = f"{100 * passed[0]['margin']:g} points"
            verb = "is" if len(passed) == 1 else "are"
            yield f"{join_names([_name(test) for test in passed])} {verb} {words} {margin}"
    if rest:
        sizes = [test["smallest_difference"] for test in rest if test.get("smallest_difference") is not None]
        text = f"no difference is shown for {join_names([_name(test) for test in rest])}"
        if sizes:
            gap = _format_gap(rest[0]["metric"], max(sizes)).removeprefix("+")
            text += f" (80% of such comparisons would find one of {gap})"
        yield text


def _name(test: Record) -> str:
    """The recipe of a test; the frozen base has no name of its own in a study's file."""
    return "the frozen base" if test["recipe"] == FROZEN else f"`{test['recipe']}`"


def _format_gap(metric: str, difference: float) -> str:
    """A difference of scores with its unit."""
    cider = metric.startswith("cider")
    return format_significant(difference, 2) if cider else f"{format_points(difference)} points"
