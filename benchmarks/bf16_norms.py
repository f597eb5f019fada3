"""Do norms learn on a bf16 base? Normtune's LN tuning beside PEFT's on the same batches, over learning rates.

    python benchmarks/bf16_norms.py --out benchmarks/bf16_norms.json

Both train the same norms of the same bf16 base with AdamW for the same steps. PEFT keeps the norms in the
base's dtype, in which a value near 1 cannot take a small step; Normtune holds them in fp32.
"""

from __future__ import annotations

import argparse
import statistics
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from peft import LNTuningConfig, get_peft_model
from record import record
from torch import Tensor, nn

from normtune.data.batches import EpochBatches
from normtune.data.registry import open_dataset
from normtune.methods.adapt import adapt
from normtune.models.family import Family
from normtune.models.image_cache import ImageCache
from normtune.models.loading import load
from normtune.models.parts import norms
from normtune.models.types import Batch
from normtune.training.collator import Collator


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--model", default="nano")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--pairs", type=int, default=8, help="question-answer pairs a step")
    parser.add_argument("--rates", type=float, nargs="+", default=[1e-4, 1e-3])
    options = parser.parse_args()
    rows = []
    for rate in options.rates:
        for name, train in (("normtune ln", normtune_norms), ("peft LN_TUNING", peft_norms)):
            torch.manual_seed(0)
            family = load(options.model, dtype="bfloat16")
            given = batches(family, options.pairs, options.steps)
            row = {"method": name, "lr": rate, **run(train, rate, family, given)}
            rows.append(row)
            print(
                f"{name:<15} lr {rate:.0e}: {row['moved']:,} of {row['values']:,} values moved "
                f"({100 * row['moved'] / row['values']:.1f}%), "
                f"{row['gains_moved']:,} of {row['gains']:,} gains, "
                f"loss {row['first_loss']:.3f} -> {row['last_loss']:.3f}"
            )
    if options.out:
        record(options.out, "bf16_norms", rows, model=options.model, steps=options.steps, pairs=options.pairs)


def normtune_norms(family: Family) -> dict[str, nn.Parameter]:
    """Normtune's: fp32 gains and biases in the places of the base's norms."""
    return adapt(family.model, "ln").trained


def peft_norms(family: Family) -> dict[str, nn.Parameter]:
    """PEFT's, on exactly the same norms."""
    names = list(norms(family.model))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT warns of every kind of norm that it is told to train
        # in place: the family's model holds PEFT's norms now
        tuned = get_peft_model(family.model, LNTuningConfig(target_modules=names))
    return {name: p for name, p in tuned.named_parameters() if p.requires_grad}


def run(train: Any, rate: float, family: Family, given: Iterable[Batch]) -> dict[str, Any]:
    """Train a step a batch; how many values moved, and the mean loss of the first and the last 20 steps."""
    trained = train(family)
    before = {name: parameter.detach().clone() for name, parameter in trained.items()}
    optimizer = torch.optim.AdamW(list(trained.values()), lr=rate, weight_decay=0.0)
    losses = []
    for batch in given:
        total, tokens = family.loss(batch)
        loss = total / tokens
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return {
        "dtype": str(next(iter(trained.values())).dtype),
        "values": sum(parameter.numel() for parameter in trained.values()),
        "moved": sum(moved(before[name], parameter) for name, parameter in trained.items()),
        "gains": sum(one.numel() for name, one in trained.items() if is_gain(name)),
        "gains_moved": sum(moved(before[name], one) for name, one in trained.items() if is_gain(name)),
        "first_loss": statistics.mean(losses[:20]),
        "last_loss": statistics.mean(losses[-20:]),
    }


def is_gain(name: str) -> bool:
    """Whether it is a norm's gain, near 1, and not its bias, near 0."""
    return name.endswith("weight")


def moved(before: Tensor, after: Tensor) -> int:
    """How many values differ."""
    return int((before != after).sum())


def batches(family: Family, pairs: int, steps: int) -> Iterator[Batch]:
    """The same batches of hospital B for every call."""
    data = open_dataset("phantom-b:200")
    sampler = EpochBatches(data.split("train"), pairs, None, seed=0)
    collate = Collator(family, ImageCache(family, data))
    done = 0
    for epoch in range(steps):
        sampler.set_epoch(epoch)
        for groups in sampler:
            if done == steps:
                return
            yield collate(groups)
            done += 1


if __name__ == "__main__":
    main()
