"""Training throughput on real questions: Normtune beside stock PEFT under the Hugging Face Trainer.

    python benchmarks/throughput.py --shape miss --data slake --root DIR --out FILE.json

Random weights of a real shape at a width that two cores can run, all methods interleaved in one run. The
peers are run as their users run them: every question is a row of its own with its own copy of the image,
padded in its batch; LoRA (r=8, query and value), LoRA on all linears, LN tuning, full tuning. Both sides
get the same pixels and tokens from memory, the same pairs a step, and AdamW; timed from the Trainer's first
step to its last.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from record import record
from shape import Shape
from shapes import SHAPES
from torch.utils.data import Dataset as TorchDataset
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from normtune.adapt import adapt
from normtune.catalog import open_dataset
from normtune.config import TrainConfig
from normtune.data.records import Dataset, Example
from normtune.packing import group_by_image
from normtune.train import fit

OURS = ("ln", "lora-8", "full")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, required=True)
    parser.add_argument("--data", choices=("slake", "vqa-rad"), required=True)
    parser.add_argument("--root", type=Path, required=True)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--pairs", type=int, default=32, help="question-answer pairs a step")
    parser.add_argument("--steps", type=int, default=3, help="steps of a peer in one round")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    shape = SHAPES[options.shape]
    dataset = open_dataset(options.data, options.root)
    examples = sample(dataset.split("train"), options.pairs * options.steps * 3)
    shape.learn_words([f"{e.question} {e.answer}" for e in dataset.examples])
    runs = methods(shape, dataset, examples, options)
    speeds: dict[str, list[float]] = {name: [] for name in runs}
    for round_ in range(options.rounds):
        for name, run in runs.items():
            torch.manual_seed(0)
            timed = run()
            speeds[name].append(timed.pairs / timed.seconds)
            print(f"round {round_ + 1}  {name:<32} {speeds[name][-1]:7.2f} pairs/s", flush=True)
    medians = {name: statistics.median(values) for name, values in speeds.items()}
    rows = [{"method": name, "pairs_per_second": speeds[name], "median": medians[name]} for name in runs]
    print("\n" + table(medians))
    sizes = [len(group) for group in group_by_image(examples)]
    if options.out:
        record(
            options.out,
            "throughput",
            rows,
            shape=shape.describe(),
            data=options.data,
            questions_per_image=sum(sizes) / len(sizes),
            pairs_a_step=options.pairs,
            steps=options.steps,
            ratios={peer: medians["normtune ln"] / medians[peer] for peer in medians},
        )
        options.out.with_suffix(".md").write_text(table(medians), encoding="utf-8")


def sample(examples: Sequence[Example], pairs: int) -> list[Example]:
    """Whole images, about `pairs` pairs in all, with as many questions an image as the data set has.

    Images are sorted by their number of questions and taken at even steps.
    """
    groups = sorted(group_by_image(examples), key=len)
    count = max(1, round(pairs * len(groups) / len(examples)))
    return [e for i in range(count) for e in groups[int((i + 0.5) * len(groups) / count)]]


@dataclass(frozen=True)
class Timed:
    """Pairs trained on, and the seconds that took."""

    pairs: int
    seconds: float


class Clock(TrainerCallback):
    """From the beginning of the first step to the end of the last."""

    def __init__(self) -> None:
        self.began = self.ended = 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.began = self.began or time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.ended = time.perf_counter()


def methods(
    shape: Shape, dataset: Dataset, examples: Sequence[Example], options: argparse.Namespace
) -> dict[str, Callable[[], Timed]]:
    """What is timed, by name; Normtune's first."""
    runs: dict[str, Callable[[], Timed]] = {}
    for recipe in OURS:
        runs[f"normtune {recipe}"] = lambda recipe=recipe: ours(
            shape, dataset, examples, recipe, True, options
        )
    runs["normtune ln, not grouped"] = lambda: ours(shape, dataset, examples, "ln", False, options)
    for peer in shape.peers:
        runs[f"PEFT {peer}"] = lambda peer=peer: theirs(shape, dataset, examples, peer, options)
    return runs


def ours(
    shape: Shape,
    dataset: Dataset,
    examples: Sequence[Example],
    recipe: str,
    group: bool,
    options: argparse.Namespace,
) -> Timed:
    """Normtune's own training run."""
    family, clock = shape.family(), Clock()
    tuned = adapt(family.model, recipe)
    with tempfile.TemporaryDirectory() as folder:
        config = TrainConfig(
            model=shape.name,
            data=options.data,
            tune=recipe,
            out=Path(folder),
            epochs=1,
            batch=options.pairs,
            max_steps=options.steps * (3 if group else 1),
            group=group,
            save_every=10_000,
            device="cpu",
        )
        remembered = Dataset(dataset.name, list(examples), shape.remember(dataset, examples))
        result, _ = fit(config, family, tuned, remembered, examples, progress=clock)
    return Timed(result.pairs, clock.ended - clock.began)


def theirs(
    shape: Shape, dataset: Dataset, examples: Sequence[Example], peer: str, options: argparse.Namespace
) -> Timed:
    """The Trainer with PEFT, one row a question."""
    model, rows, collate, clock = *shape.peer(peer, dataset, examples), Clock()
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            per_device_train_batch_size=options.pairs,
            max_steps=options.steps,
            learning_rate=1e-4,
            report_to="none",
            save_strategy="no",
            use_cpu=not torch.cuda.is_available(),
            disable_tqdm=True,
            remove_unused_columns=False,
            dataloader_pin_memory=False,
        )
        trainer = Trainer(
            model, arguments, data_collator=collate, train_dataset=Rows(rows), callbacks=[clock]
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return Timed(options.steps * options.pairs, clock.ended - clock.began)


class Rows(TorchDataset[Any]):
    """A list as the Trainer takes it."""

    def __init__(self, rows: list[Any]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Any:
        return self.rows[index]


def table(medians: dict[str, float]) -> str:
    """Medians, and how many times faster Normtune's LN tuning is."""
    lines = ["| method | pairs/s | normtune ln is faster |", "|---|--:|--:|"]
    for name, median in medians.items():
        lines.append(f"| {name} | {median:.2f} | {medians['normtune ln'] / median:.1f}x |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
