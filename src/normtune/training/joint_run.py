"""The run of one adapter in a shared pass: data order, optimiser, schedule, loss log and checkpoints.

This is what Hugging Face's Trainer does for a single run, without its loop: `normtune.training.joint` asks
each run for its next batch, computes the gradients of several runs at once, and hands the loss back.

    next_batch()    the next batch of groups; at the start of a step it also counts the step's answer tokens
    scale_loss()    loss of the batch / answer tokens of the step
    record_batch()  adds up the loss; after the last batch of the step: clip, AdamW, schedule, log, checkpoint
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator, Sequence
from itertools import count
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import get_scheduler

from normtune.adapters.multi.bank import AdapterBank
from normtune.data.batches import EpochBatches
from normtune.data.records import Dataset, Example
from normtune.errors import InputError
from normtune.runtime.files import read_json, write_json
from normtune.runtime.tensors import write_tensors
from normtune.training.checkpoints import (
    CHECKPOINT_MARK,
    OPTIMIZER_FILE,
    SCHEDULER_FILE,
    TRAINED_FILE,
    delete_checkpoints,
    run_identity,
)
from normtune.training.collator import Collator
from normtune.training.config import TrainConfig
from normtune.training.trainer import logging_steps, optimizer_steps, scheduler_name

Groups = list[list[Example]]  # a batch: the examples of each group, which have the same images
_CHECKPOINT_COUNT = 2  # complete checkpoints that remain on disk


class AdapterRun:
    """The run of one adapter, batch by batch: what `normtune.training.train` does with a model of its own.

    Args:
        adapter: index of the adapter in the bank.
        config: options of this run.
        bank: holds the values and gradients of all adapters.
        dataset, examples: what the adapter is trained on.
        collate: tokenises examples and gives images; runs on the same dataset share it.
        batches: the data order, a function of the seed and the epoch.

    Attributes:
        steps: optimiser steps done, out of `total`.
        pairs: question-answer pairs seen, those before a resume included.
        resumed_pairs: pairs seen before the resume.
        resumed_from_step: step of the checkpoint from which the run resumed; None: it did not resume.
        losses: (step, mean loss per answer token since the previous entry), as the Trainer logs it.
        seconds: from the start of the pass until this run was finished.
    """

    def __init__(
        self,
        adapter: int,
        config: TrainConfig,
        bank: AdapterBank,
        dataset: Dataset,
        examples: Sequence[Example],
        collate: Collator,
        batches: EpochBatches,
    ) -> None:
        self.adapter, self.config, self.bank = adapter, config, bank
        self.dataset, self.examples, self.collate, self.batches = dataset, examples, collate, batches
        self.total = optimizer_steps(config, batches)
        self.log_every = logging_steps(config, batches)
        self.steps = self.pairs = self.resumed_pairs = 0
        self.resumed_from_step: int | None = None
        self.losses: list[tuple[int, float]] = []
        self.seconds = 0.0
        self._unlogged_loss = 0.0  # summed since the last entry of the log
        # One row of the bank, [trained values]: views, so that the norms read what AdamW writes, and AdamW
        # reads the gradients that the bank collects. AdamW is elementwise, and clipping needs the norm of all
        # values: one flat parameter gives the same steps as one parameter per tensor
        self._values = nn.Parameter(bank.values[adapter])
        self._values.grad = bank.grads[adapter]
        self._optimizer = torch.optim.AdamW(
            [self._values], lr=config.learning_rate("ln"), weight_decay=0.0
        )  # weight decay is for matrices
        self._scheduler = get_scheduler(
            scheduler_name(config),
            self._optimizer,
            num_warmup_steps=int(config.warmup * self.total),
            num_training_steps=self.total,
        )
        self._pending: list[Groups] = []  # batches that the current step still needs
        self._step_tokens = 0  # answer tokens of all batches of the current step
        self._batches_by_step: Iterator[list[Groups]] | None = None  # made after `resume` has set `steps`

    @property
    def done(self) -> bool:
        """Whether all steps are done."""
        return self.steps >= self.total

    @property
    def epoch_steps(self) -> int:
        """Optimiser steps per epoch."""
        return math.ceil(self.batches.steps / self.config.accumulate)

    def _iterate_steps(self) -> Iterator[list[Groups]]:
        """Yield the batches of each remaining step, epoch after epoch."""
        # e.g. 7 steps done of 5 per epoch: start in epoch 1 and skip its first 2 steps
        first, skipped = divmod(self.steps, self.epoch_steps)
        size = self.config.accumulate
        for epoch in count(first):
            self.batches.set_epoch(epoch)
            batches = list(self.batches)
            # the last step of an epoch may have fewer batches, as in HF's Trainer
            steps = [batches[start : start + size] for start in range(0, len(batches), size)]
            yield from steps[skipped if epoch == first else 0 :]

    def next_batch(self) -> Groups:
        """Return the next batch."""
        assert not self.done, "this run is finished"
        if self._batches_by_step is None:
            self._batches_by_step = self._iterate_steps()
        if not self._pending:
            # the first batch of a step: its loss is normalised by the answer tokens of all batches of the
            # step, as in `AdapterTrainer.compute_loss`
            self._pending = next(self._batches_by_step)
            self._step_tokens = sum(
                len(self.collate.segment(example).answer)
                for batch in self._pending
                for group in batch
                for example in group
            )
        return self._pending.pop(0)

    def scale_loss(self, loss: Tensor) -> Tensor:
        """Turn a batch's summed cross-entropy into its part of the step's mean over answer tokens."""
        return loss / self._step_tokens

    def record_batch(self, batch: Groups, loss: float) -> None:
        """Record a batch after its backward pass, and make the optimiser step if it was the last of its step.

        Args:
            batch: the batch that `next_batch` returned; its gradients are in the bank.
            loss: its scaled loss.
        """
        self.pairs += sum(map(len, batch))
        self._unlogged_loss += loss
        if self._pending:  # gradients of further batches are added before the step
            return
        # the same order as in HF's Trainer: clip, optimiser, schedule, gradients to zero
        nn.utils.clip_grad_norm_([self._values], self.config.max_grad_norm)
        self._optimizer.step()
        self._scheduler.step()
        self.bank.grads[self.adapter].zero_()  # in place: `_values.grad` is a view of it
        self.steps += 1
        # an entry covers all steps since the previous one, also across a resume: the sum is in checkpoints
        if self.steps % self.log_every == 0:
            logged_at = self.losses[-1][0] if self.losses else 0
            self.losses.append((self.steps, self._unlogged_loss / (self.steps - logged_at)))
            self._unlogged_loss = 0.0
        save_every = self.config.save_every or self.epoch_steps
        if self.steps % save_every == 0 or self.done:
            self._save()

    # --- checkpoints ----------------------------------------------------------------------------------------

    def _folder(self) -> Path:
        """The folder of the checkpoints.

        Their names start with `together-`: the Trainer, which looks for `checkpoint-`, cannot resume from
        them.
        """
        return self.config.out / "checkpoints"

    def _complete(self) -> list[Path]:
        """List the complete checkpoints, the oldest first."""
        complete = [mark.parent for mark in self._folder().glob(f"together-*/{CHECKPOINT_MARK}")]
        return sorted(complete, key=lambda path: int(path.name.split("-")[1]))

    def _save(self) -> None:
        directory = self._folder() / f"together-{self.steps}"
        shutil.rmtree(directory, ignore_errors=True)  # an incomplete one of a killed pass
        try:
            directory.mkdir(parents=True)
            tensors = self.bank.parameters_of(self.adapter)
            # clones: on a CPU the tensors are views of the bank
            write_tensors(
                directory / TRAINED_FILE, {name: tensor.detach().cpu().clone() for name, tensor in tensors.items()}
            )
            torch.save(self._optimizer.state_dict(), directory / OPTIMIZER_FILE)
            torch.save(self._scheduler.state_dict(), directory / SCHEDULER_FILE)
        except (OSError, RuntimeError) as error:
            raise InputError(
                f"cannot write a checkpoint under {self._folder()}: {error}. "
                "Free some space and run the same again to resume from the last complete checkpoint."
            ) from error
        # the identity and the position; the mark comes last, so that a checkpoint with it is complete
        position = {"steps": self.steps, "pairs_seen": self.pairs, "losses": self.losses, "loss": self._unlogged_loss}
        write_json(directory / "run.json", run_identity(self.config) | position)
        (directory / CHECKPOINT_MARK).touch()
        for old in self._complete()[:-_CHECKPOINT_COUNT]:
            shutil.rmtree(old, ignore_errors=True)

    def resume(self) -> None:
        """Resume from the last complete checkpoint if there is one and `config.resume` is set.

        Otherwise all checkpoints are deleted.

        Raises:
            InputError: the checkpoint belongs to a run with other options.
        """
        checkpoints = self._complete() if self.config.resume else []
        if not checkpoints:
            delete_checkpoints(self.config.out)
            return
        last = checkpoints[-1]
        stored, current = read_json(last / "run.json"), run_identity(self.config)
        # only what determines the values must be equal: see `run_identity`
        if changed := [name for name, value in current.items() if stored.get(name) != value]:
            raise InputError(
                f"{last} belongs to a run with other options ({', '.join(changed)}). "
                "Repeat those options, choose another --out, or start again with --no-resume."
            )
        self.bank.set_adapter(self.adapter, load_file(last / TRAINED_FILE))
        optimizer, scheduler = (
            torch.load(last / name, self._values.device, weights_only=True) for name in (OPTIMIZER_FILE, SCHEDULER_FILE)
        )
        self._optimizer.load_state_dict(optimizer)
        self._scheduler.load_state_dict(scheduler)
        self.steps, self.pairs, self._unlogged_loss = stored["steps"], stored["pairs_seen"], stored["loss"]
        self.resumed_from_step, self.resumed_pairs = self.steps, self.pairs
        self.losses = [(step, loss) for step, loss in stored["losses"]]
