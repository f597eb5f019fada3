"""Conversion of grey values of any bit depth to 8-bit pixels, and the limit on the size of an image."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from normtune.errors import InputError

MAX_PIXELS = 89_478_485  # Pillow's limit for decompression bombs: a quarter of a gigabyte as RGB
Window = tuple[float, float]  # (centre, width), in the units of the rescaled values (Hounsfield units for CT)


def check_size(width: int, height: int, name: str) -> None:
    """Raise an `InputError` if an image has no pixels, or more than `MAX_PIXELS`."""
    if width * height > MAX_PIXELS:
        raise InputError(
            f"{name}: the image has {width} x {height} pixels, more than the limit of {MAX_PIXELS:,}. Make it smaller."
        )
    if width < 1 or height < 1:
        raise InputError(f"{name}: the image has no pixels. Replace the file.")


def apply_window(values: NDArray[np.floating], window: Window, function: str = "LINEAR") -> NDArray[np.floating]:
    """Map values to [0, 1] with a VOI window.

    Example: the window (40, 400) maps -160 to 0, 40 to about 0.5 and 240 to 1; values outside are clipped.

    Source: DICOM PS3.3 C.11.2.1.2 (LINEAR, the default), C.11.2.1.3 (SIGMOID and LINEAR_EXACT).

    Args:
        window: (centre, width).
        function: LINEAR, LINEAR_EXACT or SIGMOID.

    Raises:
        InputError: the width is not positive, or for LINEAR below 1.
    """
    centre, width = window
    if not (width >= 1 if function == "LINEAR" else width > 0) or not np.isfinite([centre, width]).all():
        raise InputError(f"window width {width:g} is too small. It must be 1 or more.")
    if function == "SIGMOID":
        return 1 / (1 + np.exp(np.clip(-4 * (values - centre) / width, -80, 80)))
    if function == "LINEAR_EXACT":
        return np.clip((values - centre) / width + 0.5, 0, 1)
    if width == 1:
        return (values > centre - 0.5).astype(values.dtype)
    return np.clip((values - (centre - 0.5)) / (width - 1) + 0.5, 0, 1)


def stretch_full_range(values: NDArray[np.floating]) -> NDArray[np.floating]:
    """Map values to [0, 1] by their smallest and largest finite value; all zero if all values are equal."""
    finite = values[np.isfinite(values)]
    if finite.size == 0 or finite.min() == finite.max():
        return np.zeros_like(values)
    low, high = finite.min(), finite.max()
    return np.clip((np.nan_to_num(values, nan=low, posinf=high, neginf=low) - low) / (high - low), 0, 1)


def grey_to_rgb(values: NDArray[np.floating]) -> Image.Image:
    """Convert grey values in [0, 1], shape [rows, columns], to an 8-bit RGB image."""
    return Image.fromarray(np.round(values * 255).astype(np.uint8)).convert("RGB")
