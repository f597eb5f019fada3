"""Seconds a training step against questions per image and image tokens, the arithmetic's curve beside it.

    python benchmarks/scaling.py --slake DIR --out benchmarks/scaling.json

LN tuning of LLaVA's shape at a small width: one image with several real SLAKE questions, grouped by Normtune,
and as separate rows, each with its own copy of the image, under PEFT's LN_TUNING with transformers' own loss.
A step is the forward and backward pass and AdamW's step. All points of both are interleaved in one run;
medians. The curves count floating-point operations and are scaled to the measured time of the separate rows
at one point.
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
from workload import spread

from normtune.data.groups import Group
from normtune.data.records import Dataset, Example
from normtune.data.registry import open_dataset
from normtune.methods.adapt import adapt
from normtune.runtime.files import atomic_write
from normtune.training.saved_activations import save_fewer_activations

QUESTIONS, IMAGE_TOKENS = (1, 2, 4, 8, 16, 32), (64, 144, 256, 576, 1024)
AT_TOKENS, AT_QUESTIONS = 576, 11  # where the one is held while the other changes; the curves meet there
GROUPED, SEPARATE = "normtune, grouped", "PEFT LN_TUNING, separate rows"


@dataclass(frozen=True)
class Point:
    """One image of so many tokens and so many questions."""

    questions: int
    image_tokens: int


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--slake", type=Path, required=True, help="SLAKE's folder, for its texts")
    parser.add_argument("--out", type=Path, help="JSON file; the plot goes beside it as PNG")
    parser.add_argument("--questions", type=int, nargs="+", default=QUESTIONS)
    parser.add_argument("--image-tokens", type=int, nargs="+", default=IMAGE_TOKENS)
    parser.add_argument("--rounds", type=int, default=5)
    chosen = parser.parse_args()
    with ExitStack() as held:
        rows, about = measured(chosen, held)
    print("\n" + table(rows))
    if chosen.out:
        plot(rows, chosen.out.with_suffix(".png"))
        chosen.out.with_suffix(".md").write_text(table(rows), encoding="utf-8")
        record(chosen.out, "scaling", rows, **about)


def measured(chosen: argparse.Namespace, held: ExitStack) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """One row a point and method, and what there is to say of all."""
    dataset = open_dataset("slake", chosen.slake)
    points = dict.fromkeys(
        [Point(count, AT_TOKENS) for count in chosen.questions]
        + [Point(AT_QUESTIONS, tokens) for tokens in chosen.image_tokens]
        + [Point(AT_QUESTIONS, AT_TOKENS)]
    )
    examples = texts(dataset, max(point.questions for point in points))
    steps: dict[tuple[Point, str], Callable[[], None]] = {}
    work: dict[tuple[Point, str], float] = {}
    for tokens in dict.fromkeys(point.image_tokens for point in points):
        shape = LlavaShape(size=PATCH * round(tokens**0.5))
        assert shape.image_tokens == tokens, f"{tokens} image tokens are no square"
        shape.learn_words([f"{e.question} {e.answer}" for e in dataset.examples])
        for point in (point for point in points if point.image_tokens == tokens):
            prepare(point, shape, dataset, examples[: point.questions], steps, work, held)
    seconds: dict[tuple[Point, str], list[float]] = {key: [] for key in steps}
    for round_ in range(-1, chosen.rounds):  # the first is not counted
        for key, step in steps.items():
            began = time.perf_counter()
            step()
            if round_ >= 0:
                seconds[key].append(time.perf_counter() - began)
        print(f"round {round_ + 1} of {chosen.rounds}", flush=True)
    anchor = (Point(AT_QUESTIONS, AT_TOKENS), SEPARATE)
    scale = spread(seconds[anchor])["median"] / work[anchor]
    rows = [
        {
            "questions": point.questions,
            "image_tokens": point.image_tokens,
            "method": method,
            "seconds": spread(seconds[point, method]),
            "rounds": seconds[point, method],
            "flops": work[point, method],
            "predicted": scale * work[point, method],
        }
        for point, method in steps
    ]
    at = {"questions": AT_QUESTIONS, "image_tokens": AT_TOKENS, "method": SEPARATE}
    return rows, {"shape": shape.describe(), "scaled_at": at, "flops_a_second": 1 / scale}


def texts(dataset: Dataset, count: int) -> list[Example]:
    """So many questions of the training split, the same in every run; smaller counts are its beginning."""
    found = list(dataset.split("train"))
    random.Random(0).shuffle(found)
    return found[:count]


def prepare(
    point: Point,
    shape: LlavaShape,
    dataset: Dataset,
    examples: Sequence[Example],
    steps: dict[tuple[Point, str], Callable[[], None]],
    work: dict[tuple[Point, str], float],
    held: ExitStack,
) -> None:
    """Both methods at one point: what runs a step, and its floating-point operations."""
    torch.manual_seed(0)
    family, peer = shape.family(), shape.tuned("LN_TUNING")
    pixels = family.preprocess_image(dataset.open_image(examples[0].images[0]))
    segments = [family.tokenize(example.id, example.question, example.answer) for example in examples]
    batch = family.collate([Group(examples[0].images, tuple(segments))], [[pixels]])
    inputs = shape.collate([shape.row(family, example, pixels) for example in examples])
    tuned = adapt(family.model, "ln")
    held.enter_context(save_fewer_activations(family.model))  # as `normtune.training.train.fit` does

    def loss() -> Tensor:
        total, tokens = family.loss(batch)
        return total / tokens

    steps[point, GROUPED] = stepper(loss, list(tuned.trained.values()))
    steps[point, SEPARATE] = stepper(
        lambda: peer(**inputs).loss, [p for p in peer.parameters() if p.requires_grad]
    )
    answers = len(batch["labels"])
    work[point, GROUPED] = flops(shape, [batch["input_ids"].shape[1]], images=1, logits=answers)
    rows, length = inputs["input_ids"].shape
    work[point, SEPARATE] = flops(shape, [length] * rows, images=rows, logits=rows * length)


def stepper(loss: Callable[[], Tensor], parameters: Sequence[nn.Parameter]) -> Callable[[], None]:
    optimizer = torch.optim.AdamW(parameters, lr=1e-4)

    def step() -> None:
        loss().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def flops(shape: LlavaShape, rows: Sequence[int], *, images: int, logits: int) -> float:
    """Floating-point operations of one LN-tuning step, from the lengths of its rows alone.

    A linear layer of m x n weights takes 2mn a token forwards and, its weights being frozen, 2mn backwards.
    Attention under a dense mask computes every pair of a row, seen or not: two products of 2d a pair
    forwards, five backwards (softmax's probabilities are made again; Dao 2022, arXiv 2205.14135). Norms,
    activations and softmax are left out, as small.

    Args:
        rows: the padded length of each row of the language model, image tokens included.
        images: how many images the vision tower sees.
        logits: how many rows the head computes.
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
    """Seconds of both at each point, and the ratio that is measured and counted."""
    lines = [
        "| questions | image tokens | grouped, s | separate, s | faster | by arithmetic |",
        "|--:|--:|--:|--:|--:|--:|",
    ]
    by = {(row["questions"], row["image_tokens"], row["method"]): row for row in rows}
    for questions, tokens in dict.fromkeys((row["questions"], row["image_tokens"]) for row in rows):
        one, other = (by[questions, tokens, method] for method in (GROUPED, SEPARATE))
        ours, theirs = one["seconds"]["median"], other["seconds"]["median"]
        lines.append(
            f"| {questions} | {tokens} | {ours:.3f} | {theirs:.3f} | {theirs / ours:.1f}x | "
            f"{other['flops'] / one['flops']:.1f}x |"
        )
    return "\n".join(lines) + "\n"


def plot(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Measured medians with their range as points, the arithmetic as curves; PNG on white."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, panels = plt.subplots(1, 2, figsize=(9.6, 4.2), dpi=150, sharey=True, facecolor="white")
    sides = (
        ("questions", "image_tokens", AT_TOKENS, f"questions of one image ({AT_TOKENS} image tokens)"),
        ("image_tokens", "questions", AT_QUESTIONS, f"image tokens ({AT_QUESTIONS} questions an image)"),
    )
    for axes, (along, held, at, label) in zip(panels, sides, strict=True):
        for method, colour, mark in ((GROUPED, "tab:blue", "o"), (SEPARATE, "tab:orange", "s")):
            own = sorted(
                (row for row in rows if row["method"] == method and row[held] == at),
                key=lambda row: row[along],
            )
            x = [row[along] for row in own]
            axes.plot(x, [row["predicted"] for row in own], color=colour, alpha=0.6, linewidth=1.2)
            middle = [row["seconds"]["median"] for row in own]
            below = [row["seconds"]["median"] - row["seconds"]["low"] for row in own]
            above = [row["seconds"]["high"] - row["seconds"]["median"] for row in own]
            axes.errorbar(x, middle, yerr=[below, above], fmt=mark, color=colour, capsize=3, label=method)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(sorted({row[along] for row in rows if row[held] == at}))
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
