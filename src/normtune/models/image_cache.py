"""Images as a family takes them, held in memory and, where their encoder is frozen, on disk.

What an image encoder makes of an image is kept by two digests: of all values and settings that it depends on,
and of the processed image. An encoder whose norms were tuned, or an image that was processed otherwise, has
other digests; nothing of a file's name or of a patient is in them.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from normtune.data.records import Dataset
from normtune.errors import InputError
from normtune.models.part_names import IMAGE_PARTS
from normtune.models.parts import part_of
from normtune.runtime.tensor_cache import TensorCache, digest

if TYPE_CHECKING:
    from normtune.models.family import Family
    from normtune.models.types import Pixels


LIMIT_BYTES = 2 << 30  # of one cache in memory
_PASSING = ("_name_or_path", "architectures", "transformers_version")  # in a config, and decide no value


class ImageCache:
    """Processed images by key, kept while they fit in `limit_bytes`; the rest are opened again each time.

    With `frozen`, what the image encoder makes of them: the tower runs once an image, not once a step; with a
    `store` (see `image_store`), once for all runs that share it.
    """

    def __init__(
        self,
        family: Family,
        dataset: Dataset,
        *,
        frozen: bool = False,
        store: TensorCache | None = None,
        limit_bytes: int = LIMIT_BYTES,
    ) -> None:
        self.family, self.dataset, self.limit_bytes = family, dataset, limit_bytes
        self.frozen, self.store = frozen, store
        self.held: dict[str, Pixels] = {}
        self.bytes = 0
        self._digests: dict[str, str] = {}

    def __call__(self, key: str) -> Pixels:
        """One image.

        Raises:
            InputError: it cannot be read.
        """
        if key in self.held:
            return self.held[key]
        pixels = self._seen(key) if self.frozen else read_pixels(self.family, self.dataset, key)
        size = size_of(pixels)
        if self.bytes + size <= self.limit_bytes:
            self.held[key] = pixels
            self.bytes += size
        return pixels

    def of(self, dataset: Dataset) -> ImageCache:
        """An empty cache of another dataset's images; the store on disk is the same."""
        return ImageCache(
            self.family, dataset, frozen=self.frozen, store=self.store, limit_bytes=self.limit_bytes
        )

    def digest(self, key: str) -> str:
        """Of the processed image; it is opened once for it."""
        if key not in self._digests:
            self._note(key, read_pixels(self.family, self.dataset, key))
        return self._digests[key]

    def _note(self, key: str, pixels: Pixels) -> None:
        self._digests[key] = digest(dict(sorted(pixels.items())))

    def _seen(self, key: str) -> Pixels:
        pixels = None
        if self.store is not None:
            if key not in self._digests:
                pixels = read_pixels(self.family, self.dataset, key)
                self._note(key, pixels)
            if (stored := self.store.read(self._digests[key])) is not None:
                return stored
        pixels = pixels or read_pixels(self.family, self.dataset, key)
        seen = self.family.encode_image(pixels)
        if self.store is not None:
            self.store.write(self._digests[key], seen)
        return seen


def read_pixels(family: Family, dataset: Dataset, key: str) -> Pixels:
    """Open and process one image.

    Raises:
        InputError: it cannot be read.
    """
    try:
        return family.preprocess_image(dataset.open_image(key))
    except (OSError, SyntaxError) as error:  # what PIL raises on a damaged file
        raise InputError(
            f"cannot read image {key} of dataset {dataset.name} ({type(error).__name__}). "
            "Replace the file or remove its rows."
        ) from error


def size_of(tensors: dict[str, Tensor]) -> int:
    """Bytes of the values."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def image_store(folder: Path | None, family: Family) -> TensorCache | None:
    """Where the family's image encoder, as it now is, keeps what it makes of images; None without a folder.

    Raises:
        InputError: the folder cannot be made.
    """
    if folder is None:
        return None
    part = part_of(family.model)
    return TensorCache(folder / f"images-{values_key(family, lambda name: part(name) in IMAGE_PARTS)[:32]}")


def values_key(family: Family, wanted: Callable[[str], bool], *words: str) -> str:
    """A digest of the model's parameters and buffers whose names are `wanted`, and of what computes them.

    All values are read (samples could miss a tuned norm): about a second for each gigabyte.
    """
    model = family.model
    config: dict[str, Any] = model.config.to_dict()  # type: ignore[operator,union-attr]
    settings = {name: value for name, value in config.items() if name not in _PASSING}
    return digest(
        {name: value for name, value in _values(model).items() if wanted(name)},
        type(family).__name__,
        json.dumps(settings, sort_keys=True, default=str),
        f"torch {torch.__version__} {torch.get_float32_matmul_precision()} on {family.device.type}",
        f"transformers {version('transformers')}",
        *words,
    )


def _values(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name, those of quantisation and those that no checkpoint holds included."""
    held = {**dict(model.named_buffers(remove_duplicate=False)), **model.state_dict()}
    return {name: value for name, value in held.items() if isinstance(value, Tensor)}
