"""The result of a training run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from normtune.methods.adapt import TunedModel
from normtune.runtime import distributed, memory
from normtune.training.changes import Change, change_report, norm_changes
from normtune.training.config import TrainConfig


@dataclass(frozen=True)
class TrainResult:
    """What a run came to. `changed` is the share of trained values that differ from the base's."""

    out: str
    recipe: str
    trainable: int
    total: int
    share: float
    pairs: int
    steps: int
    seconds: float
    pairs_per_second: float
    peak_memory_bytes: int
    computed_once: str | None  # what of the model's work was done once an image
    final_loss: float | None
    changed: float
    changes: tuple[Change, ...]
    warning: str | None
    together: int = 1  # adapters that the pass trained; seconds and memory are the pass's

    def text(self) -> str:
        """The result in a few lines for people."""
        lines = [
            f"{self.recipe}: {self.trainable:,} of {self.total:,} parameters ({100 * self.share:.4f}%)",
            f"{self.pairs:,} pairs in {self.steps:,} steps, {self.seconds:.1f} s "
            f"({self.pairs_per_second:.1f} pairs/s), peak memory {self.peak_memory_bytes / 2**20:,.0f} MiB",
        ]
        if self.together > 1:
            lines.append(f"one of {self.together} adapters that shared a pass, its time and its memory")
        if self.computed_once is not None:
            lines.append(f"computed once an image: {self.computed_once}")
        if self.final_loss is not None:
            lines.append(f"final loss {self.final_loss:.4f} a token")
        lines.append(f"{100 * self.changed:.1f}% of the trained values changed")
        for one in self.changes:
            far = "from zero" if one.relative is None else f"by {100 * one.relative:.2g}% of their size"
            lines.append(
                f"  {one.part} {one.role}: {100 * one.changed:.1f}% of {one.values:,} changed, {far}"
            )
        if self.warning:
            lines.append(f"WARNING: {self.warning}")
        return "\n".join([*lines, f"Written: {self.out}"])


def build_result(
    config: TrainConfig,
    tuned: TunedModel,
    before: Mapping[str, Tensor],
    losses: Sequence[tuple[int, float]],
    *,
    pairs: int,
    steps: int,
    seconds: float,
    computed_once: str | None,
    together: int = 1,
) -> tuple[TrainResult, dict[str, Any]]:
    """What a run came to, and its log; `before` holds what is trained as it was, `losses` (step, loss)."""
    changes = change_report(before, tuned)
    result = TrainResult(
        out=str(config.out),
        recipe=str(tuned.recipe),
        trainable=tuned.trainable,
        total=tuned.total,
        share=tuned.share,
        pairs=pairs,
        steps=steps,
        seconds=seconds,
        pairs_per_second=pairs / seconds,
        peak_memory_bytes=max(distributed.all_gather(memory.peak_memory_bytes())),
        computed_once=computed_once,
        final_loss=losses[-1][1] if losses else None,
        changed=changes.share,
        changes=changes.changes,
        warning=changes.warning,
        together=together,
    )
    return result, {"loss": [*losses], "norms": norm_changes(before, tuned)}
