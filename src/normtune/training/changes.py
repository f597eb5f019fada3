"""How far training moved the trained parameters."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from normtune.errors import InputError
from normtune.methods.adapt import TunedModel

LEARNT_SHARE = 0.01  # below it a run is reported as having learnt nothing


@dataclass(frozen=True)
class Change:
    """How far the trained parameters of one part and role went."""

    part: str
    role: str
    values: int
    changed: float  # share of the values that differ from before
    relative: float | None  # norm of the change over that of the old values; None where all were zero


@dataclass(frozen=True)
class ChangeReport:
    """What training changed; `warning` says so where it changed nothing worth the name."""

    share: float  # share of all trained values that differ from before
    changes: tuple[Change, ...]
    warning: str | None


def change_report(before: Mapping[str, Tensor], tuned: TunedModel) -> ChangeReport:
    """Compare the trained parameters with those `before` training (a copy of `tuned.trained`, by name).

    Raises:
        InputError: `before` lacks a trained parameter.
    """
    groups: dict[tuple[str, str], list[tuple[Tensor, Tensor]]] = {}
    broken = 0
    for name, parameter in tuned.trained.items():
        if name not in before:
            raise InputError(f"no earlier value of {name} to compare with.")
        old, new = before[name].detach().to(parameter.device, torch.float32), parameter.detach()
        groups.setdefault(tuned.part_and_role[name], []).append((old, new))
        broken += int((~torch.isfinite(new)).sum())
    changes, moved, values = [], 0, 0
    for (part, role), pairs in groups.items():
        count = sum(new.numel() for _, new in pairs)
        changed = sum(int((old != new).sum()) for old, new in pairs)
        size = sum(float(old.double().square().sum()) for old, _ in pairs) ** 0.5
        step = sum(float((new.double() - old.double()).square().sum()) for old, new in pairs) ** 0.5
        changes.append(Change(part, role, count, changed / count, step / size if size else None))
        moved, values = moved + changed, values + count
    share = moved / values if values else 0.0
    warning = None
    if broken:
        warning = f"{broken} trained values are not finite. Lower the learning rate."
    elif share < LEARNT_SHARE:
        warning = (
            f"only {share:.2%} of the {values:,} trained values changed. "
            "Raise the learning rate or train longer."
        )
    return ChangeReport(share, tuple(changes), warning)


def norm_changes(before: Mapping[str, Tensor], tuned: TunedModel) -> list[dict[str, Any]]:
    """How far each trained norm parameter of the base went, one row a parameter; `before` as above.

    `relative` is the norm of its step over that of its old values (None where these are zero), `rms` the root
    mean square of its step.
    """
    rows = []
    for place in tuned.parts.parameters:
        if place.role != "norm" or place.name not in tuned.trained:
            continue
        new = tuned.trained[place.name].detach().double().cpu()
        old = before[place.name].detach().double().cpu()
        step, size = float((new - old).norm()), float(old.norm())
        rows.append(
            {
                "name": place.name,
                "part": place.part,
                "layer": place.layer,
                "kind": "bias" if place.name.endswith("bias") else "gain",
                "count": place.numel,
                "relative": step / size if size else None,
                "rms": step / place.numel**0.5,
            }
        )
    return rows
