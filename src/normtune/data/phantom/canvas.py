"""A canvas for soft shapes, and the grey values of tissues. Coordinates run from -1 to 1, x to the right and y down."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Plane2D = NDArray[np.floating]  # [size, size]

# Tissue -> its grey value in CT, T1 and T2, 0 (black) to 1 (white). Their order is that of textbooks; they are not
# measured.
_VALUES: dict[str, tuple[float, float, float]] = {
    "air": (0.0, 0.02, 0.02),
    "lung": (0.10, 0.05, 0.05),
    "fat": (0.22, 0.90, 0.66),
    "muscle": (0.47, 0.42, 0.22),
    "soft": (0.42, 0.38, 0.34),
    "liver": (0.60, 0.58, 0.34),
    "spleen": (0.55, 0.40, 0.56),
    "kidney": (0.72, 0.48, 0.86),
    "stomach": (0.40, 0.30, 0.55),
    "heart": (0.62, 0.40, 0.30),
    "vessel": (0.76, 0.14, 0.08),
    "cortex": (1.0, 0.06, 0.06),
    "marrow": (0.86, 0.70, 0.48),
    "disc": (0.50, 0.35, 0.30),
    "fluid": (0.30, 0.12, 0.98),
    "pleural fluid": (0.40, 0.12, 0.98),
    "csf": (0.14, 0.10, 0.98),
    "gray matter": (0.50, 0.40, 0.58),
    "white matter": (0.42, 0.58, 0.40),
    "hemorrhage": (0.92, 0.95, 0.12),
    "edema": (0.24, 0.26, 0.84),
    "infarct": (0.26, 0.28, 0.80),
    "tumor rim": (0.74, 0.88, 0.80),
    "tumor core": (0.34, 0.24, 0.62),
    "mass": (0.36, 0.30, 0.70),
    "lung lesion": (0.58, 0.5, 0.5),
    "stone": (1.0, 0.05, 0.05),
}
# Look -> tissue -> grey value.
TISSUE: dict[str, dict[str, float]] = {
    look: {name: values[i] for name, values in _VALUES.items()} for i, look in enumerate(("ct", "t1", "t2"))
}


class Canvas:
    """A grey image, and the slightly bent coordinates in which shapes are drawn on it.

    Args:
        size: width and height in pixels.
        rng: source of textures, jitter and offsets.
        zoom: above 1 enlarges the anatomy.
        shift: (x, y) of the anatomy's centre.
    """

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
        # Bent coordinates make outlines irregular: without them every organ would be a perfect ellipse.
        self.x: Plane2D = cos * column + sin * row + self.texture(5, 0.018)
        self.y: Plane2D = cos * row - sin * column + self.texture(5, 0.018)
        self.value: Plane2D = np.zeros((size, size), np.float32)
        self.pixel = 2 / size  # width of a pixel in coordinates

    def texture(self, cells: int, amplitude: float) -> Plane2D:
        """Smooth noise: standard deviation about `amplitude`, `cells` bumps across, at any image size."""
        coarse = self.rng.standard_normal((cells, cells)).astype(np.float32)
        smooth = Image.fromarray(coarse).resize((self.size, self.size), Image.Resampling.BICUBIC)
        return np.asarray(smooth) * np.float32(amplitude * 1.3)

    def ellipse(self, cx: float, cy: float, rx: float, ry: float, tilt_deg: float = 0.0, soft: float = 0.02) -> Plane2D:
        """Mask of an ellipse: 1 inside, 0 outside, with an edge about `soft` wide."""
        dx, dy = self.x - np.float32(cx), self.y - np.float32(cy)
        if tilt_deg:
            cos, sin = math.cos(math.radians(tilt_deg)), math.sin(math.radians(tilt_deg))
            dx, dy = dx * np.float32(cos) + dy * np.float32(sin), dy * np.float32(cos) - dx * np.float32(sin)
        inside = 1 - (dx * np.float32(1 / rx)) ** 2 - (dy * np.float32(1 / ry)) ** 2
        # With r the relative radius, 1 - r^2 is near the edge about 2 * distance / radius.
        return self.edge(inside * np.float32(min(rx, ry) / 2), soft)

    def edge(self, distance: Plane2D, soft: float = 0.02) -> Plane2D:
        """Convert a signed distance (positive inside) to a mask with a soft edge."""
        mask = distance * np.float32(1 / max(soft, self.pixel)) + np.float32(0.5)
        return np.clip(mask, 0, 1, out=mask)

    def band(self, distance: Plane2D, width: float, soft: float = 0.01) -> Plane2D:
        """Mask of a line where `distance` is 0, `width` wide but at least a pixel."""
        return self.edge(np.float32(max(width, self.pixel) / 2) - np.abs(distance), soft)

    def paint(self, mask: Plane2D, value: float | Plane2D) -> None:
        """Blend `value` over the image where the mask is above 0."""
        self.value += mask * (value - self.value)

    def jitter(self, spread: float) -> float:
        """A random factor near 1, uniform in 1 - spread to 1 + spread."""
        return 1 + float(self.rng.uniform(-spread, spread))

    def offset(self, spread: float) -> float:
        """A random number near 0, uniform in -spread to spread."""
        return float(self.rng.uniform(-spread, spread))
