"""Groups of examples that share one image."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from normtune.data.examples import Example, Examples, as_examples


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
    """One image (or a study of several views) and the segments that share it."""

    images: tuple[str, ...]  # image keys of the group
    segments: tuple[Segment, ...]  # one segment a question


def group_by_image(
    examples: Sequence[Example], max_group_size: int | None = None, rng: random.Random | None = None
) -> list[Examples]:
    """Split examples into groups of one image (or study) each.

    Args:
        examples: the examples, in any order; the examples of one image need not be adjacent.
        max_group_size: most questions in a group (--cap). 1 puts each question into a group of its own; None
            sets no limit.
        rng: shuffles the questions of each image before they are cut into groups, so that the groups differ
            between epochs. None keeps the order of the examples.

    Returns:
        The groups, in the order in which their images first occur.
    """
    rows = as_examples(examples)
    groups = group_rows(rows, max_group_size)
    order = groups.order if rng is None else groups.shuffled(rng)
    return [rows.take(order[start:stop]) for start, stop in pairwise(groups.ends.tolist())]


@dataclass(frozen=True)
class RowGroups:
    """The rows of each group as arrays."""

    order: NDArray[np.int32]  # the rows, group by group; int32 [rows]. The groups of one image follow each other
    ends: NDArray[np.int64]  # group g has the rows `order[ends[g]:ends[g + 1]]`; int64 [groups + 1], from 0
    # image i has the rows `order[image_ends[i]:image_ends[i + 1]]`; int64 [images + 1], from 0
    image_ends: NDArray[np.int64]

    @property
    def sizes(self) -> NDArray[np.int64]:
        """Number of rows of each group, [groups]."""
        return np.diff(self.ends)

    def shuffled(self, rng: random.Random) -> NDArray[np.int32]:
        """`order` with the rows of each image shuffled."""
        order = self.order.copy()
        for start, stop in pairwise(self.image_ends.tolist()):
            rows = order[start:stop].tolist()
            rng.shuffle(rows)
            order[start:stop] = rows
        return order


def group_rows(examples: Examples, max_group_size: int | None = None) -> RowGroups:
    """Divide rows as `group_by_image` does, without making an object for each row."""
    assert max_group_size is None or max_group_size >= 1, "a group holds at least one question"
    codes, images = examples.codes("images")
    image_ends = np.concatenate([[0], np.cumsum(np.bincount(codes, minlength=len(images)))])
    order = np.argsort(codes, kind="stable").astype(np.int32)
    return RowGroups(order, cut_groups(image_ends, max_group_size), image_ends)


def cut_groups(image_ends: NDArray[np.int64], max_group_size: int | None) -> NDArray[np.int64]:
    """The ends of the groups, from the ends of the images: an image with more rows has several groups."""
    if max_group_size is None:
        return image_ends
    groups = -(-np.diff(image_ends) // max_group_size)  # number of groups of each image
    first = np.repeat(np.cumsum(groups) - groups, groups)  # number of the image's first group, for each group
    starts = np.repeat(image_ends[:-1], groups) + (np.arange(groups.sum()) - first) * max_group_size
    return np.append(starts, image_ends[-1])
