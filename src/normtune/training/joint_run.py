"""One adapter of a shared pass: its own data order, optimiser, schedule, loss log and checkpoints."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator, Sequence
from itertools import count
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import get_scheduler

from normtune.adapters.multi.bank import AdapterBank
from normtune.data.batches import EpochBatches
from normtune.data.records import Dataset, Example
from normtune.errors import InputError
from normtune.runtime.files import read_json, write_json
from normtune.training.checkpoints import (
    CHECKPOINT_MARK,
    OPTIMIZER_FILE,
    SCHEDULER_FILE,
    TRAINED_FILE,
    run_identity,
)
from normtune.training.collator import Collator
from normtune.training.config import TrainConfig
from normtune.training.trainer import logging_steps, optimizer_steps, scheduler_name

Groups = list[list[Example]]  # of one batch: an image's examples a group
_KEPT = 2  # checkpoints


class AdapterRun:
    """The run of one adapter, a batch at a time; what `normtune.training.train` does with a model of its own.

    Attributes:
        dataset, examples: what it is trained on.
        collate: its examples as tokens and images; lanes of one dataset share it.
        batches: its order, a function of its seed and the epoch.
        steps: optimiser steps that are done, of `total`.
        pairs: question-answer pairs seen.
        losses: (step, mean loss a token since the last entry), as the Trainer logs it.
        seconds: since the pass began, until this lane was done.
    """

    def __init__(
        self,
        adapter: int,
        config: TrainConfig,
        mixed: AdapterBank,
        dataset: Dataset,
        examples: Sequence[Example],
        collate: Collator,
        batches: EpochBatches,
    ) -> None:
        self.adapter, self.config, self.mixed = adapter, config, mixed
        self.dataset, self.examples, self.collate, self.batches = dataset, examples, collate, batches
        self.total = optimizer_steps(config, batches)
        self.log_every = logging_steps(config, batches)
        self.steps = self.pairs = 0
        self.losses: list[tuple[int, float]] = []
        self.seconds = 0.0
        self._loss = 0.0  # since the last entry of the log
        # one row of the bank: AdamW works number by number, so that tensors need not be told apart
        self._values = nn.Parameter(mixed.values[adapter])
        self._values.grad = mixed.grads[adapter]
        self._optimizer = torch.optim.AdamW(
            [self._values], lr=config.learning_rate("ln"), weight_decay=0.0
        )  # decay is for matrices
        self._scheduler = get_scheduler(
            scheduler_name(config),
            self._optimizer,
            num_warmup_steps=int(config.warmup * self.total),
            num_training_steps=self.total,
        )
        self._window: list[Groups] = []  # batches that the step under way still needs
        self._tokens = 0  # answer tokens of that step, over all its batches
        self._order: Iterator[list[Groups]] | None = None

    @property
    def done(self) -> bool:
        return self.steps >= self.total

    @property
    def epoch_steps(self) -> int:
        """Optimiser steps an epoch."""
        return math.ceil(self.batches.steps / self.config.accumulate)

    def _windows(self) -> Iterator[list[Groups]]:
        """The batches of each step that is to come."""
        first, skipped = divmod(self.steps, self.epoch_steps)
        size = self.config.accumulate
        for epoch in count(first):
            self.batches.set_epoch(epoch)
            cut = list(self.batches)
            windows = [cut[start : start + size] for start in range(0, len(cut), size)]
            yield from windows[skipped if epoch == first else 0 :]

    def next(self) -> Groups:
        """The next batch."""
        assert not self.done, "this lane is done"
        if self._order is None:
            self._order = self._windows()
        if not self._window:
            self._window = next(self._order)
            self._tokens = sum(
                len(self.collate.segment(example).answer)
                for batch in self._window
                for group in batch
                for example in group
            )
        return self._window.pop(0)

    def scale_loss(self, loss: Tensor) -> Tensor:
        """A batch's summed cross-entropy as its part of the step's mean over answer tokens."""
        return loss / self._tokens

    def record_batch(self, batch: Groups, loss: float) -> None:
        """Take in a batch whose gradients are there, with its scaled loss; step where it was the last one."""
        self.pairs += sum(map(len, batch))
        self._loss += loss
        if self._window:
            return
        nn.utils.clip_grad_norm_([self._values], self.config.max_grad_norm)
        self._optimizer.step()
        self._scheduler.step()
        self.mixed.grads[self.adapter].zero_()
        self.steps += 1
        if self.steps % self.log_every == 0:
            logged = self.losses[-1][0] if self.losses else 0
            self.losses.append((self.steps, self._loss / (self.steps - logged)))
            self._loss = 0.0
        every = self.config.save_every or self.epoch_steps
        if self.steps % every == 0 or self.done:
            self._save()

    # --- checkpoints ----------------------------------------------------------------------------------------

    def _folder(self) -> Path:
        """Not where the Trainer looks for its own: a run of one adapter cannot go on from these."""
        return self.config.out / "checkpoints"

    def _whole(self) -> list[Path]:
        """Whole checkpoints, the oldest first."""
        found = [mark.parent for mark in self._folder().glob(f"together-*/{CHECKPOINT_MARK}")]
        return sorted(found, key=lambda path: int(path.name.split("-")[1]))

    def _save(self) -> None:
        directory = self._folder() / f"together-{self.steps}"
        shutil.rmtree(directory, ignore_errors=True)
        try:
            directory.mkdir(parents=True)
            tensors = self.mixed.trained(self.adapter)
            save_file(
                {name: one.detach().cpu().clone() for name, one in tensors.items()}, directory / TRAINED_FILE
            )
            torch.save(self._optimizer.state_dict(), directory / OPTIMIZER_FILE)
            torch.save(self._scheduler.state_dict(), directory / SCHEDULER_FILE)
        except (OSError, SafetensorError, RuntimeError) as error:
            raise InputError(
                f"cannot write a checkpoint under {self._folder()}: {error}. "
                "Free some space and run the same again: it goes on from the last whole checkpoint."
            ) from error
        position = {"steps": self.steps, "pairs_seen": self.pairs, "losses": self.losses, "loss": self._loss}
        write_json(directory / "run.json", run_identity(self.config) | position)
        (directory / CHECKPOINT_MARK).touch()
        for old in self._whole()[:-_KEPT]:
            shutil.rmtree(old, ignore_errors=True)

    def resume(self) -> None:
        """Go on from the last whole checkpoint, if there is one and the run may; else forget them all.

        Raises:
            InputError: it is of a run with other options.
        """
        whole = self._whole() if self.config.resume else []
        if not whole:
            shutil.rmtree(self._folder(), ignore_errors=True)
            return
        stored, now = read_json(whole[-1] / "run.json"), run_identity(self.config)
        if changed := [name for name, value in now.items() if stored.get(name) != value]:
            raise InputError(
                f"{whole[-1]} is of a run with other options ({', '.join(changed)}). "
                "Repeat those options, choose another --out, or start afresh with --no-resume."
            )
        self.mixed.set_adapter(self.adapter, load_file(whole[-1] / TRAINED_FILE))
        optimizer, scheduler = (
            torch.load(whole[-1] / name, self._values.device, weights_only=True)
            for name in (OPTIMIZER_FILE, SCHEDULER_FILE)
        )
        self._optimizer.load_state_dict(optimizer)
        self._scheduler.load_state_dict(scheduler)
        self.steps, self.pairs, self._loss = stored["steps"], stored["pairs_seen"], stored["loss"]
        self.losses = [(step, loss) for step, loss in stored["losses"]]
