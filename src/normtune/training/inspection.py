"""What a model is made of and what a recipe would train, counted without loading its weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from normtune.errors import InputError


def inspection(model: str, tune: str | None = None) -> dict[str, Any]:
    """Parts x roles of `model` and, with `tune`, the recipe's trainable parameters by part.

    Works on the config alone (meta device): a 7B model takes a second and no memory.

    Raises:
        InputError: no such model, or a recipe that does not fit it.
    """
    from normtune.methods.adapt import adapt
    from normtune.models.loading import meta_model
    from normtune.models.parts import find_parts

    body = meta_model(model)
    parts = find_parts(body)
    found: dict[str, Any] = {
        "model": model,
        "total": parts.total,
        "parts": {part: parts.count(part) for part in parts.parts},
        "table": parts.table(),
    }
    if tune is not None:
        tuned = adapt(body, tune)
        by_method: dict[str, int] = {}
        for name, parameter in tuned.trained.items():
            by_method[tuned.methods[name]] = by_method.get(tuned.methods[name], 0) + parameter.numel()
        found["recipe"] = {
            "given": tune,
            "resolved": str(tuned.recipe),
            "trainable": tuned.trainable,
            "total": tuned.total,
            "share": tuned.share,
            "tensors": len(tuned.trained),
            "by_method": by_method,
        }
    return found


def planned(
    model: str, tune: str | None, options: Mapping[str, Any], found: dict[str, Any]
) -> dict[str, Any]:
    """`found` with the memory that training on a dataset takes, where `options` name one.

    Raises:
        InputError: an option without `data`, or see `normtune.training.memory_plan.plan.plan`.
    """
    from normtune.training.config import TrainConfig

    given = {name: value for name, value in options.items() if value is not None}
    if "data" not in given:
        if given:
            name = next(iter(given)).replace("_", "-")
            raise InputError(f"--{name} goes with --data: the data's questions and images decide the memory.")
        return found
    config = TrainConfig.checked(model=model, tune=tune or "ln", out=Path("."), **given)
    from normtune.training.memory_plan.plan import plan

    return {**found, "plan": plan(config).to_json()}


def inspect_text(found: dict[str, Any]) -> str:
    """The inspection as a table for people."""
    parts = ", ".join(f"{part} {count:,}" for part, count in found["parts"].items())
    lines = [f"{found['model']}: {found['total']:,} parameters ({parts})", ""]
    rows = found["table"]
    columns = list(rows[0])
    cells = [columns, *([_cell(column, row[column]) for column in columns] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    for line in cells:
        lines.append(
            "  ".join(
                word.rjust(w) if i > 1 else word.ljust(w)
                for i, (word, w) in enumerate(zip(line, widths, strict=True))
            )
        )
    if recipe := found.get("recipe"):
        lines += [
            "",
            f"recipe {recipe['given']} -> {recipe['resolved']}",
            f"trains {recipe['trainable']:,} of {recipe['total']:,} parameters = "
            f"{100 * recipe['share']:.4f}% in {recipe['tensors']} tensors",
        ]
    if memory := found.get("plan"):
        from normtune.training.memory_plan.plan import plan_text

        lines += ["", plan_text(memory)]
    return "\n".join(lines)


def _cell(column: str, value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4f}"
    return f"{value:,}" if isinstance(value, int) else str(value)
