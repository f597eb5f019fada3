"""The serving engine: requests of many adapters, answered in batches over one base.

    with Engine(load("nano")) as engine:
        engine.register("chest", Path("runs/chest"))
        print(engine.submit(Request((image,), "Is there a mass?", "chest")).result().text)

Every row of a batch is normalised by the gains of its own adapter, and takes its own LoRA where such are
served; all else is the base's and computed for all at once. Answers are those of each adapter by itself.
"""

from __future__ import annotations

import itertools
import logging
import math
import time
import traceback
from collections.abc import Sequence
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from threading import Condition, Thread
from typing import Any, Self

from normtune.adapters.multi.rows import RowAdapters
from normtune.data import tasks
from normtune.data.groups import Group
from normtune.data.tasks import MAX_ANSWER_TOKENS
from normtune.errors import InputError
from normtune.models.causal.family import CausalFamily
from normtune.models.family import Family
from normtune.models.types import Answer, Pixels
from normtune.serving.engine.adapter_slots import BASE, Adapters
from normtune.serving.engine.image_states import ImageStates, Key, digest_of
from normtune.serving.engine.queue import Job, Text, grouped, separate_images, take_batch
from normtune.serving.engine.requests import Busy, Closed, EngineStats, Reply, Request, ServedAdapter
from normtune.serving.engine.stable_text import stable_text

IMAGE_BYTES = 512 << 20  # of image states that are held

_log = logging.getLogger(__name__)


class Engine:
    """Answers requests in a thread of its own. All methods may be called from any thread.

    Args:
        family: a base without an adapter; the engine's own until `close`, which gives it back as it was.
        max_batch: requests that are answered together.
        max_wait: seconds that a request waits for company while nothing runs.
        queue_limit: requests that may wait; it bounds the images that are held for them.
        adapter_memory: bytes of the adapters that are loaded; None: 256 MiB, and at most 1,023 adapters.
        image_memory: bytes of image states that are kept for further questions.
        lora_rank: serve LoRA adapters of at most this rank too; 0: those of norms alone. Every adapter takes
            the memory of such a LoRA, whether it has one or not.

    Raises:
        InputError: the memory holds no adapter, or the base has no place for LoRA.
    """

    def __init__(
        self,
        family: Family,
        *,
        max_batch: int = 32,
        max_wait: float = 0.01,
        queue_limit: int = 256,
        adapter_memory: int | None = None,
        image_memory: int = IMAGE_BYTES,
        lora_rank: int = 0,
    ) -> None:
        assert max_batch >= 1 and queue_limit >= 1 and max_wait >= 0, "room for a request"
        self.family, self.max_batch, self.max_wait = family, max_batch, max_wait
        self.queue_limit = queue_limit
        self._adapters = Adapters(family.model, adapter_memory, lora_rank)
        self._images = ImageStates(image_memory)
        family.active_text_rows = self._adapters.bank.texts
        self._changed = Condition()  # guards what follows
        self._queue: list[Job] = []
        self._closing = self._given_back = False
        self._running = 0
        self._counts = dict.fromkeys(_COUNTS, 0)
        self._seconds = 0.0
        self._numbers = itertools.count()
        self._thread = Thread(target=self._work, name="normtune engine", daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        self.close(drain=kind is None)

    # --- for everybody --------------------------------------------------------------------------------------

    def submit(self, request: Request, *, on_text: Text | None = None) -> Future[Reply]:
        """Put a request into the queue; the future has its reply, or what went wrong.

        A future that is cancelled before its batch begins leaves the queue. `on_text` is called in the
        engine's thread with the text so far, each time it has grown: no character of it changes later, and
        the last text is the reply's. With several beams it is called once, at the end.

        Raises:
            Busy: the queue is full.
            Closed: the engine takes no more requests.
            UnknownAdapter: no such adapter is registered.
            InputError: a request without an image, or with room for no token or beam.
        """
        entry = self._adapters.find(request.adapter)
        if not request.images:
            raise InputError("the request has no image. Send one, or the views of one study.")
        usual = tasks.MAX_REPORT_TOKENS if request.question is None else MAX_ANSWER_TOKENS
        limit = usual if request.max_new_tokens is None else request.max_new_tokens
        if limit < 1 or request.beams < 1:
            raise InputError("the answer needs at least one token and one beam. Raise the limit.")
        with self._changed:
            self._check_room()  # before the pixels are read
        images = tuple(one if one.mode == "RGB" else one.convert("RGB") for one in request.images)
        job = Job(
            number=next(self._numbers),
            images=images,
            keys=tuple(map(digest_of, images)),
            question=request.question,
            entry=entry,
            limit=limit,
            beams=request.beams,
            future=Future(),
            on_text=on_text,
            arrived=time.monotonic(),
        )
        job.future.add_done_callback(self._drop_cancelled)
        with self._changed:
            self._check_room()
            self._queue.append(job)
            self._changed.notify_all()
        return job.future

    def register(self, name: str, folder: Path) -> ServedAdapter:
        """Make an adapter known; its tensors are read when it is first asked for.

        Raises:
            InputError: the name is taken, or the folder holds no adapter that can be served with others.
        """
        return self._adapters.register(name, folder)

    def remove(self, name: str) -> None:
        """Forget an adapter. Requests that were accepted are answered.

        Raises:
            UnknownAdapter: there is none of that name.
        """
        self._adapters.remove(name)

    def adapters(self) -> list[ServedAdapter]:
        """All that are registered, in the order in which they were."""
        return self._adapters.infos()

    def knows(self, name: str) -> bool:
        """Whether an adapter of that name is registered; of thousands, in no time."""
        return self._adapters.knows(name)

    def stats(self) -> EngineStats:
        """What the engine holds and has done."""
        registered, loaded = self._adapters.counts()
        with self._changed:
            return EngineStats(
                queued=len(self._queue),
                running=self._running,
                registered=registered,
                loaded=loaded,
                loads=self._adapters.loads,
                evictions=self._adapters.evictions,
                adapter_bytes=loaded * self._adapters.entry_bytes,
                image_bytes=self._images.bytes,
                seconds_busy=self._seconds,
                seconds_loading=self._adapters.seconds_loading,
                **self._counts,
            )

    def close(self, *, drain: bool = True, timeout: float | None = None) -> None:
        """Take no more requests, answer those that wait (with `drain`), and end; the base is as it was.

        After `timeout` seconds, or without `drain`, requests that still wait end with `Closed`; a batch that
        has begun is always answered.
        """
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        if not drain:
            self._turn_away()
        self._thread.join(timeout)
        if self._thread.is_alive():
            self._turn_away()
            return
        with self._changed:
            given_back, self._given_back = self._given_back, True
        if not given_back:
            self.family.active_text_rows = None
            self._adapters.close()

    def _check_room(self) -> None:
        """Called with the lock held."""
        if self._closing:
            raise Closed("the server is shutting down.")
        if len(self._queue) >= self.queue_limit:
            self._counts["refused"] += 1
            raise Busy(f"{self.queue_limit} requests are waiting already. Ask again in a while.")

    def _drop_cancelled(self, future: Future[Reply]) -> None:
        if future.cancelled():
            with self._changed:
                self._queue[:] = [job for job in self._queue if job.future is not future]
                self._counts["cancelled"] += 1

    def _turn_away(self) -> None:
        """End what waits."""
        with self._changed:
            left, self._queue = self._queue, []
        for job in left:
            if job.future.set_running_or_notify_cancel():
                job.future.set_exception(Closed("the server shut down before it came to the request."))

    # --- the engine's thread --------------------------------------------------------------------------------

    def _work(self) -> None:
        while jobs := self._next():
            began = time.monotonic()
            running = [job for job in jobs if job.future.set_running_or_notify_cancel()]
            try:
                self._answer(running)
            except Exception as error:  # a fault of ours: nobody is to wait for ever
                for job in running:
                    if not job.future.done():
                        self._fail(job, error)
            with self._changed:
                self._running = 0
                self._seconds += time.monotonic() - began

    def _next(self) -> list[Job]:
        """The next batch, once it is full or its first job has waited long enough; empty: the end."""
        with self._changed:
            while True:
                if not self._queue:
                    if self._closing:
                        return []
                    self._changed.wait()
                    continue
                left = self._queue[0].arrived + self.max_wait - time.monotonic()
                if len(self._queue) >= self.max_batch or left <= 0 or self._closing:
                    jobs = take_batch(self._queue, self.max_batch, self._adapters.room)
                    self._running = len(jobs)
                    return jobs
                self._changed.wait(left)

    def _answer(self, jobs: Sequence[Job]) -> None:
        """Answer what can be answered; a job that fails does not take others with it."""
        pinned: list[Job] = []
        ready: list[Job] = []
        seen: dict[Key, Pixels] = {}  # one object an image, which the family reads once
        try:
            for job in jobs:
                try:
                    self._adapters.pin(job.entry)
                    pinned.append(job)
                    self._prepare(job, seen)
                except Exception as error:
                    self._fail(job, error)
                else:
                    ready.append(job)
            if ready:
                self._write(ready)
        finally:
            for job in pinned:
                self._adapters.unpin(job.entry)

    def _prepare(self, job: Job, seen: dict[Key, Pixels]) -> None:
        report = job.question is None
        job.segment = self.family.tokenize(str(job.number), job.question or "", None, report=report)
        for image, digest in zip(job.images, job.keys, strict=True):
            key = job.entry.images, digest
            states = seen.get(key) or self._images.get(key)
            self._count("images_computed" if states is None else "images_reused")
            if states is None:
                assert job.entry.slot is not None, "pinned"
                with self._adapters.bank.use(RowAdapters([job.entry.slot]), None):
                    states = self.family.encode_image(self.family.preprocess_image(image))
                self._images.put(key, states)
            seen[key] = states
        job.shown = tuple(seen[job.entry.images, digest] for digest in job.keys)

    def _write(self, jobs: list[Job]) -> None:
        """Write the answers of prepared jobs in one batch, or in halves where that fails."""
        groups = grouped(jobs)
        answers = None
        try:
            answers = self._written(groups)
        except Exception as error:
            if len(jobs) == 1:
                self._fail(jobs[0], error)
                return
        if answers is None:  # what the error held is free now
            self._write(jobs[: len(jobs) // 2])
            self._write(jobs[len(jobs) // 2 :])
            return
        self._count("batches")
        for group, own in zip(groups, answers, strict=True):
            for job, answer in zip(group, own, strict=True):
                self._reply(job, answer)

    def _written(self, groups: Sequence[Sequence[Job]]) -> list[list[Answer]]:
        first = groups[0][0]
        asked = [Group(jobs[0].keys, tuple(_segment(job) for job in jobs)) for jobs in groups]
        # one row of a causal model holds a group, unless the image's states depend on the question
        a_row = isinstance(self.family, CausalFamily) and self.family.shares_prefix
        owners = [jobs[0].entry.slot or 0 for jobs in groups for _ in jobs[: 1 if a_row else None]]
        order = [job for jobs in groups for job in jobs]
        for job in order:
            job.tokens.clear()  # of a batch that failed; what was told stays told
        listened = any(job.on_text is not None for job in order)
        shown, studies = [jobs[0].shown for jobs in groups], None
        if (lora := self._adapters.lora) is not None and lora.reads_images:
            slots = [jobs[0].entry.slot or BASE for jobs in groups]
            shown, whose = separate_images(groups, [slot if slot in lora.used else BASE for slot in slots])
            studies = RowAdapters(whose)
        with (
            self._adapters.bank.use(None, RowAdapters(owners)),  # images are seen already
            self._adapters.looked_at_by(studies),
        ):
            return self.family.generate_answers(
                asked,
                shown,
                max_new_tokens=first.limit,
                beams=first.beams,
                on_tokens=partial(self._grown, order) if listened else None,
            )

    def _grown(self, jobs: Sequence[Job], prompts: Sequence[int], tokens: Sequence[int]) -> None:
        """Tell those who listen what is new; a listener that fails takes no other with it."""
        for prompt, token in zip(prompts, tokens, strict=True):
            job = jobs[prompt]
            if job.on_text is None or job.fault is not None:
                continue
            job.tokens.append(token)
            try:
                job.send(stable_text(self.family, job.tokens))
            except Exception as error:
                job.fault = error

    def _reply(self, job: Job, answer: Answer) -> None:
        try:
            prompt = self.family.prefix_tokens(job.shown) + len(_segment(job).prompt)
            tokenizer: Any = self.family.processor.tokenizer
            written = len(tokenizer(answer.text, add_special_tokens=False).input_ids)
            completion = min(written + 1, job.limit)  # the end token, where there was room for it
            score = answer.score if math.isfinite(answer.score) else None
            if job.fault is not None:
                raise job.fault
            job.send(answer.text)
            if not answer.text.startswith(job.sent_text):  # by rounding, in a batch of another size
                raise RuntimeError("an answer came out otherwise when its batch was tried again")
        except Exception as error:
            self._fail(job, error)
            return
        self._count("requests")
        self._count("prompt_tokens", prompt)
        self._count("completion_tokens", completion)
        job.future.set_result(Reply(answer.text, score, prompt, completion, time.monotonic() - job.arrived))

    def _fail(self, job: Job, error: Exception) -> None:
        """Tell the one who asked; what is no fault of the request is logged, without any of its words."""
        if not isinstance(error, InputError):
            where = "".join(traceback.format_tb(error.__traceback__))
            _log.error("request %d failed: %s\n%s", job.number, type(error).__name__, where)
        self._count("failed")
        job.future.set_exception(error.with_traceback(None))  # its frames hold the batch

    def _count(self, name: str, more: int = 1) -> None:
        with self._changed:
            self._counts[name] += more


def _segment(job: Job) -> Any:
    assert job.segment is not None, "prepared"
    return job.segment


_COUNTS = (
    "batches",
    "requests",
    "failed",
    "cancelled",
    "refused",
    "prompt_tokens",
    "completion_tokens",
    "images_computed",
    "images_reused",
)
