"""Axes: scales from values to pixel positions, linear or logarithmic, with round ticks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Axis:
    """An axis's title, the format of its ticks, and which values it must cover."""

    title: str  # with the unit
    format_tick: Callable[[float], str]
    log: bool = False
    from_zero: bool = False  # whether the axis begins at 0
    min_span: float = 0.0  # the least difference between the ends of the axis
    bounds: tuple[float, float] = (-math.inf, math.inf)  # the least and greatest possible value


@dataclass(frozen=True)
class Scale:
    """Maps values from `low` to `high` to pixels from `start` to `end` (upward axis: start > end)."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        """The pixel position of a value; values outside the scale are moved to its edge."""
        value = min(max(value, self.low), self.high)
        if self.log:
            fraction = math.log(value / self.low) / math.log(self.high / self.low)
        else:
            fraction = (value - self.low) / (self.high - self.low)
        return self.start + fraction * (self.end - self.start)

    def ticks(self, count: int = 5) -> list[float]:
        """Round values within the scale, about `count` of them if it is linear."""
        return _log_ticks(self.low, self.high) if self.log else _linear_ticks(self.low, self.high, count)


def make_scale(
    axis: Axis, centres: Iterable[float], ends: Iterable[float], start: float, end: float, padding: float = 0.06
) -> Scale:
    """A scale that shows all values, and the ends of their intervals unless the intervals are much wider.

    An interval over two seeds may be ten times as wide as all differences between recipes; an axis that
    showed it whole would hide the differences. Linear axes are therefore extended by at most the span of the
    values on each side.

    Args:
        axis: what the axis must cover.
        centres: the values of the marks.
        ends: the ends of their intervals.
        start: the pixel position of the low end.
        end: the pixel position of the high end.
        padding: the margin at both ends, as a fraction of the scale.
    """
    centres = [value for value in centres if math.isfinite(value) and (value > 0 or not axis.log)]
    assert centres, "an axis needs a value"
    low, high = min(centres), max(centres)
    if axis.log:
        low, high = (low / 2, high * 2) if high / low < 1.5 else (low, high)
        margin = (high / low) ** padding
        return Scale(low / margin, high * margin, start, end, log=True)
    # never 0, so that equal values have an axis too
    span = max(high - low, axis.min_span, 0.02 * max(abs(high), abs(low)), 1e-9)
    ends = [value for value in ends if math.isfinite(value)]
    low = max(min([low, *ends]), low - span)
    high = min(max([high, *ends]), high + span)
    if high - low < span:
        low, high = low - span / 2, high + span / 2
    margin = padding * (high - low)
    low, high = max(low - margin, axis.bounds[0]), min(high + margin, axis.bounds[1])
    if axis.from_zero:
        low, high = min(0.0, low), max(0.0, high)
    return Scale(low, high, start, end)


def _linear_ticks(low: float, high: float, count: int) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten."""
    rough_step = (high - low) / count
    unit = 10.0 ** math.floor(math.log10(rough_step))
    step = unit * next(factor for factor in (1, 2, 5, 10) if factor * unit >= rough_step * 0.999)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [number * step for number in range(first, last + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten; with few decades also multiples of them, with many only every second power."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    decades_shown = math.log10(high / low)
    factors: tuple[float, ...] = (1, 1.5, 2, 3, 5, 7)
    if decades_shown > 0.8:
        factors = (1,) if decades_shown > 2.2 else (1, 3) if decades_shown > 1.1 else (1, 2, 5)
    stride = 2 if decades_shown > 7 else 1
    return [
        factor * 10.0**decade
        for decade in decades
        if decade % stride == 0
        for factor in factors
        if low <= factor * 10.0**decade * 1.0000001 and factor * 10.0**decade <= high * 1.0000001
    ]
