"""Numbers as text with a sensible number of digits, and with their unit."""

from __future__ import annotations

import math
from collections.abc import Mapping

NONE = "–"  # a value that is missing
MINUS = "\u2212"  # the true minus sign


def format_fixed(value: float | None, digits: int) -> str:
    """`value` with `digits` decimals and a true minus sign; a dash if there is no finite value."""
    if value is None or not math.isfinite(value):
        return NONE
    text = f"{abs(value):,.{digits}f}"
    return text if value >= 0 or float(text.replace(",", "")) == 0 else MINUS + text


def format_significant(value: float | None, digits: int = 3) -> str:
    """`value` with `digits` significant digits; as a power of ten only if it is very small."""
    if value is None or not math.isfinite(value):
        return NONE
    if value == 0:
        return "0"
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    return format_fixed(value, decimals) if decimals <= 9 else f"{value:.{digits - 1}e}".replace("-", MINUS)


def format_percent(fraction: float | None, digits: int = 1) -> str:
    """A fraction times 100, without the sign: 0.4712 as 47.1."""
    return format_fixed(None if fraction is None else 100 * fraction, digits)


def format_points(fraction: float | None) -> str:
    """A difference of fractions in percentage points with its sign: 0.028 as +2.8."""
    text = format_percent(fraction)
    return text if text.startswith((MINUS, NONE)) or float(text) == 0 else f"+{text}"


def format_tick(value: float) -> str:
    """A round value on an axis: 0.1, 2, 50, 1,000."""
    return f"{value:,.10g}" if value >= 0 else MINUS + f"{-value:,.10g}"


def format_share(fraction: float | None) -> str:
    """A fraction in percent: 0.29%, 0.0035%, 23.9%, 100%; whole percentages without decimals."""
    if fraction is None:
        return NONE
    if abs(100 * fraction - round(100 * fraction)) < 1e-9:
        return f"{100 * fraction:.0f}%"
    return f"{format_significant(100 * fraction, 3 if fraction >= 0.1 else 2)}%"


def format_bytes(size: float | None) -> str:
    """A number of bytes in MiB or GiB, the units of `normtune train` and `normtune inspect`."""
    if size is None:
        return NONE
    return f"{format_fixed(size / 2**30, 1)} GiB" if size >= 2**30 else f"{format_fixed(size / 2**20, 0)} MiB"


def format_duration(seconds: float | None) -> str:
    """Seconds in s, min or h."""
    if seconds is None:
        return NONE
    if seconds < 100:
        return f"{format_significant(seconds, 2)} s"
    if seconds < 6000:
        return f"{format_significant(seconds / 60, 2 if seconds >= 600 else 3)} min"
    return f"{format_significant(seconds / 3600, 3)} h"


def format_p_value(p: float | None) -> str:
    """A p-value as it is written in a sentence: "p = 0.03", "p < 0.001"."""
    number = format_p_number(p)
    return f"p {number}" if p is None or p < 0.001 else f"p = {number}"


def format_p_number(p: float | None) -> str:
    """A p-value as it is written in a table: "0.03", "< 0.001"."""
    if p is None:
        return NONE
    return "< 0.001" if p < 0.001 else format_significant(p, 1 if p < 0.01 else 2)


def join_names(names: list[str]) -> str:
    """Names joined as "a, b and c"; "none" for an empty list."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}" if names else "none"


def format_interval(interval: Mapping[str, float], *, scale: float = 100, digits: int = 1, sign: str = "") -> str:
    """A score as `value [low, high]`, as commands print it.

    Args:
        interval: has the keys value, low and high.
        scale: the numbers are multiplied by it: 100 gives percentages.
        sign: "+" shows the sign of positive numbers too.
    """
    value, low, high = (f"{scale * interval[end]:{sign}.{digits}f}" for end in ("value", "low", "high"))
    return f"{value} [{low}, {high}]"
