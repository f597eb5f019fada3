"""Does grouping harm learning, and how much time does it save? The same pairs, grouped or one by one.

    python benchmarks/grouping.py --slake DIR --work DIR --out benchmarks/grouping.json
    python benchmarks/grouping.py --slake DIR --speed --out benchmarks/grouping_speed.json

With a cap of 1 every question is a group, so that a batch is a random sample of pairs; larger caps put
several questions of one image into one step. Everything else is the same: nano, the recipe, its learning
rate, the pairs, the steps, and the five seeds. (An arm such as 0x2 makes twice the passes; grouping saves
more time than these cost.) Accuracy is the mean over seeds with Student's t interval. The difference from the
random order is that of the questions' mean scores over the seeds, with an interval clustered by image.
Runs are kept in --work, where an interrupted study resumes.

With --speed, one step (loss and gradients of the norms) of SLAKE's questions is timed for each family of
`family_models`: all questions of an image in one group, and every question with its own copy of the image.
Both sides are interleaved and have the same pairs, pixels and tokens; time is that of the processor, in one thread.
"""

from __future__ import annotations

import argparse
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from family_models import MODELS, TEXT, build_family
from record import record
from workload import format_range, median_and_range, ratio

from normtune.data.groups import Group, group_by_image
from normtune.data.registry import open_dataset
from normtune.evaluation.results import read_evaluation
from normtune.methods.adapt import adapt
from normtune.metrics.answers import score_rows
from normtune.metrics.statistics.comparisons import holm_correction
from normtune.metrics.statistics.intervals import mean_over_seeds
from normtune.metrics.sum_metrics import mean_metric, paired_difference
from normtune.runtime.number_format import format_interval
from normtune.runtime.text_table import markdown_table
from normtune.studies.plan import Cell, single_cell
from normtune.studies.run import run_cells

METRIC = "global_exact"
ALL = 0  # no cap: all questions of an image in one group
ARMS, SLAKE_ARMS = ("1", "2", "4", "8", "0"), ("1", "4", "0", "0x2")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--slake", type=Path, help="SLAKE's folder, to measure on it too")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--work", type=Path, help="folder of the finished runs")
    parser.add_argument("--speed", action="store_true", help="time steps of several families, in place of learning")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=[*MODELS], help="families of --speed")
    parser.add_argument("--speed-images", type=int, default=1, help="images of a step of --speed")
    parser.add_argument("--rounds", type=int, default=4, help="how often --speed measures everything")
    parser.add_argument("--recipes", nargs="+", default=["ln"])
    parser.add_argument(
        "--arms", nargs="+", default=ARMS, help="caps; the first must be 1, the random order; 0 means no cap"
    )
    parser.add_argument(
        "--slake-arms", nargs="+", default=SLAKE_ARMS, help="the same for SLAKE; 0x2 means no cap and twice the passes"
    )
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--images", type=int, default=160, help="training images of the phantoms")
    parser.add_argument("--epochs", type=int, default=4, help="passes over the phantoms")
    parser.add_argument("--slake-epochs", type=int, default=2)
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    if (options.speed and not options.slake) or not (options.speed or options.work):
        parser.error("--speed needs --slake; without --speed, --work is needed")
    if options.speed:
        rows, about = measure_speed(options)
        print("\n" + speed_table(rows))
        if options.out:
            record(options.out, "grouping_speed", rows, **about)
            options.out.with_suffix(".md").write_text(speed_table(rows), encoding="utf-8")
        return
    phantoms = {"data": f"phantom-b:{options.images}/0/120", "device": "cpu"}
    studies = [Study("phantom-b", phantoms, options.epochs, parse_arms(options.arms))]
    if options.slake:
        slake = {"data": "slake", "root": options.slake, "device": "cpu"}
        studies.append(Study("slake", slake, options.slake_epochs, parse_arms(options.slake_arms)))
    rows = []
    for study in studies:
        for recipe in options.recipes:
            rows += run_study(study, recipe, options)
    print("\n" + table(rows))
    if options.out:
        passes = {study.name: study.epochs for study in studies}
        record(options.out, "grouping", rows, model="nano", epochs=passes, seeds=options.seeds, metric=METRIC)
        options.out.with_suffix(".md").write_text(table(rows), encoding="utf-8")


@dataclass(frozen=True)
class Arm:
    """One way of grouping.

    Attributes:
        cap: the most questions of an image in one group; 0 means all.
        passes: the number of passes over the data, as a multiple of the study's.
    """

    cap: int
    passes: int = 1

    @property
    def name(self) -> str:
        return str(self.cap) if self.passes == 1 else f"{self.cap}x{self.passes}"

    def __str__(self) -> str:
        text = {1: "random order", ALL: "all of an image"}.get(self.cap, f"at most {self.cap} of an image")
        return text if self.passes == 1 else f"{text}, {self.passes} times the passes"


def parse_arms(words: Sequence[str]) -> list[Arm]:
    return [Arm(*(int(number) for number in word.split("x"))) for word in words]


@dataclass(frozen=True)
class Study:
    """A comparison of arms on one dataset.

    Attributes:
        options: the options of `TrainConfig` and `EvaluateConfig` that select the dataset.
        epochs: passes over the training split.
        arms: the first is the random order, with which the others are compared.
    """

    name: str
    options: dict[str, Any]
    epochs: int
    arms: Sequence[Arm]


def run_study(study: Study, recipe: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Run what is missing; one row per arm: its accuracy, and the difference from the first arm."""
    folder = options.work / f"{study.name}-{recipe}"
    rows_of: dict[Arm, list[dict[str, Any]]] = {arm: [] for arm in study.arms}
    arm_of = {cell_name(arm, seed): arm for seed in range(options.seeds) for arm in study.arms}
    cells = [cell(study, recipe, arm, seed) for seed in range(options.seeds) for arm in study.arms]
    for result in run_cells(cells, folder, workers=options.workers):
        value = result["evaluation"]["metrics"][METRIC]["value"]
        print(f"{study.name} {recipe} {result['name']}: {100 * value:.1f}%", flush=True)
        rows_of[arm_of[result["name"]]].append(result)
    scores = {arm: question_scores(results) for arm, results in rows_of.items()}
    first, *other_arms = study.arms
    images = scores[first][1]
    differences = {
        arm.name: paired_difference(mean_metric(scores[first][0]), mean_metric(scores[arm][0]), images)
        for arm in other_arms
    }
    corrected_p = holm_correction({name: difference.p for name, difference in differences.items()})
    rows = []
    sizes = set()
    for arm, results in rows_of.items():
        results.sort(key=lambda result: [*arm_of].index(result["name"]))  # by seed
        runs = [result["training"] for result in results]
        sizes |= {(run["steps"] / arm.passes, run["pairs"] / arm.passes) for run in runs}
        accuracy = [result["evaluation"]["metrics"][METRIC]["value"] for result in results]
        row = {"dataset": study.name, "recipe": recipe, "cap": arm.cap, "passes": arm.passes * study.epochs}
        row |= {"arm": str(arm), "steps": runs[0]["steps"], "pairs": runs[0]["pairs"]}
        row |= {"accuracy": asdict(mean_over_seeds(accuracy)), "by_seed": accuracy, "difference": None}
        if arm.name in differences:
            row["difference"] = asdict(differences[arm.name]) | {"p_holm": corrected_p[arm.name]}
        rows.append(row)
    assert len(sizes) == 1, "all runs have the same pairs and steps per pass"
    return rows


def cell(study: Study, recipe: str, arm: Arm, seed: int) -> Cell:
    """The training run of one arm and seed, and its evaluation on the test split."""
    shared = {"model": "nano", **study.options}
    train = {**shared, "tune": recipe, "epochs": study.epochs * arm.passes, "cap": arm.cap or None, "seed": seed}
    return single_cell(cell_name(arm, seed), train, shared)


def cell_name(arm: Arm, seed: int) -> str:
    return f"{arm}, seed {seed}"


def question_scores(results: Sequence[dict[str, Any]]) -> tuple[dict[str, float], dict[str, tuple[str, ...]]]:
    """(mean score over the runs, images) of each question, by its id."""
    total: dict[str, float] = defaultdict(float)
    images: dict[str, tuple[str, ...]] = {}
    for result in results:
        run = read_evaluation(Path(result["evaluation"]["out"]))
        images |= {example.id: example.images for example in run.examples}
        scores = score_rows(run.examples, run.texts, normalisation=run.record["normalisation"])
        for id, score in scores[METRIC].items():
            total[id] += score / len(results)
    return dict(total), images


def measure_speed(options: argparse.Namespace) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """One row for each family: CPU seconds of a step of each kind, and their ratio; and what was measured."""
    dataset = open_dataset("slake", options.slake)
    groups = group_by_image(dataset.split("train"))
    mean = sum(map(len, groups)) / len(groups)
    groups = sorted(groups, key=lambda group: abs(len(group) - mean))[: options.speed_images]
    texts = [f"{example.question} {example.answer}" for example in dataset.examples]
    rows = []
    for name in options.models:
        family: Any = build_family(name, texts)
        adapt(family.model, "ln")
        pixels = [[family.preprocess_image(dataset.open_image(group[0].images[0]))] for group in groups]
        segments = [[family.tokenize(e.id, e.question, e.answer) for e in group] for group in groups]
        grouped = [Group(("",), tuple(members)) for members in segments]
        separate = [Group(("",), (segment,)) for members in segments for segment in members]
        copies = [images for images, members in zip(pixels, segments, strict=True) for _ in members]
        # a batch for each question: some towers take longer for several images at once than one by one
        separate_batches = [family.collate([group], [images]) for group, images in zip(separate, copies, strict=True)]
        batches = {"grouped": [family.collate(grouped, pixels)], "separate": separate_batches}
        seconds: dict[str, list[float]] = {kind: [] for kind in batches}
        losses = {}
        for round_ in range(options.rounds + 1):  # the first is not counted
            for kind, of_kind in batches.items():
                started = time.process_time()
                losses[kind] = 0.0
                for batch in of_kind:
                    loss, _ = family.loss(batch)
                    loss.backward()
                    losses[kind] += float(loss.detach())
                if round_:
                    seconds[kind].append(time.process_time() - started)
        tokens = {kind: sum(batch["input_ids"].numel() for batch in of_kind) for kind, of_kind in batches.items()}
        places = batches["grouped"][0].get("image_places", ())  # none where text reads the image by cross-attention
        row = {"model": name, "tokens": tokens, "image_tokens": len(places) / len(groups), "losses": losses}
        row |= {f"{kind}_seconds": median_and_range(values) for kind, values in seconds.items()}
        rows.append(row | {"faster": ratio(seconds["separate"], seconds["grouped"]), "rounds": seconds})
        print(f"{name}: {format_range(rows[-1]['faster'], 1, 'x')}", flush=True)
    questions = sum(map(len, groups))
    return rows, {"data": "slake", "images": len(groups), "questions": questions, "recipe": "ln", "text": TEXT}


def speed_table(rows: list[dict[str, Any]]) -> str:
    """A Markdown table of seconds and ratios, medians with ranges."""
    lines = [
        [
            row["model"],
            f"{row['image_tokens']:.0f}",
            format_range(row["grouped_seconds"], 2),
            format_range(row["separate_seconds"], 2),
            format_range(row["faster"], 1, "x"),
        ]
        for row in rows
    ]
    header = ["model", "tokens of an image", "grouped, CPU s", "one by one, CPU s", "ratio"]
    return "\n".join(markdown_table(header, lines, "lrrrr")) + "\n"


def table(rows: list[dict[str, Any]]) -> str:
    """A Markdown table of accuracies and differences in %, with 95% intervals."""
    lines = []
    for row in rows:
        cells = [row["dataset"], row["recipe"], row["arm"], format_interval(row["accuracy"])]
        if difference := row["difference"]:
            interval = format_interval({**difference, "value": difference["difference"]}, sign="+")
            cells += [interval, f"{difference['p_holm']:.2f}"]
        else:
            cells += ["–", "–"]
        lines.append(cells)
    header = ["dataset", "recipe", "questions of an image together", "accuracy %", "less random order", "p (Holm)"]
    return "\n".join(markdown_table(header, lines, "lllr")) + "\n"


if __name__ == "__main__":
    main()
