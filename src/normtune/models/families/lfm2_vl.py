"""LFM2-VL: SigLIP 2 on images and tiles of any size, and a language model of convolutions and attentions.

A small image is read as it is, a large one in tiles and once more as a whole (arXiv 2511.23404).
"""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from PIL.Image import Resampling
from transformers import BatchFeature, Lfm2VlProcessor
from transformers.image_processing_backends import PilBackend
from transformers.image_utils import SizeDict
from transformers.models.siglip2.image_processing_pil_siglip2 import convert_image_to_patches, pad_along_first_dim
from transformers.processing_utils import ImagesKwargs

from normtune.models.causal.family import CausalFamily
from normtune.models.types import Pixels


class ImageSettings(ImagesKwargs, total=False):  # type: ignore[call-arg]
    """The settings of LFM2-VL's preprocessor_config.json."""

    downsample_factor: int
    do_image_splitting: bool
    min_tiles: int
    max_tiles: int
    use_thumbnail: bool
    min_image_tokens: int
    max_image_tokens: int
    encoder_patch_size: int
    tile_size: int
    max_pixels_tolerance: float
    return_row_col_info: bool


class Lfm2VlImageProcessor(PilBackend):  # type: ignore[misc]
    """Transformers' image processor of this name by PIL: its own needs torchvision."""

    valid_kwargs = ImageSettings
    model_input_names = ["pixel_values", "pixel_attention_mask", "spatial_shapes"]  # noqa: RUF012
    downsample_factor, encoder_patch_size, tile_size = 2, 16, 512
    do_image_splitting = use_thumbnail = True
    min_tiles, max_tiles, min_image_tokens, max_image_tokens, max_pixels_tolerance = 2, 10, 64, 256, 2.0
    size, resample = {"height": 512, "width": 512}, Resampling.BILINEAR
    do_resize = do_rescale = do_normalize = do_convert_rgb = True
    image_mean = image_std = (0.5, 0.5, 0.5)

    def _preprocess(self, images: Any, return_tensors: Any = None, **settings: Any) -> Any:  # type: ignore[override]
        """Cut images [3, height, width] into tiles of patches.

        Returns:
            pixel_values [tiles of all images, patches, patch width], pixel_attention_mask [tiles, patches] and
            spatial_shapes [tiles, 2], the patches in height and width; for each image image_rows, image_cols and
            image_sizes, the height and width of the whole image as it is read.
        """
        use = SimpleNamespace(**settings)
        of_tile = (use.tile_size // use.encoder_patch_size) ** 2 if use.do_image_splitting else 0
        longest = max(use.max_image_tokens * use.downsample_factor**2, of_tile)
        of_images = ("image_rows", "image_cols", "image_sizes")
        data: dict[str, list[Any]] = {name: [] for name in (*self.model_input_names, *of_images)}
        for image in images:
            tiles, *sizes = self._tiles(image, use)
            for tile in tiles:
                values = self.normalize(self.rescale(tile, use.rescale_factor), use.image_mean, use.image_std)
                patches, mask = pad_along_first_dim(convert_image_to_patches(values, use.encoder_patch_size), longest)
                data["pixel_values"].append(patches)
                data["pixel_attention_mask"].append(mask)
                data["spatial_shapes"].append([edge // use.encoder_patch_size for edge in tile.shape[1:]])
            for name, value in zip(of_images, sizes, strict=True):
                data[name].append(value)
        arrays = {name: np.array(values) for name, values in data.items()}
        return BatchFeature(arrays, tensor_type=return_tensors)

    def _tiles(self, image: Any, use: Any) -> tuple[list[Any], int, int, list[int]]:
        """The tiles [3, height, width] of an image, their rows and columns, and the size of the whole image."""
        height, width = image.shape[1:]
        edge = use.encoder_patch_size * use.downsample_factor  # of the square that becomes one token
        smallest, largest = use.min_image_tokens * edge**2, use.max_image_tokens * edge**2
        whole = [max(edge, round(side / edge) * edge) for side in (height, width)]
        if (pixels := whole[0] * whole[1]) > largest:
            scale = (height * width / largest) ** 0.5
            whole = [max(edge, int(side / scale / edge) * edge) for side in (height, width)]
        elif pixels < smallest:
            scale = (smallest / (height * width)) ** 0.5
            whole = [int(np.ceil(side * scale / edge)) * edge for side in (height, width)]
        is_large = pixels > largest * use.max_pixels_tolerance
        if not is_large or not use.do_image_splitting or use.max_tiles == 1:
            return [self._resized(image, whole, use)], 1, 1, whole
        cols, rows = _grid(height, width, use)
        resized = self._resized(image, (rows * use.tile_size, cols * use.tile_size), use)
        tiles = [tile for row in np.split(resized, rows, 1) for tile in np.split(row, cols, 2)]
        if use.use_thumbnail and len(tiles) > 1:
            tiles.append(self._resized(image, whole, use))
        return tiles, rows, cols, whole

    def _resized(self, image: Any, size: Sequence[int], use: Any) -> Any:
        return self.resize(image, SizeDict(height=size[0], width=size[1]), use.resample)


def _grid(height: int, width: int, use: Any) -> tuple[int, int]:
    """The columns and rows of tiles with the ratio closest to the image's; of equal ones the larger if it is large."""
    every = {
        (w, h)
        for n in range(use.min_tiles, use.max_tiles + 1)
        for w in range(1, n + 1)
        for h in range(1, n + 1)
        if use.min_tiles <= w * h <= use.max_tiles
    }
    best, smallest = (1, 1), float("inf")
    for cols, rows in sorted(every, key=lambda grid: grid[0] * grid[1]):
        difference = abs(width / height - cols / rows)
        fills = height * width > 0.5 * use.tile_size**2 * cols * rows
        if difference < smallest or (difference == smallest and fills):
            best, smallest = (cols, rows), difference
    return best


class Lfm2VlFamily(CausalFamily):
    """LFM2-VL and LFM2.5-VL; their convolutions carry the last inputs from token to token."""

    processor_class, image_processor_class = Lfm2VlProcessor, Lfm2VlImageProcessor
    image_end_token = "image_end_token"
    concatenated_keys, unbatched_keys = ("pixel_values", "pixel_attention_mask", "spatial_shapes"), ("sizes",)

    def preprocess_image(self, image: Any) -> Pixels:
        """One image in tiles, as in `Lfm2VlImageProcessor`, and the sizes [4]: rows, columns, height, width."""
        prepared = self.processor.image_processor([image], return_tensors="pt")
        sizes = [prepared["image_rows"][0], prepared["image_cols"][0], *prepared["image_sizes"][0]]
        pixels = {name: prepared[name] for name in ("pixel_values", "pixel_attention_mask", "spatial_shapes")}
        return pixels | {"sizes": torch.tensor(sizes)}

    def image_text(self, pixels: Pixels) -> str:
        rows, cols, *size = pixels["sizes"].tolist()
        values = {"image_rows": [rows], "image_cols": [cols], "image_sizes": [size]}
        special = getattr(self.processor, "use_image_special_tokens", True)
        return self.processor.replace_image_token(values, 0, use_image_special_tokens=special)
