"""Training throughput on real questions: Normtune beside stock PEFT under the Hugging Face Trainer.

    python benchmarks/throughput.py --shape llava --data slake --root DIR --out FILE.json

Random weights of a real shape at a width that two cores can run, all methods interleaved in one run. The
peers are run as their users run them: every question is a row of its own with its own copy of the image,
padded in its batch; LoRA (r=8, query and value), LoRA on all linears, LN tuning, full tuning. Both sides
get the same pixels and tokens from memory, the same pairs a step, and AdamW. Every run begins with a step
that is not counted; Normtune's takes three times as many steps as a peer's, since they are short.
"""

from __future__ import annotations

import argparse
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from record import record
from torch.utils.data import Dataset as TorchDataset
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments
from workload import Workload, parser, ratio, shown, spread, workload

from normtune.data.records import Dataset
from normtune.methods.adapt import adapt
from normtune.models.family import Family
from normtune.models.types import Batch
from normtune.training.config import TrainConfig
from normtune.training.train import fit

OURS = ("ln", "lora-8", "full")
FIRST = "normtune ln"  # what the others are compared with
MORE = 3  # steps of Normtune's for one of a peer's


def main() -> None:
    options = parser(__doc__.splitlines()[0], pairs=24, rounds=3)
    options.add_argument(
        "--steps", type=int, default=2, help="counted steps of a peer in one round (default %(default)s)"
    )
    chosen = options.parse_args()
    work = workload(chosen, chosen.pairs * (chosen.steps * MORE + 1))
    runs = methods(work, chosen)
    speeds: dict[str, list[float]] = {name: [] for name in runs}
    for round_ in range(chosen.rounds):
        for name, run in runs.items():
            torch.manual_seed(0)
            timed = run()
            speeds[name].append(timed.pairs / timed.seconds)
            print(f"round {round_ + 1}  {name:<26} {speeds[name][-1]:7.2f} pairs/s", flush=True)
    rows = [
        {
            "method": name,
            "pairs_per_second": spread(values),
            "faster": ratio(speeds[FIRST], values),
            "rounds": values,
        }
        for name, values in speeds.items()
    ]
    print("\n" + table(rows))
    if chosen.out:
        record(chosen.out, "throughput", rows, **work.about(), pairs_a_step=chosen.pairs, steps=chosen.steps)
        chosen.out.with_suffix(".md").write_text(table(rows), encoding="utf-8")


@dataclass(frozen=True)
class Timed:
    """Pairs trained on, and the seconds that took."""

    pairs: int
    seconds: float


class Clock(TrainerCallback):
    """From the beginning of the second step to the end of the last."""

    def __init__(self) -> None:
        self.began = self.ended = 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 1:
            self.began = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.ended = time.perf_counter()

    @property
    def seconds(self) -> float:
        return self.ended - self.began


@dataclass
class Counter:
    """The pairs of each batch that a family lays out, in order."""

    pairs: list[int] = field(default_factory=list)

    def watch(self, family: Family) -> None:
        collate = family.collate

        def counted(*args: Any) -> Batch:
            batch = collate(*args)
            self.pairs.append(int(batch["pairs"]))
            return batch

        family.collate = counted  # type: ignore[method-assign]


def methods(work: Workload, chosen: argparse.Namespace) -> dict[str, Callable[[], Timed]]:
    """What is timed, by name; Normtune's first."""
    runs: dict[str, Callable[[], Timed]] = {}
    for recipe in OURS:
        runs[f"normtune {recipe}"] = lambda recipe=recipe: ours(work, recipe, True, chosen)
    runs["normtune ln, not grouped"] = lambda: ours(work, "ln", False, chosen)
    for peer in work.shape.peers:
        runs[f"PEFT {peer}"] = lambda peer=peer: theirs(work, peer, chosen)
    return runs


def ours(work: Workload, recipe: str, group: bool, chosen: argparse.Namespace) -> Timed:
    """Normtune's own training run on a random model."""
    family = work.shape.family()
    return train_ours(family, work, work.held(family), recipe, group, chosen)


def train_ours(
    family: Family, work: Workload, dataset: Dataset, recipe: str, group: bool, chosen: argparse.Namespace
) -> Timed:
    """Normtune's own training run of `family`; `chosen` has the pairs a step and a peer's steps."""
    clock, counter = Clock(), Counter()
    counter.watch(family)
    tuned = adapt(family.model, recipe)
    steps = chosen.steps * (MORE if group else 1)
    with tempfile.TemporaryDirectory() as folder:
        config = TrainConfig(
            model=work.shape.name,
            data=work.data,
            tune=recipe,
            out=Path(folder),
            epochs=1,
            batch=chosen.pairs,
            max_steps=1 + steps,
            group=group,
            save_every=10_000,
            device="cpu",
        )
        fit(config, family, tuned, dataset, work.examples, progress=clock)
    assert len(counter.pairs) > steps, "a batch a step"
    return Timed(sum(counter.pairs[1 : 1 + steps]), clock.seconds)


def theirs(work: Workload, peer: str, chosen: argparse.Namespace) -> Timed:
    """The Trainer with PEFT, one row a question."""
    (model, rows, collate), clock = work.shape.peer(peer, work.dataset, work.examples), Clock()
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            per_device_train_batch_size=chosen.pairs,
            max_steps=1 + chosen.steps,
            learning_rate=1e-4,
            report_to="none",
            save_strategy="no",
            use_cpu=True,
            disable_tqdm=True,
            remove_unused_columns=False,
            dataloader_pin_memory=False,
            dataloader_drop_last=True,
        )
        trainer = Trainer(
            model, arguments, data_collator=collate, train_dataset=Rows(rows), callbacks=[clock]
        )
        trainer.remove_callback(PrinterCallback)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            trainer.train()
    return Timed(chosen.steps * chosen.pairs, clock.seconds)


class Rows(TorchDataset[Any]):
    """A list as the Trainer takes it."""

    def __init__(self, rows: list[Any]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Any:
        return self.rows[index]


def table(rows: Sequence[dict[str, Any]], first: str = FIRST) -> str:
    """Medians with the lowest and highest round, and how many times faster the first is."""
    lines = [f"| method | pairs/s | {first} is faster |", "|---|--:|--:|"]
    for row in rows:
        cells = (row["method"], shown(row["pairs_per_second"], 2), shown(row["faster"], 1, "x"))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
