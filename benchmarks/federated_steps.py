"""When is a federated round one pooled step, and how far is the average of LoRA's factors from that of products?

    PYTHONPATH=src:. python benchmarks/federated_steps.py --out benchmarks/federated_steps.json

Two sites of equal size with a tiny model, in fp32 and without clipping: the federation of tests/federated/test_site.py.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from record import record
from safetensors.torch import load_file
from tests.federated.test_site import PICTURES, run_sites, train_pooled
from tests.support.federated_sites import write_site
from tests.support.tiny_miss import save_tiny_miss
from torch import Tensor

from normtune.federated.rules import Values, average

LORA = "decoder=lora(r=2)"
STEP_RATES = {"ln": 0.1, LORA: 1.0}  # of SGD; AdamW's is the method's default
OPTIMIZERS: dict[str, dict[str, Any]] = {"SGD": {"optimizer": "sgd"}, "AdamW": {}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        base = save_tiny_miss(work / "base")
        roots = {name: write_site(work / name, pictures) for name, pictures in PICTURES.items()}
        roots["pooled"] = write_site(work / "pooled", range(8))
        rows = pooled_steps(base, roots, work) + lora_averages(base, roots, work)
    for row in rows:
        print(row)
    record(arguments.out, "federated_steps", rows)


def pooled_steps(base: Path, roots: dict[str, Path], work: Path) -> list[dict[str, Any]]:
    """One round of one local step beside one step on the rows of both sites."""
    rows: list[dict[str, Any]] = []
    for recipe, rate in STEP_RATES.items():
        for name, optimizer in OPTIMIZERS.items():
            options = {"tune": recipe, "max_grad_norm": 1e9, "lr": rate if optimizer else None, **optimizer}
            out = work / f"{recipe}-{name}"
            run_sites(base, roots, out, **options)
            averaged = join(load_file(out / "adapter.safetensors"))
            start = join(load_file(out / "start" / "adapter.safetensors"))
            pooled = join(train_pooled(base, roots, work / f"{recipe}-{name}-pooled", 1, **options))
            rows.append({
                "recipe": recipe, "optimizer": name, "local_steps": 1,
                "largest_difference": float((averaged - pooled).abs().max()),
                "share_of_change": float((averaged - pooled).norm() / (pooled - start).norm()),
            })  # fmt: skip
    return rows


def lora_averages(base: Path, roots: dict[str, Path], work: Path) -> list[dict[str, Any]]:
    """The products of averaged LoRAs beside the average of the sites' products, after some local steps."""
    rows: list[dict[str, Any]] = []
    for name, optimizer in OPTIMIZERS.items():
        for steps in (1, 4, 16):
            options = {"tune": LORA, "max_grad_norm": 1e9, "lr": STEP_RATES[LORA] if optimizer else None, **optimizer}
            engine = run_sites(base, roots, work / f"{name}-{steps}", local_steps=steps, batch=4, **options)
            updates = [update.values for update in engine.updates.values()]
            expected = sum((join(products(update)) for update in updates), start=torch.zeros(())) / len(updates)
            for method in ("naive", "exact"):
                averaged, lost = average(updates, [1 / len(updates)] * len(updates), method)
                error = float((join(products(averaged)) - expected).norm() / expected.norm())
                rows.append({
                    "recipe": LORA, "optimizer": name, "local_steps": steps, "average": method,
                    "relative_error": error, "lost": lost,
                })  # fmt: skip
    return rows


def products(values: Values) -> dict[str, Tensor]:
    """The change B A of each linear with a LoRA."""
    linears = [name.removesuffix(".lora_A") for name in values if name.endswith(".lora_A")]
    return {name: torch.from_numpy(values[f"{name}.lora_B"] @ values[f"{name}.lora_A"]) for name in linears}


def join(tensors: Mapping[str, Tensor]) -> Tensor:
    """All values as one vector."""
    return torch.cat([tensor.flatten() for _, tensor in sorted(tensors.items())])


if __name__ == "__main__":
    main()
