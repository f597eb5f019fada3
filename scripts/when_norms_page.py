"""Writes docs/when-norms.md from benchmarks/when_norms.json: its tables, and every sentence that draws a conclusion.

`scripts/write_docs.py` calls it. A claim "holds", "does not hold" or is "undecided" by tests at 5% that are corrected
for the tests of the claim (Holm). A sentence without its rows in the record is left out.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import StrictUndefined, Template
from results_page import difference_text, points

from normtune.metrics.statistics.comparisons import holm_correction
from normtune.runtime.number_format import format_duration, format_interval, format_percent, format_points, join_names
from normtune.runtime.text_table import markdown_table

Row = dict[str, Any]
SIGNIFICANT = 0.05
SHIFTS = ("acquisition", "wording", "knowledge")
BASES = {
    "nano": "`nano`", "nano-1950": "30% of its pretraining", "nano-650": "10% of its pretraining",
    "nano-195": "3% of its pretraining", "pico": "`pico`, a sixth of the size",
}  # fmt: skip
METRICS = {"closed_label": "closed", "open_exact": "open", "global_exact": "global"}
NAMES = {"frozen": "no tuning", "both": "LN trained on hospital B", "sum": "their sum", "average": "their average"}
NAMES |= {"acquisition": "norms of acquisition", "wording": "norms of wording"}


def share(row: Mapping[str, Any]) -> str:
    """A share as `65% [52, 80]`, or the gain that is not significant."""
    if row["share"] is None:
        ends = f"[{format_points(row['gain_low'])}, {format_points(row['gain_high'])}]"
        return f"an unknown share (the whole gain is {format_points(row['gain'])} points {ends})"
    return f"{format_percent(row['share'], 0)}% [{format_percent(row['low'], 0)}, {format_percent(row['high'], 0)}]"


def verdict(rows: Sequence[Row], sign: int = 1) -> str:
    """ "holds" if every difference is significantly on the claimed side, "does not hold" if one is on the other."""
    sides = [sign * row["difference"] > 0 if row["p_holm"] < SIGNIFICANT else None for row in rows]
    if not sides:
        return "not measured"
    return "does not hold" if False in sides else "holds" if all(sides) else "undecided"


def verdict_of_none(rows: Sequence[Row]) -> str:
    """ "does not hold" if a difference is significant, else "undecided": no test shows that there is none."""
    return "does not hold" if any(row["p_holm"] < SIGNIFICANT for row in rows) else "undecided"


def correct(tests: Sequence[Row]) -> None:
    """Add the corrected p-values of a claim's tests (Holm)."""
    for index, corrected in holm_correction(dict(enumerate(test["p"] for test in tests))).items():
        tests[index]["p_holm"] = corrected


class Record:
    """The rows of benchmarks/when_norms.json."""

    def __init__(self, record: Mapping[str, Any]) -> None:
        self.about = record
        self.rows: list[Row] = record["rows"]
        self.shares = {(row["model"], row["images"], row["shift"]): row for row in self.of("share")}
        correct([row["against_full"] for row in self.shares.values()])

    def of(self, experiment: str, **values: Any) -> list[Row]:
        """The rows of an experiment with these values."""
        return [
            row
            for row in self.rows
            if row["experiment"] == experiment and all(row[name] == value for name, value in values.items())
        ]

    def contrasts(self, claim: str, **values: Any) -> list[Row]:
        return self.of("contrast", claim=claim, **values)


def by_shift(rows: Iterable[Row]) -> str:
    """Differences by shift, as a part of a sentence."""
    return join_names([f"{difference_text(row)} ({row['shift']})" for row in rows])


def enough(record: Record) -> str:
    """Are norms enough?"""
    rows = list(record.shares.values())
    tests = [row["against_full"] for row in rows]
    worse = [
        row for row in rows if row["against_full"]["p_holm"] < SIGNIFICANT and row["against_full"]["difference"] < 0
    ]
    equal = [row for row in rows if row["against_full"]["equivalent"]]
    ruling = "does not hold" if worse else "holds" if tests and len(equal) == len(rows) else "undecided"
    lines = [f"- **Norms are enough: {ruling}.**"]
    shares = [f"{share(row)} on {row['shift']}" for row in rows if (row["model"], row["images"]) == ("nano", 80)]
    if shares:
        lines.append(f"    - Of the gain of full tuning, `nano` with LN and 80 images reaches {join_names(shares)}.")
    if worse:
        largest = min(worse, key=lambda row: row["against_full"]["difference"])
        lines.append(
            f"    - LN is significantly below full tuning in {len(worse)} of {len(rows)} settings, the most with "
            f"{setting(largest)}: {difference_text(largest['against_full'])}."
        )
    if equal:
        texts = [f"{setting(row)} ({points(row['against_full'])})" for row in equal]
        lines.append(f"    - LN is equivalent to full tuning within 2 points with {join_names(texts)}.")
    return "\n".join(lines)


def setting(row: Row) -> str:
    """The base, shift and images of a setting in words."""
    return f"{BASES[row['model']]}, {row['images']} images, {row['shift']}"


def length(record: Record) -> str:
    """Are the rate and the length of the training to blame?"""
    rows = {row["grid"]: row for row in record.of("length")}
    if not {"rate", "longer-ln"} <= set(rows):
        return ""
    tests, distance = (
        [rows["rate"][other] | {"shift": "4 passes"}, rows["longer-ln"][other] | {"shift": "10 passes"}]
        for other in ("against_ln", "against_full")
    )
    correct(tests)
    correct(distance)
    shares = f"{share(rows['rate'])} with 4 passes each, and {share(rows['longer-ln'])} with 10 passes each"
    return "\n".join(
        [
            f"- **On wording, LN gains from a higher rate and from more passes: {verdict(tests)}.** At a rate of 0.03, "
            f"`nano` is {by_shift(tests)} from LN at {rate_of(record)} with 4 passes.",
            f"    - It is {by_shift(distance)} from full tuning with as many passes. Of its gain, it reaches {shares}.",
        ]
    )


def rate_of(record: Record) -> str:
    """The rate of LN that the trials chose on wording."""
    rates = record.shares["nano", 80, "wording"]["rates"]["ln"] or {}
    return join_names([f"{rate:g}" for rate in rates.values()])


def trend(record: Record, claim: str, text: str, change: str) -> str:
    """A claim that LN comes closer to full tuning as something grows."""
    rows = record.contrasts(claim)
    if not rows:
        return ""
    lines = [
        f"- **{text}: {verdict(rows)}.** {change} changes the difference of LN and full tuning by {by_shift(rows)}."
    ]
    return "\n".join(lines)


def forgetting(record: Record) -> str:
    """Does LN forget less than full tuning?"""
    rows = record.contrasts("forgets less")
    against_full = [row for row in rows if row["terms"][1][2] == "full"]
    if not against_full:
        return ""
    lines = [f"- **LN forgets less than full tuning: {verdict(against_full)}.**"]
    lost = {
        recipe: [row for row in record.contrasts("forgotten") if row["terms"][0][2] == recipe]
        for recipe in ("ln", "full")
    }
    for recipe, of_recipe in lost.items():
        if of_recipe:
            lines.append(f"    - After `{recipe}`, the base's own task changes by {by_shift(of_recipe)}.")
    lines.append(f"    - `ln` less `full` on the base's own task: {by_shift(against_full)}.")
    for other in ("lora-8", "ffn"):
        if of_other := [row for row in rows if row["terms"][1][2] == other]:
            lines.append(f"    - `ln` less `{other}`: {by_shift(of_other)}.")
    return "\n".join(lines)


def feed_forward(record: Record) -> str:
    """Does feed-forward tuning gain on some metrics and lose in transfer?"""
    inside, across = record.contrasts("ffn gains"), record.contrasts("ffn transfers")
    if not inside or not across:
        return ""
    gains = [row for row in inside if row["p_holm"] < SIGNIFICANT and row["difference"] > 0]
    losses = [row for row in across if row["p_holm"] < SIGNIFICANT and row["difference"] < 0]
    wins = [row for row in across if row["p_holm"] < SIGNIFICANT and row["difference"] > 0]
    ruling = "holds" if gains else "undecided"
    lines = [f"- **Feed-forward tuning gains on some metrics over LN: {ruling}.**"]
    for metric, name in METRICS.items():
        of_metric = [row for row in inside if row["metric"] == metric]
        lines.append(f"    - `ffn` less `ln`, {name}: {by_shift(of_metric)}.")
    ruling = "does not hold" if wins else "holds" if len(losses) == len(across) else "undecided"
    lines.append(f"- **Feed-forward tuning loses to LN in transfer to another shift: {ruling}.**")
    texts = [f"{difference_text(row)} ({row['shift']} to {row['dataset']})" for row in across]
    lines.append(f"    - `ffn` less `ln`: {join_names(texts)}.")
    return "\n".join(lines)


def parts(record: Record) -> str:
    """Is the language part or the vision part what norms need?"""
    rows = record.contrasts("parts")
    if not rows:
        return ""
    lines = [
        f"- **Norms of the language part are worth more than those of the vision part: {verdict(rows)}.** "
        f"`ln-language` less `ln-vision`: {by_shift(rows)}."
    ]
    for recipe in ("ln-language", "ln-vision"):
        gains = [row for row in record.contrasts("part gains") if row["terms"][0][2] == recipe]
        lines.append(f"    - `{recipe}` gains {by_shift(gains)} over the frozen base.")
    return "\n".join(lines)


def scaling(record: Record) -> str:
    """Does a smaller step of the norms cure forgetting?"""
    rows = record.of("lambda", **{"lambda": 0.5})
    if not rows:
        return ""
    old, new = ([row[f"{task}_against_full_step"] | {"shift": row["shift"]} for row in rows] for task in ("old", "new"))
    remaining = [row["old_against_frozen"] | {"shift": row["shift"]} for row in rows]
    for tests in (old, new, remaining):
        correct(tests)
    shares = [f"{share(row['reached'])} ({row['shift']})" for row in rows]
    return "\n".join(
        [
            f"- **Half of the learned shift (λ = 0.5) brings back some of the base's own task: {verdict(old)}.** It is "
            f"{by_shift(old)} from λ = 1.",
            f"    - It brings back all of it: {verdict_of_none(remaining)}. From the frozen base, it is "
            f"{by_shift(remaining)}.",
            f"    - The price is {by_shift(new)} on the new task. Of LN's gain remains {join_names(shares)}.",
        ]
    )


def mixing(record: Record) -> str:
    """Do norms of two shifts add up?"""
    rows = {row["recipe"]: row for row in record.of("mixture", dataset="b")}
    if not rows:
        return ""
    lines = []
    for recipe in ("sum", "average"):
        tests = [rows[recipe][f"against_{other}"] | {"shift": NAMES[other]} for other in ("acquisition", "wording")]
        correct(tests)
        name = NAMES[recipe].replace("their", "the")
        lines.append(
            f"- **On hospital B, which has both shifts, {name} of the norms of acquisition and of wording is better "
            f"than either: {verdict(tests)}.** It is {by_shift(tests)} from them, and reaches "
            f"{share(rows[recipe]['reached'])} of the gain of LN trained on hospital B."
        )
    singles = [f"{share(rows[other]['reached'])} ({NAMES[other]})" for other in ("acquisition", "wording")]
    lines.append(f"    - Alone, they reach {join_names(singles)} of that gain.")
    return "\n".join(lines)


def coverage(record: Record) -> str:
    """What simulations say about the intervals of shares."""
    rows = record.of("coverage")
    if not rows:
        return ""
    texts = [
        f"{format_percent(row['coverage'])}% (share {format_percent(row['share'], 0)}% of a gain of "
        f"{format_percent(row['full'] - row['frozen'], 0)} points)"
        for row in rows
    ]
    errors = max(1.96 * (row["coverage"] * (1 - row["coverage"]) / row["simulations"]) ** 0.5 for row in rows)
    return (
        f"In {rows[0]['simulations']:,} simulations each, with 3 seeds and 80 images, it contains the true share in "
        f"{join_names(texts)}; ± {format_percent(errors)} for the number of simulations."
    )


def share_table(record: Record) -> str:
    """The scores and the share of every setting."""
    rows = []
    for row in record.shares.values():
        rates = " / ".join(
            ", ".join(f"{rate:g}" for rate in (row["rates"][recipe] or {}).values()) for recipe in ("ln", "full")
        )
        reached = share(row) if row["share"] is not None else "–"
        gain = f"{format_points(row['gain'])} [{format_points(row['gain_low'])}, {format_points(row['gain_high'])}]"
        scores = [format_interval(row[name]) for name in ("frozen", "ln", "full")]
        rows.append([BASES[row["model"]], str(row["images"]), row["shift"], rates, *scores, gain, reached])
    head = ["base", "images", "shift", "rate of `ln` / `full`", "`frozen`", "`ln`", "`full`", "gain of `full`", "share"]
    return "\n".join(markdown_table(head, rows, "llllr"))


def recipe_table(record: Record) -> str:
    """The scores of the recipes on all shifts."""
    cells = {(row["recipe"], row["shift"], row["dataset"]): format_interval(row) for row in record.of("recipe")}
    places = (*SHIFTS, "phantom-a")
    rows = [
        [f"`{recipe}`", shift or "–", *(cells.get((recipe, shift, dataset), "–") for dataset in places)]
        for recipe, shift in dict.fromkeys((recipe, shift) for recipe, shift, _ in cells)
    ]
    return "\n".join(markdown_table(["recipe", "trained on", *SHIFTS, "the base's own task"], rows, "llr"))


def scaled_table(record: Record) -> str:
    """Accuracy for each lambda."""
    rows = [
        [row["shift"], f"{row['lambda']:g}", format_interval(row["new"]), format_interval(row["old"])]
        for row in record.of("lambda")
    ]
    return "\n".join(markdown_table(["shift", "λ", "new task", "the base's own task"], rows, "llr"))


def mixture_table(record: Record) -> str:
    """Accuracy of mixed norms."""
    cells = {(row["recipe"], row["dataset"]): format_interval(row["mean"]) for row in record.of("mixture")}
    places = list(dict.fromkeys(dataset for _, dataset in cells))
    rows = [
        [NAMES[recipe], *(cells[recipe, place] for place in places)] for recipe in dict.fromkeys(r for r, _ in cells)
    ]
    head = ["norms", *("hospital B" if place == "b" else "hospital A" if place == "a" else place for place in places)]
    return "\n".join(markdown_table(head, rows, "lr"))


def study_line(record: Record) -> str:
    """How large the study was."""
    about = record.about
    text = (
        f"{about['trained']} trainings with 3 seeds, and {about['trials']} trials of learning rates, "
        f"{format_duration(about['seconds'])} of training in all"
    )
    if len(record.shares) < about["settings"]:
        text += f"; {about['settings'] - len(record.shares)} of {about['settings']} settings are not finished"
    return text


def page(data: Mapping[str, Any]) -> str:
    """The Markdown of docs/when-norms.md."""
    record = Record(data)
    conclusions = [
        enough(record),
        length(record),
        trend(record, "strength", "The stronger the base, the closer LN comes to full tuning",
              "The whole pretraining in place of 3% of it"),
        trend(record, "size", "The larger the base, the closer LN comes", "`nano` in place of `pico`"),
        trend(record, "images", "The more images, the closer LN comes", "320 images in place of 20, on as many pairs,"),
        forgetting(record),
        feed_forward(record),
        parts(record),
        scaling(record),
        mixing(record),
    ]  # fmt: skip
    template = Path(__file__).with_name("when_norms.md.j2").read_text(encoding="utf-8")
    return Template(template, keep_trailing_newline=True, undefined=StrictUndefined).render(
        line=study_line(record),
        conclusions="\n".join(text for text in conclusions if text),
        coverage=coverage(record),
        shares=share_table(record),
        recipes=recipe_table(record),
        scaled=scaled_table(record),
        mixtures=mixture_table(record),
    )
