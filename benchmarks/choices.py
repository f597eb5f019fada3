"""Options scored per second: Normtune, which runs image and question once, compared with a forward for each option.

    python benchmarks/choices.py --out FILE.json

Questions and options are random words, of which the counts are those of two datasets; see `SETS`. Both sides have the
same random weights of LLaVA's shape and compute the log-likelihood of the text of each option, as lm-eval's `acc` does.
Transformers computes one sequence for each option, each with its own copy of the image: one by one, as lm-eval does for
models with images, and in padded batches. Before anything is timed, all likelihoods are compared. The runs of all sides
are interleaved; pixels and tokens are read from memory.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from record import record
from shape_llava import IGNORED, SIZE, LlavaShape, Row
from torch import Tensor
from workload import Workload, format_range, median_and_range, ratio

from normtune.data.examples import Example, Examples
from normtune.data.groups import Segment
from normtune.data.records import Dataset
from normtune.inference.predict import candidate_log_probs
from normtune.runtime.text_table import markdown_table

OURS, ONE, BATCHES = "normtune", "one by one", "batches"
OPTIONS = 4
# Questions of an image, words of a question and of an option: PMC-VQA (Zhang et al. 2023: 227k questions about 149k
# images) and ReXVQA (Pal et al. 2025: 696k questions about 160k studies of chest X-rays), from their descriptions.
SETS = {"pmc-vqa": (1, 12, 4), "rexvqa": (4, 14, 6)}
ROUNDING = 1e-5  # of the likelihoods of both sides, relative to the largest


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--questions", type=int, default=16, help="questions of each set (default %(default)s)")
    parser.add_argument("--batch", type=int, default=32, help="options per batch (default %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="how often everything is measured (default %(default)s)")
    parser.add_argument("--pixels", type=int, default=SIZE, help="side of an image (default %(default)s)")
    parser.add_argument("--out", type=Path, help="JSON file; the table is written next to it as .md")
    options = parser.parse_args()
    results = [measure(name, options) for name in SETS]
    print("\n" + table(results))
    if options.out:
        record(options.out, "choices", results, batch=options.batch, options=OPTIONS)
        options.out.with_suffix(".md").write_text(table(results), encoding="utf-8")


def measure(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Compare and time all sides on one set."""
    per_image = SETS[name][0]
    dataset = made_dataset(name, max(1, options.questions // per_image), options.pixels)
    shape = LlavaShape(options.pixels)
    shape.learn_words([text for e in dataset.examples for text in (e.question, *e.options)])
    torch.manual_seed(0)
    family, peer = shape.build_pair()
    examples = list(dataset.examples)
    dataset = Workload(shape, name, dataset, examples).cache_images(family)
    segments = {e.id: [without_end(family.tokenize_example(e, text)) for text in e.options] for e in examples}
    rows: list[Row] = []
    for example in examples:
        pixels = family.preprocess_image(dataset.open_image(example.images[0]))
        for text in example.options:
            question = replace(example, question=family.choices.question(example), answer=text, kind="open", options=())
            rows.append(shape.build_row(family, question, pixels))
    batches = {
        ONE: [shape.collate([row]) for row in rows],
        BATCHES: [shape.collate(rows[i : i + options.batch]) for i in range(0, len(rows), options.batch)],
    }
    sides: dict[str, Callable[[], list[float]]] = {
        OURS: lambda: [
            value
            for _, values in candidate_log_probs(
                family, dataset, examples, lambda e: segments[e.id], OPTIONS, batch_pairs=options.batch
            )
            for value in values
        ],
        ONE: lambda: stock_likelihoods(peer, batches[ONE]),
        BATCHES: lambda: stock_likelihoods(peer, batches[BATCHES]),
    }
    reference = np.array(sides[ONE]())
    for side in (OURS, BATCHES):
        difference = float(np.abs(np.array(sides[side]()) - reference).max() / np.abs(reference).max())
        print(f"{name}: {side} and {ONE} differ by at most {difference:.1e}, relative to the largest", flush=True)
        if difference > ROUNDING:
            raise SystemExit(f"{side} does not compute the likelihoods of {ONE}.")
    speeds: dict[str, list[float]] = {side: [] for side in sides}
    for round_ in range(options.rounds):
        for side, run in sides.items():
            start = time.perf_counter()
            count = len(run())
            speeds[side].append(count / (time.perf_counter() - start))
            print(f"round {round_ + 1}  {name:<8} {side:<10} {speeds[side][-1]:8.2f} options/s", flush=True)
    return {
        "set": name,
        "shape": shape.describe(),
        "questions": len(examples),
        "questions_per_image": per_image,
        **{side: median_and_range(values) for side, values in speeds.items()},
        "ratio": ratio(speeds[OURS], speeds[ONE]),
        "ratio_batches": ratio(speeds[OURS], speeds[BATCHES]),
        "rounds": speeds,
    }


def made_dataset(name: str, images: int, pixels: int) -> Dataset:
    """Choices of random words about noise, with the counts of a dataset."""
    drawn = random.Random(name)
    per_image, of_question, of_option = SETS[name]

    def text(words: int) -> str:
        return " ".join("".join(drawn.choices("abcdefghilmnoprstuv", k=drawn.randint(3, 9))) for _ in range(words))

    examples = []
    for image in range(images):
        for number in range(per_image):
            options = tuple(text(max(1, of_option + drawn.randint(-2, 2))) for _ in range(OPTIONS))
            question, answer = f"{text(of_question)}?", drawn.choice(options)
            examples.append(
                Example(f"{image}-{number}", (str(image),), question, answer, "choice", "train", options=options)
            )
    noise = np.random.default_rng(0).integers(0, 256, (images, pixels, pixels, 3), dtype=np.uint8)
    return Dataset(name, Examples(examples), lambda key: Image.fromarray(noise[int(key)]))


def without_end(segment: Segment) -> Segment:
    """A segment without the end token of its answer."""
    return replace(segment, answer=segment.answer[:-1])


@torch.inference_mode()
def stock_likelihoods(model: Any, batches: list[dict[str, Tensor]]) -> list[float]:
    """The summed log-probabilities of the labels of each row, without the last one, the end token."""
    sums: list[float] = []
    for batch in batches:
        labels = batch["labels"][:, 1:]
        inputs = {key: value for key, value in batch.items() if key != "labels"}
        logits = model(**inputs).logits[:, :-1].float()
        is_label = labels != IGNORED
        is_label &= is_label.flip(1).cumsum(1).flip(1) > 1  # without the last one of each row
        values = logits.log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0]
        sums += (values * is_label).sum(1).tolist()
    return sums


def table(rows: list[dict[str, Any]]) -> str:
    """A Markdown table of medians with the lowest and highest round."""
    lines = [
        [
            row["set"],
            str(row["questions_per_image"]),
            *(format_range(row[side], 1) for side in (OURS, ONE, BATCHES)),
            format_range(row["ratio"], 1, "x"),
            format_range(row["ratio_batches"], 1, "x"),
        ]
        for row in rows
    ]
    head = ["questions like those of", "questions an image", "normtune, options/s", ONE, BATCHES]
    return "\n".join(markdown_table([*head, "faster than one by one", "than batches"], lines, "lr")) + "\n"


if __name__ == "__main__":
    main()
