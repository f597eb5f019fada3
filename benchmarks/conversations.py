"""Training on conversations: turns that share their history, compared with separate turns.

    python benchmarks/conversations.py --data slake --root DIR --out benchmarks/conversations.json

The questions of an image become conversations of so many turns; a step has all conversations of one image. Turn k
is trained with the k - 1 turns before it, once with the image and the history computed once for all of them, and
once with every turn as a row of its own, by Normtune and by PEFT's LN tuning in the Hugging Face Trainer. Model,
pixels, tokens and pairs per step are the same; all methods are interleaved, as in `throughput`, and the first step
of every run is not counted.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from record import record
from shapes import SHAPES
from throughput import TimedRun, time_normtune, time_peft
from workload import DATA, Workload, format_range, median_and_range, ratio

from normtune.data.groups import group_by_image
from normtune.data.records import Example
from normtune.data.registry import open_dataset
from normtune.runtime.text_table import markdown_table

REFERENCE = "normtune ln, shared history"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", choices=DATA, required=True)
    parser.add_argument("--root", type=Path, required=True, help="the dataset's folder")
    parser.add_argument("--out", type=Path, help="JSON file; the table is written next to it as .md")
    parser.add_argument("--turns", type=int, nargs="+", default=[1, 4, 8], help="turns of a conversation")
    parser.add_argument(
        "--pairs", type=int, default=8, help="turns of an image, and so of a step (default %(default)s)"
    )
    parser.add_argument("--rounds", type=int, default=3, help="how often everything is measured (default %(default)s)")
    options = parser.parse_args()
    options.steps = 1  # of the separate turns in one round
    dataset, shape = open_dataset(options.data, options.root), SHAPES["llava"]
    shape.learn_words([f"{example.question} {example.answer}" for example in dataset.examples])
    images = [group for group in group_by_image(dataset.split("train")) if len(group) >= options.pairs][:4]
    rows = []
    for turns in options.turns:
        examples = [e for group in images for e in conversations(group[: options.pairs], turns)]
        rows += measure(Workload(shape, options.data, dataset, examples), turns, options)
    print("\n" + table(rows))
    if options.out:
        about = {"shape": shape.describe(), "data": options.data, "pairs_a_step": options.pairs}
        record(options.out, "conversations", rows, **about)
        options.out.with_suffix(".md").write_text(table(rows), encoding="utf-8")


def conversations(questions: Sequence[Example], turns: int) -> list[Example]:
    """Make conversations of `turns` turns from the questions of an image: each one sees the turns before it."""
    made: list[Example] = []
    for index, example in enumerate(questions):
        last = made[-1] if index % turns else None
        history = (*last.history, (last.question, last.answer)) if last else ()
        made.append(replace(example, history=history))
    return made


def measure(workload: Workload, turns: int, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Time all methods in interleaved rounds; one row for each."""
    methods: dict[str, Callable[[], TimedRun]] = {
        REFERENCE: lambda: time_normtune(workload, "ln", True, options),
        "normtune ln, separate turns": lambda: time_normtune(workload, "ln", False, options),
        "PEFT LN_TUNING, separate turns": lambda: time_peft(workload, "LN_TUNING", options),
    }
    speeds: dict[str, list[float]] = {name: [] for name in methods}
    for round_ in range(options.rounds):
        for name, run in methods.items():
            torch.manual_seed(0)
            timed_run = run()
            speeds[name].append(timed_run.pairs / timed_run.seconds)
            print(f"{turns} turns, round {round_ + 1}  {name:<30} {speeds[name][-1]:7.2f} pairs/s", flush=True)
    return [
        {
            "turns": turns,
            "method": name,
            "pairs_per_second": median_and_range(values),
            "faster": ratio(speeds[REFERENCE], values),
            "rounds": values,
        }
        for name, values in speeds.items()
    ]


def table(rows: Sequence[dict[str, Any]]) -> str:
    """A Markdown table of medians with the range of the rounds."""
    lines = [
        [
            str(row["turns"]),
            row["method"],
            format_range(row["pairs_per_second"], 2),
            format_range(row["faster"], 1, "x"),
        ]
        for row in rows
    ]
    return "\n".join(markdown_table(["turns", "method", "pairs/s", "shared history is faster"], lines, "rlrr")) + "\n"


if __name__ == "__main__":
    main()
