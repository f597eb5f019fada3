"""Private training per second and its memory: Normtune, compared with the per-sample gradients of Opacus.

    python benchmarks/private.py --out FILE.json

All sides compute the same sum: the gradient of each image's mean loss, clipped, for the norms of nano on the questions
of a phantom. Before anything is timed, the gradients of all sides are compared.

together      as Normtune does on a GPU: questions share their image; a forward and two backward passes for all images
one by one    as Normtune does on a CPU: questions share their image; a forward and a backward pass for each image
opacus        GradSampleModule: each question is a row with its own copy of the image, and has a gradient of its own;
              those of an image are added up, since Opacus knows no unit of several rows
not private   one ordinary forward and backward pass of the batch, as a reference

The runs are interleaved, and timed by the CPU time of one thread, which other programs of the machine change little.
The memory of a step is the most bytes of its tensors that exist at a time, counted without allocators.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from record import record
from torch import Tensor, nn
from torch.nn import functional as F
from workload import format_range, median_and_range, ratio

from normtune.data.groups import Group, group_by_image
from normtune.data.registry import open_dataset
from normtune.methods.adapt import adapt
from normtune.models.answer_loss import answer_loss
from normtune.models.families.miss import NO_LABEL
from normtune.models.loading import load
from normtune.models.norm_kinds import norms
from normtune.runtime.text_table import markdown_table
from normtune.training.memory_plan.live_bytes import LiveTensorBytes
from normtune.training.unit_gradients import UnitGradients

CLIP = 1.0
SIDES = ("together", "one by one", "opacus", "not private")
ROUNDING = 1e-5  # of the gradients of an image, relative to their norm


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=8, help="images of a batch (default %(default)s)")
    parser.add_argument("--questions", type=int, nargs="+", default=[1, 4, 8], help="questions of an image")
    parser.add_argument("--rounds", type=int, default=5, help="how often everything is measured (default %(default)s)")
    parser.add_argument("--out", type=Path, help="JSON file; the table is written next to it as .md")
    options = parser.parse_args()
    torch.set_num_threads(1)
    results = [measure(options.images, questions, options.rounds) for questions in options.questions]
    print("\n" + table(results))
    if options.out:
        record(options.out, "private", results, model="nano", recipe="ln", clip=CLIP)
        options.out.with_suffix(".md").write_text(table(results), encoding="utf-8")


def measure(images: int, questions: int, rounds: int) -> dict[str, Any]:
    """Compare, time and weigh all sides on one batch."""
    steps = {side: make_step(side, images, questions) for side in SIDES}
    sums = {side: step() for side, step in steps.items() if side != "not private"}
    for side, value in sums.items():
        error = float((value - sums["one by one"]).norm() / sums["one by one"].norm())
        assert error < ROUNDING, f"{side} differs by {error:.1e}"
    seconds: dict[str, list[float]] = {side: [] for side in SIDES}
    for _ in range(rounds):
        for side, step in steps.items():
            started = time.process_time()
            step()
            seconds[side].append(time.process_time() - started)
    pairs = images * questions
    peaks = {side: peak_bytes(step) for side, step in steps.items()}
    return {
        "images": images,
        "questions": questions,
        "pairs_per_second": {side: median_and_range([pairs / s for s in values]) for side, values in seconds.items()},
        "times_opacus": {side: ratio(seconds["opacus"], values) for side, values in seconds.items()},
        "peak_bytes": peaks,
    }


def peak_bytes(step: Callable[[], Tensor]) -> int:
    """The most bytes of tensors of a step that exist at a time."""
    with LiveTensorBytes() as counter:
        step()
    return counter.peak


def make_step(side: str, images: int, questions: int) -> Callable[[], Tensor]:
    """A function that returns the sum of the clipped gradients of a fixed batch, [trained values]."""
    torch.manual_seed(0)
    family = load("nano", dtype="float32", device="cpu")
    dataset = open_dataset(f"phantom-b:{4 * images}")
    large_enough = [g for g in group_by_image(dataset.train, questions) if len(g) == questions]
    first = list({g[0].images: g for g in large_enough}.values())[:images]
    assert len(first) == images, "too few images with so many questions"
    groups = [Group(g[0].images, tuple(family.tokenize(e.id, e.question, e.answer) for e in g)) for g in first]
    pixels = {g[0].images[0]: family.preprocess_image(dataset.open_image(g[0].images[0])) for g in first}
    tokens = torch.tensor([sum(len(segment.answer) for segment in group.segments) for group in groups])
    if side == "opacus":
        return opacus_step(family, groups, pixels, tokens)
    trained = adapt(family.model, "ln").trained
    gradients = UnitGradients(family.model, trained)
    family.model.eval()

    def losses_of(of_batch: list[Group]) -> tuple[Tensor, Tensor]:
        batch = family.collate(of_batch, [[pixels[group.images[0]]] for group in of_batch])
        states, labels, segments = family.answer_states(batch)
        losses = answer_loss(family.head, states, labels, vocabulary=family.vocabulary, reduction="none")
        units = torch.tensor([groups.index(group) for group in of_batch for _ in group.segments])[segments]
        return losses / tokens[units], units

    def together() -> Tensor:
        with gradients.watch():
            losses, units = losses_of(groups)
            return clipped_sum(gradients.of_many(losses, units, images))

    def separately() -> Tensor:
        return sum(clipped_sum(gradients.of_one(losses_of([group])[0])) for group in groups)  # type: ignore[return-value]

    def ordinary() -> Tensor:
        return gradients.of_one(losses_of(groups)[0])[0]

    return {"together": together, "one by one": separately, "not private": ordinary}[side]


class QuestionLoss(nn.Module):
    """The weighted loss of each question, [questions], from rows that share nothing."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, labels: Tensor, weights: Tensor, **inputs: Any) -> Tensor:
        logits = self.model(**inputs).logits  # [questions, answer length, vocabulary]
        losses = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none", ignore_index=NO_LABEL)
        return losses.view(labels.shape).sum(1) * weights


def opacus_step(family: Any, groups: list[Group], pixels: Any, tokens: Tensor) -> Callable[[], Tensor]:
    from opacus import GradSampleModule

    model = family.model.eval().requires_grad_(False)
    trained = [p for norm in norms(model).values() for p in (norm.weight, norm.bias)]
    trained = [parameter for parameter in model.parameters() if any(parameter is other for other in trained)]
    for parameter in trained:
        parameter.requires_grad_(True)
    for norm in norms(model).values():
        norm.train()  # its hooks do nothing in eval mode; the dropouts stay off
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = GradSampleModule(QuestionLoss(model), loss_reduction="sum", strict=False)
    # a group for each question, with the image once for each
    single = [Group(group.images, (segment,)) for group in groups for segment in group.segments]
    batch = family.collate(single, [[pixels[group.images[0]]] for group in single])
    batch["pixel_values"] = batch["pixel_values"][batch.pop("image_index")]
    units = torch.tensor([number for number, group in enumerate(groups) for _ in group.segments])
    weights = 1 / tokens[units]
    names = ("input_ids", "attention_mask", "decoder_input_ids", "pixel_values", "labels")
    inputs = {name: batch[name] for name in names}

    def step() -> Tensor:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the hooks: the inputs need no gradient
            wrapped(weights=weights, **inputs).sum().backward()
        rows = torch.cat([parameter.grad_sample.flatten(1) for parameter in trained], 1)  # [questions, values]
        of_units = torch.zeros(len(groups), rows.shape[1]).index_add_(0, units, rows)
        for parameter in trained:
            parameter.grad = parameter.grad_sample = None
        return clipped_sum(of_units)

    return step


def clipped_sum(gradients: Tensor) -> Tensor:
    factors = (CLIP / gradients.norm(dim=1)).clamp(max=1)
    return factors @ gradients


def table(results: list[dict[str, Any]]) -> str:
    rows = []
    for result in results:
        for side in SIDES:
            name = f"{result['images']} images, {result['questions']} questions each" if side == SIDES[0] else ""
            speed = format_range(result["pairs_per_second"][side], 0)
            times = format_range(result["times_opacus"][side], 2, "x")
            rows.append((name, side, speed, times, f"{result['peak_bytes'][side] / 2**20:.0f} MiB"))
    header = ("batch", "side", "pairs per CPU second", "times Opacus", "memory of a step")
    return "\n".join(markdown_table(header, rows, "llrrr")) + "\n"


if __name__ == "__main__":
    main()
