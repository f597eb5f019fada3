"""Renders a scene as an image, with the geometry, grey values and noise of a hospital's scanners."""

from __future__ import annotations

import random
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from normtune.data.phantom import abdomen, chest, head
from normtune.data.phantom.canvas import Canvas
from normtune.data.phantom.scene import PROFILES, Hospital, HospitalName, Scene

_DRAW = {  # (region, plane) -> drawing function
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
    """Geometry, grey values and noise of one image. Lengths are in units of half the image's width."""

    zoom: float
    rotation_deg: float
    shift: tuple[float, float]
    gamma: float
    black: float  # grey value of no signal
    white: float  # grey value of full signal
    noise: float  # standard deviation
    blur: float
    inverted: bool  # displayed as MONOCHROME1
    marker: bool  # the side marker, a letter L


def sample_acquisition(scene: Scene, hospital: HospitalName) -> Acquisition:
    """Sample the acquisition of a scene at a hospital; it depends only on these two.

    B has a wider field of view, flatter contrast, more noise and blur. A third of its images is inverted.
    """
    scanners = PROFILES[hospital].acquisition
    rng = random.Random(f"acquisition-{scanners}-{scene.seed}")
    if scanners == "a":
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
    scene: Scene, hospital: HospitalName, size: int = 96, rng: np.random.Generator | None = None
) -> NDArray[np.uint8]:
    """Draw a scene as a grey image.

    Args:
        scene: the scene; its seed determines the shapes of the anatomy.
        size: width and height in pixels.
        rng: source of the noise; None derives it from the scene's seed.

    Returns:
        The image, shape [size, size].
    """
    settings = sample_acquisition(scene, hospital)
    canvas = Canvas(
        size,
        np.random.default_rng((scene.seed, 0)),
        zoom=settings.zoom,
        rotation_deg=settings.rotation_deg,
        shift=settings.shift,
    )
    _DRAW[scene.region, scene.plane](canvas, scene)
    value = np.clip(canvas.value, 0, 1)
    if scene.modality == "mri":
        value *= 1 + canvas.texture(3, 0.06)  # uneven brightness of the receiver coil
    if settings.marker:
        _paint_marker(value, PROFILES[hospital].acquisition)
    if settings.blur * size / 2 > 0.3:
        # Blur in 8 bits, as PIL cannot filter floats; the noise that is added next hides the rounding.
        grey = Image.fromarray((np.clip(value, 0, 1) * 255).astype(np.uint8))
        value = np.asarray(grey.filter(ImageFilter.GaussianBlur(settings.blur * size / 2)), np.float32) / 255
    noise_rng = rng if rng is not None else np.random.default_rng((scene.seed, 1))
    value = np.clip(value, 0, 1) ** np.float32(settings.gamma)
    value = value + noise_rng.standard_normal(value.shape, np.float32) * np.float32(settings.noise)
    value = settings.black + np.clip(value, 0, 1) * np.float32(settings.white - settings.black)
    if settings.inverted:
        value = 1 - value
    return np.rint(value * 255).astype(np.uint8)


def _paint_marker(value: NDArray[np.float32], hospital: Hospital) -> None:
    """Paint the side marker, an L at the patient's left: small at the top (A), larger at the bottom (B)."""
    size = len(value)
    height, top = (0.07, 0.03) if hospital == "a" else (0.10, 0.87)
    for x0, x1, y0, y1 in _LETTER_L:
        rows = slice(round((top + y0 * height) * size), max(1, round((top + y1 * height) * size)))
        columns = slice(round((0.90 + x0 * height) * size), round((0.90 + x1 * height) * size))
        value[rows, columns] = 0.95
