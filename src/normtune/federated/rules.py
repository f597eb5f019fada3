"""What the server does with the updates of a round: which it refuses, and how it averages the others.

Nothing here depends on how the updates arrived. Values are fp32 arrays by the names of the trained tensors.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from normtune.adapters.fingerprint import same_base
from normtune.adapters.mixing import sum_products, sum_values

Values = dict[str, NDArray[Any]]  # name of a trained tensor -> its values

_MANY = 3  # from so many norms on, one of them can be compared with the median


@dataclass(frozen=True)
class SiteUpdate:
    """What a site sends after it has trained in a round."""

    values: Values  # after training, without those that stay at the site
    pairs: int  # question-answer pairs that it trains on
    steps: int
    seconds: float  # of training
    loss: float | None  # last entry of its loss log
    base_fingerprint: str
    # of a private site: the guarantee for its patients, after all updates that it has sent
    epsilon: float | None = None
    delta: float | None = None


def find_refusals(
    updates: Mapping[str, SiteUpdate],
    start: Values,
    base_fingerprint: str,
    max_update: float,
    earlier_norms: Sequence[float] = (),
) -> dict[str, str]:
    """Find the updates that must not be averaged.

    Args:
        updates: site -> its update.
        start: the values that the round started with.
        base_fingerprint: of the base that the server's adapter belongs to.
        max_update: the largest norm of an update, as a multiple of the median of all valid ones and of the earlier
            ones. With fewer than three norms there is no majority, and they are not compared.
        earlier_norms: of the updates that were accepted in the round before.

    Returns:
        Site -> the reason, for every update that is refused.
    """
    reasons = {site: _invalid(update, start, base_fingerprint) for site, update in updates.items()}
    refused = {site: reason for site, reason in reasons.items() if reason is not None}
    norms = {site: update_norm(update.values, start) for site, update in updates.items() if site not in refused}
    compared = [*norms.values(), *earlier_norms]
    median = float(np.median(compared)) if len(compared) >= _MANY else 0.0
    for site, norm in norms.items():
        if median and norm > max_update * median:
            refused[site] = f"its update is {norm / median:.3g} times as large as the median (limit {max_update:g})"
    return refused


def _invalid(update: SiteUpdate, start: Values, base_fingerprint: str) -> str | None:
    """Why an update cannot be used, whatever the others are; None if it can."""
    if reason := check_figures(update, base_fingerprint):
        return reason
    if differing := sorted(update.values.keys() ^ start.keys()):
        return f"{len(differing)} tensors are missing or unknown, the first is {differing[0][:200]}"
    for name, expected in start.items():
        actual = update.values[name]
        if not isinstance(actual, np.ndarray):
            return f"{name} is no array"
        if actual.shape != expected.shape or actual.dtype != expected.dtype:
            return f"{name} has shape {actual.shape} {actual.dtype}, not {expected.shape} {expected.dtype}"
        if not np.isfinite(actual).all():
            return f"{name} has values that are not finite"
    return None


def check_figures(update: SiteUpdate, base_fingerprint: str) -> str | None:
    """Why an update cannot be used, by what came with its values; None if it can."""
    if str(update.base_fingerprint).count("-") != 1 or not same_base(update.base_fingerprint, base_fingerprint):
        return "its base has other values"
    if not isinstance(update.pairs, int) or update.pairs <= 0:
        return "its number of pairs is not above 0"
    return None


def update_norm(values: Values, start: Values) -> float:
    """The Euclidean norm of a change."""
    squares = (np.square(values[name] - value, dtype=np.float64).sum() for name, value in start.items())
    return math.sqrt(sum(squares))


def site_weights(updates: Mapping[str, SiteUpdate], by: str) -> dict[str, float]:
    """The weight of each site: 0.75 and 0.25 by `pairs` for sites with 90 and 30 pairs, 0.5 each if `equal`."""
    sizes = {site: update.pairs if by == "pairs" else 1 for site, update in updates.items()}
    return {site: size / sum(sizes.values()) for site, size in sizes.items()}


def average(updates: Sequence[Values], weights: Sequence[float], method: str) -> tuple[Values, float | None]:
    """Average the values of sites.

    Args:
        method: `naive` averages the factors of a LoRA, which is not the average of the changes that they make;
            `exact` averages their products and keeps the rank.

    Returns:
        The average, and with `exact` the share of the squared size of the averaged products that the rank cannot
        hold (None without a LoRA).
    """
    states = [{name: torch.from_numpy(value) for name, value in update.items()} for update in updates]
    lost = None
    if method == "exact":
        averaged, lost = sum_products(states, weights)
    else:
        averaged = sum_values(states, weights)
    return {name: value.numpy() for name, value in averaged.items()}, lost


@dataclass
class ServerAdam:
    """FedAdam (Reddi et al. 2021): Adam at the server, where a round's average change is the negative gradient.

    Adam's correction of the first steps is included.
    """

    rate: float
    steps: int = 0
    moments: Values = field(default_factory=dict)  # "first/NAME" and "second/NAME"
    betas: tuple[float, float] = (0.9, 0.99)
    epsilon: float = 1e-3  # the paper's tau: the adaptivity

    def step(self, start: Values, averaged: Values) -> Values:
        """Return the values of the next round."""
        self.steps += 1
        after = {}
        for name, value in start.items():
            change = averaged[name].astype(np.float64) - value
            for key, beta, term in (("first", self.betas[0], change), ("second", self.betas[1], change**2)):
                self.moments[f"{key}/{name}"] = beta * self.moments.get(f"{key}/{name}", 0.0) + (1 - beta) * term
            first = self.moments[f"first/{name}"] / (1 - self.betas[0] ** self.steps)
            second = self.moments[f"second/{name}"] / (1 - self.betas[1] ** self.steps)
            after[name] = (value + self.rate * first / (np.sqrt(second) + self.epsilon)).astype(value.dtype)
        return after
