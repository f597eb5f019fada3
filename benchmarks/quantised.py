"""What a base in 8 or 4 bits costs in accuracy: gradients of the first step, and answers after training.

    python benchmarks/quantised.py --out benchmarks/quantised.json

Needs pip install 'normtune[quantize]'. The same recipe, batches and seed on the base in fp32, in bf16, and
with its language model's linears in int8 (torchao) and nf4 (bitsandbytes), all else in fp32. The gradient's
error is relative to fp32's, over all that is trained. Every delta is evaluated on the base that it was
trained on, and those of quantised bases on the fp32 one too; differences from fp32 are paired by question.
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from record import record
from torch import Tensor

from normtune.data.groups import Group, group_by_image
from normtune.data.registry import open_dataset
from normtune.evaluation.compare import compare
from normtune.evaluation.config import EvaluateConfig
from normtune.evaluation.evaluate import evaluate_config
from normtune.methods.adapt import adapt
from normtune.models.family import Family
from normtune.models.loading import load
from normtune.models.quantization import PACKAGES, check_installed
from normtune.training.config import TrainConfig
from normtune.training.train import train

METRIC = "global_exact"
BASES: dict[str, dict[str, str]] = {
    "fp32": {},
    "bf16": {"dtype": "bfloat16"},
    "int8": {"quantize": "int8"},
    "nf4": {"quantize": "nf4"},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="JSON file; the table goes beside it")
    parser.add_argument("--model", default="nano", help="a directory, a hub name, or 'nano'")
    parser.add_argument("--data", default="phantom-b:160/0/120", help="trained on and evaluated")
    parser.add_argument("--root", type=Path, help="the data set's folder")
    parser.add_argument("--tune", default="ln")
    parser.add_argument("--epochs", type=float, default=4)
    parser.add_argument("--pairs", type=int, default=24, help="of the gradient that is compared")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    for kind in PACKAGES:
        check_installed(kind)
    with tempfile.TemporaryDirectory() as folder:
        rows = [row(options, name, Path(folder)) for name in BASES]
    print(table(rows))
    if options.out:
        given = {name: value for name, value in vars(options).items() if name not in ("out", "root")}
        packages = {package: version(package) for package in PACKAGES.values()}
        record(options.out, "quantised", rows, quantised_by=packages, **given)
        options.out.with_suffix(".md").write_text(table(rows), encoding="utf-8")


def row(options: argparse.Namespace, name: str, folder: Path) -> dict[str, Any]:
    """One base: its gradient's error, and the scores after training."""
    how = BASES[name]
    exact, own = gradient(options, {}), gradient(options, how)
    data = {"model": options.model, "data": options.data, "root": options.root, "device": "cpu"}
    result = train(
        TrainConfig.checked(
            **data, **how, out=folder / name, tune=options.tune, epochs=options.epochs, seed=options.seed
        )
    )
    found: dict[str, Any] = {
        "base": name,
        "gradient_error": float((own - exact).norm() / exact.norm()),
        "seconds": result.seconds,
        "final_loss": result.final_loss,
        "metrics": scores(data | how, folder, name, f"{name}-own"),
    }
    if "quantize" in how:
        found["on_fp32"] = scores(data, folder, name, f"{name}-on-fp32")
    if name != "fp32":
        found["difference"] = asdict(compare(folder / "fp32-own", folder / f"{name}-own")[METRIC])
    error, score = found["gradient_error"], found["metrics"][METRIC]["value"]
    print(f"{name}: gradient error {error:.4f}, {METRIC} {100 * score:.1f}", flush=True)
    return found


def gradient(options: argparse.Namespace, how: dict[str, str]) -> Tensor:
    """Of the first step's loss by all that is trained, in one row."""
    torch.manual_seed(options.seed)
    family = load(options.model, **how)
    tuned = adapt(family.model, options.tune, seed=options.seed)
    total, tokens = family.loss(batch(options, family))
    (total / tokens).backward()
    # the last layer of some towers is not read
    return torch.cat([one.grad.flatten() for one in tuned.trained.values() if one.grad is not None])


def batch(options: argparse.Namespace, family: Family) -> dict[str, Any]:
    """The first images with about so many questions."""
    dataset = open_dataset(options.data, options.root)
    members: list[Any] = []
    for group in group_by_image(dataset.split("train")):
        if sum(map(len, members)) < options.pairs:
            members.append(group)
    groups = [
        Group(m[0].images, tuple(family.tokenize(e.id, e.question, e.answer) for e in m)) for m in members
    ]
    pixels = [[family.preprocess_image(dataset.open_image(key)) for key in m[0].images] for m in members]
    return family.collate(groups, pixels)


def scores(how: dict[str, Any], folder: Path, adapter: str, out: str) -> dict[str, Any]:
    config = EvaluateConfig.checked(**how, adapter=folder / adapter, out=folder / out)
    found: dict[str, Any] = evaluate_config(config)["metrics"]
    return found


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        f"| base | gradient error | {METRIC} % | less fp32 | on the fp32 base % |",
        "|---|--:|--:|--:|--:|",
    ]
    for one in rows:
        cells = [one["base"], f"{one['gradient_error']:.4f}", shown(one["metrics"][METRIC])]
        cells.append(shown(one["difference"], "difference") if "difference" in one else "–")
        cells.append(shown(one["on_fp32"][METRIC]) if "on_fp32" in one else "–")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def shown(metric: dict[str, float], value: str = "value") -> str:
    return f"{100 * metric[value]:.1f} [{100 * metric['low']:.1f}, {100 * metric['high']:.1f}]"


if __name__ == "__main__":
    main()
