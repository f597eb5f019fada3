"""When are norms enough? The gain of full tuning that LN reaches, by base, shift and images; scaled and mixed norms.

    normtune study studies/when-norms.yaml
    python benchmarks/when_norms.py --study when-norms --out benchmarks/when_norms.json

It reads the finished cells of the study, scales and mixes the norms that they have trained, and evaluates these.
Evaluations in --work are not repeated. Settings with fewer than three seeds are left out and counted. Figures are
written to --figures. `scripts/write_docs.py` writes docs/when-norms.md from the record.

*Share* is (LN - frozen) / (full - frozen), with Fieller's interval: all shares that a test at 5% does not reject, where
the test is that of recipes (`normtune.metrics.statistics.compare_recipes`), for new seeds and new images. It is given
only where full tuning gains significantly. *Coverage* simulates how often the interval contains the true share.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
from record import record

from normtune.adapters.mixing import mix_adapters
from normtune.evaluation.compare import compute_metrics
from normtune.evaluation.config import EvaluateConfig
from normtune.evaluation.evaluate import evaluate_config
from normtune.evaluation.results import read_evaluation
from normtune.metrics.statistics.comparisons import MIN_SEEDS, SeedScores, equivalence, holm_correction, recipe_mean
from normtune.metrics.statistics.intervals import (
    Floats,
    Interval,
    difference_interval,
    influence_of_mean,
    satterthwaite_df,
)
from normtune.metrics.sum_metrics import cluster_rows, score_clusters
from normtune.runtime.files import read_json
from normtune.studies.plan import single_cell
from normtune.studies.run import run_cells

Row = dict[str, Any]
METRIC = "global_exact"
SHIFTS = ("acquisition", "wording", "knowledge")
HOME, POOL = "phantom-a", 320  # the base's own task; the training images of which a share is used
HOME_RECIPES = ("ln", "full", "lora-8", "ffn", "ln-language", "ln-vision")
MODELS = ("nano", "nano-1950", "nano-650", "nano-195", "pico")
IMAGES = (20, 80, 320)
LAMBDAS = (0.25, 0.5, 0.75)
MIXTURES = {"sum": (1.0, 1.0), "average": (0.5, 0.5)}
HOME_DATA = "phantom-a:8/0/60"  # more images than in the study, for what is forgotten
BOTH = "phantom-b:320/40/60"  # both shifts, and other findings
LENGTHS = ("rate", "longer-ln", "longer-full")  # grids of nano with 80 images and wording only
MARGIN = 0.02  # accuracy that does not matter
SHARES = np.round(np.arange(-3, 5.0001, 0.005), 3)  # that Fieller's interval is searched in
# simulated: accuracy of frozen and of full tuning, and the share of the gain that LN reaches
SCENARIOS = ((0.30, 0.55, 0.65), (0.30, 0.55, 1.0), (0.50, 0.58, 0.3), (0.50, 0.58, 0.9))


@dataclass(frozen=True)
class Scores:
    """One recipe's models on one test set; `runs` are the scores of its seeds with intervals for new images."""

    seeds: SeedScores
    counts: Floats  # questions of each image, [images]
    runs: tuple[Interval, ...]

    @property
    def mean(self) -> Interval:
        """The mean over seeds, with its interval for new seeds and new images."""
        return recipe_mean(self.runs, len(self.counts))


@cache
def read_run(folder: Path, metric: str) -> tuple[float, Floats, Floats, Interval]:
    """The score of an evaluation, the influence and the questions of each image, and the interval."""
    run = read_evaluation(folder)
    scores = score_clusters(compute_metrics(run)[metric], cluster_rows(run.examples))
    interval = run.record["metrics"][metric]
    return scores.value, scores.influence, scores.counts, Interval(*(interval[k] for k in ("value", "low", "high")))


def read_scores(paths: Sequence[Path], metric: str = METRIC, *, fixed: bool = False) -> Scores:
    """Read the evaluations of the seeds of one recipe."""
    runs = [read_run(folder, metric) for folder in paths]
    seeds = SeedScores(np.array([run[0] for run in runs]), np.stack([run[1] for run in runs]), fixed)
    return Scores(seeds, runs[0][2], tuple(run[3] for run in runs))


def contrast(terms: Sequence[tuple[float, Scores]]) -> Row:
    """A weighted sum of recipes' scores with its 95% interval: `compare_recipes` for more than two recipes.

    Args:
        terms: (weight, scores of a recipe) on the same images.
    """
    counts = terms[0][1].counts
    random = [(weight, scores.seeds) for weight, scores in terms if not scores.seeds.fixed]
    df_seeds = sum(len(seeds.values) - 1 for _, seeds in random)
    per_seed = sum(weight**2 / len(seeds.values) for weight, seeds in random) / df_seeds
    spread = sum(float(((s.values - s.values.mean()) ** 2).sum()) for _, s in random) * per_seed
    noise = sum(float(((s.influence - s.influence.mean(axis=0)) ** 2).sum()) for _, s in random) * per_seed
    of_seeds = max(spread, noise)
    of_images = float((sum(weight * scores.seeds.influence.mean(axis=0) for weight, scores in terms) ** 2).sum())
    variance = of_seeds + max(0.0, of_images - noise)
    parts = of_seeds**2 / df_seeds + of_images**2 / satterthwaite_df(counts)
    df = variance**2 / parts if parts > 0 else float(df_seeds)
    value = float(sum(weight * scores.seeds.values.mean() for weight, scores in terms))
    low, high, error = difference_interval(value, variance, df, clusters=len(counts))
    return {"difference": value, "low": low, "high": high, "p": p_value(value / error, df), "error": error, "df": df}


def p_value(t: float, df: float) -> float:
    """The two-sided p-value of Student's t."""
    from scipy.special import stdtr

    return float(2 * stdtr(df, -abs(t)))


def reached_share(frozen: Scores, part: Scores, whole: Scores) -> Row:
    """Which share of the gain of `whole` over `frozen` the recipe `part` reaches, with Fieller's interval.

    Returns:
        `gain` of `whole` with its interval; `share`, None if the gain is not significantly above 0; `low` and `high`.
    """
    gain = contrast([(1, whole), (-1, frozen)])
    row: Row = {"gain": gain["difference"], "gain_low": gain["low"], "gain_high": gain["high"]}
    if gain["low"] <= 0:
        return row | {"share": None, "low": None, "high": None}
    share = float((part.seeds.values.mean() - frozen.seeds.values.mean()) / gain["difference"])
    inside = [value for value in SHARES if contains_share(frozen, part, whole, float(value))] or [share]
    return row | {"share": share, "low": float(min(share, inside[0])), "high": float(max(share, inside[-1]))}


def contains_share(frozen: Scores, part: Scores, whole: Scores, share: float) -> bool:
    """Whether Fieller's interval contains a share: part - frozen - share (whole - frozen) may be 0."""
    test = contrast([(1, part), (share - 1, frozen), (-share, whole)])
    return bool(test["low"] <= 0 <= test["high"])


class StudyCells:
    """The finished cells of the study, by what was trained."""

    def __init__(self, out: Path) -> None:
        self.out = out
        tables = read_json(out / "results.json")
        self.seed_rows = [row for row in tables["seeds"] if row["metric"] == METRIC]
        self.cells: dict[tuple[Any, ...], dict[int | None, str]] = {}
        for cell in tables["cells"]:
            if cell["status"] == "done" and cell["grids"] != ["search"]:
                # cells of another rate or length than in the other grids have the grid in their name
                grid = next((f" {name}" for name in cell["grids"] if cell["trained_on"] and name in LENGTHS), "")
                name = (cell["model"], cell["recipe"] + grid, cell["trained_on"], round(POOL * cell["share"]))
                self.cells.setdefault(name, {})[cell["seed"]] = cell["key"]
        self.evaluations = {
            (row["key"], row["dataset"]): out / row["folder"]
            for row in tables["evaluations"]
            if row["role"] != "validate"
        }
        self.searched = sum(cell["grids"] == ["search"] for cell in tables["cells"])
        self.trained = sum(len(seeds) for name, seeds in self.cells.items() if name[2])
        self.seconds = sum(cell["train_seconds"] or 0 for cell in tables["cells"])
        self.rates = {
            (cell["model"], cell["recipe"], cell["trained_on"]): cell["rates"]
            for cell in tables["cells"]
            if cell["rate_source"] == "search" and cell["status"] == "done"
        }

    def scores(
        self, model: str, recipe: str, shift: str, images: int, dataset: str | None = None, metric: str = METRIC
    ) -> Scores | None:
        """The scores of a recipe's seeds on a test set (by default its own); None with fewer than three seeds."""
        fixed = recipe == "frozen"
        cells = self.cells.get((model, recipe, None, POOL) if fixed else (model, recipe, shift, images), {})
        paths = [self.evaluations.get((cells[seed], dataset or shift)) for seed in sorted(cells, key=str)]
        if None in paths or len(paths) < (1 if fixed else MIN_SEEDS):
            return None
        return read_scores([folder for folder in paths if folder], metric, fixed=fixed)

    def adapters(self, shift: str) -> dict[int, Path]:
        """Seed -> folder of nano's norms that were trained on 80 images of a shift."""
        cells = self.cells.get(("nano", "ln", shift, 80), {})
        return {int(str(seed)): self.out / "cells" / key / "adapter" for seed, key in cells.items()}


def settings() -> Iterator[Row]:
    """The bases and numbers of images: every base with 80 images, and nano with 20 and 320, on every shift."""
    for model in MODELS:
        for images in IMAGES if model == "nano" else (80,):
            for shift in SHIFTS:
                yield {"model": model, "images": images, "shift": shift}


def share_rows(cells: StudyCells) -> Iterator[Row]:
    """One row for each setting: the three scores, the share, and LN compared with full tuning."""
    for setting in settings():
        model, shift, images = setting["model"], setting["shift"], setting["images"]
        frozen, ln, full = (cells.scores(model, recipe, shift, images) for recipe in ("frozen", "ln", "full"))
        if frozen and ln and full:
            means = {name: as_row(scores.mean) for name, scores in (("frozen", frozen), ("ln", ln), ("full", full))}
            against = contrast([(1, ln), (-1, full)])
            equal = equivalence(against["difference"], against["error"], against["df"], MARGIN) <= 0.05
            rates = {recipe: cells.rates.get((model, recipe, shift)) for recipe in ("ln", "full")}
            yield {
                "experiment": "share", **setting, **means, **reached_share(frozen, ln, full),
                "against_full": against | {"equivalent": bool(equal)}, "rates": rates,
                "questions": int(ln.counts.sum()), "test_images": len(ln.counts), "seeds": len(ln.runs),
            }  # fmt: skip


def length_rows(cells: StudyCells) -> Iterator[Row]:
    """LN at a higher rate, and LN and full tuning with more passes, on wording."""
    frozen, full, longer_full = (
        cells.scores("nano", name, "wording", 80) for name in ("frozen", "full", "full longer-full")
    )
    shorter = cells.scores("nano", "ln", "wording", 80)
    for name, whole in (("ln", full), ("ln rate", full), ("ln longer-ln", longer_full)):
        part = cells.scores("nano", name, "wording", 80)
        if frozen and shorter and part and whole:
            about = {"experiment": "length", "grid": name.removeprefix("ln").strip(), "ln": as_row(part.mean)}
            yield {
                **about, "full": as_row(whole.mean), **reached_share(frozen, part, whole),
                "against_full": contrast([(1, part), (-1, whole)]),
                "against_ln": contrast([(1, part), (-1, shorter)]) if name != "ln" else None,
            }  # fmt: skip


def as_row(interval: Interval) -> Row:
    return {"value": interval.value, "low": interval.low, "high": interval.high}


def contrast_rows(cells: StudyCells) -> Iterator[Row]:
    """The contrasts behind the conclusions; p-values are corrected over the rows of a claim (Holm)."""

    def compare(claim: str, terms: Sequence[tuple[float, str, str, int]], shift: str, dataset: str, metric: str) -> Row:
        scores = [
            (weight, cells.scores(model, recipe, shift, images, dataset, metric))
            for weight, model, recipe, images in terms
        ]
        complete = [(weight, read) for weight, read in scores if read is not None]
        about = {"experiment": "contrast", "claim": claim, "shift": shift, "dataset": dataset, "metric": metric}
        about["terms"] = [list(term) for term in terms]
        return about | (contrast(complete) if len(complete) == len(terms) else {"difference": None})

    def pair(model: str, images: int, first: str, second: str) -> list[tuple[float, str, str, int]]:
        return [(1, model, first, images), (-1, model, second, images)]

    def change(before: tuple[str, int], after: tuple[str, int]) -> list[tuple[float, str, str, int]]:
        """How far LN is from full tuning in one setting, less how far it is in another."""
        return [
            (sign, model, recipe, images)
            for outer, (model, images) in ((1, after), (-1, before))
            for sign, recipe in ((outer, "ln"), (-outer, "full"))
        ]

    rows = []
    for shift in SHIFTS:
        for claim, before, after in (
            ("strength", ("nano-195", 80), ("nano", 80)),
            ("images", ("nano", 20), ("nano", 320)),
            ("size", ("pico", 80), ("nano", 80)),
        ):
            rows.append(compare(claim, change(before, after), shift, shift, METRIC))
        for recipe in ("ln", "full", "lora-8", "ffn"):
            rows.append(compare("forgotten", pair("nano", 80, recipe, "frozen"), shift, HOME, METRIC))
        for recipe in ("full", "lora-8", "ffn"):
            rows.append(compare("forgets less", pair("nano", 80, "ln", recipe), shift, HOME, METRIC))
        for metric in ("closed_label", "open_exact", METRIC):
            rows.append(compare("ffn gains", pair("nano", 80, "ffn", "ln"), shift, shift, metric))
        rows.append(compare("parts", pair("nano", 80, "ln-language", "ln-vision"), shift, shift, METRIC))
        for recipe in ("ln-language", "ln-vision"):
            rows.append(compare("part gains", pair("nano", 80, recipe, "frozen"), shift, shift, METRIC))
    for shift, dataset in permutations(SHIFTS, 2):
        rows.append(compare("ffn transfers", pair("nano", 80, "ffn", "ln"), shift, dataset, METRIC))
        rows.append(compare("ln transfers", pair("nano", 80, "ln", "frozen"), shift, dataset, METRIC))
    tested = [row for row in rows if row["difference"] is not None]
    for claim in dict.fromkeys(row["claim"] for row in tested):
        of_claim = {index: row["p"] for index, row in enumerate(tested) if row["claim"] == claim}
        for index, corrected in holm_correction(of_claim).items():
            tested[index]["p_holm"] = corrected
    yield from tested


def recipe_rows(cells: StudyCells) -> Iterator[Row]:
    """Scores of every recipe of nano with 80 images on all shifts and on the base's own task."""
    for recipe in ("frozen", "ln", "full", "ffn", "lora-8", "ln-language", "ln-vision"):
        for shift in SHIFTS:
            for dataset in (*SHIFTS, HOME):
                if scores := cells.scores("nano", recipe, shift, 80, dataset):
                    about = {"recipe": recipe, "shift": None if recipe == "frozen" else shift, "dataset": dataset}
                    yield {"experiment": "recipe", **about, **as_row(scores.mean)}
            if recipe == "frozen":
                break


Evaluate = Callable[[str, Path | None, str], Path]


def evaluate_home(cells: StudyCells, work: Path) -> None:
    """Evaluate nano's recipes with 80 images on more images of the base's own task than the study has."""
    evaluate = evaluator(work)
    for (model, recipe, shift, images), seeds in cells.cells.items():
        if model == "nano" and (recipe == "frozen" or (recipe in HOME_RECIPES and images == 80)):
            for seed, key in seeds.items():
                adapter = cells.out / "cells" / key / "adapter" if shift else None
                cells.evaluations[key, HOME] = evaluate(f"{recipe}-{shift}-{seed}", adapter, HOME_DATA)


def evaluator(work: Path) -> Evaluate:
    """A function that evaluates nano with an adapter on a data set once, and returns the folder of the result."""

    def evaluate(name: str, adapter: Path | None, data: str) -> Path:
        out = work / "evaluations" / f"{name}-{data.replace(':', '-').replace('/', '-')}"
        if not (out / "metrics.json").is_file():
            evaluate_config(EvaluateConfig(model="nano", adapter=adapter, data=data, out=out, device="cpu", batch=128))
        return out

    return evaluate


def mix_norms(weights: Mapping[Path, float], out: Path) -> Path:
    """The folder of the mixed adapter, which is written if it is not there."""
    if not out.exists():
        mix_adapters({str(path): weight for path, weight in weights.items()}, out=out, model="nano")
    return out


def data_of(cells: StudyCells, dataset: str) -> str:
    """The text of a study's data set, such as phantom-wording:320/60/80."""
    if dataset == HOME:
        return HOME_DATA
    return str(read_json(cells.out / "results.json")["spec"]["datasets"][dataset]["data"])


def scaled_rows(cells: StudyCells, work: Path) -> Iterator[Row]:
    """Norms scaled by lambda: base + lambda (tuned - base), on the new task and on the base's own."""
    evaluate = evaluator(work)
    for shift in SHIFTS:
        adapters = cells.adapters(shift)
        if len(adapters) < MIN_SEEDS:
            continue
        scores: dict[tuple[float, str], Scores] = {}
        for dataset in (shift, HOME):
            frozen, ln = (cells.scores("nano", recipe, shift, 80, dataset) for recipe in ("frozen", "ln"))
            assert frozen and ln
            scores[0.0, dataset], scores[1.0, dataset] = frozen, ln
            for factor in LAMBDAS:
                paths = []
                for seed, adapter in sorted(adapters.items()):
                    name = f"{shift}-{seed}-{factor:g}"
                    scaled = mix_norms({adapter: factor}, work / "adapters" / name)
                    paths.append(evaluate(name, scaled, data_of(cells, dataset)))
                scores[factor, dataset] = read_scores(paths)
        for factor in (0.0, *LAMBDAS, 1.0):
            row: Row = {"experiment": "lambda", "shift": shift, "lambda": factor}
            for dataset, name in ((shift, "new"), (HOME, "old")):
                frozen, part, whole = (scores[value, dataset] for value in (0.0, factor, 1.0))
                row[name] = as_row(part.mean)
                if factor in LAMBDAS:
                    row[f"{name}_against_frozen"] = contrast([(1, part), (-1, frozen)])
                    row[f"{name}_against_full_step"] = contrast([(1, part), (-1, whole)])
            if factor in LAMBDAS:
                row["reached"] = reached_share(*(scores[value, shift] for value in (0.0, factor, 1.0)))
            yield row


def mixture_rows(cells: StudyCells, work: Path) -> Iterator[Row]:
    """Norms of acquisition and of wording, mixed, on hospital B, which has both shifts, and on each shift alone."""
    evaluate = evaluator(work)
    adapters = {shift: cells.adapters(shift) for shift in ("acquisition", "wording")}
    seeds = sorted(set(adapters["acquisition"]) & set(adapters["wording"]))
    if len(seeds) < MIN_SEEDS:
        return
    by_recipe: dict[str, list[tuple[str, Path | None]]] = {"frozen": [("frozen", None)]}
    for shift, of_seeds in adapters.items():
        by_recipe[shift] = [(f"{shift}-{seed}", of_seeds[seed]) for seed in seeds]
    for name, weights in MIXTURES.items():
        by_recipe[name] = [
            (
                f"{name}-{seed}",
                mix_norms(
                    {adapters[s][seed]: w for s, w in zip(adapters, weights, strict=True)},
                    work / "adapters" / f"{name}-{seed}",
                ),
            )
            for seed in seeds
        ]
    by_recipe["both"] = [(f"both-{seed}", adapter) for seed, adapter in train_on_both(cells, seeds, work).items()]
    for data in (BOTH, data_of(cells, "acquisition"), data_of(cells, "wording"), data_of(cells, HOME)):
        scores = {
            recipe: read_scores([evaluate(*run, data) for run in runs], fixed=recipe == "frozen")
            for recipe, runs in by_recipe.items()
        }
        for recipe, score in scores.items():
            dataset = data.partition(":")[0].removeprefix("phantom-")
            row = {"experiment": "mixture", "recipe": recipe, "dataset": dataset, "mean": as_row(score.mean)}
            row |= {"questions": int(score.counts.sum()), "test_images": len(score.counts)}
            for other in ("frozen", "acquisition", "wording", "both"):
                if recipe not in ("frozen", other):
                    row[f"against_{other}"] = contrast([(1, score), (-1, scores[other])])
            if recipe not in ("frozen", "both"):
                row["reached"] = reached_share(scores["frozen"], score, scores["both"])
            yield row


def train_on_both(cells: StudyCells, seeds: Sequence[int], work: Path) -> dict[int, Path]:
    """Seed -> norms trained on 80 images of hospital B, as long as in the study and with the rate for wording."""
    spec = read_json(cells.out / "results.json")["spec"]
    options = {"model": "nano", "data": BOTH, "device": "cpu", "tune": "ln", "share": 80 / POOL}
    options |= {
        "lr": cells.rates["nano", "ln", "wording"]["ln"],
        "epochs": spec["grids"]["strength"]["budget"]["epochs"],
    }
    evaluation = {"model": "nano", "data": BOTH, "device": "cpu"}
    planned = [single_cell(f"both@{seed}", {**options, "seed": seed}, evaluation) for seed in seeds]
    adapters: dict[int, Path] = {}
    for result in run_cells(planned, work / "both", workers=1):
        adapters[int(result["name"].partition("@")[2])] = Path(result["evaluation"]["out"]).parents[1] / "adapter"
    return adapters


def coverage_rows(simulations: int) -> Iterator[Row]:
    """How often Fieller's interval contains the true share, for three seeds and 80 images with 1 to 19 questions."""
    from scipy.special import ndtr, ndtri
    from statistics_checks import IMAGE, QUESTION, QUESTIONS, SEED

    images, seeds, by_recipe, by_seed = 80, MIN_SEEDS, 0.05, 0.05
    for number, (frozen, full, share) in enumerate(SCENARIOS):
        draw = np.random.default_rng([number, simulations])
        covered, significant = [], []
        for _ in range(simulations):
            counts = draw.integers(1, 2 * QUESTIONS - 2, images)
            image = np.repeat(np.arange(images), counts)
            difficulty = IMAGE * draw.standard_normal(images)
            question = QUESTION * draw.standard_normal(len(image))
            scores = []
            for accuracy, models in ((frozen, 1), (frozen + share * (full - frozen), seeds), (full, seeds)):
                spread = float(np.sqrt(1 + IMAGE**2 + QUESTION**2))
                slope = float(np.exp(-(ndtri(accuracy) ** 2) / 2) / np.sqrt(2 * np.pi) / spread)
                sizes = np.array([by_recipe, *((by_seed, SEED) if models > 1 else (0.0, 0.0))]) / slope
                level = ndtri(accuracy) * np.sqrt(spread**2 + (sizes**2).sum())
                of_image = sizes[0] * draw.standard_normal(images) + sizes[1] * draw.standard_normal((models, images))
                of_image = of_image + sizes[2] * draw.standard_normal((models, 1)) + difficulty + level
                right = draw.random((models, len(image))) < ndtr(of_image[:, image] + question)
                sums = np.add.reduceat(right.astype(float), np.r_[0, np.cumsum(counts)[:-1]], axis=-1)
                weights = counts.astype(float)
                values = SeedScores(sums.sum(axis=1) / weights.sum(), influence_of_mean(sums, weights), models == 1)
                scores.append(Scores(values, weights, ()))
            covered.append(contains_share(*scores, share))
            significant.append(contrast([(1, scores[2]), (-1, scores[0])])["low"] > 0)
        of_significant = [contained for contained, gains in zip(covered, significant, strict=True) if gains]
        yield {
            "experiment": "coverage", "frozen": frozen, "full": full, "share": share, "simulations": simulations,
            "coverage": float(np.mean(covered)), "significant": float(np.mean(significant)),
            "coverage_if_significant": float(np.mean(of_significant)),
        }  # fmt: skip


def draw_figures(rows: Sequence[Row], folder: Path) -> None:
    """Draw the shares by base and by images, scaled norms and mixed norms, as when-norms.png and .svg."""
    from matplotlib.figure import Figure

    colors = dict(zip(SHIFTS, ("#0072b2", "#d55e00", "#009e73"), strict=True))
    figure = Figure(figsize=(11, 7.2), layout="constrained")
    axes = figure.subplots(2, 2)
    bases = {"3%": "nano-195", "10%": "nano-650", "30%": "nano-1950", "100%": "nano", "pico,\n100%": "pico"}
    by_base = {label: (model, 80) for label, model in bases.items()}
    by_images = {str(images): ("nano", images) for images in IMAGES}
    _draw_shares(axes[0][0], rows, colors, by_base)
    axes[0][0].set(title="80 images", xlabel="base: steps of its pretraining")
    _draw_shares(axes[0][1], rows, colors, by_images)
    axes[0][1].legend(frameon=False, loc="upper left")
    axes[0][1].set(title="nano", xlabel="training images")
    _draw_scaled(axes[1][0], rows, colors)
    mixtures = [row for row in rows if row["experiment"] == "mixture" and row["dataset"] == "b"]
    ends = np.array([[100 * row["mean"][end] for end in ("value", "low", "high")] for row in mixtures])
    axis = axes[1][1]
    if len(ends):
        axis.errorbar(
            range(len(ends)), ends[:, 0], yerr=[ends[:, 0] - ends[:, 1], ends[:, 2] - ends[:, 0]], fmt="o", capsize=3,
            color="#444444",
        )  # fmt: skip
        axis.set(xticks=range(len(ends)), xticklabels=[row["recipe"] for row in mixtures])
    axis.set(title="Hospital B, norms of acquisition and wording mixed", ylabel="accuracy, %")
    for place in axes.flat:
        place.spines[["top", "right"]].set_visible(False)
        place.title.set_fontsize(10)
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / "when-norms.png", dpi=110)
    figure.savefig(folder / "when-norms.svg", metadata={"Date": None})


def _draw_shares(axis: Any, rows: Sequence[Row], colors: Mapping[str, str], places: Mapping[str, Any]) -> None:
    """Draw the share of each shift at each place with its interval; a cross where full tuning gains nothing."""
    shares = {(row["model"], row["images"], row["shift"]): row for row in rows if row["experiment"] == "share"}
    for number, (shift, color) in enumerate(colors.items()):
        points = [
            (position + 0.12 * (number - 1), shares[(*setting, shift)])
            for position, setting in enumerate(places.values())
            if (*setting, shift) in shares
        ]
        gains = [(x, row) for x, row in points if row["share"] is not None]
        ends = np.array([[100 * row[end] for end in ("share", "low", "high")] for _, row in gains]).reshape(-1, 3).T
        axis.errorbar(
            [x for x, _ in gains], ends[0], yerr=[ends[0] - ends[1], ends[2] - ends[0]], color=color, marker="o",
            capsize=3, linewidth=1, label=shift,
        )  # fmt: skip
        missing = [x for x, row in points if row["share"] is None]
        axis.plot(missing, [-45] * len(missing), "x", color=color)
    for level in (0, 100):
        axis.axhline(level, color="gray", linewidth=0.8, linestyle=":")
    axis.set(xticks=range(len(places)), xticklabels=list(places), ylim=(-55, 165))
    axis.set_ylabel("% of full tuning's gain that LN reaches")


def _draw_scaled(axis: Any, rows: Sequence[Row], colors: Mapping[str, str]) -> None:
    """Draw accuracy against lambda, of the new task and of the base's own."""
    for shift, color in colors.items():
        of_shift = [row for row in rows if row["experiment"] == "lambda" and row["shift"] == shift]
        for name, style in (("new", "-"), ("old", "--")):
            ends = np.array([[100 * row[name][end] for end in ("value", "low", "high")] for row in of_shift])
            if len(ends):
                factors = [row["lambda"] for row in of_shift]
                axis.plot(factors, ends[:, 0], style, marker="o", color=color)
                axis.fill_between(factors, ends[:, 1], ends[:, 2], color=color, alpha=0.10, linewidth=0)
    axis.set(title="Scaled norms: new task (solid), the base's own (dashed)", xlabel="λ", ylabel="accuracy, %")
    axis.set_xticks([0.0, *LAMBDAS, 1.0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--study", type=Path, required=True, help="folder of the study's results")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--work", type=Path, help="folder of scaled and mixed norms (default: a temporary one)")
    parser.add_argument("--figures", type=Path, help="folder of the figures")
    parser.add_argument("--simulations", type=int, default=2000)
    parser.add_argument("--only-study", action="store_true", help="no scaled and mixed norms")
    options = parser.parse_args()
    cells = StudyCells(options.study)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        work = options.work or Path(folder)
        if not options.only_study:
            evaluate_home(cells, work)
        rows += [*share_rows(cells), *length_rows(cells), *contrast_rows(cells), *recipe_rows(cells)]
        if not options.only_study:
            rows += [*scaled_rows(cells, work), *mixture_rows(cells, work)]
        rows += coverage_rows(options.simulations)
    planned, shares = len(list(settings())), [row for row in rows if row["experiment"] == "share"]
    print(f"{len(shares)} of {planned} settings have three seeds of LN and of full tuning")
    for row in shares:
        ends = "no gain" if row["share"] is None else f"{row['share']:.2f} [{row['low']:.2f}, {row['high']:.2f}]"
        print(f"{row['model']:10} {row['images']:4} {row['shift']:12} gain {100 * row['gain']:+.1f}  share {ends}")
    if options.figures:
        draw_figures(rows, options.figures)
    if options.out:
        about = {"trained": cells.trained, "trials": cells.searched, "seconds": cells.seconds, "settings": planned}
        record(options.out, "when_norms", rows, **about)


if __name__ == "__main__":
    main()
