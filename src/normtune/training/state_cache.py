"""Hidden states at the input of the lowest trained layer, computed once per image with all of its questions.

    pixels -> image encoder -> [prefix of the image | question 1 | question 2 | ...]
                                    |  frozen layers (the trunk): computed once, cached here
                                    v
                               hidden states  [tokens, width]
                                    |  trained layers: each step starts here
                                    v
                                  loss

One cache entry holds the states of one image (or of one study's images) and of every question about it in the
run. In memory entries are keyed by the images' keys. On disk their folder is named after the base's frozen
weights and the depth of the trunk, and the file after the images' pixels and the questions' tokens: a changed
question, image or base never finds a wrong entry.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from normtune.data.groups import Group, Segment
from normtune.models.family import Family
from normtune.models.frozen_trunk import FrozenTrunk, TrunkStates
from normtune.models.image_cache import LIMIT_BYTES, ImageCache, tensor_bytes, values_key
from normtune.models.types import Batch
from normtune.runtime.tensor_cache import TensorCache, digest

QUESTIONS_PER_PASS = 32  # questions of an image that are computed in one forward pass; bounds its memory

Images = tuple[str, ...]  # the keys of a group's images


class StateCache:
    """Hidden states by image: in memory up to `limit_bytes`, and on disk if there is a `store`.

    An image's questions are always computed in the same forward passes, which do not depend on the batches of the
    run. Sums of floating-point numbers depend on a batch's shape; this way the states are equal bit for bit after a
    resume, and when read from disk.

    Args:
        trunk: the frozen layers, which compute the states.
        images: gives the image encoder's output for an image.
        questions: all segments of the run, by the images that they are about.
        store: cache on disk; None: memory only.
        limit_bytes: entries beyond this size are not kept in memory, and are read or computed again.
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
        self.trunk, self.images, self.questions = trunk, images, questions
        self.store, self.limit_bytes = store, limit_bytes
        self.entries: dict[Images, dict[str, Tensor]] = {}
        self.bytes = 0  # of all entries in memory

    def collate(self, groups: Sequence[Group]) -> Batch:
        """Build a batch from states; see `Family.collate`."""
        return self.trunk.collate(groups, [self(group) for group in groups])

    def __call__(self, group: Group) -> TrunkStates:
        """Return the states of a group, which has some or all of the questions about its images."""
        entry = self._entry(group.images)  # of all questions about these images; the group may have fewer
        questions = self.questions[group.images]
        states = entry["segments"].split([len(self.trunk.tokens_of(segment)) for segment in questions])
        by_id = {segment.id: rows for segment, rows in zip(questions, states, strict=True)}  # [tokens, width]
        images: list[dict[str, Tensor]] = [{} for _ in group.images]
        for name, value in entry.items():  # keys as `_entry` describes them
            index, _, key = name.partition(".")
            if key:
                images[int(index)][key] = value
        return TrunkStates(tuple(images), entry["prefix"], tuple(by_id[segment.id] for segment in group.segments))

    def fits(self) -> bool:
        """Whether the states of all images fit in memory, if all prefixes are as long as the first one."""
        # an estimate from one image, without running the encoder on all of them
        first = self._entry(next(iter(self.questions)))
        row_bytes = first["segments"].shape[1] * first["segments"].element_size()  # of one token's state
        tokens = len(self.questions) * len(first["prefix"])
        for questions in self.questions.values():
            if tokens * row_bytes > self.limit_bytes:  # of many questions, not all are tokenised to find that out
                return False
            tokens += sum(len(self.trunk.tokens_of(segment)) for segment in questions)
        return tokens * row_bytes <= self.limit_bytes

    def _entry(self, images: Images) -> dict[str, Tensor]:
        """Return the entry of some images, from memory, from disk or computed.

        Returns:
            prefix: states of the image's tokens, [prefix tokens, width].
            segments: states of all questions in their order, one after the other, [tokens of all, width].
            N.NAME: what the family needs of the pixels of image N to build a batch.
        """
        if images in self.entries:
            return self.entries[images]
        entry = self._read_or_compute(images) if self.store is not None else self._compute(images)
        size = tensor_bytes(entry)
        # first come, first kept: an entry that does not fit is read or computed again each time
        if self.bytes + size <= self.limit_bytes:
            self.entries[images] = entry
            self.bytes += size
        return entry

    def _read_or_compute(self, images: Images) -> dict[str, Tensor]:
        assert self.store is not None
        tokens = [self.trunk.tokens_of(segment) for segment in self.questions[images]]
        # the file's name: a hash of the pixels and of the tokens, not of file names or example ids
        name = digest({}, *(self.images.digest(key) for key in images), *map(str, tokens))
        entry = self.store.read(name)
        if entry is None:
            entry = self._compute(images)
            self.store.write(name, entry)
        return entry

    def _compute(self, images: Images) -> dict[str, Tensor]:
        questions, step = self.questions[images], QUESTIONS_PER_PASS
        encoded = [self.images(key) for key in images]
        passes = [
            self.trunk.states(Group(images, tuple(questions[start : start + step])), encoded)
            for start in range(0, len(questions), step)
        ]
        # a pass has the states of up to 32 questions, each question [tokens, width]
        # the prefix does not depend on the questions, so that the first pass has all of it
        entry = {
            "prefix": passes[0].prefix,
            "segments": torch.cat([states for group in passes for states in group.segments]),
        }
        for index, image in enumerate(passes[0].images):
            entry |= {f"{index}.{name}": value for name, value in image.items()}
        return entry


def state_store(folder: Path | None, family: Family, trunk: FrozenTrunk) -> TensorCache | None:
    """Return the folder of a trunk's states on disk; None without a cache folder.

    Its name is a hash of all weights and settings that the states depend on, and of the depth of the trunk:
    runs share it exactly if their states are the same.

    Raises:
        InputError: the folder cannot be made.
    """
    # the trunk depends only on frozen weights, so that adapters of any recipe with the same trunk share it
    if folder is None:
        return None
    return TensorCache(folder / f"states-{values_key(family, trunk.depends_on, trunk.description)[:32]}")
