"""Positions for the labels of marks, chosen to avoid overlaps. Lengths are pixels; y grows downward."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

FONT = 12.5  # font size of labels
ADVANCE = 0.59 * FONT  # mean width of a letter in the page's fonts, measured


@dataclass(frozen=True)
class Box:
    """A rectangle; y grows downward."""

    left: float
    top: float
    right: float
    bottom: float

    def overlap(self, other: Box) -> float:
        """The area that both boxes cover."""
        width = min(self.right, other.right) - max(self.left, other.left)
        height = min(self.bottom, other.bottom) - max(self.top, other.top)
        return max(0.0, width) * max(0.0, height)


@dataclass(frozen=True)
class LabelPosition:
    """The anchor point of a label on its baseline, and whether a line joins the label and its mark."""

    x: float
    y: float
    anchor: str  # start, middle, end
    leader: bool


def text_width(text: str) -> float:
    """The approximate width of a text."""
    return ADVANCE * len(text)


def place_labels(
    names: Sequence[str], marks: Sequence[tuple[float, float]], occupied: Sequence[Box], frame: Box
) -> list[LabelPosition]:
    """A position for each label near its mark, where it covers as little as possible.

    Labels are placed from left to right, each at the candidate of lowest cost; a placed label counts as
    occupied.

    Args:
        names: the labels' texts.
        marks: (x, y) of each mark.
        occupied: boxes that labels should not cover: marks and intervals.
        frame: labels should stay inside it.
    """
    positions: dict[int, LabelPosition] = {}
    boxes = list(occupied)
    for index in sorted(range(len(names)), key=lambda index: marks[index]):

        def cost(candidate: tuple[LabelPosition, float], name: str = names[index]) -> float:
            position, penalty = candidate
            box = _label_box(name, position)
            # covered area in pixels; area outside the frame is twelve times as bad
            outside = (box.right - box.left) * (box.bottom - box.top) - box.overlap(frame)
            return penalty + 12 * outside + sum(box.overlap(other) for other in boxes)

        positions[index], _ = min(_candidate_positions(*marks[index]), key=cost)
        boxes.append(_label_box(names[index], positions[index]))
    return [positions[index] for index in range(len(names))]


def _candidate_positions(x: float, y: float) -> list[tuple[LabelPosition, float]]:
    """Positions around a mark with their penalties: six next to it, and sixteen farther away with a line."""
    near = [
        (LabelPosition(x + 8, y - 6, "start", False), 0.0),
        (LabelPosition(x - 8, y - 6, "end", False), 2.0),
        (LabelPosition(x + 8, y + 14, "start", False), 3.0),
        (LabelPosition(x - 8, y + 14, "end", False), 4.0),
        (LabelPosition(x + 10, y + 4, "start", False), 1.0),
        (LabelPosition(x - 10, y + 4, "end", False), 3.0),
    ]
    far = [
        (
            LabelPosition(x + side * (8 + reach / 3), y + vertical * reach + 4, "start" if side > 0 else "end", True),
            8 + reach,
        )
        for reach in (24, 36, 50, 66)
        for side in (1, -1)
        for vertical in (-1, 1)
    ]
    return near + far


def _label_box(name: str, position: LabelPosition) -> Box:
    """The box that a label covers at a position."""
    width = text_width(name)
    left = position.x - {"start": 0.0, "middle": width / 2, "end": width}[position.anchor]
    return Box(left, position.y - 0.8 * FONT, left + width, position.y + 0.25 * FONT)


def spread_heights(heights: Sequence[float], low: float, high: float, gap: float = FONT + 1.5) -> list[float]:
    """Heights as near as possible to the given ones, at least `gap` apart.

    Args:
        heights: the preferred heights.
        low: the least height.
        high: the greatest height; with too little room for all, the gaps are made smaller.
    """
    order = sorted(range(len(heights)), key=lambda index: heights[index])
    gap = min(gap, (high - low) / max(1, len(heights) - 1)) if len(heights) > 1 else gap
    spread: list[float] = []
    for index in order:
        spread.append(max(heights[index], spread[-1] + gap if spread else low))
    limit = high
    for position in reversed(range(len(spread))):  # move the labels beyond `high` back up to it
        spread[position] = min(spread[position], limit)
        limit = spread[position] - gap
    result = [0.0] * len(heights)
    for index, height in zip(order, spread, strict=True):
        result[index] = height
    return result
