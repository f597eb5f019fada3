"""What a base in 8 or 4 bits costs in accuracy: gradients of the first step, and answers after training.

    python benchmarks/quantised.py --out benchmarks/quantised.json

It needs pip install 'normtune[quantize]'. The same recipe, batches and seed are used on the base in fp32, in
bf16, and with the linears of its language model in int8 (torchao) and nf4 (bitsandbytes), all else in fp32.
The error of the gradient is relative to the fp32 gradient, over all trained parameters. Every adapter is
evaluated on the base that it was trained on, and those of quantised bases also on the fp32 base. Differences
from fp32 are paired by question.
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
from normtune.runtime.number_format import format_interval
from normtune.runtime.text_table import markdown_table
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
    parser.add_argument("--out", type=Path, help="JSON file; the table is written next to it as .md")
    parser.add_argument("--model", default="nano", help="a directory, a Hub name, or 'nano'")
    parser.add_argument("--data", default="phantom-b:160/0/120", help="the dataset to train and evaluate on")
    parser.add_argument("--root", type=Path, help="the dataset's folder")
    parser.add_argument("--tune", default="ln")
    parser.add_argument("--epochs", type=float, default=4)
    parser.add_argument("--pairs", type=int, default=24, help="pairs of the compared gradient")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    for kind in PACKAGES:
        check_installed(kind)
    with tempfile.TemporaryDirectory() as folder:
        rows = [measure_base(options, name, Path(folder)) for name in BASES]
    print(table(rows))
    if options.out:
        arguments = {name: value for name, value in vars(options).items() if name not in ("out", "root")}
        packages = {package: version(package) for package in PACKAGES.values()}
        record(options.out, "quantised", rows, quantised_by=packages, **arguments)
        options.out.with_suffix(".md").write_text(table(rows), encoding="utf-8")


def measure_base(options: argparse.Namespace, name: str, folder: Path) -> dict[str, Any]:
    """The row of one base: the error of its gradient, and the metrics after training."""
    base_options = BASES[name]
    fp32_gradient, base_gradient = first_gradient(options, {}), first_gradient(options, base_options)
    data = {"model": options.model, "data": options.data, "root": options.root, "device": "cpu"}
    result = train(
        TrainConfig.checked(
            **data, **base_options, out=folder / name, tune=options.tune, epochs=options.epochs, seed=options.seed
        )
    )
    measured: dict[str, Any] = {
        "base": name,
        "gradient_error": float((base_gradient - fp32_gradient).norm() / fp32_gradient.norm()),
        "seconds": result.seconds,
        "final_loss": result.final_loss,
        "metrics": evaluate_adapter(data | base_options, folder, name, f"{name}-own"),
    }
    if "quantize" in base_options:
        measured["on_fp32"] = evaluate_adapter(data, folder, name, f"{name}-on-fp32")
    if name != "fp32":
        (differences,) = compare([folder / "fp32-own", folder / f"{name}-own"]).differences.values()
        measured["difference"] = asdict(differences[METRIC])
    error, score = measured["gradient_error"], measured["metrics"][METRIC]["value"]
    print(f"{name}: gradient error {error:.4f}, {METRIC} {100 * score:.1f}", flush=True)
    return measured


def first_gradient(options: argparse.Namespace, base_options: dict[str, str]) -> Tensor:
    """The gradient of the first step's loss with respect to all trained parameters, as one vector."""
    torch.manual_seed(options.seed)
    family = load(options.model, **base_options)
    tuned = adapt(family.model, options.tune, seed=options.seed)
    total, tokens = family.loss(first_batch(options, family))
    (total / tokens).backward()
    # a parameter without effect on the loss has no gradient, such as those of an unused last vision layer
    return torch.cat([tensor.grad.flatten() for tensor in tuned.trained.values() if tensor.grad is not None])


def first_batch(options: argparse.Namespace, family: Family) -> dict[str, Any]:
    """A batch of the first images with about `options.pairs` questions in all."""
    dataset = open_dataset(options.data, options.root)
    members: list[Any] = []
    for group in group_by_image(dataset.split("train")):
        if sum(map(len, members)) < options.pairs:
            members.append(group)
    groups = [Group(m[0].images, tuple(family.tokenize(e.id, e.question, e.answer) for e in m)) for m in members]
    pixels = [[family.preprocess_image(dataset.open_image(key)) for key in m[0].images] for m in members]
    return family.collate(groups, pixels)


def evaluate_adapter(base_options: dict[str, Any], folder: Path, adapter: str, out: str) -> dict[str, Any]:
    """Evaluate an adapter of `folder`; its evaluation is written to the subfolder `out`."""
    config = EvaluateConfig.checked(**base_options, adapter=folder / adapter, out=folder / out)
    metrics: dict[str, Any] = evaluate_config(config).record["metrics"]
    return metrics


def table(rows: list[dict[str, Any]]) -> str:
    """A Markdown table, one row per base."""
    header = ["base", "gradient error", f"{METRIC} %", "less fp32", "on the fp32 base %"]
    lines = []
    for row in rows:
        cells = [row["base"], f"{row['gradient_error']:.4f}", format_interval(row["metrics"][METRIC])]
        difference = row.get("difference")
        cells.append(format_interval(difference | {"value": difference["difference"]}) if difference else "–")
        lines.append([*cells, format_interval(row["on_fp32"][METRIC]) if "on_fp32" in row else "–"])
    return "\n".join(markdown_table(header, lines)) + "\n"


if __name__ == "__main__":
    main()
