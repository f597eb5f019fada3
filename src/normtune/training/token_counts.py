"""Counts the tokens of groups, for batches with about the same number of tokens each."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from normtune.data.batches import TokenCosts
from normtune.data.groups import Segment
from normtune.data.records import Dataset, Example
from normtune.models.family import Family


def count_tokens(
    family: Family,
    dataset: Dataset,
    examples: Sequence[Example],
    segment: Callable[[Example], Segment],
    opened: int | None = None,
) -> TokenCosts:
    """Count the tokens of every image and of every question with its answer.

    Images are opened, but only one of each size is processed, since its size alone determines the number
    of tokens that a processor makes of it. No features are computed.

    Args:
        segment: gives the tokens of an example. Pass `Collator.segment`, which tokenises each example once.
        opened: number of groups of images that are opened; the others get the most tokens of these. None: all.

    Returns:
        Tokens per group of images and per example. Families that do not share the prefix among questions
        repeat it in every sequence: its tokens are then added to each example's.

    Raises:
        InputError: an image cannot be read, or an example cannot be tokenised.
    """
    by_size: dict[tuple[tuple[int, int], ...], int] = {}  # sizes of a study's images -> tokens
    prefixes: dict[tuple[str, ...], int] = {}
    # groups of images in the order of their first example, each once
    groups = list(dict.fromkeys(example.images for example in examples))
    for keys in groups[:opened]:
        images = [dataset.open_image(key) for key in keys]
        sizes = tuple(image.size for image in images)
        # processing resizes and tiles an image: only one of each size is needed
        if sizes not in by_size:
            by_size[sizes] = family.prefix_tokens([family.preprocess_image(image) for image in images])
        prefixes[keys] = by_size[sizes]
    prefixes |= dict.fromkeys(groups[len(prefixes) :], max(prefixes.values(), default=0))
    segments = {example.id: len(segment(example)) for example in examples}
    # a group: prefix + all segments; or, without sharing, every question: prefix + segment
    if family.shares_prefix:
        return TokenCosts(prefixes, segments)
    return TokenCosts(
        dict.fromkeys(prefixes, 0),
        {example.id: prefixes[example.images] + segments[example.id] for example in examples},
    )
