"""The features of images that replace image tokens, and which feature each image token of a batch has."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain

import torch
from torch import Tensor

from normtune.models.types import Pixels

FEATURES = "features"  # key of an encoded image's features; keys of further features begin with it


def flatten_features(features: Tensor | Sequence[Tensor]) -> Tensor:
    """Join features, [tokens, width], [images, tokens, width] or one tensor an image, to [image tokens, width]."""
    whole = features if isinstance(features, Tensor) else torch.cat([*features])
    return whole.flatten(0, -2)


def distinct_images(pixels: Sequence[Sequence[Pixels]]) -> list[Pixels]:
    """The images of all groups; the same object in several groups (a study in two groups) is encoded once."""
    return list({id(image): image for image in chain.from_iterable(pixels)}.values())


def encoded_features(images: Sequence[Pixels]) -> dict[str, Tensor]:
    """The features that `encode_images` has computed; empty if images are still pixels."""
    names = [name for name in images[0] if name.startswith(FEATURES)]
    return {name: torch.cat([image[name] for image in images]) for name in names}


def feature_rows(
    pixels: Sequence[Sequence[Pixels]],
    distinct: Sequence[Pixels],
    count_tokens: Callable[[Sequence[Pixels]], list[int]],
) -> Tensor | None:
    """The feature of each image token: [image tokens] long, rows of the distinct images' features.

    None if every image occurs once, since features and image tokens then have the same order. Example:
    images a (2 tokens) and b (1 token) in the order a, b, a give `[0, 1, 2, 0, 1]`.

    Args:
        pixels: the images of each group.
        count_tokens: the number of image tokens of each image.
    """
    image_ids = [id(image) for image in chain.from_iterable(pixels)]
    if len(image_ids) == len(distinct):
        return None
    counts = count_tokens(distinct)
    rows_of = dict(zip(map(id, distinct), torch.arange(sum(counts)).split(counts), strict=True))
    return torch.cat([rows_of[image_id] for image_id in image_ids])
