"""Training speed with the outputs of frozen layers computed in every step, cached in memory, or on disk.

    python benchmarks/caches.py --data slake --root DIR --out benchmarks/caches.json

LLaVA's shape at a width that two cores can run, with random weights; LN tuning of the last quarter of the
language model's layers. Cached are the outputs of the image encoder (image states), or also the hidden states
that enter the last quarter. A cache in memory is filled in an epoch before the timed one. A cache on disk is
filled in an earlier run; the timed run opens each image (from memory), preprocesses it and finds its entry by
its digest. Rounds are interleaved.
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
from workload import format_range, median_and_range, ratio, sample_images

from normtune.data.records import Dataset, Example
from normtune.data.registry import open_dataset
from normtune.methods.adapt import adapt
from normtune.runtime.text_table import markdown_table
from normtune.training.config import TrainConfig
from normtune.training.setup import TrainingSetup
from normtune.training.train import fit

FIRST_TRAINED_LAYER = TEXT["num_hidden_layers"] * 3 // 4
RECIPE = f"language=ln[{FIRST_TRAINED_LAYER}:]"
NO_CACHE = "nothing kept"
CACHES = {  # name -> (whether image states are cached, whether hidden states are, whether on disk)
    NO_CACHE: (False, False, False),
    "image states, memory": (True, False, False),
    "image states, disk": (True, False, True),
    "hidden states, memory": (True, True, False),
    "hidden states, disk": (True, True, True),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="phantom-b:40", help="slake, vqa-rad or phantoms")
    parser.add_argument("--root", type=Path, help="the dataset's folder")
    parser.add_argument("--out", type=Path, help="JSON file; the table is written next to it as .md")
    parser.add_argument("--questions", type=int, default=160, help="approximate number, in whole images")
    parser.add_argument("--pairs", type=int, default=32, help="question-answer pairs per step")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    dataset = open_dataset(options.data, options.root)
    examples = sample_images(dataset.split("train"), options.questions)
    shape = LlavaShape()
    shape.learn_words([f"{e.question} {e.answer}" for e in dataset.examples])
    images = {key: dataset.open_image(key) for example in examples for key in example.images}
    in_memory = Dataset(dataset.name, examples, images.__getitem__)
    speeds: dict[str, list[float]] = {cached: [] for cached in CACHES}
    with tempfile.TemporaryDirectory() as folder:
        for cached, (_, _, on_disk) in CACHES.items():
            if on_disk:
                time_epoch(shape, cached, in_memory, examples, options, Path(folder))
        for round_ in range(options.rounds):
            for cached in CACHES:
                speeds[cached].append(time_epoch(shape, cached, in_memory, examples, options, Path(folder)))
                print(f"round {round_ + 1}  {cached:<22} {speeds[cached][-1]:7.2f} pairs/s", flush=True)
    text = table(speeds)
    print("\n" + text)
    if options.out:
        record(
            options.out,
            "caches",
            [
                {"kept": cached, "pairs_per_second": values, **median_and_range(values)}
                | {"faster": ratio(values, speeds[NO_CACHE])}
                for cached, values in speeds.items()
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
    """Measures the seconds of the last epoch."""

    def __init__(self) -> None:
        self.start = self.seconds = 0.0

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.start = time.perf_counter()

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seconds = time.perf_counter() - self.start


def time_epoch(
    shape: LlavaShape,
    cached: str,
    dataset: Dataset,
    examples: Sequence[Example],
    options: argparse.Namespace,
    folder: Path,
) -> float:
    """Pairs per second of one epoch; a cache in memory is filled in an epoch before it."""
    cache_images, cache_states, on_disk = CACHES[cached]
    torch.manual_seed(0)  # cache entries depend on the encoder's weights: they are the same in every run
    family: Any = shape.build_family()
    if not cache_images:
        family.encode_image = lambda pixels: pixels  # pixels are cached, and encoded in every step
    if not cache_states:
        family.frozen_trunk = lambda trained: None  # no hidden states are cached
    clock = LastEpoch()
    config = TrainConfig(
        model=shape.name,
        data=options.data,
        tune=RECIPE,
        out=folder / "run",
        epochs=1 if on_disk else 2,
        batch=options.pairs,
        cache=folder / "cache" if on_disk else None,
        resume=False,
        save_every=10_000,
        device="cpu",
    )
    fit(TrainingSetup(config, dataset, examples, family, adapt(family.model, RECIPE)), progress=clock)
    return len(examples) / clock.seconds


def table(speeds: dict[str, list[float]]) -> str:
    """A Markdown table: medians with the range of the rounds, and the speed relative to no cache."""
    lines = []
    for cached, values in speeds.items():
        faster = format_range(ratio(values, speeds[NO_CACHE]), 2, "x")
        lines.append([cached, format_range(median_and_range(values), 2), faster])
    return "\n".join(markdown_table(["kept", "pairs/s", "faster"], lines)) + "\n"


if __name__ == "__main__":
    main()
