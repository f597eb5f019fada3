"""Do norms learn on a bf16 base? LN tuning by Normtune and by PEFT on the same batches, at several rates.

    python benchmarks/bf16_norms.py --out benchmarks/bf16_norms.json

Both train the same norms of the same bf16 base with AdamW for the same number of steps. PEFT keeps the norms
in the dtype of the base. Near 1, neighbouring bf16 values differ by 2^-8 (under 1) or 2^-7 (over 1), so that
a much smaller update changes nothing. Normtune trains the norms in fp32.
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
from normtune.models.norm_kinds import norms
from normtune.models.types import Batch
from normtune.training.collator import Collator


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--model", default="nano")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--pairs", type=int, default=8, help="question-answer pairs per step")
    parser.add_argument("--rates", type=float, nargs="+", default=[1e-4, 1e-3])
    options = parser.parse_args()
    rows = []
    for rate in options.rates:
        for name, add_norms in (("normtune ln", add_normtune_norms), ("peft LN_TUNING", add_peft_norms)):
            torch.manual_seed(0)
            family = load(options.model, dtype="bfloat16")
            training_batches = make_batches(family, options.pairs, options.steps)
            row = {"method": name, "lr": rate, **train_norms(add_norms, rate, family, training_batches)}
            rows.append(row)
            print(
                f"{name:<15} lr {rate:.0e}: {row['moved']:,} of {row['values']:,} values moved "
                f"({100 * row['moved'] / row['values']:.1f}%), "
                f"{row['gains_moved']:,} of {row['gains']:,} gains, "
                f"loss {row['first_loss']:.3f} -> {row['last_loss']:.3f}"
            )
    if options.out:
        record(options.out, "bf16_norms", rows, model=options.model, steps=options.steps, pairs=options.pairs)


def add_normtune_norms(family: Family) -> dict[str, nn.Parameter]:
    """Replace the model's norms by Normtune's; returns their gains and biases, which are fp32, by name."""
    return adapt(family.model, "ln").trained


def add_peft_norms(family: Family) -> dict[str, nn.Parameter]:
    """Apply PEFT's LN_TUNING to exactly the same norms; returns the trainable parameters by name."""
    names = list(norms(family.model))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT warns about every kind of norm that it trains
        # PEFT changes the model in place: `family.model` has PEFT's norms from here on
        peft_model = get_peft_model(family.model, LNTuningConfig(target_modules=names))
    return {name: parameter for name, parameter in peft_model.named_parameters() if parameter.requires_grad}


def train_norms(add_norms: Any, rate: float, family: Family, batches: Iterable[Batch]) -> dict[str, Any]:
    """Train with one step per batch.

    Args:
        add_norms: `add_normtune_norms` or `add_peft_norms`; adds norms to the family's model and returns the
            parameters to train.

    Returns:
        How many values changed, of all values and of the gains, and the mean loss of the first and last 20
        steps.
    """
    parameters = add_norms(family)
    before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    optimizer = torch.optim.AdamW(list(parameters.values()), lr=rate, weight_decay=0.0)
    losses = []
    for batch in batches:
        total, tokens = family.loss(batch)
        loss = total / tokens
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return {
        "dtype": str(next(iter(parameters.values())).dtype),
        "values": sum(parameter.numel() for parameter in parameters.values()),
        "moved": sum(count_changes(before[name], parameter) for name, parameter in parameters.items()),
        "gains": sum(tensor.numel() for name, tensor in parameters.items() if is_gain(name)),
        "gains_moved": sum(count_changes(before[name], tensor) for name, tensor in parameters.items() if is_gain(name)),
        "first_loss": statistics.mean(losses[:20]),
        "last_loss": statistics.mean(losses[-20:]),
    }


def is_gain(name: str) -> bool:
    """Whether a parameter is the gain of a norm (near 1) and not its bias (near 0)."""
    return name.endswith("weight")


def count_changes(before: Tensor, after: Tensor) -> int:
    """The number of values that differ."""
    return int((before != after).sum())


def make_batches(family: Family, pairs: int, steps: int) -> Iterator[Batch]:
    """`steps` batches of hospital B's phantoms, the same ones in every call."""
    dataset = open_dataset("phantom-b:200")
    epoch_batches = EpochBatches(dataset.split("train"), pairs, None, seed=0)
    collate = Collator(family, ImageCache(family, dataset))
    steps_done = 0
    for epoch in range(steps):
        epoch_batches.set_epoch(epoch)
        for groups in epoch_batches:
            if steps_done == steps:
                return
            yield collate(groups)
            steps_done += 1


if __name__ == "__main__":
    main()
