"""`normtune inspect`: counts a model's parts and what a recipe would train, without loading the weights."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from normtune.data.records import Dataset
from normtune.errors import InputError
from normtune.runtime.text_table import text_table


def inspect_model(model: str, tune: str | None = None) -> dict[str, Any]:
    """Count a model's parameters by part and role and, with `tune`, what the recipe would train.

    The model is built from its config on the meta device: a 7B model takes a second and no memory.

    Args:
        model: a local directory, a hub name, or the name of an architecture.
        tune: a recipe; None: only the model is described.

    Raises:
        InputError: there is no such model, or the recipe does not fit it.
    """
    # imported here: torch takes seconds, and the command line must start without it
    from normtune.methods.adapt import adapt
    from normtune.models.loading import meta_model, self_test_report
    from normtune.models.parts import find_parts

    network = meta_model(model)
    parts = find_parts(network)
    report: dict[str, Any] = {
        "model": model,
        "total": parts.total,
        "parts": {part: parts.count(part) for part in parts.parts},
        "table": parts.table(),
    } | self_test_report(model)
    if tune is not None:
        tuned = adapt(network, tune)
        by_method: dict[str, int] = {}  # a recipe may combine methods: count the parameters of each
        for name, parameter in tuned.trained.items():
            by_method[tuned.methods[name]] = by_method.get(tuned.methods[name], 0) + parameter.numel()
        report["recipe"] = {
            "given": tune,  # as the user wrote it; "resolved" has a method for each part of this model
            "resolved": str(tuned.recipe),
            "trainable": tuned.trainable,
            "total": tuned.total,
            "share": tuned.share,
            "tensors": len(tuned.trained),
            "left_out": tuned.left_out,  # values that the model never uses
            "by_method": by_method,
            # linears that LoRA or IA3 change, by the last component of their names: {"q_proj": 32, "v_proj": 32}
            "linears": dict(
                Counter(name.rpartition(".")[2] for addition in tuned.additions for name in addition.layers)
            ),
        }
    return report


def add_memory_plan(model: str, tune: str | None, options: Mapping[str, Any], report: dict[str, Any]) -> dict[str, Any]:
    """Return the inspection with a plan of the memory that training on a dataset takes.

    Args:
        options: options of `TrainConfig` by name; those that are None are not set. Without `data` there is no
            plan.

    Raises:
        InputError: there are options but no `data`, or planning fails; see `plan_memory`.
    """
    from normtune.training.config import TrainConfig

    options = {name: value for name, value in options.items() if value is not None}
    # the other options mean nothing without a dataset: an error, not a silent omission
    if "data" not in options:
        if options:
            name = next(iter(options)).replace("_", "-")
            raise InputError(f"--{name} needs --data: questions and images determine the memory.")
        return report
    # `out` is required but unused: a plan writes nothing
    config = TrainConfig.checked(model=model, tune=tune or "ln", out=Path("."), **options)
    from normtune.training.memory_plan.plan import plan_memory

    return {**report, "plan": plan_memory(config).to_json()}


def estimate_training(model: str, dataset: Dataset) -> dict[str, Any]:
    """Plan the memory of a run on a dataset with the default options; see `memory_plan.plan.estimate_memory`."""
    from normtune.training.config import TrainConfig
    from normtune.training.memory_plan.plan import estimate_memory

    config = TrainConfig(model=model, data=dataset.name, out=Path("."))
    examples = dataset.examples.where(dataset.examples.flags("split", config.split.__eq__)) or dataset.examples
    return estimate_memory(config, dataset, examples)


def inspect_text(report: dict[str, Any]) -> str:
    """Format an inspection as text: totals, the table of parts and roles, the recipe, the memory plan."""
    parts = ", ".join(f"{part} {count:,}" for part, count in report["parts"].items())
    lines = [f"{report['model']}: {report['total']:,} parameters ({parts})", ""]
    rows = report["table"]  # one row per part and role; all rows have the same keys
    columns = list(rows[0])
    cells = [columns, *([_cell(column, row[column]) for column in columns] for row in rows)]
    lines += text_table(cells, "llr")
    if recipe := report.get("recipe"):
        lines += [
            "",
            f"recipe {recipe['given']} -> {recipe['resolved']}",
            f"trains {recipe['trainable']:,} of {recipe['total']:,} parameters = "
            f"{100 * recipe['share']:.4f}% in {recipe['tensors']} tensors",
        ]
        if recipe["linears"]:
            counts = ", ".join(f"{name} ({count})" for name, count in recipe["linears"].items())
            lines.append(f"changes {sum(recipe['linears'].values())} linears: {counts}")
        if recipe["left_out"]:
            lines.append(
                f"left out: {recipe['left_out']:,} values that the model never uses (image encoder layers, sound)"
            )
    if tested := report.get("self_test"):
        lines += ["", tested["text"]]
    if memory := report.get("plan"):
        from normtune.training.memory_plan.plan import plan_text

        lines += ["", plan_text(memory)]
    return "\n".join(lines)


def _cell(column: str, value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4f}"
    return f"{value:,}" if isinstance(value, int) else str(value)
