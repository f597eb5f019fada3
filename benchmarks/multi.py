"""Norm adapters trained in one pass over one base, beside as many runs one after the other.

    python benchmarks/multi.py --data slake --root DIR --out benchmarks/multi.json

MISS's and LLaVA's shapes at widths that two cores can run, random weights; LN tuning of the text parts. Two
sweeps: seeds, whose steps see different images, and learning rates of one seed, whose steps see the same.
One pass takes its adapters' batches one at a time or all at once. Time is that of the runs, the base being
loaded; rounds are interleaved. Memory is what one step makes at its peak (`normtune.training.memory_plan.live_bytes`) and the base's
weights: of the pass, of one run, and of all runs side by side.
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
from workload import ratio, sample, shown, spread

from normtune.adapters.multi.bank import AdapterBank, build_bank
from normtune.data.batches import EpochBatches
from normtune.data.records import Dataset, Example
from normtune.data.registry import open_dataset
from normtune.methods.adapt import adapt
from normtune.training.collator import build_collator
from normtune.training.config import TrainConfig
from normtune.training.joint import backward, train_all
from normtune.training.joint_run import AdapterRun
from normtune.training.memory_plan.live_bytes import LiveTensorBytes
from normtune.training.saved_activations import save_fewer_activations
from normtune.training.train import fit

TUNE = {"miss": "encoder=ln,decoder=ln", "llava": "language=ln"}
SWEEPS = ("seeds", "learning rates")
OF_ADAM = 4 * 4  # bytes of a trained value: itself, its gradient and two moments, fp32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, action="append", help="all by default")
    parser.add_argument("--data", default="phantom-b:40", help="slake, vqa-rad or phantoms")
    parser.add_argument("--root", type=Path, help="the data set's folder")
    parser.add_argument("--out", type=Path, help="JSON file; the table goes beside it")
    parser.add_argument("--adapters", type=int, default=8)
    parser.add_argument("--questions", type=int, default=160, help="about so many, in whole images")
    parser.add_argument("--pairs", type=int, default=24, help="question-answer pairs a step and adapter")
    parser.add_argument("--steps", type=int, default=4, help="of each adapter")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    dataset = open_dataset(options.data, options.root)
    examples = sample(dataset.split("train"), options.questions)
    images = {key: dataset.open_image(key) for example in examples for key in example.images}
    held = Dataset(dataset.name, examples, images.__getitem__)
    rows = []
    for name in options.shape or SHAPES:
        SHAPES[name].learn_words([f"{e.question} {e.answer}" for e in dataset.examples])
        for sweep in SWEEPS:
            rows.append(measured(SHAPES[name], sweep, held, examples, options))
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


def measured(
    shape: Shape, sweep: str, dataset: Dataset, examples: Sequence[Example], options: argparse.Namespace
) -> dict[str, Any]:
    """Seconds of both ways, round by round, and the bytes of a step."""
    ways = (1, options.adapters)  # adapters at once
    seconds: dict[str, list[float]] = {"apart": [], **{str(way): [] for way in ways}}
    with tempfile.TemporaryDirectory() as folder:
        configs = [config_of(shape, sweep, i, Path(folder), options) for i in range(options.adapters)]
        for round_ in range(options.rounds):
            seconds["apart"].append(sum(apart(shape, one, dataset, examples) for one in configs))
            for way in ways:
                seconds[str(way)].append(together(shape, configs, dataset, examples, way))
            told = ", ".join(f"{taken[-1]:.1f} s {way}" for way, taken in seconds.items())
            print(f"round {round_ + 1}  {shape.name} {sweep:<15} {told}", flush=True)
        base, one = step_bytes(shape, configs[:1], dataset, examples, 1)
        steps = [step_bytes(shape, configs, dataset, examples, way)[1] for way in ways]
    return {
        "shape": shape.name,
        "recipe": TUNE[shape.name],
        "sweep": sweep,
        "seconds": seconds,
        "apart": spread(seconds["apart"]),
        "ways": [
            {
                "at_once": way,
                "seconds": spread(seconds[str(way)]),
                "faster": ratio(seconds["apart"], seconds[str(way)]),
                "memory_of_one_run": (base + step) / (base + one),
                "memory_of_runs_side_by_side": (base + step) / (len(configs) * (base + one)),
            }
            for way, step in zip(ways, steps, strict=True)
        ],
        "base_bytes": base,
        "step_bytes": {"one_run": one, **dict(zip(map(str, ways), steps, strict=True))},
    }


def config_of(
    shape: Shape, sweep: str, number: int, folder: Path, options: argparse.Namespace
) -> TrainConfig:
    """The run of one adapter."""
    return TrainConfig(
        model=shape.name,
        data=options.data,
        tune=TUNE[shape.name],
        out=folder / str(number),
        batch=options.pairs,
        max_steps=options.steps,
        seed=number if sweep == "seeds" else 0,
        lr=1e-3 * 2**number if sweep != "seeds" else None,
        resume=False,
        save_every=10_000,
        device="cpu",
    )


def loaded(shape: Shape) -> Any:
    """The same base for all."""
    torch.manual_seed(0)
    return shape.family()


def apart(shape: Shape, config: TrainConfig, dataset: Dataset, examples: Sequence[Example]) -> float:
    """Seconds of one run by itself."""
    family = loaded(shape)
    tuned = adapt(family.model, config.tune)
    started = time.perf_counter()
    fit(config, family, tuned, dataset, examples)
    return time.perf_counter() - started


def together(
    shape: Shape,
    configs: Sequence[TrainConfig],
    dataset: Dataset,
    examples: Sequence[Example],
    at_once: int,
) -> float:
    """Seconds of the pass."""
    family = loaded(shape)
    tuned = adapt(family.model, configs[0].tune)
    started = time.perf_counter()
    mixed = build_bank(tuned, len(configs))
    train_all(family, mixed, lanes_of(family, mixed, configs, dataset, examples), configs[0], at_once)
    return time.perf_counter() - started


def lanes_of(
    family: Any,
    mixed: AdapterBank,
    configs: Sequence[TrainConfig],
    dataset: Dataset,
    examples: Sequence[Example],
) -> list[AdapterRun]:
    """One a config, with one collator."""
    collate = build_collator(configs[0], family, mixed.tuned, dataset, examples)
    return [
        AdapterRun(
            adapter,
            config,
            mixed,
            dataset,
            examples,
            collate,
            EpochBatches(examples, config.batch, config.cap, config.seed),
        )
        for adapter, config in enumerate(configs)
    ]


def step_bytes(
    shape: Shape,
    configs: Sequence[TrainConfig],
    dataset: Dataset,
    examples: Sequence[Example],
    at_once: int,
) -> tuple[int, int]:
    """Bytes of the base's weights, and those alive at the peak of a step, the adapters' among them."""
    family = loaded(shape)
    base = sum(parameter.numel() * parameter.element_size() for parameter in family.model.parameters())
    mixed = build_bank(adapt(family.model, configs[0].tune), len(configs))
    parts = [(lane, lane.next()) for lane in lanes_of(family, mixed, configs, dataset, examples)]
    for lane, groups in parts:
        lane.collate(groups)  # images are seen before
    with save_fewer_activations(family.model), LiveTensorBytes() as live:
        for first in range(0, len(parts), at_once):
            backward(family, mixed, parts[first : first + at_once])
    return base, live.peak + OF_ADAM * mixed.values.numel()


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Medians with the range of the rounds."""
    lines = [
        "| shape | sweep | one after the other, s | batches at once | one pass, s | faster "
        "| memory, of one run's | memory, of all side by side |",
        "|---|---|--:|--:|--:|--:|--:|--:|",
    ]
    for row in rows:
        for way in row["ways"]:
            lines.append(
                f"| {row['shape']} | {row['sweep']} | {shown(row['apart'], 1)} | {way['at_once']} "
                f"| {shown(way['seconds'], 1)} | {shown(way['faster'], 2, 'x')} "
                f"| {way['memory_of_one_run']:.2f}x | {way['memory_of_runs_side_by_side']:.2f}x |"
            )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
