"""A picture of the demo's results: accuracy against the trained share of the parameters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from normtune.runtime.files import atomic_write


def plot_accuracy(rows: list[dict[str, Any]], path: Path) -> None:
    """Plot accuracy with its 95% interval against the trainable share, one point for each recipe, as PNG.

    The share has a log scale. The frozen base is a dashed line with its interval as a band.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7.2, 4.4), dpi=150)
    trained = sorted((row for row in rows if row["training"]), key=lambda row: row["training"]["share"])
    # labels alternate above and below the points, so that neighbours do not overlap
    labelled_below = {row["name"] for row in trained[1::2]}
    for row in rows:
        score = row["evaluation"]["metrics"]["global_exact"]
        value, low, high = (100 * score[key] for key in ("value", "low", "high"))
        if row["training"] is None:
            axes.axhline(value, linestyle="--", color="0.45", label=row["name"])
            axes.axhspan(low, high, color="0.9", zorder=0)
            continue
        share = 100 * row["training"]["share"]
        axes.errorbar(share, value, yerr=[[value - low], [high - value]], fmt="o", capsize=3)
        offset = (5, -11) if row["name"] in labelled_below else (5, 5)
        axes.annotate(row["name"], (share, value), xytext=offset, textcoords="offset points", fontsize=8)
    axes.set_xscale("log")
    axes.set_xlabel("trained share of the model (%)")
    axes.set_ylabel("answers exactly right (%)")
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    figure.tight_layout()
    with atomic_write(path) as temporary:
        figure.savefig(temporary, format="png")
    plt.close(figure)
