"""Places for the names of marks, so that none lies on another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

FONT = 12.5
ADVANCE = 0.59 * FONT  # mean width of a letter in the page's fonts


@dataclass(frozen=True)
class Box:
    """A rectangle, y downward."""

    left: float
    top: float
    right: float
    bottom: float

    def overlap(self, other: Box) -> float:
        """The area that both cover."""
        width = min(self.right, other.right) - max(self.left, other.left)
        height = min(self.bottom, other.bottom) - max(self.top, other.top)
        return max(0.0, width) * max(0.0, height)


@dataclass(frozen=True)
class Place:
    """Where a name is written: its baseline's anchor point, and whether a line leads to its mark."""

    x: float
    y: float
    anchor: str  # start, middle, end
    leader: bool


def width_of(text: str) -> float:
    """About how wide a text is."""
    return ADVANCE * len(text)


def beside(
    names: Sequence[str], marks: Sequence[tuple[float, float]], taken: Sequence[Box], frame: Box
) -> list[Place]:
    """A place for each name near its mark, the least crowded of those around it.

    Args:
        names: the texts.
        marks: where the marks are.
        taken: what else may not be covered: marks, intervals.
        frame: the names stay within it.
    """
    places: dict[int, Place] = {}
    covered = list(taken)
    for index in sorted(range(len(names)), key=lambda index: marks[index]):

        def crowded(candidate: tuple[Place, float], name: str = names[index]) -> float:
            place, penalty = candidate
            box = _box(name, place)
            outside = (box.right - box.left) * (box.bottom - box.top) - box.overlap(frame)
            return penalty + 12 * outside + sum(box.overlap(other) for other in covered)

        places[index], _ = min(_candidates(*marks[index]), key=crowded)
        covered.append(_box(names[index], places[index]))
    return [places[index] for index in range(len(names))]


def _candidates(x: float, y: float) -> list[tuple[Place, float]]:
    near = [
        (Place(x + 8, y - 6, "start", False), 0.0),
        (Place(x - 8, y - 6, "end", False), 2.0),
        (Place(x + 8, y + 14, "start", False), 3.0),
        (Place(x - 8, y + 14, "end", False), 4.0),
        (Place(x + 10, y + 4, "start", False), 1.0),
        (Place(x - 10, y + 4, "end", False), 3.0),
    ]
    far = [
        (
            Place(x + side * (8 + reach / 3), y + up * reach + 4, "start" if side > 0 else "end", True),
            8 + reach,
        )
        for reach in (24, 36, 50, 66)
        for side in (1, -1)
        for up in (-1, 1)
    ]
    return near + far


def _box(name: str, place: Place) -> Box:
    width = width_of(name)
    left = place.x - {"start": 0.0, "middle": width / 2, "end": width}[place.anchor]
    return Box(left, place.y - 0.8 * FONT, left + width, place.y + 0.25 * FONT)


def spread(wanted: Sequence[float], low: float, high: float, gap: float = FONT + 1.5) -> list[float]:
    """Heights near the wanted ones, at least `gap` apart, between low and high where there is room."""
    order = sorted(range(len(wanted)), key=lambda index: wanted[index])
    gap = min(gap, (high - low) / max(1, len(wanted) - 1)) if len(wanted) > 1 else gap
    placed: list[float] = []
    for index in order:
        placed.append(max(wanted[index], placed[-1] + gap if placed else low))
    ceiling = high
    for position in reversed(range(len(placed))):  # push back what has run over the end
        placed[position] = min(placed[position], ceiling)
        ceiling = placed[position] - gap
    result = [0.0] * len(wanted)
    for index, height in zip(order, placed, strict=True):
        result[index] = height
    return result
