"""What privacy costs in accuracy: norms, LoRA and full training of nano on a phantom at several epsilons.

    python benchmarks/private_accuracy.py --out FILE.json

The hospital words its questions and answers in another way than the one that nano knows. Each image with three of its
questions is a unit. The validation split chooses for each recipe

- without noise and at epsilon 3: one of three learning rates, at clip 1;
- at epsilon 3 also one of the clips 1 and 0.3, with the best rate;
- at epsilon 1: that rate or a third of it; at epsilon 8: that rate or three times it;
- at every epsilon: three times the rate, as long as the highest one is the best.

Each choice is tested, and trained again with the other seeds. The trials are not part of epsilon: they replace trials
on public data. A stopped run continues after its last row, if --out is the same.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from record import write_record
from score_intervals import METRIC, difference, interval

import normtune
from normtune.data.examples import Examples
from normtune.data.groups import group_by_image
from normtune.methods.registry import LEARNING_RATES
from normtune.metrics.answers import score_rows
from normtune.runtime.files import read_json
from normtune.runtime.number_format import format_interval
from normtune.runtime.text_table import markdown_table

RECIPES = {"ln": "ln", "lora-8": "lora", "full": "full"}  # recipe -> method of its default rate
EPSILONS = ("1", "3", "8", "inf")
QUESTIONS = 3  # of an image
ACCUMULATE = 4
MECHANISM = ("noise_multiplier", "sampling_rate", "units")
Run = dict[str, Any]  # recipe, epsilon, rate, clip and seed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=2000, help="training images (default %(default)s)")
    parser.add_argument("--test-images", type=int, default=90, help="of validate and of test (default %(default)s)")
    parser.add_argument("--units", type=int, default=100, help="expected images of a step (default %(default)s)")
    parser.add_argument("--steps", type=int, default=50, help="steps of a run (default %(default)s)")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--out", type=Path, help="JSON file; the tables are written next to it as .md")
    options = parser.parse_args()
    torch.set_num_threads(1)
    bench = Benchmark(options)
    for run in bench.missing_runs():
        bench.rows.append(run | bench.measure(run))
        print({key: value for key, value in bench.rows[-1].items() if key != "correct"}, flush=True)
        bench.write()
    print("\n" + bench.table())


class Benchmark:
    """The runs so far, and what to run next."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.data = f"phantom-wording:{options.images}/{options.test_images}/{options.test_images}"
        dataset = normtune.open_dataset(self.data)
        train = [example for group in group_by_image(dataset.train) for example in group[:QUESTIONS]]
        self.train_pairs = len(train)
        self.dataset = replace(
            dataset, examples=Examples([*train, *dataset.validation, *dataset.test]), options={}
        )  # fmt: skip
        self.model = normtune.load("nano", dtype="float32", device="cpu")
        out = options.out
        self.rows: list[Run] = read_json(out)["rows"] if out and out.is_file() else []

    def missing_runs(self) -> Iterator[Run]:
        """The runs that have no row, in an order in which each choice comes after its trials."""
        yield from self._without_row("base", None, None, None, 0)
        for epsilon in ("inf", "3"):
            for recipe, method in RECIPES.items():
                for factor in (1 / 3, 1, 3):
                    yield from self._without_row(recipe, epsilon, round(LEARNING_RATES[method] * factor, 6), 1.0, 0)
        for recipe in RECIPES:
            rate = self.choice(recipe, "3")["rate"]
            yield from self._without_row(recipe, "3", rate, 0.3, 0)
        for epsilon, factor in (("1", 1 / 3), ("8", 3)):
            for recipe in RECIPES:
                best = self.choice(recipe, "3")
                for rate in (best["rate"], round(best["rate"] * factor, 6)):
                    yield from self._without_row(recipe, epsilon, rate, best["clip"], 0)
        for recipe in reversed(RECIPES):
            for epsilon in ("3", "1", "8", "inf"):
                yield from self._higher_rates(recipe, epsilon)
        for seed in range(1, self.options.seeds):
            for epsilon in EPSILONS:
                for recipe in RECIPES:
                    best = self.choice(recipe, epsilon)
                    yield from self._without_row(recipe, epsilon, best["rate"], best["clip"], seed)

    def _higher_rates(self, recipe: str, epsilon: str) -> Iterator[Run]:
        """Three times the rate, as long as the highest rate is the best."""
        while True:
            best = self.choice(recipe, epsilon)
            tried = [row["rate"] for row in self.rows if (row["recipe"], row["epsilon"]) == (recipe, epsilon)]
            if best["rate"] < max(tried):
                return
            yield from self._without_row(recipe, epsilon, round(best["rate"] * 3, 6), best["clip"], 0)

    def _without_row(
        self, recipe: str, epsilon: str | None, rate: float | None, clip: float | None, seed: int
    ) -> Iterator[Run]:
        run = {"recipe": recipe, "epsilon": epsilon, "rate": rate, "clip": clip, "seed": seed}
        if not any(run.items() <= row.items() for row in self.rows):
            yield run

    def choice(self, recipe: str, epsilon: str) -> Run:
        """The trial with the highest accuracy on the validation split."""
        trials = [row for row in self.rows if (row["recipe"], row["epsilon"], row["seed"]) == (recipe, epsilon, 0)]
        return max(trials, key=lambda row: row["validation"])

    def measure(self, run: Run) -> Run:
        """Train and answer both splits; the scores of the test questions are written as a string of 0 and 1."""
        options, unit_pairs = self.options, self.train_pairs / self.options.images
        if run["recipe"] == "base":
            return self._answer(None)
        with TemporaryDirectory() as folder:
            trained = normtune.train(
                self.model, self.dataset, tune=run["recipe"], lr=run["rate"], seed=run["seed"],
                dp_epsilon=float(run["epsilon"]), dp_clip=run["clip"], dp_delta=1e-5, max_steps=options.steps,
                batch=round(options.units * unit_pairs / ACCUMULATE), accumulate=ACCUMULATE,
                out=Path(folder) / "out", progress=False,
            )  # fmt: skip
            assert trained.privacy is not None
            spent = {"spent_epsilon": trained.privacy["epsilon"]}
            return self._answer(trained.out) | spent | {name: trained.privacy[name] for name in MECHANISM}

    def _answer(self, adapter: Any) -> Run:
        evaluate = {"adapter": adapter, "progress": False}
        validation = normtune.evaluate(self.model, self.dataset, split="validate", **evaluate)
        test = normtune.evaluate(self.model, self.dataset, split="test", **evaluate)
        scores = score_rows(test.examples, test.texts, normalisation="vqa")[METRIC]
        correct = "".join(str(int(scores[example.id])) for example in self.dataset.test)
        return {
            "validation": validation.metrics[METRIC].value, "test": test.metrics[METRIC].value, "correct": correct
        }  # fmt: skip

    def scores(self, recipe: str, epsilon: str | None) -> dict[str, float]:
        """The score of each test question, its mean over the seeds, at the chosen rate and clip."""
        if epsilon is None:
            rows = [row for row in self.rows if row["recipe"] == "base"]
        else:
            best = self.choice(recipe, epsilon)
            same = {name: best[name] for name in ("recipe", "epsilon", "rate", "clip")}
            rows = [row for row in self.rows if same.items() <= row.items()]
        ids = [example.id for example in self.dataset.test]
        return {
            id: sum(map(int, marks)) / len(rows)
            for id, *marks in zip(ids, *(row["correct"] for row in rows), strict=True)
        }

    @cached_property
    def images(self) -> dict[str, tuple[str, ...]]:
        """Id of a test question -> its images."""
        return {example.id: example.images for example in self.dataset.test}

    def table(self) -> str:
        """Three Markdown tables with a row for each recipe: accuracy, the gain over the base, and what was chosen."""
        base = self.scores("base", None)

        def accuracy(recipe: str, epsilon: str) -> str:
            return format_interval(interval(self.scores(recipe, epsilon), self.images))

        def gain(recipe: str, epsilon: str) -> str:
            return format_interval(difference(base, self.scores(recipe, epsilon), self.images), sign="+")

        def chosen(recipe: str, epsilon: str) -> str:
            best = self.choice(recipe, epsilon)
            return f"{best['rate']:g}, {best['clip']:g}"

        done = {(row["recipe"], row["epsilon"]) for row in self.rows}
        tables = [f"The base without training: {format_interval(interval(base, self.images))}"]
        for name, cell in (("accuracy, %", accuracy), ("more than the base", gain), ("rate, clip", chosen)):
            header = [name, *(f"epsilon {epsilon}" for epsilon in EPSILONS)]
            lines = [
                [f"`{recipe}`", *(cell(recipe, e) if (recipe, e) in done else "–" for e in EPSILONS)]
                for recipe in RECIPES
            ]
            tables.append("\n".join(markdown_table(header, lines, "lrrrr")))
        return "\n\n".join(tables) + "\n"

    def write(self) -> None:
        """Write the record and the tables."""
        out, options = self.options.out, self.options
        if out is None:
            return
        about = {"model": "nano", "data": self.data, "questions": QUESTIONS, "delta": 1e-5, "clip_trials": [0.3, 1]}
        write_record(out, "private_accuracy", self.rows, steps=options.steps, units_of_a_step=options.units, **about)
        out.with_suffix(".md").write_text(self.table(), encoding="utf-8")


if __name__ == "__main__":
    main()
