"""Examples -> a family's batch, with whatever is frozen computed once: image states, or hidden states."""

from __future__ import annotations

from collections.abc import Sequence

from normtune.data.groups import Group, Segment, group_by_image
from normtune.data.records import Dataset, Example
from normtune.methods.adapt import TunedModel
from normtune.models.family import Family
from normtune.models.image_cache import LIMIT_BYTES, ImageCache, image_store
from normtune.models.part_names import IMAGE_PARTS
from normtune.models.types import Batch, Pixels
from normtune.training.config import TrainConfig
from normtune.training.state_cache import StateCache, state_store


class Collator:
    """Lists of examples, one list an image -> the family's batch.

    Attributes:
        computed_once: what of the model's work is done once an image, for people; None: nothing.
    """

    def __init__(self, family: Family, images: ImageCache) -> None:
        self.family, self.images = family, images
        self.states: StateCache | None = None
        self._segments: dict[str, Segment] = {}

    @property
    def cached_states(self) -> str | None:
        if self.states is not None:
            return self.states.below.description
        return "image states" if self.images.frozen else None

    def __call__(self, groups: Sequence[Sequence[Example]]) -> Batch:
        packed = self.tokenize_groups(groups)
        if self.states is not None:
            return self.states.collate(packed)
        return self.family.collate(packed, [self.images_of(group) for group in packed])

    def tokenize_groups(self, groups: Sequence[Sequence[Example]]) -> list[Group]:
        """The groups as tokens."""
        return [
            Group(members[0].images, tuple(self.segment(example) for example in members))
            for members in groups
        ]

    def images_of(self, group: Group) -> list[Pixels]:
        """The images of a group, or what a frozen encoder makes of them."""
        return [self.images(key) for key in group.images]

    def segment(self, example: Example) -> Segment:
        """The tokens of one example."""
        if example.id not in self._segments:
            self._segments[example.id] = self.family.tokenize(
                example.id, example.question, example.answer, report=example.kind == "report"
            )
        return self._segments[example.id]


def build_collator(
    config: TrainConfig,
    family: Family,
    tuned: TunedModel,
    dataset: Dataset,
    examples: Sequence[Example],
    *,
    hold: bool = True,
    limit_bytes: int = LIMIT_BYTES,
) -> Collator:
    """The collator of a run, with the caches that its recipe allows.

    Without dropout (grouped training has none in the base) the image encoder's output stays the same where
    nothing of it is trained, and so do the hidden states below the lowest trained layer: the latter are kept
    where `config.cache` names a folder, or where those of all images fit in `limit_bytes` of memory. Without
    `hold` neither is kept: no process can compute them by itself.

    Raises:
        InputError: the cache's folder cannot be made, or an image cannot be read.
    """
    frozen = hold and config.group and not {*IMAGE_PARTS} & {part for part, _ in tuned.part_and_role.values()}
    if not frozen:
        return Collator(family, ImageCache(family, dataset, limit_bytes=limit_bytes))
    store = image_store(config.cache, family)
    images = ImageCache(family, dataset, frozen=True, store=store, limit_bytes=limit_bytes)
    made = Collator(family, images)
    below = family.frozen_trunk(tuned.trained.values())
    if below is None:
        return made
    by_image = {group[0].images: [made.segment(one) for one in group] for group in group_by_image(examples)}
    # an image's states are taken once, with all its questions: they need not be held
    passing = ImageCache(family, dataset, frozen=True, store=store, limit_bytes=0)
    kept = state_store(config.cache, family, below)
    states = StateCache(below, passing, by_image, store=kept, limit_bytes=limit_bytes)
    if config.cache is not None or states.fits():
        made.states = states
    return made
