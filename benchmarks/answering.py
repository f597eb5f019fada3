"""Evaluation throughput on real questions: Normtune beside transformers' `generate()` for each question.

    python benchmarks/answering.py --shape miss --data slake --root DIR --out FILE.json

The peer answers in batches, each question with its own copy of its image. Random weights hardly ever end an
answer, so that both write as many tokens. All runs are interleaved; pixels and tokens come from memory.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import torch
from record import record
from shapes import SHAPES
from throughput import sample

from normtune.catalog import open_dataset
from normtune.data.records import Dataset
from normtune.evaluate import answer_all


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, required=True)
    parser.add_argument("--data", choices=("slake", "vqa-rad"), required=True)
    parser.add_argument("--root", type=Path, required=True)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--pairs", type=int, default=64, help="questions in all")
    parser.add_argument("--batch", type=int, default=32, help="questions at once")
    parser.add_argument("--tokens", type=int, default=8, help="tokens of each answer")
    parser.add_argument("--beams", type=int, nargs="+", default=[1, 3])
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    shape = SHAPES[options.shape]
    dataset = open_dataset(options.data, options.root)
    examples = sample(dataset.split("train"), options.pairs)
    shape.learn_words([f"{e.question} {e.answer}" for e in dataset.examples])
    family = shape.family()
    family.model.eval()
    generate, batches = shape.generator(dataset, examples, options.batch)
    remembered = Dataset(dataset.name, examples, shape.remember(dataset, examples))
    speeds: dict[tuple[str, int], list[float]] = {}
    for _ in range(options.rounds):
        for beams in options.beams:
            began = time.perf_counter()
            answer_all(
                family,
                remembered,
                examples,
                batch_pairs=options.batch,
                beams=beams,
                max_new_tokens=options.tokens,
            )
            ended = time.perf_counter()
            speeds.setdefault(("normtune", beams), []).append(len(examples) / (ended - began))
            began = time.perf_counter()
            with torch.inference_mode():
                for batch in batches:
                    generate(batch, beams, options.tokens)
            ended = time.perf_counter()
            speeds.setdefault(("generate()", beams), []).append(len(examples) / (ended - began))
    rows = []
    for beams in options.beams:
        ours, theirs = (statistics.median(speeds[name, beams]) for name in ("normtune", "generate()"))
        print(
            f"{beams} beams: normtune {ours:.1f}, generate() {theirs:.1f} questions/s: {ours / theirs:.1f}x"
        )
        rows.append({"beams": beams, "normtune": ours, "generate": theirs, "ratio": ours / theirs})
    if options.out:
        record(
            options.out,
            "answering",
            rows,
            shape=shape.describe(),
            data=options.data,
            questions=len(examples),
            batch=options.batch,
            tokens=options.tokens,
        )


if __name__ == "__main__":
    main()
