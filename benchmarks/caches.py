"""One epoch with what is frozen computed in every step, held in memory, or read from disk.

    python benchmarks/caches.py --data slake --root DIR --out benchmarks/caches.json

LLaVA's shape at a width that two cores can run, random weights; LN tuning of the upper quarter of the
language model's layers. Image states, or hidden states below that quarter, are kept: in memory from an epoch
before the one that is timed, on disk from a run before, whose images the next run opens (from memory),
processes and digests to find its entries. Rounds are interleaved.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from record import record
from shape_llava import TEXT, LlavaShape
from transformers import TrainerCallback
from workload import ratio, sample, shown, spread

from normtune.data.records import Dataset, Example
from normtune.data.registry import open_dataset
from normtune.methods.adapt import adapt
from normtune.training.config import TrainConfig
from normtune.training.train import fit

BELOW = TEXT["num_hidden_layers"] * 3 // 4
RECIPE = f"language=ln[{BELOW}:]"
NONE = "nothing kept"
WAYS = {  # name -> (whether image states are kept, whether hidden states are, whether they are on disk)
    NONE: (False, False, False),
    "image states, memory": (True, False, False),
    "image states, disk": (True, False, True),
    "hidden states, memory": (True, True, False),
    "hidden states, disk": (True, True, True),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="phantom-b:40", help="slake, vqa-rad or phantoms")
    parser.add_argument("--root", type=Path, help="the data set's folder")
    parser.add_argument("--out", type=Path, help="JSON file; the table goes beside it")
    parser.add_argument("--questions", type=int, default=160, help="about so many, in whole images")
    parser.add_argument("--pairs", type=int, default=32, help="question-answer pairs a step")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    dataset = open_dataset(options.data, options.root)
    examples = sample(dataset.split("train"), options.questions)
    shape = LlavaShape()
    shape.learn_words([f"{e.question} {e.answer}" for e in dataset.examples])
    images = {key: dataset.open_image(key) for example in examples for key in example.images}
    held = Dataset(dataset.name, examples, images.__getitem__)
    speeds: dict[str, list[float]] = {way: [] for way in WAYS}
    with tempfile.TemporaryDirectory() as folder:
        for way, (_, _, disk) in WAYS.items():
            if disk:
                epoch(shape, way, held, examples, options, Path(folder))
        for round_ in range(options.rounds):
            for way in WAYS:
                speeds[way].append(epoch(shape, way, held, examples, options, Path(folder)))
                print(f"round {round_ + 1}  {way:<22} {speeds[way][-1]:7.2f} pairs/s", flush=True)
    text = table(speeds)
    print("\n" + text)
    if options.out:
        record(
            options.out,
            "caches",
            [
                {"kept": way, "pairs_per_second": values, **spread(values)}
                | {"faster": ratio(values, speeds[NONE])}
                for way, values in speeds.items()
            ],
            shape=shape.describe(),
            recipe=RECIPE,
            data=options.data,
            questions=len(examples),
            images=len({example.images for example in examples}),
            pairs_a_step=options.pairs,
        )
        options.out.with_suffix(".md").write_text(text, encoding="utf-8")


class LastEpoch(TrainerCallback):
    """The seconds of the last epoch."""

    def __init__(self) -> None:
        self.began = self.seconds = 0.0

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.began = time.perf_counter()

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seconds = time.perf_counter() - self.began


def epoch(
    shape: LlavaShape,
    way: str,
    dataset: Dataset,
    examples: Sequence[Example],
    options: argparse.Namespace,
    folder: Path,
) -> float:
    """Pairs a second of one epoch; what is kept in memory is computed in an epoch before it."""
    images, states, disk = WAYS[way]
    torch.manual_seed(0)  # the same weights in every run: another tower would not find its entries
    family: Any = shape.family()
    if not images:
        family.seen = lambda pixels: pixels
    if not states:
        family.below = lambda trained: None
    clock = LastEpoch()
    config = TrainConfig(
        model=shape.name,
        data=options.data,
        tune=RECIPE,
        out=folder / "run",
        epochs=1 if disk else 2,
        batch=options.pairs,
        cache=folder / "cache" if disk else None,
        resume=False,
        save_every=10_000,
        device="cpu",
    )
    fit(config, family, adapt(family.model, RECIPE), dataset, examples, progress=clock)
    return len(examples) / clock.seconds


def table(speeds: dict[str, list[float]]) -> str:
    """Medians with the range of the rounds, and how many times faster than with nothing kept."""
    lines = ["| kept | pairs/s | faster |", "|---|--:|--:|"]
    for way, values in speeds.items():
        faster = shown(ratio(values, speeds[NONE]), 2, "x")
        lines.append(f"| {way} | {shown(spread(values), 2)} | {faster} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
