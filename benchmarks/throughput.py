"""Training throughput on real questions: Normtune compared with stock PEFT in the Hugging Face Trainer.

    python benchmarks/throughput.py --shape llava --data slake --root DIR --out FILE.json

The weights are random, of a real shape at a width that two cores can run; all methods are interleaved. The
peers run as their users run them: every question is a row with its own copy of the image, padded in its
batch; the methods are LoRA (r=8, query and value), LoRA on all linears, LN tuning and full tuning. Both sides
read the same pixels and tokens from memory, and use the same number of pairs per step and AdamW. The first
step of every run is not counted. Normtune's runs have three times as many steps as a peer's, since its steps
are short.

With `--per-image N`, every image has N questions, which are drawn from the training split: the shape of datasets with
many questions about an image. Normtune is then measured with several `--cap`, beside LoRA on query and value. Without a
cap, one of its steps has all N questions of an image.
"""

from __future__ import annotations

import argparse
import random
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from record import record
from torch.utils.data import Dataset as TorchDataset
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments
from workload import Workload, build_parser, format_range, load_workload, median_and_range, ratio

from normtune.data.records import Dataset
from normtune.methods.adapt import adapt
from normtune.models.family import Family
from normtune.models.types import Batch
from normtune.runtime.text_table import markdown_table
from normtune.training.config import TrainConfig
from normtune.training.setup import TrainingSetup
from normtune.training.train import fit

RECIPES = ("ln", "lora-8", "full")
REFERENCE = "normtune ln"  # the method that the others are compared with
CAPS = (24, 4)  # with --per-image
STEPS_PER_PEER = 3  # steps of Normtune for each step of a peer


def main() -> None:
    parser = build_parser(__doc__.splitlines()[0], pairs=24, rounds=3)
    parser.add_argument("--steps", type=int, default=2, help="timed steps of a peer in one round (default %(default)s)")
    parser.add_argument("--per-image", type=int, metavar="N", help="N questions an image, and several --cap")
    options = parser.parse_args()
    if options.per_image:
        workload = give_questions(load_workload(options, options.pairs), options)
        runs = make_capped_methods(workload, options)
    else:
        workload = load_workload(options, options.pairs * (options.steps * STEPS_PER_PEER + 1))
        runs = make_methods(workload, options)
    speeds: dict[str, list[float]] = {name: [] for name in runs}
    for round_ in range(options.rounds):
        for name, run in runs.items():
            torch.manual_seed(0)
            timed_run = run()
            speeds[name].append(timed_run.pairs / timed_run.seconds)
            print(f"round {round_ + 1}  {name:<26} {speeds[name][-1]:7.2f} pairs/s", flush=True)
    rows = [
        {
            "method": name,
            "pairs_per_second": median_and_range(values),
            "faster": ratio(speeds[REFERENCE], values),
            "rounds": values,
        }
        for name, values in speeds.items()
    ]
    print("\n" + table(rows))
    if options.out:
        fields = {**workload.describe(), "pairs_a_step": options.pairs, "steps": options.steps}
        if options.per_image:
            fields["sharing_limit"] = sharing_limit(workload, options)
        record(options.out, "throughput", rows, **fields)
        options.out.with_suffix(".md").write_text(table(rows), encoding="utf-8")


@dataclass(frozen=True)
class TimedRun:
    """The pairs of the timed steps, and their seconds in all."""

    pairs: int
    seconds: float


class Clock(TrainerCallback):
    """Measures the time from the start of the second step to the end of the last."""

    def __init__(self) -> None:
        self.start = self.end = 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 1:
            self.start = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.end = time.perf_counter()

    @property
    def seconds(self) -> float:
        return self.end - self.start


@dataclass
class PairCounter:
    """Counts the pairs of each batch that a family collates, in order."""

    pairs: list[int] = field(default_factory=list)

    def watch(self, family: Family) -> None:
        collate = family.collate

        def collate_and_count(*args: Any) -> Batch:
            batch = collate(*args)
            self.pairs.append(int(batch["pairs"]))
            return batch

        family.collate = collate_and_count  # type: ignore[method-assign]


def make_methods(workload: Workload, options: argparse.Namespace) -> dict[str, Callable[[], TimedRun]]:
    """The functions that are timed, by name; Normtune's come first."""
    runs: dict[str, Callable[[], TimedRun]] = {}
    for recipe in RECIPES:
        runs[f"normtune {recipe}"] = lambda recipe=recipe: time_normtune(workload, recipe, True, options)
    runs["normtune ln, not grouped"] = lambda: time_normtune(workload, "ln", False, options)
    for peer in workload.shape.peers:
        runs[f"PEFT {peer}"] = lambda peer=peer: time_peft(workload, peer, options)
    return runs


def make_capped_methods(workload: Workload, options: argparse.Namespace) -> dict[str, Callable[[], TimedRun]]:
    """The functions that are timed with `--per-image`: LN tuning with several caps, and one method of PEFT."""
    runs: dict[str, Callable[[], TimedRun]] = {REFERENCE: lambda: time_normtune(workload, "ln", True, options)}
    for cap in CAPS:
        runs[f"{REFERENCE}, --cap {cap}"] = lambda cap=cap: time_normtune(workload, "ln", True, options, cap)
    runs[f"{REFERENCE}, not grouped"] = lambda: time_normtune(workload, "ln", False, options)
    runs["PEFT LoRA r8 q,v"] = lambda: time_peft(workload, "LoRA r8 q,v", options)
    return runs


def give_questions(workload: Workload, options: argparse.Namespace) -> Workload:
    """The workload with `options.per_image` random questions of the training split about each of some images."""
    rng = random.Random(0)
    rows = list(workload.dataset.split("train"))
    images = list(dict.fromkeys(row.images for row in rows))[: options.steps * STEPS_PER_PEER + 1]
    examples = [
        replace(row, id=f"{number}-{row.id}", images=image)
        for number, image in enumerate(images)
        for row in rng.sample(rows, options.per_image)
    ]
    return replace(workload, examples=examples)


def sharing_limit(workload: Workload, options: argparse.Namespace) -> float:
    """Tokens of the separate rows, divided by those of the rows that share an image: what sharing alone can give."""
    family = workload.shape.build_family()
    rows = [family.tokenize(row.id, row.question, row.answer) for row in workload.examples]
    segment = sum(map(len, rows)) / len(rows)
    image = workload.dataset.open_image(workload.examples[0].images[0])
    prefix = family.prefix_tokens([family.preprocess_image(image)])
    return (prefix + segment) * options.per_image / (prefix + segment * options.per_image)


def time_normtune(
    workload: Workload, recipe: str, group: bool, options: argparse.Namespace, cap: int | None = None
) -> TimedRun:
    """Time Normtune's training run on a new random model."""
    family = workload.shape.build_family()
    return train_normtune(family, workload, workload.cache_images(family), recipe, group, options, cap)


def train_normtune(
    family: Family,
    workload: Workload,
    dataset: Dataset,
    recipe: str,
    group: bool,
    options: argparse.Namespace,
    cap: int | None = None,
) -> TimedRun:
    """Time Normtune's training run of `family`; `options` has the pairs per step and a peer's steps."""
    clock, counter = Clock(), PairCounter()
    counter.watch(family)
    tuned_model = adapt(family.model, recipe)
    steps = options.steps * (STEPS_PER_PEER if group else 1)
    with tempfile.TemporaryDirectory() as folder:
        config = TrainConfig(
            model=workload.shape.name,
            data=workload.data,
            tune=recipe,
            out=Path(folder),
            epochs=1,
            batch=options.pairs,
            max_steps=1 + steps,
            group=group,
            cap=cap,
            save_every=10_000,
            device="cpu",
        )
        fit(TrainingSetup(config, dataset, workload.examples, family, tuned_model), progress=clock)
    assert len(counter.pairs) > steps, "one batch per step"
    return TimedRun(sum(counter.pairs[1 : 1 + steps]), clock.seconds)


def time_peft(workload: Workload, peer: str, options: argparse.Namespace) -> TimedRun:
    """Time the Trainer with PEFT, with one row per question."""
    clock = Clock()
    model, rows, collate = workload.shape.build_peer(peer, workload.dataset, workload.examples)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            per_device_train_batch_size=options.pairs,
            max_steps=1 + options.steps,
            learning_rate=1e-4,
            report_to="none",
            save_strategy="no",
            use_cpu=True,
            disable_tqdm=True,
            remove_unused_columns=False,
            dataloader_pin_memory=False,
            dataloader_drop_last=True,
        )
        trainer = Trainer(model, arguments, data_collator=collate, train_dataset=RowDataset(rows), callbacks=[clock])
        trainer.remove_callback(PrinterCallback)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            trainer.train()
    return TimedRun(options.steps * options.pairs, clock.seconds)


class RowDataset(TorchDataset[Any]):
    """A list as a dataset for the Trainer."""

    def __init__(self, rows: list[Any]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Any:
        return self.rows[index]


def table(rows: Sequence[dict[str, Any]], first: str = REFERENCE) -> str:
    """A Markdown table of medians with the range of the rounds, and how many times faster `first` is."""
    lines = [
        [row["method"], format_range(row["pairs_per_second"], 2), format_range(row["faster"], 1, "x")] for row in rows
    ]
    return "\n".join(markdown_table(["method", "pairs/s", f"{first} is faster"], lines)) + "\n"


if __name__ == "__main__":
    main()
