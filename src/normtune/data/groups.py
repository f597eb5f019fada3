"""Groups of examples that share one image."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from normtune.data.records import Example


@dataclass(frozen=True)
class Segment:
    """One tokenised question and its answer. The answer is empty when the model is to generate it."""

    id: str
    prompt: tuple[int, ...]
    answer: tuple[int, ...] = ()

    def __len__(self) -> int:
        return len(self.prompt) + len(self.answer)


@dataclass(frozen=True)
class Group:
    """One image (or a study of several views) and the segments that share it.

    Attributes:
        images: image keys of the group.
        segments: one segment a question.
    """

    images: tuple[str, ...]
    segments: tuple[Segment, ...]


def group_by_image(
    examples: Sequence[Example], max_group_size: int | None = None, rng: random.Random | None = None
) -> list[list[Example]]:
    """Split examples into groups of one image (or study) each.

    Args:
        examples: the examples, in any order; those of one image need not be adjacent.
        max_group_size: most questions in a group (--cap). 1 puts each question into a group of its own; None
            sets no limit.
        rng: shuffles the questions of each image before they are cut into groups, so that the groups differ
            between epochs. None keeps the order of the examples.

    Returns:
        The groups, in the order in which their images first occur.
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
