"""What a model is made of and what a recipe would train, counted without loading its weights."""

from __future__ import annotations

from typing import Any


def inspection(model: str, tune: str | None = None) -> dict[str, Any]:
    """Parts x roles of `model` and, with `tune`, the recipe's trainable parameters by part.

    Works on the config alone (meta device): a 7B model takes a second and no memory.

    Raises:
        InputError: no such model, or a recipe that does not fit it.
    """
    from normtune.adapt import adapt
    from normtune.anatomy import anatomy
    from normtune.models import skeleton

    body = skeleton(model)
    parts = anatomy(body)
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
    return "\n".join(lines)


def _cell(column: str, value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4f}"
    return f"{value:,}" if isinstance(value, int) else str(value)
