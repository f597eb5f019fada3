"""Checkpoints of a training run: which one to resume from, and what it records.

A checkpoint folder `checkpoints/checkpoint-STEP` holds the trained values, optimiser and schedule, HF's
`trainer_state.json`, `run.json` (the run's identity and position), and an empty file as a mark, written last.
"""

from __future__ import annotations

import shutil
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from normtune.data.batches import EpochBatches
from normtune.errors import InputError
from normtune.runtime import distributed
from normtune.runtime.files import read_json

# the last file of a checkpoint: a checkpoint without it is incomplete and is ignored
CHECKPOINT_MARK = "whole"
RUN_FILE = "run.json"
TRAINED_FILE, OPTIMIZER_FILE, SCHEDULER_FILE = "trained.safetensors", "optimizer.pt", "scheduler.pt"


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint, and the position of the run that wrote it."""

    folder: Path
    step: int
    pairs_seen: int  # question-answer pairs that all processes had trained on
    pairs_a_step: int  # pairs per batch, summed over all processes
    steps_an_epoch: int  # batches per epoch and process
    unlogged_loss: float  # sum of the losses of the steps since the last log entry
    logged_at: int  # step of that entry
    train_seconds: float = 0.0  # of training until then, without set-up and validation
    validation_seconds: float = 0.0
    noise_multiplier: float | None = None  # of a private run
    max_group_size: int | None = None  # most questions of one image in a group; None: no limit, or not recorded

    @classmethod
    def read(cls, folder: Path) -> Checkpoint:
        """Read the position that a checkpoint records.

        Raises:
            InputError: the folder is not on storage that this process can see, or its file is damaged.
        """
        if not folder.is_dir():
            raise InputError(f"not all processes can see {folder}. Choose an --out on storage that all of them share.")
        stored = read_json(folder / RUN_FILE)
        names = ("pairs_seen", "pairs_a_step", "steps_an_epoch", "unlogged_loss", "logged_at")
        try:
            position = {name: stored[name] for name in names}
            times = {name: stored.get(name, 0.0) for name in ("train_seconds", "validation_seconds")}
            others = {name: stored.get(name) for name in ("max_group_size", "noise_multiplier")}
            return cls(folder, _step(folder), **position, **times, **others)
        except KeyError as error:
            raise InputError(
                f"{folder / RUN_FILE} has no entry {error}. Start again with --no-resume, or choose another --out."
            ) from error

    def batch_size(self) -> int:
        """Return the batch size per process with which a run resumes.

        A step keeps its number of pairs if the number of processes changes. For example, a run of 2 processes
        with 8 pairs each resumes with 16 pairs on 1 process, or with 4 on each of 4.

        Raises:
            InputError: the pairs of a step cannot be divided evenly among the processes.
        """
        ranks = distributed.world_size()
        if self.pairs_a_step % ranks:
            raise InputError(
                f"{self.folder} has {self.pairs_a_step} pairs per step, which {ranks} processes cannot share evenly. "
                "Start another number of processes, or start again with --no-resume."
            )
        return self.pairs_a_step // ranks

    def check_steps(self, batches: EpochBatches) -> None:
        """Check that an epoch has as many steps as in the run that wrote the checkpoint, and the same groups.

        Every process needs a group in every step, so that more processes can mean fewer steps. The groups of sampled
        rows (`--sample`, weights of --data) depend on the batch of a process.

        Raises:
            InputError: they differ.
        """
        if batches.sampler is not None and self.max_group_size != batches.max_group_size:
            raise InputError(
                f"{self.folder} has groups of at most {self.max_group_size} sampled questions, and these processes "
                f"would make groups of {batches.max_group_size}. Start as many processes as before, or start again "
                "with --no-resume."
            )
        if self.steps_an_epoch != batches.steps:
            raise InputError(
                f"{self.folder} has {self.steps_an_epoch} steps per epoch, but {batches.ranks} processes need "
                f"{batches.steps}. Start fewer processes, or start again with --no-resume."
            )


def _step(folder: Path) -> int:
    return int(folder.name.split("-")[1])


def last_checkpoint(out: Path) -> Path | None:
    """Return the newest complete checkpoint under `out`, or None."""
    # the largest step, not the newest file: copying a folder changes times
    complete = [mark.parent for mark in (out / "checkpoints").glob(f"checkpoint-*/{CHECKPOINT_MARK}")]
    return max(complete, key=_step, default=None)


def delete_checkpoints(out: Path) -> None:
    """Delete the checkpoints under `out`, complete or not, but no files that an experiment tracker wrote there."""
    folder = out / "checkpoints"
    for checkpoint in folder.glob("checkpoint-*"):
        shutil.rmtree(checkpoint, ignore_errors=True)
    with suppress(OSError):  # it is missing, or has other files
        folder.rmdir()


def log_folder(out: Path, *, resumed: bool) -> Path:
    """Return the folder of a run's TensorBoard files, which stay after the run.

    A new one under `out/runs`, named by the time; a resumed run continues in the newest one.
    """
    earlier = sorted((out / "runs").glob("*/")) if resumed else []
    return earlier[-1] if earlier else out / "runs" / time.strftime("%Y-%m-%d_%H-%M-%S")
