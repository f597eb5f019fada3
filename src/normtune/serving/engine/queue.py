"""Requests that wait, and which of them are answered together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

from PIL import Image

from normtune.data.groups import Segment
from normtune.models.types import Pixels
from normtune.serving.engine.adapter_slots import BASE, AdapterSlot
from normtune.serving.engine.requests import Reply

Text = Callable[[str], None]  # told the text so far, each time longer than before


@dataclass(eq=False)
class Job:
    """A request under way.

    Attributes:
        images, keys: its views, RGB, and the digest of each.
        question: None for a report.
        limit: the most tokens of its answer.
        arrived: by `time.monotonic`.
        segment, shown: its question and its views as the family takes them, once it runs.
        tokens: of its answer so far, where somebody listens.
        told: the text that the listener has.
        fault: what the listener raised; it is told no more.
    """

    number: int
    images: tuple[Image.Image, ...]
    keys: tuple[str, ...]
    question: str | None
    entry: AdapterSlot
    limit: int
    beams: int
    future: Future[Reply]
    on_text: Text | None
    arrived: float
    segment: Segment | None = None
    shown: tuple[Pixels, ...] = ()
    tokens: list[int] = field(default_factory=list)
    sent_text: str = ""
    fault: Exception | None = None

    def send(self, text: str) -> None:
        """Hand the text so far to the listener, where it says more than the one before."""
        if self.on_text is not None and len(text) > len(self.sent_text) and text.startswith(self.sent_text):
            self.sent_text = text
            self.on_text(text)


def take_batch(queue: list[Job], most: int, adapters: int) -> list[Job]:
    """Take the next batch out of the queue: the job that has waited longest, and those that can go with it.

    They write at most as many tokens with as many beams. At most `most` jobs of `adapters` adapters, the base
    not counted; those that are passed over keep their places.
    """
    first = queue[0]
    taken: list[Job] = []
    left: list[Job] = []
    entries: set[AdapterSlot] = set()
    for job in queue:
        alike = (job.limit, job.beams) == (first.limit, first.beams)
        own = set() if job.entry.slot == BASE else {job.entry}
        if len(taken) < most and alike and len(entries | own) <= adapters:
            taken.append(job)
            entries |= own
        else:
            left.append(job)
    queue[:] = left
    return taken


def separate_images(
    groups: Sequence[Sequence[Job]], owners: Sequence[int]
) -> tuple[list[tuple[Pixels, ...]], list[int]]:
    """The images of each group, none of them shared by groups of several owners, and whose each study is.

    Families tell images apart by their identity, and a study is what one or more groups show: those come in
    the order of the first group of each.
    """
    own: dict[tuple[int, int], Pixels] = {}
    shown = [
        tuple(own.setdefault((owner, id(one)), dict(one)) for one in jobs[0].shown)
        for jobs, owner in zip(groups, owners, strict=True)
    ]
    studies = {tuple(map(id, images)): owner for images, owner in zip(shown, owners, strict=True)}
    return shown, [*studies.values()]


def grouped(jobs: Sequence[Job]) -> list[list[Job]]:
    """Jobs of one adapter about the same images, which share them; groups of an adapter follow each other."""
    groups: dict[tuple[int | None, tuple[str, ...]], list[Job]] = {}
    for job in sorted(jobs, key=lambda job: job.entry.slot or BASE):
        groups.setdefault((job.entry.slot, job.keys), []).append(job)
    return [*groups.values()]
