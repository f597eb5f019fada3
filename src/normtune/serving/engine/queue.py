"""The queue's jobs, and which of them form the next batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from time import monotonic

from PIL import Image

from normtune.data.groups import Segment
from normtune.models.types import Pixels
from normtune.serving.engine.adapter_slots import BASE_SLOT, RegisteredAdapter
from normtune.serving.engine.requests import Reply, Request

# (`RegisteredAdapter.image_digest`: which image encoder, `pixel_digest` of the image)
ImageKey = tuple[str, str]
TextCallback = Callable[[str], None]  # receives the text so far; each text extends the one before


@dataclass(eq=False)
class Job:
    """A request in the queue or in a batch."""

    number: int  # counts the engine's requests
    request: Request  # without its images
    # its views, preprocessed for the model, or RGB if they were in the cache of encoded images
    images: tuple[Pixels | Image.Image, ...]
    image_digests: tuple[str, ...]  # the `pixel_digest` of each view
    adapter: RegisteredAdapter
    on_text: TextCallback | None  # receives the text of a streamed answer
    future: Future[Reply] = field(default_factory=Future)
    arrived: float = field(default_factory=monotonic)  # time of arrival, by `time.monotonic`
    # the tokenised question; set when its batch begins
    segment: Segment = field(default_factory=lambda: Segment("", ()))
    tokens_cut: int = 0  # see `Reply.question_tokens_cut`
    # its views as the image encoder returns them; set before the batch is answered
    encoded_images: tuple[Pixels, ...] = ()
    tokens: list[int] = field(default_factory=list)  # tokens of a streamed answer so far
    sent_text: str = ""  # the text that `on_text` received last
    callback_error: Exception | None = None  # what `on_text` raised; it is not called again after that

    @property
    def image_keys(self) -> list[ImageKey]:
        """The views' keys in the cache of encoded images, while the adapter is loaded."""
        return [(self.adapter.image_digest, digest) for digest in self.image_digests]

    def send(self, text: str) -> None:
        """Pass the text so far, up to a stop text, to `on_text`, if it extends the text sent before."""
        if self.on_text is not None and len(text) > len(self.sent_text) and text.startswith(self.sent_text):
            self.sent_text = text
            self.on_text(text)


def take_batch(queue: list[Job], max_jobs: int, max_adapters: int) -> list[Job]:
    """Remove the next batch from the queue: its oldest job, and later jobs that can be answered with it.

    All jobs of a batch have the oldest job's token limit and number of beams. Jobs that do not fit keep their
    order in the queue.

    Args:
        queue: waiting jobs, the oldest first; changed in place.
        max_adapters: the most adapters of a batch, not counting the base.
    """
    first = queue[0].request
    batch: list[Job] = []
    remaining: list[Job] = []
    adapters: set[RegisteredAdapter] = set()
    for job in queue:
        request = job.request
        same_options = (request.token_limit, request.beams) == (first.token_limit, first.beams)
        needed = set() if job.adapter.slot == BASE_SLOT else {job.adapter}
        if len(batch) < max_jobs and same_options and len(adapters | needed) <= max_adapters:
            batch.append(job)
            adapters |= needed
        else:
            remaining.append(job)
    queue[:] = remaining
    return batch


def separate_images(
    groups: Sequence[Sequence[Job]], slots: Sequence[int]
) -> tuple[list[tuple[Pixels, ...]], list[int]]:
    """Copy encoded images so that groups of different slots do not share them.

    A family recognises a repeated study by the identity of its image dictionaries and computes its keys and
    values once. With LoRA on those layers, they differ by adapter, so groups of different adapters must not
    appear to show the same study.

    Args:
        groups: jobs of one adapter about the same images.
        slots: the slot that provides each group's LoRA.

    Returns:
        The images of each group (shallow copies: the tensors are shared), and the slot of each distinct
        study, in the order in which the groups first use them.
    """
    copies: dict[tuple[int, int], Pixels] = {}
    images_of_groups = [
        tuple(copies.setdefault((slot, id(image)), dict(image)) for image in jobs[0].encoded_images)
        for jobs, slot in zip(groups, slots, strict=True)
    ]
    study_slots = {tuple(map(id, images)): slot for images, slot in zip(images_of_groups, slots, strict=True)}
    return images_of_groups, [*study_slots.values()]


def group_jobs(jobs: Sequence[Job]) -> list[list[Job]]:
    """Group jobs of one adapter about the same images, which share the image's computation.

    Groups of one adapter are adjacent, so that its rows form one run in the batch.
    """
    groups: dict[tuple[int | None, tuple[str, ...]], list[Job]] = {}
    for job in sorted(jobs, key=lambda job: job.adapter.slot or BASE_SLOT):
        groups.setdefault((job.adapter.slot, job.image_digests), []).append(job)
    return [*groups.values()]
