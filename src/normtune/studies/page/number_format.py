"""Numbers as a reader wants them: as many digits as they are worth, with their unit."""

from __future__ import annotations

import math

NONE = "–"
MINUS = "\u2212"


def fixed(value: float | None, digits: int) -> str:
    """`value` with `digits` decimals and a true minus sign; a dash where there is none."""
    if value is None or not math.isfinite(value):
        return NONE
    text = f"{abs(value):,.{digits}f}"
    return text if value >= 0 or float(text.replace(",", "")) == 0 else MINUS + text


def significant(value: float | None, digits: int = 3) -> str:
    """`value` with `digits` significant digits, never as a power of ten above 1e-6."""
    if value is None or not math.isfinite(value):
        return NONE
    if value == 0:
        return "0"
    places = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    return fixed(value, places) if places <= 9 else f"{value:.{digits - 1}e}".replace("-", MINUS)


def percent(fraction: float | None, digits: int = 1) -> str:
    """0.4712 as 47.1."""
    return fixed(None if fraction is None else 100 * fraction, digits)


def points(fraction: float | None) -> str:
    """A difference of fractions in percentage points, signed: 0.028 as +2.8."""
    text = percent(fraction)
    return text if text.startswith((MINUS, NONE)) or float(text) == 0 else f"+{text}"


def tick(value: float) -> str:
    """A round value of an axis: 0.1, 2, 50, 1,000."""
    return f"{value:,.10g}" if value >= 0 else MINUS + f"{-value:,.10g}"


def share(fraction: float | None) -> str:
    """A share as a percentage with its sign: 0.29%, 0.0035%, 23.9%, 100%; round ones without decimals."""
    if fraction is None:
        return NONE
    if abs(100 * fraction - round(100 * fraction)) < 1e-9:
        return f"{100 * fraction:.0f}%"
    return f"{significant(100 * fraction, 3 if fraction >= 0.1 else 2)}%"


def memory(size: float | None) -> str:
    """Bytes as MB or GB (powers of ten)."""
    if size is None:
        return NONE
    return f"{fixed(size / 1e9, 1)} GB" if size >= 1e9 else f"{fixed(size / 1e6, 0)} MB"


def duration(seconds: float | None) -> str:
    """Seconds as s, min or h."""
    if seconds is None:
        return NONE
    if seconds < 100:
        return f"{significant(seconds, 2)} s"
    if seconds < 6000:
        return f"{significant(seconds / 60, 2 if seconds >= 600 else 3)} min"
    return f"{significant(seconds / 3600, 3)} h"


def p_value(p: float | None) -> str:
    """A p-value as it stands in a sentence: "p = 0.03", "p < 0.001"."""
    if p is None:
        return f"p {NONE}"
    return "p < 0.001" if p < 0.001 else f"p = {significant(p, 1 if p < 0.01 else 2)}"


def several(names: list[str]) -> str:
    """a, b and c."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}" if names else "none"
