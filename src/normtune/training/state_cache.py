"""Hidden states below everything that is trained, computed once an image with all its questions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from normtune.data.groups import Group, Segment
from normtune.models.family import Family
from normtune.models.frozen_trunk import FrozenTrunk, TrunkStates
from normtune.models.image_cache import LIMIT_BYTES, ImageCache, size_of, values_key
from normtune.models.types import Batch
from normtune.runtime.tensor_cache import TensorCache, digest

AT_ONCE = 32  # questions of an image that are computed together

Images = tuple[str, ...]  # the keys of a group's images


class StateCache:
    """States by image, held while they fit in `limit_bytes` and on disk where there is a `store`.

    An image's questions are always computed in the same company, whatever the batches of the run: states are
    the same to the bit after an interruption, and from disk.

    Args:
        below: computes them.
        images: gives what the image encoder makes of an image.
        questions: all segments of the run, by the images that they are about.
    """

    def __init__(
        self,
        trunk: FrozenTrunk,
        images: ImageCache,
        questions: Mapping[Images, Sequence[Segment]],
        *,
        store: TensorCache | None = None,
        limit_bytes: int = LIMIT_BYTES,
    ) -> None:
        self.below, self.images, self.questions = trunk, images, questions
        self.store, self.limit_bytes = store, limit_bytes
        self.held: dict[Images, dict[str, Tensor]] = {}
        self.bytes = 0

    def collate(self, groups: Sequence[Group]) -> Batch:
        """See `Family.collate`."""
        return self.below.collate(groups, [self(group) for group in groups])

    def __call__(self, group: Group) -> TrunkStates:
        """The states of a group, some or all of the questions of its images."""
        entry = self._entry(group.images)
        asked = self.questions[group.images]
        rows = entry["segments"].split([len(self.below.tokens_of(segment)) for segment in asked])
        by_id = {segment.id: states for segment, states in zip(asked, rows, strict=True)}
        images: list[dict[str, Tensor]] = [{} for _ in group.images]
        for name, value in entry.items():
            number, _, own = name.partition(".")
            if own:
                images[int(number)][own] = value
        return TrunkStates(
            tuple(images), entry["prefix"], tuple(by_id[segment.id] for segment in group.segments)
        )

    def fits(self) -> bool:
        """Whether the states of all images fit in memory, if the prefixes are as long as the first one."""
        first = self._entry(next(iter(self.questions)))
        row = first["segments"].shape[1] * first["segments"].element_size()
        tokens = sum(len(self.below.tokens_of(one)) for asked in self.questions.values() for one in asked)
        return (tokens + len(self.questions) * len(first["prefix"])) * row <= self.limit_bytes

    def _entry(self, images: Images) -> dict[str, Tensor]:
        """`prefix` and `segments` [tokens of all, width], and `N.name` of image N's pixels."""
        if images in self.held:
            return self.held[images]
        entry = self._stored(images) if self.store is not None else self._computed(images)
        size = size_of(entry)
        if self.bytes + size <= self.limit_bytes:
            self.held[images] = entry
            self.bytes += size
        return entry

    def _stored(self, images: Images) -> dict[str, Tensor]:
        assert self.store is not None
        read = [self.below.tokens_of(segment) for segment in self.questions[images]]
        name = digest({}, *(self.images.digest(key) for key in images), *map(str, read))
        entry = self.store.read(name)
        if entry is None:
            entry = self._computed(images)
            self.store.write(name, entry)
        return entry

    def _computed(self, images: Images) -> dict[str, Tensor]:
        asked = self.questions[images]
        seen = [self.images(key) for key in images]
        parts = [
            self.below.states(Group(images, tuple(asked[start : start + AT_ONCE])), seen)
            for start in range(0, len(asked), AT_ONCE)
        ]
        entry = {
            "prefix": parts[0].prefix,
            "segments": torch.cat([states for part in parts for states in part.segments]),
        }
        for number, image in enumerate(parts[0].images):
            entry |= {f"{number}.{name}": value for name, value in image.items()}
        return entry


def state_store(folder: Path | None, family: Family, below: FrozenTrunk) -> TensorCache | None:
    """Where the states below are kept; None without a folder.

    Raises:
        InputError: the folder cannot be made.
    """
    if folder is None:
        return None
    return TensorCache(folder / f"states-{values_key(family, below.depends_on, below.description)[:32]}")
