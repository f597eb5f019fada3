"""How a hospital's scanners and display turn a drawn anatomy into an image."""

from __future__ import annotations

import random
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from normtune.data.phantom import abdomen, chest, head
from normtune.data.phantom.canvas import Canvas
from normtune.data.phantom.scene import Hospital, Scene

_DRAW = {
    ("chest", "frontal"): chest.draw_radiograph,
    ("chest", "axial"): chest.draw_axial,
    ("chest", "coronal"): chest.draw_coronal,
    ("abdomen", "axial"): abdomen.draw_axial,
    ("abdomen", "coronal"): abdomen.draw_coronal,
    ("head", "axial"): head.draw_axial,
    ("head", "sagittal"): head.draw_sagittal,
}
# The letter L as strokes (x0, x1, y0, y1) in a box of one unit.
_LETTER_L = ((0.0, 0.25, 0.0, 1.0), (0.25, 0.8, 0.75, 1.0))


@dataclass(frozen=True)
class Acquisition:
    """Geometry, grey map and noise of one image; lengths in units of half the image's width."""

    zoom: float
    rotation_deg: float
    shift: tuple[float, float]
    gamma: float
    black: float  # grey value of no signal
    white: float  # grey value of full signal
    noise: float  # standard deviation
    blur: float
    inverted: bool  # displayed as MONOCHROME1
    marker: bool


def acquisition(scene: Scene, hospital: Hospital) -> Acquisition:
    """The acquisition of one scene at one hospital, a function of both alone.

    B shows a wider field of view, flatter contrast, more noise and blur, and a third of it inverted.
    """
    rng = random.Random(f"acquisition-{hospital}-{scene.seed}")
    if hospital == "a":
        return Acquisition(
            zoom=rng.uniform(0.95, 1.05),
            rotation_deg=rng.uniform(-4, 4),
            shift=(rng.uniform(-0.03, 0.03), rng.uniform(-0.03, 0.03)),
            gamma=rng.uniform(0.88, 1.12),
            black=rng.uniform(0.0, 0.04),
            white=rng.uniform(0.94, 1.0),
            noise=rng.uniform(0.01, 0.03),
            blur=rng.uniform(0.0, 0.008),
            inverted=rng.random() < 0.03,
            marker=scene.modality == "x-ray" and rng.random() < 0.5,
        )
    return Acquisition(
        zoom=rng.uniform(0.84, 0.94),
        rotation_deg=rng.uniform(-9, 9),
        shift=(rng.uniform(-0.06, 0.06), rng.uniform(-0.06, 0.06)),
        gamma=rng.choice((rng.uniform(0.55, 0.75), rng.uniform(1.35, 1.7))),
        black=rng.uniform(0.08, 0.16),
        white=rng.uniform(0.74, 0.88),
        noise=rng.uniform(0.04, 0.07),
        blur=rng.uniform(0.010, 0.018),
        inverted=rng.random() < 0.33,
        marker=rng.random() < 0.5,
    )


def render(
    scene: Scene, hospital: Hospital, size: int = 96, rng: np.random.Generator | None = None
) -> NDArray[np.uint8]:
    """Draw a scene as a grey image [size, size].

    The anatomy's shapes come from `scene.seed`; `rng` makes the noise alone (default: also from the seed).
    """
    how = acquisition(scene, hospital)
    canvas = Canvas(
        size,
        np.random.default_rng((scene.seed, 0)),
        zoom=how.zoom,
        rotation_deg=how.rotation_deg,
        shift=how.shift,
    )
    _DRAW[scene.region, scene.plane](canvas, scene)
    value = np.clip(canvas.value, 0, 1)
    if scene.modality == "mri":
        value *= 1 + canvas.texture(3, 0.06)  # coil shading
    if how.marker:
        _paint_marker(value, hospital)
    if how.blur * size / 2 > 0.3:
        # Blur in 8 bits: PIL filters no floats, and the noise added next hides the rounding.
        grey = Image.fromarray((np.clip(value, 0, 1) * 255).astype(np.uint8))
        value = np.asarray(grey.filter(ImageFilter.GaussianBlur(how.blur * size / 2)), np.float32) / 255
    noise_rng = rng if rng is not None else np.random.default_rng((scene.seed, 1))
    value = np.clip(value, 0, 1) ** np.float32(how.gamma)
    value = value + noise_rng.standard_normal(value.shape, np.float32) * np.float32(how.noise)
    value = how.black + np.clip(value, 0, 1) * np.float32(how.white - how.black)
    if how.inverted:
        value = 1 - value
    return np.rint(value * 255).astype(np.uint8)


def _paint_marker(value: NDArray[np.float32], hospital: Hospital) -> None:
    """The side marker: an L at the patient's left; A has it at the top, B larger and at the bottom."""
    size = len(value)
    height, top = (0.07, 0.03) if hospital == "a" else (0.10, 0.87)
    for x0, x1, y0, y1 in _LETTER_L:
        rows = slice(round((top + y0 * height) * size), max(1, round((top + y1 * height) * size)))
        columns = slice(round((0.90 + x0 * height) * size), round((0.90 + x1 * height) * size))
        value[rows, columns] = 0.95
