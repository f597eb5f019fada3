"""The training run: a recipe on a dataset, through the Hugging Face Trainer, to a delta on disk."""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    TrainerCallback,
    TrainerControl,
    TrainerState,
)
from transformers.trainer_utils import set_seed

from normtune import delta, memory, processes
from normtune.adapt import Change, Tuned, adapt, change_report, norm_changes
from normtune.catalog import open_from
from normtune.collator import collator
from normtune.compiled import compiled
from normtune.config import TrainConfig
from normtune.data.records import Dataset, Example
from normtune.data.splits import chosen
from normtune.errors import InputError
from normtune.files import write_json
from normtune.lean import lean
from normtune.models import load
from normtune.models.family import Family
from normtune.models.tokens import count_tokens
from normtune.packing import EpochBatches
from normtune.recipe import parse
from normtune.recompute import recomputed
from normtune.trainer import DeltaTrainer, check_same_steps, last_checkpoint, resumed_batch


@dataclass(frozen=True)
class TrainResult:
    """What a run came to. `changed` is the share of trained values that differ from the base's."""

    out: str
    recipe: str
    trainable: int
    total: int
    share: float
    pairs: int
    steps: int
    seconds: float
    pairs_per_second: float
    peak_memory_bytes: int
    computed_once: str | None  # what of the model's work was done once an image
    final_loss: float | None
    changed: float
    changes: tuple[Change, ...]
    warning: str | None
    together: int = 1  # adapters that the pass trained; seconds and memory are the pass's

    def text(self) -> str:
        """The result in a few lines for people."""
        lines = [
            f"{self.recipe}: {self.trainable:,} of {self.total:,} parameters ({100 * self.share:.4f}%)",
            f"{self.pairs:,} pairs in {self.steps:,} steps, {self.seconds:.1f} s "
            f"({self.pairs_per_second:.1f} pairs/s), peak memory {self.peak_memory_bytes / 2**20:,.0f} MiB",
        ]
        if self.together > 1:
            lines.append(f"one of {self.together} adapters that shared a pass, its time and its memory")
        if self.computed_once is not None:
            lines.append(f"computed once an image: {self.computed_once}")
        if self.final_loss is not None:
            lines.append(f"final loss {self.final_loss:.4f} a token")
        lines.append(f"{100 * self.changed:.1f}% of the trained values changed")
        for one in self.changes:
            far = "from zero" if one.relative is None else f"by {100 * one.relative:.2g}% of their size"
            lines.append(
                f"  {one.part} {one.role}: {100 * one.changed:.1f}% of {one.values:,} changed, {far}"
            )
        if self.warning:
            lines.append(f"WARNING: {self.warning}")
        return "\n".join([*lines, f"Written: {self.out}"])


def train(config: TrainConfig, *, progress: TrainerCallback | None = None) -> TrainResult:
    """Train `config.tune` on `config.data` and write the delta to `config.out`.

    A run that was killed goes on from its last whole checkpoint and ends with the same delta (fp32, CPU).
    Under a launcher all its processes call this, and the first of them writes.

    Raises:
        InputError: bad option, data, model or recipe.
    """
    recipe = parse(config.tune)  # a misspelt word is told before anything is loaded
    processes.join(config.device)
    if config.memory == "tight":
        memory.return_freed()
    dataset = open_from(config)
    examples = chosen(dataset.split(config.split), config)
    # a base that is to be dealt out may be larger than a device
    device = "cpu" if processes.sharded() else config.device
    family = load(config.model, dtype=config.dtype, device=device, quantize=config.quantize)
    base_fingerprint = delta.fingerprint(family.model)
    if len(set(processes.gathered(base_fingerprint))) > 1:
        raise InputError(f"the processes loaded different bases as {config.model}. Give all the same files.")
    tuned = adapt(family.model, recipe, seed=config.seed)
    result, description = fit(config, family, tuned, dataset, examples, progress=progress)
    if processes.is_first():
        write(config, tuned, dataset, len(examples), base_fingerprint, result, description)
    processes.wait()
    return result


def write(
    config: TrainConfig,
    tuned: Tuned,
    dataset: Dataset,
    pairs: int,
    base_fingerprint: str,
    result: TrainResult,
    description: dict[str, Any],
) -> None:
    """Write the delta with the run's config and result; its checkpoints go.

    Raises:
        InputError: the files cannot be written.
    """
    delta.save_delta(
        tuned,
        config.out,
        base_name=config.model,
        base_fingerprint=base_fingerprint,
        data={
            "name": dataset.name,
            "split": config.split,
            "licence": dataset.licence,
            "task": config.task,
            "pairs": pairs,
        },
        metrics={"training": description},
    )
    write_json(config.out / "train_config.json", config.model_dump(mode="json"))
    write_json(config.out / "train_result.json", asdict(result))
    shutil.rmtree(config.out / "checkpoints", ignore_errors=True)


def fit(
    config: TrainConfig,
    family: Family,
    tuned: Tuned,
    dataset: Dataset,
    examples: Sequence[Example],
    *,
    progress: TrainerCallback | None = None,
) -> tuple[TrainResult, dict[str, Any]]:
    """Train the tuned parameters in place; returns the result, and the log of the loss and of the norms.

    Under FSDP2 the model stays dealt out, and `tuned.trained` then holds whole copies of what was trained.

    Raises:
        InputError: the recipe trains nothing, or a checkpoint under `config.out` is of another run.
    """
    if not tuned.trained:
        raise InputError(f"recipe '{tuned.recipe}' trains nothing. Choose another with --tune.")
    if config.cache is not None and processes.sharded():
        raise InputError("--cache: under FSDP no process holds the whole image encoder. Leave --cache out.")
    set_seed(config.seed)
    before = {name: parameter.detach().clone() for name, parameter in tuned.trained.items()}
    collate = collator(config, family, tuned, dataset, examples, hold=not processes.sharded())
    by_tokens = config.balance == "tokens"
    tokens = count_tokens(family, dataset, examples, collate.segment) if by_tokens else None
    cap = config.cap if config.group else 1
    checkpoint = processes.from_first(lambda: last_checkpoint(config.out) if config.resume else None)
    pairs = config.batch if checkpoint is None else resumed_batch(config, checkpoint)
    batches = EpochBatches(examples, pairs, cap, config.seed, tokens=tokens, ranks=processes.count())
    if checkpoint is not None:
        check_same_steps(checkpoint, batches)
    try:
        trainer = DeltaTrainer(config, family, tuned, collate, batches, progress)
    except (ValueError, RuntimeError, ImportError) as error:  # what the Trainer says of a tracker
        raise InputError(f"--tracker {config.tracker}: {error}") from error
    if checkpoint is None and processes.is_first():
        shutil.rmtree(config.out / "checkpoints", ignore_errors=True)
    processes.wait()
    memory.reset_peak()
    started = time.perf_counter()
    with (
        lean(family.model),
        compiled(family.model, config.compile),
        recomputed(family.model, config.memory),
        processes.losing_none(),
    ):
        try:
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        except torch.OutOfMemoryError as error:
            raise InputError(
                f"the device ran out of memory with --batch {config.batch} --memory {config.memory}. "
                + ("" if config.memory == "tight" else "Go on with --memory tight, or ")
                + "lower --batch, raise --accumulate and start afresh with --no-resume."
            ) from error
    seconds = time.perf_counter() - started
    family.model.eval()
    if processes.sharded():
        tuned.trained = {name: nn.Parameter(value) for name, value in trainer.trained_values().items()}
    return outcome(
        config,
        tuned,
        before,
        [(int(row["step"]), row["loss"]) for row in trainer.state.log_history if "loss" in row],
        pairs=sum(processes.gathered(trainer.pairs_seen)),
        steps=trainer.state.global_step,
        seconds=seconds,
        computed_once=collate.computed_once,
    )


def outcome(
    config: TrainConfig,
    tuned: Tuned,
    before: Mapping[str, Tensor],
    losses: Sequence[tuple[int, float]],
    *,
    pairs: int,
    steps: int,
    seconds: float,
    computed_once: str | None,
    together: int = 1,
) -> tuple[TrainResult, dict[str, Any]]:
    """What a run came to, and its log; `before` holds what is trained as it was, `losses` (step, loss)."""
    changes = change_report(before, tuned)
    result = TrainResult(
        out=str(config.out),
        recipe=str(tuned.recipe),
        trainable=tuned.trainable,
        total=tuned.total,
        share=tuned.share,
        pairs=pairs,
        steps=steps,
        seconds=seconds,
        pairs_per_second=pairs / seconds,
        peak_memory_bytes=max(processes.gathered(memory.peak_memory_bytes())),
        computed_once=computed_once,
        final_loss=losses[-1][1] if losses else None,
        changed=changes.share,
        changes=changes.changes,
        warning=changes.warning,
        together=together,
    )
    return result, {"loss": [*losses], "norms": norm_changes(before, tuned)}


class PrintProgress(TrainerCallback):
    """A rich progress bar with the loss; nothing that could hold patient text."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self.bar = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("loss {task.fields[loss]}"),
            console=Console(stderr=True),
        )
        self.task: Any = None

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.bar.start()
        self.task = self.bar.add_task(
            "training", total=state.max_steps, completed=state.global_step, loss="-"
        )

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.bar.update(self.task, completed=state.global_step)

    def on_log(
        self, args: Any, state: TrainerState, control: TrainerControl, logs: Any = None, **kwargs: Any
    ) -> None:
        if logs and "loss" in logs:
            self.bar.update(self.task, loss=f"{logs['loss']:.4f}")

    def on_train_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.bar.stop()
