"""Do norms learn on a bf16 base? It depends on what they store: the gain, or the gain minus one.

    python benchmarks/bf16_norms.py --out benchmarks/bf16_norms.json

Near 1, neighbouring bf16 values differ by 2^-8 (under 1) or 2^-7 (over 1), so that a much smaller update
changes nothing. A norm that stores its gain minus one (Gemma 3, Qwen3.5) has values near 0, which bf16
resolves finely. Two experiments, with AdamW and the same number of steps everywhere:

- The norms of one bf16 base on the same batches: by Normtune (fp32), by PEFT (the gain, in the dtype of the
  base), and stored as the gain minus one in bf16.
- The norms of small random language models of transformers as they are in bf16, by what they store.
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
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM

from normtune.data.batches import EpochBatches
from normtune.data.registry import open_dataset
from normtune.methods.adapt import adapt
from normtune.models.family import Family
from normtune.models.image_cache import ImageCache
from normtune.models.loading import load
from normtune.models.norm_kinds import norm_kind, norms
from normtune.models.types import Batch
from normtune.training.collator import Collator

LANGUAGE_MODELS = ("llama", "qwen3", "gemma3_text", "qwen3_5_text")
VOCABULARY, TOKENS, SEQUENCES = 256, 32, 8  # of the random language models and their steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--model", default="nano")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--pairs", type=int, default=8, help="question-answer pairs per step")
    parser.add_argument("--rates", type=float, nargs="+", default=[1e-4, 1e-3])
    options = parser.parse_args()
    rows = []
    methods = {
        "normtune ln": add_normtune_norms,
        "peft LN_TUNING": add_peft_norms,
        "gain - 1 in bf16": add_gain_minus_one_norms,
    }
    for rate in options.rates:
        for name, add_norms in methods.items():
            torch.manual_seed(0)
            family = load(options.model, dtype="bfloat16")
            training_batches = make_batches(family, options.pairs, options.steps)
            row = {"method": name, "lr": rate, **train_norms(add_norms, rate, family, training_batches)}
            rows.append(row)
            print(
                f"{name:<16} lr {rate:.0e}: {row['moved']:,} of {row['values']:,} values moved "
                f"({100 * row['moved'] / row['values']:.1f}%), "
                f"{row['gains_moved']:,} of {row['gains']:,} gains, "
                f"loss {row['first_loss']:.3f} -> {row['last_loss']:.3f}"
            )
        for model_type in LANGUAGE_MODELS:
            row = {"language_model": model_type, "lr": rate, **train_language_model(model_type, rate, options.steps)}
            rows.append(row)
            print(
                f"{model_type:<16} lr {rate:.0e}: norms store the {row['stores']}, "
                f"{row['gains_moved']:,} of {row['gains']:,} moved"
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


class GainMinusOneNorm(nn.Module):
    """A LayerNorm that stores its gain minus one, as the RMSNorm of Gemma 3 and Qwen3.5 does."""

    def __init__(self, norm: nn.LayerNorm) -> None:
        super().__init__()
        self.shape, self.eps = norm.normalized_shape, norm.eps
        self.weight, self.bias = nn.Parameter(norm.weight.detach() - 1), norm.bias

    def forward(self, x: Tensor) -> Tensor:
        """Compute in fp32 and return the dtype of `x`."""
        gain, bias = 1 + self.weight.float(), self.bias.float()
        return F.layer_norm(x.float(), self.shape, gain, bias, self.eps).to(x.dtype)


def add_gain_minus_one_norms(family: Family) -> dict[str, nn.Parameter]:
    """Replace exactly the same norms by `GainMinusOneNorm`; returns the trainable parameters by name."""
    family.model.requires_grad_(False)
    names = list(norms(family.model))
    for name in names:
        parent, _, child = name.rpartition(".")
        setattr(family.model.get_submodule(parent), child, GainMinusOneNorm(family.model.get_submodule(name)))
    return {
        f"{name}.{key}": parameter.requires_grad_()
        for name in names
        for key, parameter in family.model.get_submodule(name).named_parameters()
    }


def train_language_model(model_type: str, rate: float, steps: int) -> dict[str, Any]:
    """Train the norms of a small random language model in bf16, as transformers builds it, on random tokens.

    Returns:
        What the norms store, and how many of their values changed.
    """
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        model_type,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,  # the fourth layer of Qwen3.5 is the first with attention
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        vocab_size=VOCABULARY,
        pad_token_id=0,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).requires_grad_(False)
    # Qwen3.5 also has gated norms, which store the gain; they are not trained here
    trained_norms = norms(model)
    gains = [norm.weight.requires_grad_() for norm in trained_norms.values()]
    before = [gain.detach().clone() for gain in gains]
    optimizer = torch.optim.AdamW(gains, lr=rate, weight_decay=0.0)
    for _ in range(steps):
        tokens = torch.randint(1, VOCABULARY, (SEQUENCES, TOKENS))
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    kinds = {norm_kind(norm) for norm in trained_norms.values()}
    return {
        "stores": " and the ".join("gain - 1" if kind == "rms_offset" else "gain" for kind in sorted(kinds)),
        "dtype": str(gains[0].dtype),
        "gains": sum(gain.numel() for gain in gains),
        "gains_moved": sum(count_changes(*pair) for pair in zip(before, gains, strict=True)),
    }


def train_norms(add_norms: Any, rate: float, family: Family, batches: Iterable[Batch]) -> dict[str, Any]:
    """Train with one step per batch.

    Args:
        add_norms: `add_normtune_norms` or one of its rivals; adds norms to the family's model and returns the
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
