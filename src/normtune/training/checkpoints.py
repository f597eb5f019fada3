"""Checkpoints of a training run: which one to resume from, and whether the run may resume from it.

A checkpoint folder `checkpoints/checkpoint-STEP` holds the trained values, optimiser and schedule, HF's
`trainer_state.json`, `run.json` (the run's identity and position), and an empty file as a mark, written last.
"""

from __future__ import annotations

import shutil
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from normtune.data.batches import EpochBatches
from normtune.errors import InputError
from normtune.runtime import distributed
from normtune.runtime.files import read_json
from normtune.training.config import TrainConfig

# the last file of a checkpoint: a checkpoint without it is incomplete and is ignored
CHECKPOINT_MARK = "whole"
TRAINED_FILE, OPTIMIZER_FILE, SCHEDULER_FILE = "trained.safetensors", "optimizer.pt", "scheduler.pt"


def last_checkpoint(out: Path) -> Path | None:
    """Return the newest complete checkpoint under `out`, or None."""
    # the largest step, not the newest file: copying a folder changes times
    complete = [mark.parent for mark in (out / "checkpoints").glob(f"checkpoint-*/{CHECKPOINT_MARK}")]
    return max(complete, key=lambda path: int(path.name.split("-")[1]), default=None)


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


def run_identity(config: TrainConfig) -> dict[str, Any]:
    """Return the run's identity: the options that must be the same in order to resume from a checkpoint."""
    # the excluded options change where a run computes and writes, not the values that it computes
    return config.model_dump(
        mode="json", exclude={"out", "root", "resume", "tracker", "device", "save_every", "memory", "cache", "compile"}
    )


def resumed_batch(config: TrainConfig, checkpoint: Path) -> int:
    """Return the batch size per process with which a run resumes from `checkpoint`.

    A step keeps its number of pairs if the number of processes changes. For example, a run of 2 processes
    with 8 pairs each resumes with 16 pairs on 1 process, or with 4 on each of 4.

    Raises:
        InputError: the checkpoint belongs to a run with other options, or its steps cannot be divided evenly
            among the processes.
    """
    if not checkpoint.is_dir():
        raise InputError(f"not all processes can see {checkpoint}. Choose an --out on storage that all of them share.")
    stored, current = read_json(checkpoint / "run.json"), run_identity(config)
    ranks = distributed.world_size()
    # pairs per step over all processes; without the key the step is taken to be as large as this run's
    pairs = int(stored.get("pairs_a_step", config.batch * ranks))
    if config.batch * ranks == pairs:
        # e.g. --batch 8 on 2 processes and --batch 16 on 1 make the same steps
        current["batch"] = stored.get("batch")
    # an option that is missing in the file (written by an older version) counts as None
    changed = [name for name, value in current.items() if stored.get(name) != value]
    if changed:
        raise InputError(
            f"{checkpoint} belongs to a run with other options ({', '.join(changed)}). "
            "Repeat those options, choose another --out, or start again with --no-resume."
        )
    # each process takes the same number of pairs
    if pairs % ranks:
        raise InputError(
            f"{checkpoint} has {pairs} pairs per step, which {ranks} processes cannot share evenly. "
            "Start another number of processes, or start again with --no-resume."
        )
    return pairs // ranks


def check_same_steps(checkpoint: Path, batches: EpochBatches) -> None:
    """Check that an epoch has as many steps as in the run that wrote `checkpoint`.

    Every process needs a group in every step, so that more processes can mean fewer steps.

    Raises:
        InputError: the numbers differ.
    """
    stored = int(read_json(checkpoint / "run.json").get("steps_an_epoch", batches.steps))
    if stored != batches.steps:
        raise InputError(
            f"{checkpoint} has {stored} steps per epoch, but {batches.ranks} processes need {batches.steps}. "
            "Start fewer processes, or start again with --no-resume."
        )
