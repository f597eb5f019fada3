"""Axes: from values to places in a picture, with round ticks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Axis:
    """What an axis shows and how its ticks are written."""

    title: str  # with its unit
    tick: Callable[[float], str]
    log: bool = False
    zero: bool = False  # the axis begins at 0
    least: float = 0.0  # the axis covers no less
    bound: tuple[float, float] = (-math.inf, math.inf)  # no value can lie beyond


@dataclass(frozen=True)
class Scale:
    """The values from `low` to `high` laid out from `start` to `end` (of pixels; start > end for upward)."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        """The place of a value; values outside lie at the edge."""
        value = min(max(value, self.low), self.high)
        if self.log:
            part = math.log(value / self.low) / math.log(self.high / self.low)
        else:
            part = (value - self.low) / (self.high - self.low)
        return self.start + part * (self.end - self.start)

    def ticks(self, wanted: int = 5) -> list[float]:
        """Round values within the scale, about `wanted` of them."""
        return _log_ticks(self.low, self.high) if self.log else _ticks(self.low, self.high, wanted)


def scale(
    axis: Axis, centres: Iterable[float], ends: Iterable[float], start: float, end: float, pad: float = 0.06
) -> Scale:
    """A scale that shows all `centres`, and the `ends` of their intervals unless these dwarf the centres.

    An interval of two seeds may be ten times as wide as all differences between recipes; an axis that
    showed it whole would show nothing else.
    """
    centres = [value for value in centres if math.isfinite(value) and (value > 0 or not axis.log)]
    assert centres, "an axis needs a value"
    low, high = min(centres), max(centres)
    if axis.log:
        low, high = (low / 2, high * 2) if high / low < 1.5 else (low, high)
        room = (high / low) ** pad
        return Scale(low / room, high * room, start, end, log=True)
    reach = max(high - low, axis.least, 0.02 * max(abs(high), abs(low)), 1e-9)
    ends = [value for value in ends if math.isfinite(value)]
    low = max(min([low, *ends]), low - reach)
    high = min(max([high, *ends]), high + reach)
    if high - low < reach:
        low, high = low - reach / 2, high + reach / 2
    room = pad * (high - low)
    low, high = max(low - room, axis.bound[0]), min(high + room, axis.bound[1])
    return Scale(min(0.0, low) if axis.zero else low, max(0.0, high) if axis.zero else high, start, end)


def _ticks(low: float, high: float, wanted: int) -> list[float]:
    raw = (high - low) / wanted
    unit = 10.0 ** math.floor(math.log10(raw))
    step = unit * next(factor for factor in (1, 2, 5, 10) if factor * unit >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [number * step for number in range(first, last + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    within = math.log10(high / low)
    factors: tuple[float, ...] = (1, 1.5, 2, 3, 5, 7)
    if within > 0.8:
        factors = (1,) if within > 2.2 else (1, 3) if within > 1.1 else (1, 2, 5)
    every = 2 if within > 7 else 1
    return [
        factor * 10.0**decade
        for decade in decades
        if decade % every == 0
        for factor in factors
        if low <= factor * 10.0**decade * 1.0000001 and factor * 10.0**decade <= high * 1.0000001
    ]
