"""Several norm adapters trained in one pass over one base, compared with one run after the other.

    python benchmarks/multi.py --data slake --root DIR --out benchmarks/multi.json

MISS's and LLaVA's shapes at widths that two cores can run, with random weights; LN tuning of the text parts.
There are two sweeps: seeds, where the adapters see different images in a step, and learning rates with one
seed, where they see the same images. The joint pass processes the batches of its adapters one at a time or
all in one forward pass. Times do not include loading the base; rounds are interleaved. Memory is the peak of
one step (`normtune.training.memory_plan.live_bytes`) plus the base's weights: of the joint pass, of one run,
and of all runs at the same time.
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
from shape import Shape
from shapes import SHAPES
from workload import format_range, median_and_range, ratio, sample_images

from normtune.adapters.multi.bank import AdapterBank, build_bank
from normtune.data.batches import EpochBatches
from normtune.data.records import Dataset, Example
from normtune.data.registry import open_dataset
from normtune.methods.adapt import adapt
from normtune.training.collator import build_collator
from normtune.training.config import TrainConfig
from normtune.training.joint import accumulate_gradients, train_all
from normtune.training.joint_run import AdapterRun
from normtune.training.memory_plan.live_bytes import LiveTensorBytes
from normtune.training.saved_activations import save_fewer_activations
from normtune.training.train import fit

RECIPES = {"miss": "encoder=ln,decoder=ln", "llava": "language=ln"}
SWEEPS = ("seeds", "learning rates")
BYTES_PER_TRAINED_VALUE = 4 * 4  # fp32: the value, its gradient and two moments of Adam


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, action="append", help="may be repeated (default: all)")
    parser.add_argument("--data", default="phantom-b:40", help="slake, vqa-rad or phantoms")
    parser.add_argument("--root", type=Path, help="the dataset's folder")
    parser.add_argument("--out", type=Path, help="JSON file; the table is written next to it as .md")
    parser.add_argument("--adapters", type=int, default=8)
    parser.add_argument("--questions", type=int, default=160, help="approximate number, in whole images")
    parser.add_argument("--pairs", type=int, default=24, help="question-answer pairs per step and adapter")
    parser.add_argument("--steps", type=int, default=4, help="steps of each adapter")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    dataset = open_dataset(options.data, options.root)
    examples = sample_images(dataset.split("train"), options.questions)
    images = {key: dataset.open_image(key) for example in examples for key in example.images}
    cached_dataset = Dataset(dataset.name, examples, images.__getitem__)
    rows = []
    for name in options.shape or SHAPES:
        SHAPES[name].learn_words([f"{e.question} {e.answer}" for e in dataset.examples])
        for sweep in SWEEPS:
            rows.append(measure_sweep(SHAPES[name], sweep, cached_dataset, examples, options))
    text = table(rows)
    print("\n" + text)
    if options.out:
        record(
            options.out,
            "multi",
            rows,
            shapes={name: SHAPES[name].describe() for name in options.shape or SHAPES},
            data=options.data,
            questions=len(examples),
            images=len(images),
            adapters=options.adapters,
            pairs_a_step=options.pairs,
            steps=options.steps,
        )
        options.out.with_suffix(".md").write_text(text, encoding="utf-8")


def measure_sweep(
    shape: Shape, sweep: str, dataset: Dataset, examples: Sequence[Example], options: argparse.Namespace
) -> dict[str, Any]:
    """One row: seconds of separate runs and of the joint pass, by round, and the bytes of a step."""
    modes = (1, options.adapters)  # adapters per forward pass
    seconds: dict[str, list[float]] = {"apart": [], **{str(per_pass): [] for per_pass in modes}}
    with tempfile.TemporaryDirectory() as folder:
        configs = [make_config(shape, sweep, i, Path(folder), options) for i in range(options.adapters)]
        for round_ in range(options.rounds):
            seconds["apart"].append(sum(time_one_run(shape, config, dataset, examples) for config in configs))
            for per_pass in modes:
                seconds[str(per_pass)].append(time_joint_run(shape, configs, dataset, examples, per_pass))
            latest = ", ".join(f"{values[-1]:.1f} s {per_pass}" for per_pass, values in seconds.items())
            print(f"round {round_ + 1}  {shape.name} {sweep:<15} {latest}", flush=True)
        base, one_run = step_bytes(shape, configs[:1], dataset, examples, 1)
        steps = [step_bytes(shape, configs, dataset, examples, per_pass)[1] for per_pass in modes]
    return {
        "shape": shape.name,
        "recipe": RECIPES[shape.name],
        "sweep": sweep,
        "seconds": seconds,
        "apart": median_and_range(seconds["apart"]),
        "ways": [
            {
                "at_once": per_pass,
                "seconds": median_and_range(seconds[str(per_pass)]),
                "faster": ratio(seconds["apart"], seconds[str(per_pass)]),
                "memory_of_one_run": (base + step) / (base + one_run),
                "memory_of_runs_side_by_side": (base + step) / (len(configs) * (base + one_run)),
            }
            for per_pass, step in zip(modes, steps, strict=True)
        ],
        "base_bytes": base,
        "step_bytes": {"one_run": one_run, **dict(zip(map(str, modes), steps, strict=True))},
    }


def make_config(shape: Shape, sweep: str, number: int, folder: Path, options: argparse.Namespace) -> TrainConfig:
    """The options of one adapter's run."""
    return TrainConfig(
        model=shape.name,
        data=options.data,
        tune=RECIPES[shape.name],
        out=folder / str(number),
        batch=options.pairs,
        max_steps=options.steps,
        seed=number if sweep == "seeds" else 0,
        lr=1e-3 * 2**number if sweep != "seeds" else None,
        resume=False,
        save_every=10_000,
        device="cpu",
    )


def build_base(shape: Shape) -> Any:
    """A new base with the same weights in every call."""
    torch.manual_seed(0)
    return shape.build_family()


def time_one_run(shape: Shape, config: TrainConfig, dataset: Dataset, examples: Sequence[Example]) -> float:
    """Seconds of the separate run of one adapter."""
    family = build_base(shape)
    tuned = adapt(family.model, config.tune)
    start = time.perf_counter()
    fit(config, family, tuned, dataset, examples)
    return time.perf_counter() - start


def time_joint_run(
    shape: Shape, configs: Sequence[TrainConfig], dataset: Dataset, examples: Sequence[Example], per_pass: int
) -> float:
    """Seconds of the joint pass of all adapters."""
    family = build_base(shape)
    tuned = adapt(family.model, configs[0].tune)
    start = time.perf_counter()
    bank = build_bank(tuned, len(configs))
    train_all(family, bank, make_runs(family, bank, configs, dataset, examples), configs[0], per_pass)
    return time.perf_counter() - start


def make_runs(
    family: Any, bank: AdapterBank, configs: Sequence[TrainConfig], dataset: Dataset, examples: Sequence[Example]
) -> list[AdapterRun]:
    """One run per config; they share a collator."""
    collate = build_collator(configs[0], family, bank.tuned, dataset, examples)
    return [
        AdapterRun(
            adapter,
            config,
            bank,
            dataset,
            examples,
            collate,
            EpochBatches(examples, config.batch, config.cap, config.seed),
        )
        for adapter, config in enumerate(configs)
    ]


def step_bytes(
    shape: Shape, configs: Sequence[TrainConfig], dataset: Dataset, examples: Sequence[Example], per_pass: int
) -> tuple[int, int]:
    """(bytes of the base's weights, peak bytes of a step, with the adapters and their optimiser state)."""
    family = build_base(shape)
    base = sum(parameter.numel() * parameter.element_size() for parameter in family.model.parameters())
    bank = build_bank(adapt(family.model, configs[0].tune), len(configs))
    run_batches = [(run, run.next_batch()) for run in make_runs(family, bank, configs, dataset, examples)]
    for run, groups in run_batches:
        run.collate(groups)  # encodes the images, so that this is not part of the measured step
    with save_fewer_activations(family.model), LiveTensorBytes() as tensor_bytes:
        for first in range(0, len(run_batches), per_pass):
            accumulate_gradients(family, bank, run_batches[first : first + per_pass])
    return base, tensor_bytes.peak + BYTES_PER_TRAINED_VALUE * bank.values.numel()


def table(rows: Sequence[dict[str, Any]]) -> str:
    """A Markdown table of medians with the range of the rounds."""
    lines = [
        "| shape | sweep | one after the other, s | batches at once | one pass, s | faster "
        "| memory, of one run's | memory, of all side by side |",
        "|---|---|--:|--:|--:|--:|--:|--:|",
    ]
    for row in rows:
        for mode in row["ways"]:
            lines.append(
                f"| {row['shape']} | {row['sweep']} | {format_range(row['apart'], 1)} | {mode['at_once']} "
                f"| {format_range(mode['seconds'], 1)} | {format_range(mode['faster'], 2, 'x')} "
                f"| {mode['memory_of_one_run']:.2f}x | {mode['memory_of_runs_side_by_side']:.2f}x |"
            )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
