"""The serving engine answers requests for many adapters in shared batches over one base.

    with Engine(load("nano")) as engine:
        engine.register("chest", Path("runs/chest"))
        print(engine.submit(Request((image,), "Is there a mass?", "chest")).result().text)

Each row of a batch is normalised with the gains of its own adapter and, where LoRA is served, adds its own
LoRA. All other layers are the base's and run once for the whole batch. The answers are those that each
adapter would give alone.
"""

from __future__ import annotations

import itertools
import logging
import math
import time
import traceback
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import Future
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from functools import partial
from threading import Condition, Thread
from typing import Self

import torch

from normtune.adapters.multi.rows import RowAdapters
from normtune.data.groups import Group
from normtune.data.records import is_abstained
from normtune.errors import InputError
from normtune.metrics.choices import chosen_letter
from normtune.models.causal.family import CausalFamily
from normtune.models.family import Family
from normtune.models.types import Answer
from normtune.serving.engine.adapter_slots import BASE_SLOT, AdapterSlots
from normtune.serving.engine.image_encoder import ImageEncoder, pixel_digest
from normtune.serving.engine.queue import Job, TextCallback, group_jobs, separate_images, take_batch
from normtune.serving.engine.requests import Busy, Closed, DeviceFailed, EngineStats, Reply, Request, is_device_failure
from normtune.serving.engine.stable_text import before_stop, finish_answer, stable_text

IMAGE_BYTES = 512 << 20  # default size of the cache of encoded images

_log = logging.getLogger(__name__)


class Engine:
    """Answers requests in a worker thread of its own. All methods are thread-safe.

    Args:
        family: a base without an adapter. The engine changes it; `close` restores it.
        max_batch: the most requests of a batch.
        max_wait: seconds that the oldest request waits for others to join its batch while nothing runs.
        queue_limit: the most requests in the queue; it bounds the memory of their images.
        adapter_memory: bytes for loaded adapters; None is 256 MiB and at most 1,023 adapters.
        image_memory: bytes for the cache of encoded images.
        lora_rank: the largest rank of the LoRA adapters to serve; 0 serves norm adapters only. Every loaded
            adapter takes the memory of a LoRA of this rank, even if it has none.

    Attributes:
        failed: whether the accelerator failed, after which no request can be answered.
        register, remove, adapters, has_adapter: see the methods of `AdapterSlots`.

    Raises:
        InputError: `adapter_memory` is too small for one adapter, the base has no layer for LoRA, or it computes no
            batches.
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
        assert max_batch >= 1 and queue_limit >= 1 and max_wait >= 0, "limits leave room for a request"
        if not family.computes_batches:
            raise InputError(
                f"model {family.source} cannot be served: the self-test of grouping failed, so that its questions are "
                "computed one by one and cannot be batched. Use normtune ask or evaluate, or another model."
            )
        self.family, self.max_batch, self.max_wait, self.queue_limit = family, max_batch, max_wait, queue_limit
        self._adapters = adapters = AdapterSlots(family.model, adapter_memory, lora_rank, family.max_pixels)
        self.register, self.remove = adapters.register, adapters.remove
        self.adapters, self.has_adapter = adapters.infos, adapters.has_adapter
        self._images = ImageEncoder(family, self._adapters.bank, image_memory)
        family.active_text_rows = self._adapters.bank.text_rows
        self._condition = Condition()  # guards the attributes below; notified when the queue changes
        self._queue: list[Job] = []
        self._closing = self._base_restored = self.failed = False
        self._running = 0
        self._counts: Counter[str] = Counter()  # field of EngineStats -> count
        self._seconds_busy = 0.0
        self._numbers = itertools.count()
        self._thread = Thread(target=self._run, name="normtune engine", daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        self.close(drain=kind is None)

    # --- called from any thread -----------------------------------------------------------------------------

    def submit(self, request: Request, *, on_text: TextCallback | None = None) -> Future[Reply]:
        """Preprocess a request's images and add it to the queue.

        Args:
            on_text: called in the worker thread with the text so far, each time it has grown. Characters
                that were sent never change, and the last text is the reply's. With several beams, or with
                `abstain_below`, it is called once, at the end.

        Returns:
            A future of the reply. If it is cancelled before its batch begins, the request leaves the queue.

        Raises:
            Busy, Closed, DeviceFailed, UnknownAdapter: see their docstrings.
            InputError: the request cannot be answered; see `Request.check`.
        """
        adapter = self._adapters.find(request.adapter)
        request.check()
        with self._condition:
            self._check_accepting()  # refuse early: converting, hashing and preprocessing images take time
        images = tuple(image if image.mode == "RGB" else image.convert("RGB") for image in request.images)
        family, digests = self.family, tuple(map(pixel_digest, images))
        job = Job(
            number=next(self._numbers),
            request=replace(request, images=()),  # the queue bounds the memory of images, so it keeps one copy of each
            images=tuple(
                # An image that is in the cache will probably not be encoded again.
                image if (adapter.image_digest, digest) in self._images.cache else family.preprocess_image(image)
                for image, digest in zip(images, digests, strict=True)
            ),
            image_digests=digests,
            adapter=adapter,
            on_text=on_text,
        )
        job.future.add_done_callback(self._drop_cancelled)
        with self._condition:
            self._check_accepting()
            self._queue.append(job)
            self._condition.notify_all()
        return job.future

    def stats(self) -> EngineStats:
        """Return the current state and the counters since the start."""
        registered, loaded = self._adapters.counts()
        with self._condition:
            return EngineStats(
                queued=len(self._queue),
                running=self._running,
                registered=registered,
                loaded=loaded,
                loads=self._adapters.loads,
                evictions=self._adapters.evictions,
                adapter_bytes=loaded * self._adapters.bytes_per_adapter,
                images_computed=self._images.computed,
                images_reused=self._images.reused,
                image_bytes=self._images.cache.bytes,
                seconds_busy=self._seconds_busy,
                seconds_loading=self._adapters.seconds_loading,
                **self._counts,
            )

    def close(self, *, drain: bool = True, timeout: float | None = None) -> None:
        """Stop accepting requests, answer the queued ones (with `drain`), and restore the base.

        Without `drain`, or after `timeout` seconds, the requests still in the queue fail with `Closed`. A
        batch that has begun is always answered.
        """
        with self._condition:
            self._closing = True
            self._condition.notify_all()
        if not drain:
            self._reject_queued()
        self._thread.join(timeout)
        if self._thread.is_alive():
            self._reject_queued()
            return
        with self._condition:
            was_restored, self._base_restored = self._base_restored, True
        if not was_restored and not self.failed:
            self.family.active_text_rows = self.family.prompt_limit = None
            self._adapters.close()

    def _check_accepting(self) -> None:
        """Raise an error if no request can be accepted. The caller holds the lock."""
        if self.failed:
            raise DeviceFailed()
        if self._closing:
            raise Closed("the server is shutting down.")
        if len(self._queue) >= self.queue_limit:
            self._counts["refused"] += 1
            raise Busy(f"the queue is full: {self.queue_limit} requests are waiting. Try again later.")

    def _drop_cancelled(self, future: Future[Reply]) -> None:
        if future.cancelled():
            with self._condition:
                self._queue[:] = [job for job in self._queue if job.future is not future]
                self._counts["cancelled"] += 1

    def _reject_queued(self) -> None:
        """Fail all requests in the queue with `Closed`."""
        with self._condition:
            rejected, self._queue = self._queue, []
        for job in rejected:
            if job.future.set_running_or_notify_cancel():
                closed = Closed("the server shut down before it answered the request.")
                job.future.set_exception(DeviceFailed() if self.failed else closed)

    # --- the worker thread ----------------------------------------------------------------------------------

    def _run(self) -> None:
        _select_device(self.family.device)
        while not self.failed and (jobs := self._next_batch()):
            began = time.monotonic()
            # Futures that were cancelled meanwhile are dropped; the others can no longer be cancelled.
            running = [job for job in jobs if job.future.set_running_or_notify_cancel()]
            try:
                self._process(running)
            except Exception as error:  # a bug of the engine: fail the jobs, or their callers would wait forever
                for job in running:
                    if not job.future.done():
                        self._fail(job, error)
            with self._condition:
                self._running = 0
                self._seconds_busy += time.monotonic() - began
        if self.failed:
            self._reject_queued()

    def _next_batch(self) -> list[Job]:
        """Wait until a batch is full or its oldest job has waited `max_wait` seconds; empty when the engine closes."""
        with self._condition:
            while True:
                if not self._queue:
                    if self._closing:
                        return []
                    self._condition.wait()
                    continue
                wait = self._queue[0].arrived + self.max_wait - time.monotonic()
                if len(self._queue) >= self.max_batch or wait <= 0 or self._closing:
                    jobs = take_batch(self._queue, self.max_batch, self._adapters.capacity)
                    self._running = len(jobs)
                    return jobs
                self._condition.wait(wait)

    def _process(self, jobs: Sequence[Job]) -> None:
        """Load the adapters of a batch, encode its images and answer it. A job that fails fails alone."""
        ready: list[Job] = []
        with ExitStack() as stack:
            for job in jobs:
                try:
                    self._adapters.pin(job.adapter)
                    stack.callback(self._adapters.unpin, job.adapter)
                    self._tokenize(job)
                    ready.append(job)
                except Exception as error:
                    self._fail(job, error)
            errors = self._images.encode(ready)
            for job, image_error in errors.items():
                self._fail(job, image_error)
            if ready := [job for job in ready if job not in errors]:
                self._answer(ready)

    def _tokenize(self, job: Job) -> None:
        """Set a job's segment, cut as in its adapter's training, and count the tokens that are cut."""
        family, request = self.family, job.request
        question = job.adapter.choices.write(request.question or "", request.options)
        family.use_limits(job.adapter.limits)
        is_report = request.question is None
        job.segment = family.tokenize(str(job.number), question, None, report=is_report, history=request.history)
        job.tokens_cut = family.question_tokens_cut(job.segment, question, request.history)

    def _answer(self, jobs: list[Job]) -> None:
        """Answer prepared jobs in one batch. If that fails, for example for memory, retry it in halves."""
        groups = group_jobs(jobs)
        answers = None
        try:
            answers = self._generate(groups)
        except Exception as error:
            if len(jobs) == 1 or is_device_failure(error):
                for job in jobs:
                    self._fail(job, error)
                return
        if answers is None:  # retry outside the except block, where the error no longer keeps the batch in memory
            self._answer(jobs[: len(jobs) // 2])
            self._answer(jobs[len(jobs) // 2 :])
            return
        self._count(batches=1)
        for group, group_answers in zip(groups, answers, strict=True):
            for job, answer in zip(group, group_answers, strict=True):
                self._reply(job, answer)

    def _generate(self, groups: Sequence[Sequence[Job]]) -> list[list[Answer]]:
        """Generate the answers of one batch; `result[g][j]` is for job j of group g."""
        request = groups[0][0].request  # all jobs of a batch have its limit and beams
        questions = [Group(jobs[0].image_digests, tuple(job.segment for job in jobs)) for jobs in groups]
        # A causal model computes a group in one row, unless the image's states depend on the question; other
        # models have a row for each job.
        row_limit = 1 if isinstance(self.family, CausalFamily) and self.family.shares_prefix else None
        slots = [jobs[0].adapter.slot or BASE_SLOT for jobs in groups]
        row_slots = [slot for slot, jobs in zip(slots, groups, strict=True) for _ in jobs[:row_limit]]
        jobs_in_order = [job for jobs in groups for job in jobs]
        for job in jobs_in_order:
            job.tokens.clear()  # tokens of a batch that failed before; the client has `sent_text`
        streams = any(job.on_text is not None for job in jobs_in_order)
        images, studies = [jobs[0].encoded_images for jobs in groups], None
        if (lora := self._adapters.lora) is not None and lora.reads_images:
            # Adapters without LoRA share the base's keys and values of a study.
            lora_slots = [slot if slot in lora.loaded else BASE_SLOT for slot in slots]
            images, study_slots = separate_images(groups, lora_slots)
            studies = RowAdapters(study_slots)
        with (
            # None: the images are already encoded, so the norms of the image parts do not run.
            self._adapters.bank.use(None, RowAdapters(row_slots)),
            # Text layers that attend to images use the LoRA of each study's adapter.
            nullcontext() if lora is None else lora.cross_attention_rows.use(studies),
        ):
            return self.family.generate_answers(
                questions,
                images,
                max_new_tokens=request.token_limit,
                beams=request.beams,
                on_tokens=partial(self._stream, jobs_in_order) if streams else None,
            )

    def _stream(self, jobs: Sequence[Job], prompts: Sequence[int], tokens: Sequence[int]) -> None:
        """Send the new text of streamed answers; `prompts` has the index in `jobs` of each of the new `tokens`."""
        for prompt, token in zip(prompts, tokens, strict=True):
            job = jobs[prompt]
            if job.on_text is None or job.request.abstain_below is not None or job.callback_error is not None:
                continue
            job.tokens.append(token)
            try:
                job.send(before_stop(stable_text(self.family, job.tokens), job.request.stop))
            except Exception as error:  # only this job's callback failed
                job.callback_error = error

    def _reply(self, job: Job, answer: Answer) -> None:
        """Send the rest of a streamed answer, and complete the job's future."""
        try:
            tokens = {"prompt_tokens": self.family.prefix_tokens(job.encoded_images) + len(job.segment.prompt)}
            text, tokens["completion_tokens"], finish_reason = finish_answer(self.family, answer, job.request.stop)
            # The score describes the whole answer, so an answer that was cut has none.
            score = answer.score if math.isfinite(answer.score) and text == answer.text else None
            abstained = is_abstained(score, job.request.abstain_below)
            text = "" if abstained else text
            if job.callback_error is not None:
                raise job.callback_error
            job.send(text)
            # In a retried batch of another size, rounding may change a token that was already sent.
            if not text.startswith(job.sent_text):
                raise RuntimeError("the answer changed when its batch was retried")
        except Exception as error:
            self._fail(job, error)
            return
        self._count(requests=1, questions_cut=int(job.tokens_cut > 0), abstained=int(abstained), **tokens)
        job.future.set_result(
            Reply(
                text=text,
                score=score,
                seconds=time.monotonic() - job.arrived,
                finish_reason=finish_reason,
                question_tokens_cut=job.tokens_cut,
                abstained=abstained,
                choice=chosen_letter(text, job.request.options) if job.request.options else None,
                **tokens,
            )
        )

    def _fail(self, job: Job, error: Exception) -> None:
        """Fail a job. An error that its input did not cause is logged, without its message.

        The message could quote the question, which may name a patient.
        """
        if is_device_failure(error) and not self.failed:
            self.failed = True
            _log.error("the accelerator failed; the process must be started again: %s", str(error).partition("\n")[0])
        if not isinstance(error, InputError):
            where = "".join(traceback.format_tb(error.__traceback__))
            _log.error("request %d failed: %s\n%s", job.number, type(error).__name__, where)
        self._count(failed=1)
        reported = DeviceFailed() if self.failed else error
        job.future.set_exception(reported.with_traceback(None))  # the traceback's frames keep the batch in memory

    def _count(self, **amounts: int) -> None:
        with self._condition:
            self._counts.update(amounts)


def _select_device(device: torch.device) -> None:
    if device.type == "cuda":  # a new thread does not inherit the current device
        torch.cuda.set_device(device)
