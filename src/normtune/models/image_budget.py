"""`--max-pixels`: the most pixels of an image that a model reads, for families with image tokens that depend on it.

Families that read images of any size scale them down; those that cut images into tiles take fewer of them. The image
processor does both, so that the result is what transformers gives with the same setting.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

from normtune.errors import InputError

Settings = dict[str, Any]  # attributes of the image processor


def limited_settings(processor: Any, model_type: str, max_pixels: int | None) -> Settings:
    """The image processor's attributes for at most this many pixels an image; with None as they are.

    Raises:
        InputError: the family reads every image at one size, or the number is less than its smallest image.
    """
    find_settings = _BY_TYPE.get(model_type)
    if find_settings is None:
        if max_pixels is None:
            return {}
        raise InputError(
            f"--max-pixels: models of type {model_type} read every image with the same number of tokens. Leave it out."
        )
    smallest, settings = find_settings(processor, math.inf if max_pixels is None else max_pixels)
    if max_pixels is not None and max_pixels < smallest:
        raise InputError(f"--max-pixels {max_pixels}: this model reads at least {smallest} pixels of an image.")
    if max_pixels is None:
        return {name: getattr(processor, name) for name in settings}
    return settings


def _any_size(processor: Any, max_pixels: float, *, counts_frames: bool = False) -> tuple[int, Settings]:
    """Qwen-VL: an image is scaled to whole patches, within an area.

    Args:
        counts_frames: an image counts as `temporal_patch_size` frames of a video (GLM-4.1V).
    """
    smallest = (processor.patch_size * processor.merge_size) ** 2
    frames = processor.temporal_patch_size if counts_frames else 1
    area = int(min(frames * max_pixels, processor.size["longest_edge"]))
    limits = {"longest_edge": area, "shortest_edge": min(processor.size["shortest_edge"], area)}
    return smallest, {"size": type(processor.size)(**dict(processor.size) | limits)}


def _tile_grids(processor: Any, max_pixels: float) -> tuple[int, Settings]:
    """LLaVA-NeXT and OneVision: an image is scaled to one of several grids of tiles."""
    grids = [[int(side) for side in grid] for grid in processor.image_grid_pinpoints]
    return min(map(math.prod, grids)), {"image_grid_pinpoints": [g for g in grids if math.prod(g) <= max_pixels]}


def _tiles(processor: Any, max_pixels: float) -> tuple[int, Settings]:
    """InternVL: an image is cut into a number of square patches; a small copy of it is read besides."""
    patch = processor.size["height"] * processor.size["width"]
    most = min(processor.max_patches, max(1, int(min(max_pixels, patch * processor.max_patches) // patch)))
    return patch, {"max_patches": most, "min_patches": min(processor.min_patches, most)}


def _square_of_tiles(processor: Any, max_pixels: float) -> tuple[int, Settings]:
    """Idefics3: the longer side is scaled to whole tiles."""
    tile, longest = processor.max_image_size["longest_edge"], processor.size["longest_edge"]
    sides = max(1, int(math.sqrt(min(max_pixels, longest**2)) // tile))
    size = dict(processor.size) | {"longest_edge": min(longest, sides * tile)}
    return tile**2, {"size": type(processor.size)(**size)}


_BY_TYPE: dict[str, Callable[[Any, float], tuple[int, Settings]]] = {
    **dict.fromkeys(("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe"), _any_size),
    "glm4v": partial(_any_size, counts_frames=True),
    **dict.fromkeys(("llava_next", "llava_onevision"), _tile_grids),
    "internvl": _tiles,
    **dict.fromkeys(("idefics3", "smolvlm"), _square_of_tiles),
}
