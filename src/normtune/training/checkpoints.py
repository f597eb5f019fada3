"""Checkpoints of a training run: which one to resume from, and whether that is possible."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from normtune.data.batches import EpochBatches
from normtune.errors import InputError
from normtune.runtime import distributed
from normtune.runtime.files import read_json
from normtune.training.config import TrainConfig

CHECKPOINT_MARK = (
    "whole"  # the last file of a checkpoint: one without it was cut short and is not resumed from
)
TRAINED_FILE, OPTIMIZER_FILE, SCHEDULER_FILE = "trained.safetensors", "optimizer.pt", "scheduler.pt"


def last_checkpoint(out: Path) -> Path | None:
    """The newest whole checkpoint under `out`, if there is one."""
    whole = [mark.parent for mark in (out / "checkpoints").glob(f"checkpoint-*/{CHECKPOINT_MARK}")]
    return max(whole, key=lambda path: int(path.name.split("-")[1]), default=None)


def run_identity(config: TrainConfig) -> dict[str, Any]:
    """What must be the same for a run to go on from a checkpoint."""
    return config.model_dump(
        mode="json",
        exclude={"out", "root", "resume", "tracker", "device", "save_every", "memory", "cache", "compile"},
    )


def resumed_batch(config: TrainConfig, checkpoint: Path) -> int:
    """Pairs a step and process with which the run that wrote `checkpoint` goes on.

    A step holds what it held: fewer processes take more of it each, more processes less.

    Raises:
        InputError: it is of a run with other options, or its steps cannot be shared by these processes.
    """
    if not checkpoint.is_dir():
        raise InputError(f"not all processes see {checkpoint}. Choose an --out on storage that all share.")
    stored, now, ranks = read_json(checkpoint / "run.json"), run_identity(config), distributed.count()
    pairs = int(stored.get("pairs_a_step", config.batch * ranks))
    if config.batch * ranks == pairs:
        now["batch"] = stored.get("batch")
    changed = [name for name, value in now.items() if stored.get(name) != value]
    if changed:
        raise InputError(
            f"{checkpoint} is of a run with other options ({', '.join(changed)}). "
            "Repeat those options, choose another --out, or start afresh with --no-resume."
        )
    if pairs % ranks:
        raise InputError(
            f"{checkpoint} is of a run of {pairs} pairs a step, which {ranks} processes cannot share evenly. "
            "Start another number of them, or start afresh with --no-resume."
        )
    return pairs // ranks


def check_same_steps(checkpoint: Path, batches: EpochBatches) -> None:
    """Check that the run that wrote `checkpoint` cut an epoch into as many steps.

    Raises:
        InputError: it did not.
    """
    stored = int(read_json(checkpoint / "run.json").get("steps_an_epoch", batches.steps))
    if stored != batches.steps:
        raise InputError(
            f"{checkpoint} is of a run of {stored} steps an epoch, and {batches.ranks} processes make "
            f"{batches.steps} of these groups. Start fewer of them, or start afresh with --no-resume."
        )
