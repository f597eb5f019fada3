"""What a study found, in sentences that are computed from its numbers and say no more than these."""

from __future__ import annotations

from collections.abc import Iterator

from normtune.studies.page.figures import forgotten_by, score, score_interval, title
from normtune.studies.page.norm_maps import moved
from normtune.studies.page.number_format import memory, percent, points, several, share, significant
from normtune.studies.page.results import Arm, Estimate, Results, Setting, metric_name
from normtune.studies.page.tables import SIGNIFICANT

FULL = "full"


def findings(results: Results) -> Iterator[tuple[str, list[str]]]:
    """(what it is about, sentences) of each setting that has something to say."""
    for setting in results.settings():
        curve = results.is_curve(setting)
        found = [*_curve(results, setting)] if curve else [*_main(results, setting)]
        if found:
            yield title(results, setting) + (", shares of the data" if curve else ""), found


def _main(results: Results, setting: Setting) -> Iterator[str]:
    arms = {arm.name: arm for arm in results.full_data(setting)}
    reference = results.reference(setting)
    for dataset in results.datasets(setting, "in"):
        metric = results.primary(dataset)
        scores = {name: one for name, arm in arms.items() if (one := results.estimate(arm, dataset, metric))}
        if reference in scores:
            yield from _gain(results, setting, arms, scores, reference, dataset)
        yield from _best(scores, arms, metric)
        if reference is not None:
            yield from _tests(results, arms, reference, dataset)
    if reference in arms:
        for dataset in results.datasets(setting, "out"):
            yield from _transferred(results, arms, reference, dataset)
        yield from _forgotten(results, arms, reference)
        yield from _moved(results, arms[reference])


def _gain(
    results: Results,
    setting: Setting,
    arms: dict[str, Arm],
    scores: dict[str, Estimate],
    reference: str,
    dataset: str,
) -> Iterator[str]:
    """What the reference trains and how much of full tuning's gain it reaches."""
    metric = results.primary(dataset)
    mine, base = scores[reference], results.frozen(setting.model, dataset, metric)
    trained = share(arms[reference].mean("trainable_share"))
    text = f"{reference} trains {trained} of the parameters; "
    text += f"{metric_name(metric)}: {score_interval(metric, mine)}"
    if base:
        text += f", the frozen base {score_interval(metric, base)}"
    full = scores.get(FULL) if reference != FULL else None
    if full is None:
        yield f"{text}."
        return
    text += f", full tuning {score_interval(metric, full)}."
    if base is not None and full.low <= base.value:
        text += " Full tuning's gain over the frozen base is not clear of 0, so no share of it is told."
    elif base is not None and mine.value < base.value:
        text += " That is below the frozen base."
    elif base is not None:
        reached = (mine.value - base.value) / (full.value - base.value)
        text += f" That is {percent(reached, 0)}% of full tuning's gain over the frozen base (of the means)."
    peaks = arms[reference].mean("train_peak_bytes"), arms[FULL].mean("train_peak_bytes")
    if all(peaks):
        text += f" Peak memory of training: {memory(peaks[0])} against full tuning's {memory(peaks[1])}."
    yield text


def _best(scores: dict[str, Estimate], arms: dict[str, Arm], metric: str) -> Iterator[str]:
    """The highest mean, and who is within its interval at less training."""
    if len(scores) < 3:
        return
    best = max(scores, key=lambda name: scores[name].value)
    trained = arms[best].mean("trainable_share")
    yield f"The highest mean is {best}'s: {score(metric, scores[best].value)} with {share(trained)} trained."


def _tests(results: Results, arms: dict[str, Arm], reference: str, dataset: str) -> Iterator[str]:
    """Which recipes differ from the reference after the correction."""
    metric = results.primary(dataset)
    tests = {name: test for name, arm in arms.items() if (test := results.test(arm, dataset, metric))}
    if not tests:
        return
    clear = {name: test for name, test in tests.items() if test["p_holm"] < SIGNIFICANT}
    told = []
    for word, sign in (("above", 1), ("below", -1)):
        found = [name for name, test in clear.items() if test["difference"] * sign > 0]
        if found:
            found.sort(key=lambda name: -abs(tests[name]["difference"]))
            named = several([f"{name} ({_by(metric, tests[name]['difference'])})" for name in found])
            told.append(f"{named} {'lies' if len(found) == 1 else 'lie'} {word} {reference}")
    same = [name for name in tests if name not in clear]
    if same:
        told.append(f"{several(same)} cannot be told from {reference}")
    yield f"On {dataset}, after Holm's correction: {'; '.join(told)}."


def _by(metric: str, difference: float) -> str:
    return f"{points(difference)} points" if not metric.startswith("cider") else significant(difference, 2)


def _transferred(results: Results, arms: dict[str, Arm], reference: str, dataset: str) -> Iterator[str]:
    """What training did to another data set than its own."""
    metric = results.primary(dataset)
    setting = arms[reference].setting
    base = results.frozen(setting.model, dataset, metric)
    named = [name for name in dict.fromkeys((reference, FULL)) if name in arms]
    scores = {name: one for name in named if (one := results.estimate(arms[name], dataset, metric))}
    if base is None or not scores:
        return
    parts = [
        f"{name} {score(metric, one.value)} ({_by(metric, one.value - base.value)})"
        for name, one in scores.items()
    ]
    yield (
        f"Asked about {dataset} without training on it, against the frozen base's "
        f"{score(metric, base.value)}: {several(parts)}."
    )


def _forgotten(results: Results, arms: dict[str, Arm], reference: str) -> Iterator[str]:
    for dataset in dict.fromkeys(row["dataset"] for row in results.tables["forgetting"]):
        lost = {
            name: one
            for name in dict.fromkeys((reference, FULL))
            if name in arms and (one := forgotten_by(results, arms[name], dataset))
        }
        if lost:
            parts = [f"{name} {percent(one.value)}" for name, one in lost.items()]
            yield f"Points lost on the base's own task, {dataset}: {several(parts)}."


def _moved(results: Results, arm: Arm) -> Iterator[str]:
    """The part whose gains moved most."""
    parts: dict[str, list[float]] = {}
    for cell in moved(results, arm, "gain"):
        parts.setdefault(cell.row.partition(":")[0], []).append(cell.value)
    if len(parts) > 1:
        means = {part: sum(values) / len(values) for part, values in parts.items()}
        told = [
            f"{part} {significant(100 * means[part], 2)}%" for part in sorted(means, key=lambda p: -means[p])
        ]
        yield f"Mean step of a norm's gain under {arm.name}, of its start: {several(told)}."


def _curve(results: Results, setting: Setting) -> Iterator[str]:
    """Where the order of two recipes changes with the share of the data."""
    arms = results.arms(setting)
    reference = results.reference(setting) or arms[0].name
    for dataset in results.datasets(setting, "in"):
        metric = results.primary(dataset)
        table: dict[str, dict[float, Estimate]] = {}
        for arm in arms:
            if one := results.estimate(arm, dataset, metric):
                table.setdefault(arm.name, {})[arm.share] = one
        mine = table.get(reference, {})
        for name, other in table.items():
            common = sorted(set(mine) & set(other))
            if name == reference or not common:
                continue
            ahead = [share(s) for s in common if mine[s].value > other[s].value]
            if not ahead:
                where = "at no share of the training images"
            elif len(ahead) == len(common):
                where = "at every share of the training images"
            else:
                where = f"with {several(ahead)} of the training images"
            tried = several([share(one) for one in common])
            yield f"On {dataset} {reference}'s mean is higher than {name}'s {where} (tried: {tried})."
