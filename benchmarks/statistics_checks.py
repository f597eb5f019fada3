"""Coverage of the intervals, size and power of the tests, against the methods that they replaced.

    python benchmarks/statistics_checks.py --out benchmarks/statistics_checks.json

Five experiments. *Coverage*: simulated answers of one model, how often the 95% interval contains the true accuracy.
*Recipes*: simulated scores of two recipes with several seeds each, how often the test rejects and TOST declares them
equivalent. *Splits*: the real runs of `statistics_runs.json`; the seeds of one recipe are split into two groups in
every way, and the groups compared: each rejection is wrong. "Before" is the percentile bootstrap, and the swap test of
rows of all seeds together. *Confidence*: simulated answers with their confidence, how often the intervals contain the
true calibration error, overconfidence and area under the risk-coverage curve. *Conformal*: simulated probabilities of
candidates, how often the sets contain the answer to a question about a new image.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from record import record

from normtune.metrics.calibration import ConfidentRows, area_under_risk_coverage, calibration_error, overconfidence
from normtune.metrics.conformal import LEVELS, conformal_threshold
from normtune.metrics.statistics.comparisons import SeedScores, compare_recipes, equivalence, smallest_difference
from normtune.metrics.statistics.intervals import Floats, influence_of_mean, mean_interval
from normtune.runtime.text_table import markdown_table

RUNS = Path(__file__).with_name("statistics_runs.json")
IMAGES, ACCURACIES = (10, 20, 50, 200), (0.5, 0.85, 0.95)
CORRELATIONS = (0.1, 0.3)  # of the answers within an image
RESAMPLES, SWAPS = 500, 500  # of the methods before
TEST_IMAGES, QUESTIONS, ACCURACY = 96, 11, 0.5  # of simulated recipes; questions are drawn from 1 to 2 x 11 - 1
IMAGE, QUESTION = 0.7, 1.2  # standard deviations of the difficulty, in units of the probit
SEED = 0.017  # standard deviation of the score over seeds
INTERACTIONS = {  # scenario: standard deviations of recipe x image and of seed x image, as shares of right answers
    "one recipe twice": (0.0, 0.05),
    "equally good recipes": (0.05, 0.05),
}
DIFFERENCE = MARGIN = 0.05
TARGET = 0.05  # the nominal rate of wrong rejections
CONFIDENCE_IMAGES = (20, 50, 200)
# share by which the probability of a right answer is below the confidence: calibrated, too sure, much too sure
SHIFTS = {"calibrated": 0.0, "5 points too sure": 0.05, "20 points too sure": 0.2}
POPULATION = 400_000  # questions that the true values are computed from


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--runs", type=Path, default=RUNS)
    parser.add_argument("--simulations", type=int, default=2000)
    parser.add_argument("--images", nargs="+", type=int, default=IMAGES)
    parser.add_argument("--confidence-images", nargs="+", type=int, default=CONFIDENCE_IMAGES)
    parser.add_argument("--confidence-simulations", type=int, default=1000)
    parser.add_argument(
        "--only",
        choices=["coverage", "recipes", "splits", "confidence", "conformal"],
        help="keep the other rows of --out",
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=(3, 5, 10))
    options = parser.parse_args()
    experiments = {
        "coverage": lambda: coverage(options.images, options.simulations),
        "recipes": lambda: recipes(options.seeds, options.simulations),
        "splits": lambda: splits(json.loads(options.runs.read_text(encoding="utf-8"))),
        "confidence": lambda: confidence(options.confidence_images, options.confidence_simulations),
        "conformal": lambda: conformal(options.confidence_images, 5 * options.confidence_simulations),
    }
    if options.only:
        before = json.loads(options.out.read_text(encoding="utf-8"))["rows"] if options.out else []
        rows = [row for row in before if row["experiment"] != options.only] + [*experiments[options.only]()]
    else:
        rows = [row for experiment in experiments.values() for row in experiment()]
    of_confidence = [row for row in rows if row["experiment"] in ("confidence", "conformal")]
    tables = table([row for row in rows if row not in of_confidence]), table(of_confidence)
    print("\n".join(tables))
    if options.out:
        record(options.out, "statistics_checks", rows, simulations=options.simulations)
        options.out.with_suffix(".md").write_text(tables[0], encoding="utf-8")
        options.out.with_name(f"{options.out.stem}_confidence.md").write_text(tables[1], encoding="utf-8")


def coverage(image_counts: list[int], simulations: int) -> Iterator[dict[str, Any]]:
    """One row for each number of images and accuracy: the worst of four cells of correlation and sizes of images."""
    for images in image_counts:
        for accuracy in ACCURACIES:
            cells = []
            for correlation in CORRELATIONS:
                for equal in (False, True):
                    draw = np.random.default_rng([images, int(100 * accuracy), int(10 * correlation), equal])
                    counts = (
                        np.full((simulations, images), 10) if equal else draw.integers(1, 12, (simulations, images))
                    )
                    shape = accuracy * (1 / correlation - 1), (1 - accuracy) * (1 / correlation - 1)
                    right = draw.binomial(counts, draw.beta(*shape, counts.shape))
                    cells.append(_coverage_cell(right.astype(float), counts.astype(float), accuracy, draw))
            before, after = ({key: [cell[side][key] for cell in cells] for key in cells[0][side]} for side in (0, 1))
            yield {
                "experiment": "coverage",
                "images": images,
                "accuracy": accuracy,
                **{f"{side}_coverage": min(cell["coverage"]) for side, cell in (("before", before), ("after", after))},
                **{f"{side}_empty": max(cell["empty"]) for side, cell in (("before", before), ("after", after))},
                "before_width": float(np.mean(before["width"])),
                "after_width": float(np.mean(after["width"])),
                "outside": max(after["outside"]),
            }


def _coverage_cell(
    right: Floats, counts: Floats, accuracy: float, draw: np.random.Generator
) -> tuple[dict[str, float], dict[str, float]]:
    """Coverage, mean width, share of empty intervals and of ends outside 0 to 1, before and after."""
    images = counts.shape[1]
    times = draw.multinomial(images, [1 / images] * images, RESAMPLES).astype(float)
    before = np.quantile(times @ right.T / (times @ counts.T), [0.025, 0.975], axis=0)
    intervals = [mean_interval(sums, sums, rows) for sums, rows in zip(right, counts, strict=True)]
    after = np.array([[i.low, i.high] for i in intervals]).T

    def describe(ends: Floats) -> dict[str, float]:
        low, high = ends
        return {
            "coverage": float(np.mean((low <= accuracy) & (accuracy <= high))),
            "width": float(np.mean(high - low)),
            "empty": float(np.mean(high <= low)),
            "outside": float(np.mean((low < 0) | (high > 1))),
        }

    return describe(before), describe(after)


def recipes(seed_counts: list[int], simulations: int) -> Iterator[dict[str, Any]]:
    """One row for each scenario and number of seeds."""
    for number, (scenario, (by_recipe, by_seed)) in enumerate(INTERACTIONS.items()):
        for seeds in seed_counts:
            rates: dict[str, list[float]] = {}
            draw = np.random.default_rng([number, seeds])
            for _ in range(simulations):
                for name, shift in (("size", 0.0), ("power", DIFFERENCE)):
                    right, counts = simulate_recipes(draw, seeds, shift, by_recipe, by_seed)
                    before, result, error = compare_both(right[0], right[1], counts, draw)
                    rates.setdefault(f"before_{name}", []).append(before <= TARGET)
                    rates.setdefault(f"after_{name}", []).append(result.p <= TARGET)
                    if name == "size":
                        covered = result.low <= 0 <= result.high
                        rates.setdefault("coverage", []).append(covered)
                        rates.setdefault("smallest_difference", []).append(smallest_difference(error, result.df))
                    tost = equivalence(result.difference, error, result.df, MARGIN) <= TARGET
                    rates.setdefault("tost_power" if name == "size" else "tost_size", []).append(tost)
            means = {name: float(np.mean(values)) for name, values in rates.items()}
            yield {"experiment": "recipes", "scenario": scenario, "seeds": seeds, "images": TEST_IMAGES, **means}


def simulate_recipes(
    draw: np.random.Generator, seeds: int, shift: float, by_recipe: float, by_seed: float
) -> tuple[Floats, Floats]:
    """Right answers of two recipes, [2, seeds, images], and the questions of each image; the second is better.

    The probability of a right answer is the normal distribution function of difficulty, recipe and seed.
    """
    from scipy.special import ndtr, ndtri

    spread = float(np.sqrt(1 + IMAGE**2 + QUESTION**2))
    slope = float(np.exp(-(ndtri(ACCURACY) ** 2) / 2) / np.sqrt(2 * np.pi) / spread)  # points per unit of the probit
    level = ndtri(np.array([ACCURACY, ACCURACY + shift])) * spread
    counts = draw.integers(1, 2 * QUESTIONS, TEST_IMAGES)
    image = np.repeat(np.arange(TEST_IMAGES), counts)
    normal = draw.standard_normal
    by_image = IMAGE * normal(TEST_IMAGES) + by_recipe / slope * normal((2, 1, TEST_IMAGES))
    by_image = by_image + by_seed / slope * normal((2, seeds, TEST_IMAGES)) + SEED / slope * normal((2, seeds, 1))
    chance = ndtr((level[:, None, None] + by_image)[:, :, image] + QUESTION * normal(len(image)))
    answers = (draw.random(chance.shape) < chance).astype(float)
    starts = np.r_[0, np.cumsum(counts)[:-1]]
    return np.add.reduceat(answers, starts, axis=-1), counts.astype(float)


def compare_both(first: Floats, second: Floats, counts: Floats, draw: np.random.Generator) -> tuple[float, Any, float]:
    """The p-value before, and the comparison and its standard error after.

    Args:
        first, second: right answers of each recipe, [seeds, images].
        counts: questions of each image, [images].
        draw: draws the swaps of the test before.
    """
    gap = second.mean(axis=0) - first.mean(axis=0)
    swapped = np.abs(draw.choice([-1.0, 1.0], (SWAPS, len(gap))) @ gap)
    before = (1 + int((swapped >= abs(gap.sum()) - 1e-9).sum())) / (1 + SWAPS)
    scores = (SeedScores(r.sum(axis=1) / counts.sum(), influence_of_mean(r, counts)) for r in (first, second))
    result = compare_recipes(*scores, counts)
    return before, result, result.error


def splits(runs: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """One row for each recipe and size of the groups: rejections over all splits of its seeds."""
    counts = np.array(runs["questions"], dtype=float)
    right = {
        recipe: np.array([row["right"] for row in runs["rows"] if row["recipe"] == recipe], dtype=float)
        for recipe in dict.fromkeys(row["recipe"] for row in runs["rows"])
    }
    draw = np.random.default_rng(0)
    for recipe, scores in right.items():
        values = scores.sum(axis=1) / counts.sum()
        for size in range(3, len(scores) // 2 + 1):
            p = [
                compare_both(scores[list(a)], scores[list(b)], counts, draw)
                for a in combinations(range(len(scores)), size)
                for b in combinations([seed for seed in range(len(scores)) if seed not in a], size)
                if a < b
            ]
            yield {
                "experiment": "splits",
                "recipe": recipe,
                "seeds": size,
                "images": len(counts),
                "splits": len(p),
                "before_size": float(np.mean([before <= TARGET for before, _, _ in p])),
                "after_size": float(np.mean([result.p <= TARGET for _, result, _ in p])),
                "seed_deviation": float(values.std(ddof=1)),
            }
    if len(right) == 2:
        first, second = (scores.sum(axis=1) for scores in right.values())
        yield {"experiment": "pairing", "seeds": len(first), "correlation": float(np.corrcoef(first, second)[0, 1])}


def draw_answers(
    draw: np.random.Generator, images: int, shift: float, correlation: float
) -> tuple[Floats, Floats, NDArray[np.int64]]:
    """Confidence, right or wrong, and image of simulated answers; an image has 1 to 11 questions.

    The confidence is uniform in 0.3 to 1, and its questions share a part of it. A right answer has a probability of
    the confidence - `shift`; within an image, answers are right or wrong together with the given correlation.
    """
    image = np.repeat(np.arange(images), draw.integers(1, 12, images))
    base = draw.random(images)[image]
    level = 0.3 + 0.7 * np.where(draw.random(len(image)) < 0.5, base, draw.random(len(image)))
    common = draw.random(images)[image]
    chance = np.where(draw.random(len(image)) < correlation, common, draw.random(len(image)))
    return level, (chance < level - shift).astype(float), image


def confidence(image_counts: list[int], simulations: int) -> Iterator[dict[str, Any]]:
    """One row for each miscalibration and number of images."""
    measures = {"ece": calibration_error, "overconfidence": overconfidence, "aurc": area_under_risk_coverage}
    for name, shift in SHIFTS.items():
        level, right, _ = draw_answers(np.random.default_rng(0), POPULATION // 6, shift, 0.0)
        everything = ConfidentRows(level, right, np.zeros(len(level), dtype=np.int64))
        # the true gap of every bin is the shift, and a level of 0.3 to 1 is always above it
        truth = {"ece": shift, "overconfidence": shift, "aurc": area_under_risk_coverage(everything).value}
        for images in image_counts:
            draw = np.random.default_rng([images, int(100 * shift)])
            intervals: dict[str, list[Any]] = {measure: [] for measure in measures}
            for _ in range(simulations):
                rows = ConfidentRows(*draw_answers(draw, images, shift, 0.3))
                for measure, compute in measures.items():
                    intervals[measure].append(compute(rows))
            yield {
                "experiment": "confidence",
                "answers": name,
                "images": images,
                **{
                    f"{measure}_{key}": value
                    for measure, computed in intervals.items()
                    for key, value in (
                        ("true", truth[measure]),
                        ("mean", float(np.mean([interval.value for interval in computed]))),
                        ("coverage", float(np.mean([i.low <= truth[measure] <= i.high for i in computed]))),
                        ("width", float(np.mean([interval.high - interval.low for interval in computed]))),
                    )
                },
            }


def conformal(image_counts: list[int], simulations: int) -> Iterator[dict[str, Any]]:
    """One row for each number of calibration images and level.

    The score of a question is one minus the share of the right answer: the normal distribution function of a value
    that half comes from the image. Images with many questions are harder, so that weights matter.
    """
    from scipy.special import ndtr

    for images in image_counts:
        draw = np.random.default_rng(images)
        covered: dict[float, list[float]] = {level: [] for level in LEVELS}
        for _ in range(simulations):
            counts = draw.integers(1, 12, images + 1)
            image = np.repeat(np.arange(images + 1), counts)
            values = draw.standard_normal(images + 1)[image] + 0.1 * counts[image] + draw.standard_normal(len(image))
            scores, old = ndtr(values / 2 - 1), image < images
            clusters = image[old].astype(str).tolist()
            for level in LEVELS:
                threshold = conformal_threshold(scores[old], clusters, level)
                covered[level].append(float(np.mean(scores[~old] <= threshold)))
        for level in LEVELS:
            coverage = float(np.mean(covered[level]))
            yield {"experiment": "conformal", "images": images, "level": level, "coverage": coverage}


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown tables, in %."""
    percent = lambda row, *names: [f"{100 * row[name]:.1f}" for name in names]  # noqa: E731
    parts = []
    for experiment, head, cells in (
        (
            "coverage",
            ["images", "accuracy", "covered before", "covered now", "no width before", "no width now", "width now"],
            lambda row: [
                str(row["images"]),
                f"{row['accuracy']:g}",
                *percent(row, "before_coverage", "after_coverage", "before_empty", "after_empty", "after_width"),
            ],
        ),
        (
            "recipes",
            [
                "simulated",
                "seeds",
                "wrong before",
                "wrong now",
                "5 points found",
                "can show",
                "TOST wrong",
                "TOST found",
            ],
            lambda row: [
                row["scenario"],
                str(row["seeds"]),
                *percent(
                    row, "before_size", "after_size", "after_power", "smallest_difference", "tost_size", "tost_power"
                ),
            ],
        ),
        (
            "splits",
            ["real runs of", "seeds", "splits", "wrong before", "wrong now"],
            lambda row: [
                row["recipe"],
                f"{row['seeds']} + {row['seeds']}",
                str(row["splits"]),
                *percent(row, "before_size", "after_size"),
            ],
        ),
        (
            "confidence",
            ["answers", "images", "true ECE", "mean ECE", "covered", "width", "overconfidence covered", "AURC covered"],
            lambda row: [
                row["answers"],
                str(row["images"]),
                *percent(row, "ece_true", "ece_mean", "ece_coverage", "ece_width"),
                *percent(row, "overconfidence_coverage", "aurc_coverage"),
            ],
        ),
        (
            "conformal",
            ["calibration images", "level", "contain the answer"],
            lambda row: [str(row["images"]), *percent(row, "level", "coverage")],
        ),
    ):
        lines = [cells(row) for row in rows if row["experiment"] == experiment]
        if lines:
            align = "r" if experiment in ("coverage", "conformal") else "lr"
            parts.append("\n".join(markdown_table(head, lines, align)))
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    main()
