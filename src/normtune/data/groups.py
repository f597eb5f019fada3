"""Groups of examples that share one image."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from normtune.data.records import Example


@dataclass(frozen=True)
class Segment:
    """One tokenised question with its answer. The answer is empty when the model is to write it."""

    id: str
    prompt: tuple[int, ...]
    answer: tuple[int, ...] = ()

    def __len__(self) -> int:
        return len(self.prompt) + len(self.answer)


@dataclass(frozen=True)
class Group:
    """One image (or study of several views) and the segments that share it."""

    images: tuple[str, ...]
    segments: tuple[Segment, ...]


def group_by_image(
    examples: Sequence[Example], max_group_size: int | None = None, rng: random.Random | None = None
) -> list[list[Example]]:
    """Split examples into groups of one image each, at most `cap` questions a group.

    With `cap=1` every question stands alone. With `rng`, the questions of each image are shuffled before
    they are cut into groups, so that capped groups differ between epochs; without it the order is kept.
    """
    assert max_group_size is None or max_group_size >= 1, "a group holds at least one question"
    by_image: dict[tuple[str, ...], list[Example]] = {}
    for example in examples:
        by_image.setdefault(example.images, []).append(example)
    groups = []
    for members in by_image.values():
        if rng is not None:
            rng.shuffle(members)
        size = max_group_size or len(members)
        groups += [members[start : start + size] for start in range(0, len(members), size)]
    return groups
