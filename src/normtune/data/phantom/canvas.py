"""Soft shapes on a grid of normalised coordinates: x to the right and y down, from -1 to 1."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Plane2D = NDArray[np.floating]  # [size, size]


class Canvas:
    """A grey image being painted, and the (slightly bent) coordinates that its shapes are drawn in."""

    def __init__(
        self,
        size: int,
        rng: np.random.Generator,
        *,
        zoom: float = 1.0,
        rotation_deg: float = 0.0,
        shift: tuple[float, float] = (0.0, 0.0),
    ) -> None:
        self.size, self.rng = size, rng
        axis = (np.arange(size, dtype=np.float32) + 0.5) * np.float32(2 / size) - np.float32(1)
        column, row = (axis - np.float32(shift[0]))[None, :], (axis - np.float32(shift[1]))[:, None]
        cos, sin = math.cos(math.radians(rotation_deg)) / zoom, math.sin(math.radians(rotation_deg)) / zoom
        # Bending the coordinates a little keeps every outline from being a perfect ellipse.
        self.x: Plane2D = cos * column + sin * row + self.texture(5, 0.018)
        self.y: Plane2D = cos * row - sin * column + self.texture(5, 0.018)
        self.value: Plane2D = np.zeros((size, size), np.float32)
        self.pixel = 2 / size

    def texture(self, cells: int, amplitude: float) -> Plane2D:
        """Smooth noise of standard deviation about `amplitude`, `cells` bumps across, alike at any size."""
        coarse = self.rng.standard_normal((cells, cells)).astype(np.float32)
        smooth = Image.fromarray(coarse).resize((self.size, self.size), Image.Resampling.BICUBIC)
        return np.asarray(smooth) * np.float32(amplitude * 1.3)

    def ellipse(
        self, cx: float, cy: float, rx: float, ry: float, tilt_deg: float = 0.0, soft: float = 0.02
    ) -> Plane2D:
        """1 inside, 0 outside, with an edge about `soft` wide."""
        dx, dy = self.x - np.float32(cx), self.y - np.float32(cy)
        if tilt_deg:
            cos, sin = math.cos(math.radians(tilt_deg)), math.sin(math.radians(tilt_deg))
            dx, dy = dx * np.float32(cos) + dy * np.float32(sin), dy * np.float32(cos) - dx * np.float32(sin)
        inside = 1 - (dx * np.float32(1 / rx)) ** 2 - (dy * np.float32(1 / ry)) ** 2
        # Near the edge 1 - r^2 is about twice the distance over the radius.
        return self.edge(inside * np.float32(min(rx, ry) / 2), soft)

    def edge(self, distance: Plane2D, soft: float = 0.02) -> Plane2D:
        """A signed distance (positive inside) as a mask with a soft edge."""
        mask = distance * np.float32(1 / max(soft, self.pixel)) + np.float32(0.5)
        return np.clip(mask, 0, 1, out=mask)

    def band(self, distance: Plane2D, width: float, soft: float = 0.01) -> Plane2D:
        """A line `width` wide where `distance` is 0, never thinner than a pixel."""
        return self.edge(np.float32(max(width, self.pixel) / 2) - np.abs(distance), soft)

    def paint(self, mask: Plane2D, value: float | Plane2D) -> None:
        """Cover what is under the mask."""
        self.value += mask * (value - self.value)

    def jitter(self, spread: float) -> float:
        """A number near 1: uniform within `spread`."""
        return 1 + float(self.rng.uniform(-spread, spread))

    def offset(self, spread: float) -> float:
        """A number near 0: uniform within `spread`."""
        return float(self.rng.uniform(-spread, spread))
