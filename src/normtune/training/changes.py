"""Measures how far training moved the trained parameters, and warns of runs that learnt nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from normtune.errors import InputError
from normtune.methods.adapt import TunedModel

# A run that changed a smaller share of its trained values gets a warning: its steps were smaller than the
# spacing of the values, as happens where the learning rate is far too low.
LEARNT_SHARE = 0.01


@dataclass(frozen=True)
class Change:
    """How far the trained parameters of one part and role moved.

    The field names are JSON keys of `train_result.json`.
    """

    part: str
    role: str
    values: int
    changed: float  # share of the values that differ from those before training
    relative: float | None  # L2 norm of the change / L2 norm of the old values; None if all of them were zero


@dataclass(frozen=True)
class ChangeReport:
    """What training changed; `warning` is set if almost nothing changed or values are not finite."""

    share: float  # share of all trained values that differ from those before training
    changes: tuple[Change, ...]
    warning: str | None


def change_report(before: Mapping[str, Tensor], tuned: TunedModel) -> ChangeReport:
    """Compare the trained parameters with their values before training.

    Args:
        before: copies of `tuned.trained` from before training, by name.

    Raises:
        InputError: a trained parameter is missing in `before`.
    """
    groups: dict[tuple[str, str], list[tuple[Tensor, Tensor]]] = {}  # (part, role) -> [(old, new)]
    nonfinite = 0
    for name, parameter in tuned.trained.items():
        if name not in before:
            raise InputError(f"{name} has no value from before training to compare with.")
        # compared in fp32, on the device of the parameter
        old, new = before[name].detach().to(parameter.device, torch.float32), parameter.detach()
        groups.setdefault(tuned.part_and_role[name], []).append((old, new))
        nonfinite += int((~torch.isfinite(new)).sum())
    changes, moved, values = [], 0, 0
    for (part, role), pairs in groups.items():
        count = sum(new.numel() for _, new in pairs)
        # exact comparison in fp32: a value that moved by one bit has changed
        changed = sum(int((old != new).sum()) for old, new in pairs)
        # norms over all tensors of the group, in fp64: steps are small differences of large values
        size = sum(float(old.double().square().sum()) for old, _ in pairs) ** 0.5
        step = sum(float((new.double() - old.double()).square().sum()) for old, new in pairs) ** 0.5
        changes.append(Change(part, role, count, changed / count, step / size if size else None))
        moved, values = moved + changed, values + count
    share = moved / values if values else 0.0
    warning = None
    if nonfinite:
        warning = f"{nonfinite} trained values are not finite. Lower the learning rate."
    elif share < LEARNT_SHARE:
        warning = f"only {share:.2%} of the {values:,} trained values changed. Raise the learning rate or train longer."
    return ChangeReport(share, tuple(changes), warning)


def norm_changes(before: Mapping[str, Tensor], tuned: TunedModel) -> list[dict[str, Any]]:
    """Return how far each trained norm parameter of the base moved, one row per parameter.

    Args:
        before: copies of `tuned.trained` from before training, by name.

    Returns:
        Rows with the parameter's name, part, layer, kind (gain or bias) and count of values. Of its change
        `relative` is the L2 norm divided by the old values' L2 norm (None if they are zero), and `rms` the root mean
        square.
    """
    rows = []
    for info in tuned.parts.parameters:
        # norms of the base itself, not values that a method added
        if info.role != "norm" or info.name not in tuned.trained:
            continue
        # fp64: a step may be as small as the last bit of an fp32 value
        new = tuned.trained[info.name].detach().double().cpu()
        old = before[info.name].detach().double().cpu()
        step, size = float((new - old).norm()), float(old.norm())
        rows.append(
            {
                "name": info.name,
                "part": info.part,
                "layer": info.layer,
                "kind": "bias" if info.name.endswith("bias") else "gain",
                "count": info.numel,
                "relative": step / size if size else None,
                "rms": step / info.numel**0.5,
            }
        )
    return rows
