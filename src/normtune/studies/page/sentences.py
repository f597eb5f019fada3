"""The findings of a study as sentences that are computed from its numbers.

A difference between recipes is stated only if its paired test is significant after the correction.
"""

from __future__ import annotations

from collections.abc import Iterator

from normtune.runtime.number_format import (
    format_bytes,
    format_percent,
    format_points,
    format_share,
    format_significant,
    join_names,
)
from normtune.studies.page.figures import forgetting_estimate, format_interval, format_score, setting_title
from normtune.studies.page.norm_maps import norm_changes
from normtune.studies.page.results import Arm, Estimate, Results, Setting, metric_name
from normtune.studies.page.tables import SIGNIFICANT

FULL = "full"  # the recipe that gains are compared with


def findings(results: Results) -> Iterator[tuple[str, list[str]]]:
    """A title and sentences for each setting that has findings."""
    for setting in results.settings():
        curve = results.is_curve(setting)
        sentences = [*_curve_findings(results, setting)] if curve else [*_main_findings(results, setting)]
        if sentences:
            yield setting_title(results, setting) + (", shares of the data" if curve else ""), sentences


def _main_findings(results: Results, setting: Setting) -> Iterator[str]:
    """The findings of a setting that does not compare shares of the data."""
    arms = {arm.name: arm for arm in results.full_data_arms(setting)}
    reference = results.reference_recipe(setting)
    for dataset in results.datasets(setting, "in"):
        metric = results.primary_metric(dataset)
        scores = {name: mean for name, arm in arms.items() if (mean := results.estimate(arm, dataset, metric))}
        if reference in scores:
            yield from _reference_gain(results, setting, arms, scores, reference, dataset)
        yield from _highest_mean(scores, arms, metric)
        if reference is not None:
            yield from _test_results(results, arms, reference, dataset)
    if reference in arms:
        for dataset in results.datasets(setting, "out"):
            yield from _transfer(results, arms, reference, dataset)
        yield from _forgetting(results, arms, reference)
        yield from _norm_findings(results, arms[reference])


def _reference_gain(
    results: Results, setting: Setting, arms: dict[str, Arm], scores: dict[str, Estimate], reference: str, dataset: str
) -> Iterator[str]:
    """What the reference recipe trains, and how much of full tuning's gain over the base it reaches."""
    metric = results.primary_metric(dataset)
    reference_score, base_score = scores[reference], results.frozen_estimate(setting.model, dataset, metric)
    trained = format_share(arms[reference].mean("trainable_share"))
    text = f"{reference} trains {trained} of the parameters; "
    text += f"{metric_name(metric)}: {format_interval(metric, reference_score)}"
    if base_score:
        text += f", the frozen base {format_interval(metric, base_score)}"
    full_score = scores.get(FULL) if reference != FULL else None
    if full_score is None:
        yield f"{text}."
        return
    text += f", full tuning {format_interval(metric, full_score)}."
    if base_score is not None and full_score.low <= base_score.value:
        text += " Full tuning's gain over the frozen base is not clearly above 0, so no share of it is given."
    elif base_score is not None and reference_score.value < base_score.value:
        text += " That is below the frozen base."
    elif base_score is not None:
        reached = (reference_score.value - base_score.value) / (full_score.value - base_score.value)
        percent = format_percent(reached, 0)
        text += f" That is {percent}% of full tuning's gain over the frozen base (of the means)."
    peaks = arms[reference].mean("train_peak_bytes"), arms[FULL].mean("train_peak_bytes")
    if all(peaks):
        memory, full_memory = map(format_bytes, peaks)
        text += f" Peak memory of training: {memory} against full tuning's {full_memory}."
    yield text


def _highest_mean(scores: dict[str, Estimate], arms: dict[str, Arm], metric: str) -> Iterator[str]:
    """The recipe with the highest mean, if there are at least three."""
    if len(scores) < 3:
        return
    best = max(scores, key=lambda name: scores[name].value)
    trained = format_share(arms[best].mean("trainable_share"))
    yield f"The highest mean is {best}'s: {format_score(metric, scores[best].value)} with {trained} trained."


def _test_results(results: Results, arms: dict[str, Arm], reference: str, dataset: str) -> Iterator[str]:
    """Which recipes differ significantly from the reference after Holm's correction."""
    metric = results.primary_metric(dataset)
    tests = {name: test for name, arm in arms.items() if (test := results.test_of_arm(arm, dataset, metric))}
    if not tests:
        return
    clear = {name: test for name, test in tests.items() if test["p_holm"] < SIGNIFICANT}
    clauses = []
    for word, sign in (("above", 1), ("below", -1)):
        names = [name for name, test in clear.items() if test["difference"] * sign > 0]
        if names:
            names.sort(key=lambda name: -abs(tests[name]["difference"]))
            described = join_names([f"{name} ({_format_gap(metric, tests[name]['difference'])})" for name in names])
            clauses.append(f"{described} {'is' if len(names) == 1 else 'are'} {word} {reference}")
    unclear = [name for name in tests if name not in clear]
    if unclear:
        verb = "does" if len(unclear) == 1 else "do"
        clauses.append(f"{join_names(unclear)} {verb} not differ significantly from {reference}")
    yield f"On {dataset}, after Holm's correction: {'; '.join(clauses)}."


def _format_gap(metric: str, difference: float) -> str:
    """A difference of scores with its unit."""
    cider = metric.startswith("cider")
    return format_significant(difference, 2) if cider else f"{format_points(difference)} points"


def _transfer(results: Results, arms: dict[str, Arm], reference: str, dataset: str) -> Iterator[str]:
    """The scores of the reference and of full tuning on a data set that they were not trained on."""
    metric = results.primary_metric(dataset)
    setting = arms[reference].setting
    base_score = results.frozen_estimate(setting.model, dataset, metric)
    names = [name for name in dict.fromkeys((reference, FULL)) if name in arms]
    scores = {name: score for name in names if (score := results.estimate(arms[name], dataset, metric))}
    if base_score is None or not scores:
        return
    parts = [
        f"{name} {format_score(metric, score.value)} ({_format_gap(metric, score.value - base_score.value)})"
        for name, score in scores.items()
    ]
    yield (
        f"On {dataset}, without training on it, against the frozen base's "
        f"{format_score(metric, base_score.value)}: {join_names(parts)}."
    )


def _forgetting(results: Results, arms: dict[str, Arm], reference: str) -> Iterator[str]:
    """What the reference and full tuning lost on the base's own task."""
    for dataset in dict.fromkeys(row["dataset"] for row in results.tables["forgetting"]):
        losses = {
            name: loss
            for name in dict.fromkeys((reference, FULL))
            if name in arms and (loss := forgetting_estimate(results, arms[name], dataset))
        }
        if losses:
            parts = [f"{name} {format_percent(loss.value)}" for name, loss in losses.items()]
            yield f"Points lost on the base's own task, {dataset}: {join_names(parts)}."


def _norm_findings(results: Results, arm: Arm) -> Iterator[str]:
    """How far the gains of each part's norms moved, in the order of the means."""
    parts: dict[str, list[float]] = {}
    for (row, _), value in norm_changes(results, arm, "gain").items():
        parts.setdefault(row.partition(":")[0], []).append(value)
    if len(parts) > 1:
        means = {part: sum(values) / len(values) for part, values in parts.items()}
        described = [
            f"{part} {format_significant(100 * means[part], 2)}%" for part in sorted(means, key=lambda p: -means[p])
        ]
        changes = join_names(described)
        yield f"Mean change of a norm's gain under {arm.name}, relative to its start: {changes}."


def _curve_findings(results: Results, setting: Setting) -> Iterator[str]:
    """At which shares of the data the reference's mean is higher than that of another recipe."""
    arms = results.arms(setting)
    reference = results.reference_recipe(setting) or arms[0].name
    for dataset in results.datasets(setting, "in"):
        metric = results.primary_metric(dataset)
        scores_of: dict[str, dict[float, Estimate]] = {}
        for arm in arms:
            if score := results.estimate(arm, dataset, metric):
                scores_of.setdefault(arm.name, {})[arm.share] = score
        reference_scores = scores_of.get(reference, {})
        for name, scores in scores_of.items():
            shares = sorted(set(reference_scores) & set(scores))
            if name == reference or not shares:
                continue
            ahead = [format_share(s) for s in shares if reference_scores[s].value > scores[s].value]
            if not ahead:
                where = "at no share of the training images"
            elif len(ahead) == len(shares):
                where = "at every share of the training images"
            else:
                where = f"with {join_names(ahead)} of the training images"
            tried = join_names([format_share(score) for score in shares])
            yield f"On {dataset} {reference}'s mean is higher than {name}'s {where} (tried: {tried})."
