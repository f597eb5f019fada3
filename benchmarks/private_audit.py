"""An attack on trained adapters: how well their losses reveal which canaries they were trained on.

    python benchmarks/private_audit.py --out FILE.json

Canaries are pictures of noise with a question of random words and a random answer, each a unit. A random half of them
is added to the training rows. The quarter of the canaries with the smallest losses is guessed to be in, that with the
largest to be out. A run of (epsilon, delta) can be right about each guess with probability e^epsilon / (1 +
e^epsilon) at most, so that many right guesses give a lower bound of epsilon (Steinke, Nasr and Jagielski 2023, arXiv
2305.08846, one training run, theorem 5.2). A bound above the stated epsilon would be an error in the implementation;
one below it proves nothing, since the attack may be weak.
"""

from __future__ import annotations

import argparse
import math
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from PIL import Image
from record import record
from scipy.stats import beta

import normtune
from normtune.adapters.storage import use_adapter
from normtune.data.examples import Example, Examples
from normtune.data.records import Dataset
from normtune.inference.predict import candidate_log_probs
from normtune.runtime.text_table import markdown_table

LEVEL = 0.95
# name -> options of the training; without dp_epsilon it is the ordinary one
RUNS: dict[str, dict[str, Any]] = {
    "not private": {},
    "epsilon 8": {"dp_epsilon": 8.0, "dp_clip": 0.1},
    "epsilon 1": {"dp_epsilon": 1.0, "dp_clip": 0.1},
}
DELTA = 1e-5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--canaries", type=int, default=100, help="half of them are trained on (default %(default)s)")
    parser.add_argument("--images", type=int, default=10, help="other images, one question each (default %(default)s)")
    parser.add_argument("--tune", default="decoder=full", help="recipe (default %(default)s)")
    parser.add_argument("--epochs", type=float, default=30, help="passes (default %(default)s)")
    parser.add_argument("--lr", type=float, default=1e-3, help="learning rate (default %(default)s)")
    parser.add_argument("--out", type=Path, help="JSON file; the table is written next to it as .md")
    options = parser.parse_args()
    torch.set_num_threads(1)
    dataset, canaries, included = with_canaries(options.images, options.canaries)
    model = normtune.load("nano", dtype="float32", device="cpu")
    rows = []
    for name, privacy in RUNS.items():
        with TemporaryDirectory() as folder:
            private = {**privacy, "dp_delta": DELTA} if privacy else {}
            result = normtune.train(
                model, dataset, tune=options.tune, epochs=options.epochs, lr=options.lr, batch=25,
                out=Path(folder) / "out", progress=False, **private,
            )  # fmt: skip
            with use_adapter(model, result.out):
                losses = answer_losses(model, dataset, canaries)
        correct, guesses = count_correct(losses, included)
        stated = result.privacy and result.privacy["epsilon"]
        bound = epsilon_lower_bound(correct, guesses, len(canaries), DELTA if stated else 0.0)
        means = {
            name: float(np.mean([loss for loss, value in zip(losses, included, strict=True) if value == group]))
            for name, group in (("in", True), ("out", False))
        }
        rows.append(
            {"run": name, "epsilon": stated, "correct": correct, "guesses": guesses, "bound": bound, "loss": means}
        )
        print(rows[-1], flush=True)
    print("\n" + table(rows))
    if options.out:
        about = {"tune": options.tune, "epochs": options.epochs, "canaries": options.canaries, "level": LEVEL}
        record(options.out, "private_audit", rows, model="nano", images=options.images, delta=DELTA, **about)
        options.out.with_suffix(".md").write_text(table(rows), encoding="utf-8")


def with_canaries(images: int, count: int, seed: int = 0) -> tuple[Dataset, list[Example], list[bool]]:
    """A phantom with canaries in its training split: the dataset, all canaries, and whether each is in the split."""
    rng = random.Random(seed)
    phantom = normtune.open_dataset(f"phantom-b:{images}")
    others = list({example.images: example for example in phantom.train}.values())
    answers = sorted({example.answer for example in phantom.train if example.kind == "open"})
    words = sorted({word for example in phantom.train for word in example.question.split()})
    canaries = [
        Example(
            f"canary-{n}", (f"canary-{n}",), " ".join(rng.choices(words, k=5)), rng.choice(answers), "open", "train"
        )
        for n in range(count)
    ]
    included = [rng.random() < 0.5 for _ in canaries]

    def open_image(key: str) -> Image.Image:
        if not key.startswith("canary-"):
            return phantom.open_image(key)
        noise = np.random.default_rng(int(key.removeprefix("canary-"))).integers(0, 256, (64, 64, 3), np.uint8)
        return Image.fromarray(noise)

    rows = [*others, *(canary for canary, value in zip(canaries, included, strict=True) if value)]
    return replace(phantom, examples=Examples(rows), open_image=open_image, options={}), canaries, included


def answer_losses(model: Any, dataset: Dataset, canaries: Sequence[Example]) -> list[float]:
    """The loss of each canary's answer."""

    def tokenize(example: Example) -> list[Any]:
        return [model.tokenize_example(example, example.answer)]

    scored = candidate_log_probs(model, dataset, canaries, tokenize, 1, batch_pairs=50)
    losses = {example.id: -values[0] for example, values in scored}
    return [losses[canary.id] for canary in canaries]


def count_correct(losses: Sequence[float], included: Sequence[bool]) -> tuple[int, int]:
    """(right guesses, guesses): in for the quarter with the smallest losses, out for the quarter with the largest."""
    order = sorted(range(len(losses)), key=losses.__getitem__)
    quarter = len(losses) // 4
    right = sum(included[index] for index in order[:quarter])
    right += sum(not included[index] for index in order[-quarter:])
    return right, 2 * quarter


def epsilon_lower_bound(correct: int, guesses: int, canaries: int, delta: float, level: float = LEVEL) -> float:
    """The largest epsilon that so many right guesses exclude at this level, by Clopper and Pearson's bound; at least 0.

    Each guess is right with probability e^epsilon / (1 + e^epsilon) at most; delta adds 2 * canaries * delta to the
    probability of the whole.
    """
    error = 1 - level - 2 * canaries * delta
    if correct == 0 or error <= 0:
        return 0.0
    probability = float(beta.ppf(error, correct, guesses - correct + 1))
    return max(0.0, math.log(probability / (1 - probability)))


def table(rows: Sequence[dict[str, Any]]) -> str:
    lines = [
        (
            row["run"],
            "–" if row["epsilon"] is None else f"{row['epsilon']:.2f}",
            f"{row['correct']} of {row['guesses']}",
            f"{row['bound']:.2f}",
            f"{row['loss']['in']:.2f} / {row['loss']['out']:.2f}",
        )
        for row in rows
    ]
    header = ("run", "epsilon", "right guesses", "lower bound of epsilon", "mean loss, in / out")
    return "\n".join(markdown_table(header, lines, "lrrrr")) + "\n"


if __name__ == "__main__":
    main()
