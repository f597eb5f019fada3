"""Examples -> a family's batch, with the outputs of frozen layers from a cache.

What is cached depends on the recipe:

| trained                      | cached per image                                 | a step starts at         |
|------------------------------|--------------------------------------------------|--------------------------|
| an image part, or no groups  | processed pixels                                 | the pixels               |
| text parts                   | outputs of the image encoder                     | the first text layer     |
| upper text layers only       | hidden states of the image and of all its        | the lowest trained layer |
|                              | questions, before that layer (`StateCache`)      |                          |
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

from normtune.data.batches import TokenCosts
from normtune.data.examples import Example, Examples, as_examples
from normtune.data.groups import Group, Segment, group_rows
from normtune.data.records import Dataset
from normtune.methods.adapt import TunedModel
from normtune.models.family import Family
from normtune.models.image_cache import LIMIT_BYTES, ImageCache, image_store
from normtune.models.part_names import IMAGE_PARTS
from normtune.models.types import Batch, Pixels
from normtune.training.config import TrainConfig
from normtune.training.state_cache import StateCache, state_store

MAX_SEGMENTS = 100_000  # tokenised questions that are kept, about 1 kB each; others are tokenised in each epoch


class Collator:
    """Turns groups of examples into the family's batch.

    Args:
        family: tokenises the examples and builds the batch.
        images: gives the processed pixels of an image, or the encoder's output for it.

    Attributes:
        states: gives hidden states in place of images; None: batches are built from images.
    """

    def __init__(self, family: Family, images: ImageCache) -> None:
        self.family, self.images = family, images
        self.states: StateCache | None = None
        self._segments: dict[str, Segment] = {}  # by example id: every epoch needs them again; the oldest first

    @property
    def cached_states(self) -> str | None:
        """The part of the model's work that is done once per image, in words; None: none of it."""
        if self.states is not None:
            return self.states.trunk.description
        return "image states" if self.images.frozen else None

    def __call__(self, groups: Sequence[Sequence[Example]]) -> Batch:
        """Build a batch. Each group lists examples with the same images."""
        return self.collate(self.tokenize_groups(groups))

    def collate(self, tokenized: Sequence[Group]) -> Batch:
        """Build a batch of tokenised groups."""
        # hidden states at the lowest trained layer, or images (pixels, or the frozen encoder's output)
        if self.states is not None:
            return self.states.collate(tokenized)
        return self.family.collate(tokenized, [self.images_of(group) for group in tokenized])

    def prefetch(self, groups: Sequence[Sequence[Example]], workers: int) -> None:
        """Begin to read the images of a batch that is needed soon, in background threads."""
        if self.states is None:  # hidden states are computed once, with all questions of an image
            self.images.prefetch(dict.fromkeys(key for members in groups for key in members[0].images), workers)

    def tokenize_groups(self, groups: Sequence[Sequence[Example]]) -> list[Group]:
        """Tokenise the examples of each group."""
        return [Group(members[0].images, tuple(self.segment(example) for example in members)) for members in groups]

    def images_of(self, group: Group) -> list[Pixels]:
        """Return the processed images of a group, or a frozen encoder's output for them."""
        return [self.images(key) for key in group.images]

    def segment(self, example: Example) -> Segment:
        """Return the tokens of an example: question and answer."""
        segment = self._segments.get(example.id)
        if segment is None:
            segment = self.family.tokenize_example(example, self.family.choices.answer(example))
            if len(self._segments) >= MAX_SEGMENTS:
                del self._segments[next(iter(self._segments))]
            self._segments[example.id] = segment
        return segment


class _SegmentsOfImages(Mapping[tuple[str, ...], Sequence[Segment]]):
    """Keys of a group's images -> the segments of all questions about them, tokenised at each look-up."""

    def __init__(self, examples: Examples, segment: Callable[[Example], Segment]) -> None:
        self._examples, self._segment, self._groups = examples, segment, group_rows(examples)
        self._index = {images: number for number, images in enumerate(examples.codes("images")[1])}

    def __getitem__(self, images: tuple[str, ...]) -> Sequence[Segment]:
        number = self._index[images]
        rows = self._groups.order[self._groups.ends[number] : self._groups.ends[number + 1]]
        return [self._segment(example) for example in self._examples.take(rows)]

    def __iter__(self) -> Iterator[tuple[str, ...]]:
        return iter(self._index)

    def __len__(self) -> int:
        return len(self._index)


def build_collator(
    config: TrainConfig,
    family: Family,
    tuned: TunedModel,
    dataset: Dataset,
    examples: Sequence[Example],
    *,
    use_caches: bool = True,
    limit_bytes: int = LIMIT_BYTES,
) -> Collator:
    """Build the collator of a run, with the caches that its recipe allows.

    An encoder's output for an image is constant if none of its parameters is trained and no dropout is active
    (grouped training turns off the base's dropout). The same holds for the hidden states before the lowest
    trained layer. Hidden states are cached if `config.cache` names a folder, or if all of them fit in memory.

    Args:
        examples: all examples of the run. An image's hidden states are computed with all of its questions.
        use_caches: False under FSDP, where no process has a whole encoder to compute the outputs with.

    Raises:
        InputError: the cache's folder cannot be made, or an image cannot be read.
    """
    frozen = use_caches and config.group and not {*IMAGE_PARTS} & {part for part, _ in tuned.part_and_role.values()}
    # row 1 of the table above: pixels only
    if not frozen:
        return Collator(family, ImageCache(family, dataset, limit_bytes=limit_bytes))
    # row 2: encoder outputs, in memory and, with --cache, on disk; keyed by the image, on disk by its pixels
    store = image_store(config.cache, family)
    images = ImageCache(family, dataset, frozen=True, store=store, limit_bytes=limit_bytes)
    collator = Collator(family, images)
    trunk = family.frozen_trunk(tuned.trained.values())
    # row 3: hidden states, if there are frozen layers between the encoder and the lowest trained layer
    if trunk is None:
        return collator
    questions = _SegmentsOfImages(as_examples(examples), collator.segment)
    # each image's encoder output is needed once, for its hidden states: no memory for it
    uncached_images = ImageCache(family, dataset, frozen=True, store=store, limit_bytes=0)
    state_folder = state_store(config.cache, family, trunk)
    states = StateCache(trunk, uncached_images, questions, store=state_folder, limit_bytes=limit_bytes)
    # with a folder, states that do not fit in memory are read from disk again in each epoch
    if config.cache is not None or states.fits():
        collator.states = states
    return collator


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
