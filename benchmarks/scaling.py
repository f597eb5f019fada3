"""Seconds of a training step by questions per image and by image tokens, compared with its operations.

    python benchmarks/scaling.py --slake DIR --out benchmarks/scaling.json

LN tuning of LLaVA's shape at a small width: one image with several real SLAKE questions. Normtune groups
them; PEFT's LN_TUNING, with transformers' own loss, takes them as separate rows, each with its own copy of
the image. A step is a forward pass, a backward pass and an update by AdamW. All points of both methods are
interleaved in one run, and medians are reported. The curves of the plot are numbers of floating-point
operations, scaled to the measured time of the separate rows at one point.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from record import record
from shape_llava import PATCH, LlavaShape
from torch import Tensor, nn
from workload import median_and_range

from normtune.data.groups import Group
from normtune.data.records import Dataset, Example
from normtune.data.registry import open_dataset
from normtune.methods.adapt import adapt
from normtune.runtime.files import atomic_write
from normtune.runtime.text_table import markdown_table
from normtune.training.saved_activations import save_fewer_activations

QUESTIONS, IMAGE_TOKENS = (1, 2, 4, 8, 16, 32), (64, 144, 256, 576, 1024)
FIXED_TOKENS, FIXED_QUESTIONS = 576, 11  # one is fixed while the other varies; curves are scaled here
GROUPED, SEPARATE = "normtune, grouped", "PEFT LN_TUNING, separate rows"


@dataclass(frozen=True)
class Point:
    """One image with this number of tokens and of questions."""

    questions: int
    image_tokens: int


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--slake", type=Path, required=True, help="SLAKE's folder, for its questions")
    parser.add_argument("--out", type=Path, help="JSON file; plot and table are written next to it")
    parser.add_argument("--questions", type=int, nargs="+", default=QUESTIONS)
    parser.add_argument("--image-tokens", type=int, nargs="+", default=IMAGE_TOKENS)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    with ExitStack() as contexts:
        rows, about = measure(options, contexts)
    print("\n" + table(rows))
    if options.out:
        plot(rows, options.out.with_suffix(".png"))
        options.out.with_suffix(".md").write_text(table(rows), encoding="utf-8")
        record(options.out, "scaling", rows, **about)


def measure(options: argparse.Namespace, contexts: ExitStack) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """(one row per point and method, the fields of the record that all rows share)."""
    dataset = open_dataset("slake", options.slake)
    points = dict.fromkeys(
        [Point(count, FIXED_TOKENS) for count in options.questions]
        + [Point(FIXED_QUESTIONS, tokens) for tokens in options.image_tokens]
        + [Point(FIXED_QUESTIONS, FIXED_TOKENS)]
    )
    examples = sample_questions(dataset, max(point.questions for point in points))
    steps: dict[tuple[Point, str], Callable[[], None]] = {}
    flops: dict[tuple[Point, str], float] = {}
    for tokens in dict.fromkeys(point.image_tokens for point in points):
        shape = LlavaShape(size=PATCH * round(tokens**0.5))
        assert shape.image_tokens == tokens, f"{tokens} image tokens are no square"
        shape.learn_words([f"{e.question} {e.answer}" for e in dataset.examples])
        for point in (point for point in points if point.image_tokens == tokens):
            prepare_point(point, shape, dataset, examples[: point.questions], steps, flops, contexts)
    seconds: dict[tuple[Point, str], list[float]] = {key: [] for key in steps}
    for round_ in range(-1, options.rounds):  # round -1 is not counted
        for key, step in steps.items():
            start = time.perf_counter()
            step()
            if round_ >= 0:
                seconds[key].append(time.perf_counter() - start)
        print(f"round {round_ + 1} of {options.rounds}", flush=True)
    anchor = (Point(FIXED_QUESTIONS, FIXED_TOKENS), SEPARATE)
    scale = median_and_range(seconds[anchor])["median"] / flops[anchor]
    rows = [
        {
            "questions": point.questions,
            "image_tokens": point.image_tokens,
            "method": method,
            "seconds": median_and_range(seconds[point, method]),
            "rounds": seconds[point, method],
            "flops": flops[point, method],
            "predicted": scale * flops[point, method],
        }
        for point, method in steps
    ]
    scaled_at = {"questions": FIXED_QUESTIONS, "image_tokens": FIXED_TOKENS, "method": SEPARATE}
    return rows, {"shape": shape.describe(), "scaled_at": scaled_at, "flops_a_second": 1 / scale}


def sample_questions(dataset: Dataset, count: int) -> list[Example]:
    """`count` random questions of the training split; a smaller `count` returns a prefix of a larger one."""
    examples = list(dataset.split("train"))
    random.Random(0).shuffle(examples)
    return examples[:count]


def prepare_point(
    point: Point,
    shape: LlavaShape,
    dataset: Dataset,
    examples: Sequence[Example],
    steps: dict[tuple[Point, str], Callable[[], None]],
    flops: dict[tuple[Point, str], float],
    contexts: ExitStack,
) -> None:
    """Add both methods at one point: to `steps` the function that runs a step, to `flops` its operations."""
    torch.manual_seed(0)
    family, peer = shape.build_family(), shape.build_peft("LN_TUNING")
    pixels = family.preprocess_image(dataset.open_image(examples[0].images[0]))
    segments = [family.tokenize(example.id, example.question, example.answer) for example in examples]
    batch = family.collate([Group(examples[0].images, tuple(segments))], [[pixels]])
    inputs = shape.collate([shape.build_row(family, example, pixels) for example in examples])
    tuned = adapt(family.model, "ln")
    contexts.enter_context(save_fewer_activations(family.model))  # as `normtune.training.train.fit` does

    def loss() -> Tensor:
        total, tokens = family.loss(batch)
        return total / tokens

    steps[point, GROUPED] = build_step(loss, list(tuned.trained.values()))
    steps[point, SEPARATE] = build_step(lambda: peer(**inputs).loss, [p for p in peer.parameters() if p.requires_grad])
    answer_tokens = len(batch["labels"])
    flops[point, GROUPED] = count_flops(shape, [batch["input_ids"].shape[1]], images=1, logits=answer_tokens)
    rows, length = inputs["input_ids"].shape
    flops[point, SEPARATE] = count_flops(shape, [length] * rows, images=rows, logits=rows * length)


def build_step(loss: Callable[[], Tensor], parameters: Sequence[nn.Parameter]) -> Callable[[], None]:
    """A function that runs one training step with AdamW."""
    optimizer = torch.optim.AdamW(parameters, lr=1e-4)

    def step() -> None:
        loss().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def count_flops(shape: LlavaShape, rows: Sequence[int], *, images: int, logits: int) -> float:
    """The floating-point operations of one LN-tuning step, computed from the lengths of its rows.

    A linear layer with m x n frozen weights takes 2mn operations per token in the forward pass and 2mn in the
    backward pass. Attention with a dense mask computes all pairs of positions of a row, masked or not: per
    pair, two products of 2d operations in the forward pass and five in the backward pass, which recomputes
    the probabilities (Dao 2022, arXiv 2205.14135). Norms, activations and softmax are small and not counted.

    Args:
        rows: the padded length of each row of the language model, image tokens included.
        images: the number of images in the batch, copies included.
        logits: the number of positions for which the head computes logits.
    """
    patches = shape.image_tokens + 1  # with the class token

    def layer(dims: dict[str, Any], lengths: Sequence[int], matrices: int) -> float:
        width, inner = dims["hidden_size"], dims["intermediate_size"]
        weights = 4 * width**2 + matrices * width * inner
        linear = 4 * weights * sum(lengths)
        attention = 7 * 2 * width * sum(length**2 for length in lengths)
        return dims["num_hidden_layers"] * (linear + attention)

    vision, text = shape.vision, shape.text
    tower = layer(vision, [patches] * images, matrices=2)
    patch = 2 * 3 * PATCH**2 * vision["hidden_size"] * shape.image_tokens * images  # no gradient to pixels
    projector = vision["hidden_size"] * text["hidden_size"] + text["hidden_size"] ** 2
    connector = 4 * projector * shape.image_tokens * images
    head = 4 * text["hidden_size"] * shape.describe()["vocabulary"] * logits
    return tower + patch + connector + layer(text, rows, matrices=3) + head


def table(rows: Sequence[dict[str, Any]]) -> str:
    """A Markdown table: seconds of both methods at each point, and the ratios of times and operations."""
    lines = []
    row_of = {(row["questions"], row["image_tokens"], row["method"]): row for row in rows}
    for questions, tokens in dict.fromkeys((row["questions"], row["image_tokens"]) for row in rows):
        grouped, separate = (row_of[questions, tokens, method] for method in (GROUPED, SEPARATE))
        grouped_seconds, separate_seconds = grouped["seconds"]["median"], separate["seconds"]["median"]
        cells = [str(questions), str(tokens), f"{grouped_seconds:.3f}", f"{separate_seconds:.3f}"]
        ratios = separate_seconds / grouped_seconds, separate["flops"] / grouped["flops"]
        lines.append([*cells, *(f"{ratio:.1f}x" for ratio in ratios)])
    header = ["questions", "image tokens", "grouped, s", "separate, s", "faster", "by arithmetic"]
    return "\n".join(markdown_table(header, lines, "r")) + "\n"


def plot(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Write the plot as PNG: measured medians with their ranges as points, the operations as curves."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, panels = plt.subplots(1, 2, figsize=(9.6, 4.2), dpi=150, sharey=True, facecolor="white")
    sides = (
        ("questions", "image_tokens", FIXED_TOKENS, f"questions of one image ({FIXED_TOKENS} image tokens)"),
        ("image_tokens", "questions", FIXED_QUESTIONS, f"image tokens ({FIXED_QUESTIONS} questions an image)"),
    )
    for axes, (varied, fixed, fixed_value, label) in zip(panels, sides, strict=True):
        for method, colour, marker in ((GROUPED, "tab:blue", "o"), (SEPARATE, "tab:orange", "s")):
            points = sorted(
                (row for row in rows if row["method"] == method and row[fixed] == fixed_value),
                key=lambda row: row[varied],
            )
            x = [row[varied] for row in points]
            axes.plot(x, [row["predicted"] for row in points], color=colour, alpha=0.6, linewidth=1.2)
            medians = [row["seconds"]["median"] for row in points]
            lower = [row["seconds"]["median"] - row["seconds"]["low"] for row in points]
            upper = [row["seconds"]["high"] - row["seconds"]["median"] for row in points]
            axes.errorbar(x, medians, yerr=[lower, upper], fmt=marker, color=colour, capsize=3, label=method)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(sorted({row[varied] for row in rows if row[fixed] == fixed_value}))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.minorticks_off()
        axes.set_xlabel(label)
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("seconds a training step")
    panels[0].legend(title="points: measured; lines: arithmetic", fontsize=8, title_fontsize=8)
    figure.tight_layout()
    with atomic_write(path) as temporary:
        figure.savefig(temporary, format="png")
    plt.close(figure)


if __name__ == "__main__":
    main()
