"""How many tokens the groups of a run cost, for batches that hold about as many each."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from normtune.data.batches import TokenCosts
from normtune.data.groups import Segment
from normtune.data.records import Dataset, Example
from normtune.models.family import Family


def count_tokens(
    family: Family, dataset: Dataset, examples: Sequence[Example], segment: Callable[[Example], Segment]
) -> TokenCosts:
    """Open every image once, process one of each size, and compute no features.

    Processors decide by an image's size alone how many tokens it takes. `segment` gives the tokens of an
    example; where the run holds them already, nothing is tokenised twice.

    Raises:
        InputError: an image cannot be read, or an example cannot be tokenised.
    """
    by_size: dict[tuple[tuple[int, int], ...], int] = {}
    prefixes: dict[tuple[str, ...], int] = {}
    for keys in dict.fromkeys(example.images for example in examples):
        images = [dataset.open_image(key) for key in keys]
        sizes = tuple(image.size for image in images)
        if sizes not in by_size:
            by_size[sizes] = family.prefix_tokens([family.preprocess_image(image) for image in images])
        prefixes[keys] = by_size[sizes]
    segments = {example.id: len(segment(example)) for example in examples}
    if family.shares_prefix:
        return TokenCosts(prefixes, segments)
    return TokenCosts(
        dict.fromkeys(prefixes, 0),
        {example.id: prefixes[example.images] + segments[example.id] for example in examples},
    )
