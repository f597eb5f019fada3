"""The training run: a recipe on a dataset, through the Hugging Face Trainer, to a delta on disk."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset
from transformers import (
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_utils import set_seed

from normtune import delta, memory
from normtune.adapt import Change, Tuned, adapt, change_report
from normtune.catalog import open_from
from normtune.collator import Collator, collator
from normtune.config import TrainConfig
from normtune.data.records import Dataset, Example
from normtune.errors import InputError
from normtune.files import read_json, write_json
from normtune.lean import lean
from normtune.models import load
from normtune.models.family import Family
from normtune.models.tokens import count_tokens
from normtune.packing import EpochBatches
from normtune.recipe import parse
from normtune.recompute import recomputed

CHECKPOINT_MARK = (
    "whole"  # the last file of a checkpoint: one without it was cut short and is not resumed from
)
TRAINED_FILE = "trained.safetensors"


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

    def text(self) -> str:
        """The result in a few lines for people."""
        lines = [
            f"{self.recipe}: {self.trainable:,} of {self.total:,} parameters ({100 * self.share:.4f}%)",
            f"{self.pairs:,} pairs in {self.steps:,} steps, {self.seconds:.1f} s "
            f"({self.pairs_per_second:.1f} pairs/s), peak memory {self.peak_memory_bytes / 2**20:,.0f} MiB",
        ]
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

    Raises:
        InputError: bad option, data, model or recipe.
    """
    recipe = parse(config.tune)  # a misspelt word is told before anything is loaded
    dataset = open_from(config)
    examples = dataset.split(config.split)[: config.limit]
    family = load(config.model, dtype=config.dtype, device=config.device)
    base_fingerprint = delta.fingerprint(family.model)
    tuned = adapt(family.model, recipe, seed=config.seed)
    result, description = fit(config, family, tuned, dataset, examples, progress=progress)
    delta.save_delta(
        tuned,
        config.out,
        base_name=config.model,
        base_fingerprint=base_fingerprint,
        data={
            "name": dataset.name,
            "split": config.split,
            "licence": dataset.licence,
            "pairs": len(examples),
        },
        metrics={"training": description},
    )
    write_json(config.out / "train_config.json", config.model_dump(mode="json"))
    write_json(config.out / "train_result.json", asdict(result))
    shutil.rmtree(config.out / "checkpoints", ignore_errors=True)
    return result


def fit(
    config: TrainConfig,
    family: Family,
    tuned: Tuned,
    dataset: Dataset,
    examples: Sequence[Example],
    *,
    progress: TrainerCallback | None = None,
) -> tuple[TrainResult, dict[str, Any]]:
    """Train the tuned parameters in place; returns the result and the loss log.

    Raises:
        InputError: the recipe trains nothing, or a checkpoint under `config.out` is of another run.
    """
    if not tuned.trained:
        raise InputError(f"recipe '{tuned.recipe}' trains nothing. Choose another with --tune.")
    set_seed(config.seed)
    before = {name: parameter.detach().clone() for name, parameter in tuned.trained.items()}
    collate = collator(config, family, tuned, dataset, examples)
    by_tokens = config.balance == "tokens"
    tokens = count_tokens(family, dataset, examples, collate.segment) if by_tokens else None
    cap = config.cap if config.group else 1
    batches = EpochBatches(examples, config.batch, cap, config.seed, tokens=tokens)
    try:
        trainer = _DeltaTrainer(config, family, tuned, collate, batches, progress)
    except (ValueError, RuntimeError, ImportError) as error:  # what the Trainer says of a tracker
        raise InputError(f"--tracker {config.tracker}: {error}") from error
    checkpoint = last_checkpoint(config.out) if config.resume else None
    if checkpoint is None:
        shutil.rmtree(config.out / "checkpoints", ignore_errors=True)
    else:
        _check_same_run(config, checkpoint)
    memory.reset_peak()
    started = time.perf_counter()
    with lean(family.model), recomputed(family.model, config.memory):
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
    changes = change_report(before, tuned)
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    result = TrainResult(
        out=str(config.out),
        recipe=str(tuned.recipe),
        trainable=tuned.trainable,
        total=tuned.total,
        share=tuned.share,
        pairs=trainer.pairs_seen,
        steps=trainer.state.global_step,
        seconds=seconds,
        pairs_per_second=trainer.pairs_seen / seconds,
        peak_memory_bytes=memory.peak_memory_bytes(),
        computed_once=collate.computed_once,
        final_loss=losses[-1] if losses else None,
        changed=changes.share,
        changes=changes.changes,
        warning=changes.warning,
    )
    return result, {
        "loss": [(row["step"], row["loss"]) for row in trainer.state.log_history if "loss" in row]
    }


class _Objective(nn.Module):
    """The family's loss as a module, so that the Trainer can wrap it for one device or many."""

    def __init__(self, family: Family, label_smoothing: float, dropout: bool) -> None:
        super().__init__()
        self.model = family.model
        self._family = [family]  # in a list: not a submodule, and not copied with one
        self._label_smoothing = label_smoothing
        self._dropout = dropout

    def forward(self, **batch: Any) -> Tensor:
        """Sum of the answer tokens' cross-entropies, a scalar."""
        total, _ = self._family[0].loss(batch, label_smoothing=self._label_smoothing)
        return total

    def train(self, mode: bool = True) -> _Objective:
        """Grouped questions see one image, so they would share its dropout: the base's is off for them.

        LoRA's own, which the recipe asks for, stays: for each question the draws are distributed as they are
        where it stands alone, so that the expected gradient is the same; those of a group are correlated.
        """
        super().train(mode)
        if mode and not self._dropout:
            lora = [module for module in self.model.modules() if isinstance(module, LoraLayer)]
            added = {id(module) for layer in lora for module in layer.lora_dropout.modules()}
            for module in self.model.modules():
                if id(module) not in added:
                    module.training = False
        return self


class _Examples(TorchDataset[list[list[Example]]]):
    """Index -> index: batches come whole from `EpochBatches`; this only gives them to the collator."""

    def __init__(self, batches: EpochBatches) -> None:
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches.examples)

    def __getitem__(self, group: Any) -> Any:
        return group

    def set_epoch(self, epoch: int) -> None:
        """Accelerate's way to the batches where a resumed run of several processes wraps them twice."""
        self.batches.set_epoch(epoch)


class _DeltaTrainer(Trainer):
    """HF's Trainer for a family's batches; its checkpoints hold only what is trained."""

    def __init__(
        self,
        config: TrainConfig,
        family: Family,
        tuned: Tuned,
        collate: Collator,
        batches: EpochBatches,
        progress: TrainerCallback | None,
    ) -> None:
        self.config, self.tuned, self.batches = config, tuned, batches
        self.pairs_seen = 0
        every = config.save_every
        arguments = TrainingArguments(
            output_dir=str(config.out / "checkpoints"),
            per_device_train_batch_size=1,
            gradient_accumulation_steps=config.accumulate,
            num_train_epochs=config.epochs,
            max_steps=config.max_steps or -1,
            learning_rate=max(config.learning_rate(name) for name in set(tuned.methods.values())),
            lr_scheduler_type={"constant": "constant_with_warmup"}.get(config.schedule, config.schedule),
            warmup_steps=int(config.warmup * _steps(config, batches)),
            weight_decay=config.weight_decay,
            max_grad_norm=config.max_grad_norm,
            save_strategy="steps" if every else "epoch",
            save_steps=every or 500,
            save_total_limit=2,
            logging_strategy="steps",
            logging_steps=max(1, len(batches) // (4 * config.accumulate)),
            report_to=config.tracker,
            seed=config.seed,
            data_seed=config.seed,
            use_cpu=family.device.type == "cpu",
            disable_tqdm=True,
            dataloader_num_workers=0,
            dataloader_pin_memory=False,
            remove_unused_columns=False,
            label_names=["labels"],
        )
        super().__init__(
            model=_Objective(family, config.label_smoothing, dropout=not config.group),
            args=arguments,
            train_dataset=_Examples(batches),
            data_collator=collate,
            callbacks=[progress] if progress else None,
        )
        self.model_accepts_loss_kwargs = True  # the loss is normalised by tokens over all accumulated batches
        self.loss_is_scaled_for_ga = True
        self.remove_callback(PrinterCallback)

    def get_train_dataloader(self) -> DataLoader[Any]:
        loader: DataLoader[Any] = DataLoader(
            cast(Any, self.train_dataset),
            batch_sampler=cast(Any, self.batches),
            collate_fn=self.data_collator,
        )
        return cast(DataLoader[Any], self.accelerator.prepare(loader))

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """AdamW with each method's own learning rate; weight decay on matrices only."""
        if self.optimizer is None:
            groups: dict[tuple[str, bool], list[nn.Parameter]] = {}
            for name, parameter in self.tuned.trained.items():
                groups.setdefault((self.tuned.methods[name], parameter.ndim > 1), []).append(parameter)
            self.optimizer = torch.optim.AdamW(
                [
                    {
                        "params": parameters,
                        "lr": self.config.learning_rate(method),
                        "weight_decay": self.config.weight_decay if matrix else 0.0,
                    }
                    for (method, matrix), parameters in groups.items()
                ]
            )
        return self.optimizer

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Token cross-entropies summed, over the answer tokens of the whole step on all processes."""
        assert num_items_in_batch is not None and not return_outputs
        return model(**inputs) * self.accelerator.num_processes / num_items_in_batch

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        self.pairs_seen += int(inputs["pairs"])
        return super().training_step(model, inputs, *args, **kwargs)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        return 0  # HF's estimate assumes one token stream

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        directory = Path(output_dir or str(self.args.output_dir))
        directory.mkdir(parents=True, exist_ok=True)
        tensors = {name: p.detach().contiguous().cpu() for name, p in self.tuned.trained.items()}
        save_file(tensors, directory / TRAINED_FILE)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        try:
            super()._save_checkpoint(model, trial)
        except (OSError, SafetensorError) as error:
            raise InputError(
                f"cannot write a checkpoint under {self.args.output_dir}: {error}. "
                "Free some space and run the same command again: it goes on from the last whole checkpoint."
            ) from error
        directory = Path(str(self.args.output_dir)) / f"checkpoint-{self.state.global_step}"
        write_json(directory / "run.json", _identity(self.config) | {"pairs_seen": self.pairs_seen})
        (directory / CHECKPOINT_MARK).touch()

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        stored = load_file(Path(resume_from_checkpoint) / TRAINED_FILE)
        with torch.no_grad():
            for name, parameter in self.tuned.trained.items():
                parameter.copy_(stored[name])
        self.pairs_seen = int(read_json(Path(resume_from_checkpoint) / "run.json")["pairs_seen"])


def _steps(config: TrainConfig, batches: EpochBatches) -> int:
    """Optimiser steps of the whole run."""
    return config.max_steps or math.ceil(config.epochs * math.ceil(len(batches) / config.accumulate))


def last_checkpoint(out: Path) -> Path | None:
    """The newest whole checkpoint under `out`, if there is one."""
    whole = [mark.parent for mark in (out / "checkpoints").glob(f"checkpoint-*/{CHECKPOINT_MARK}")]
    return max(whole, key=lambda path: int(path.name.split("-")[1]), default=None)


def _identity(config: TrainConfig) -> dict[str, Any]:
    """What must be the same for a run to go on from a checkpoint."""
    return config.model_dump(
        mode="json", exclude={"out", "root", "resume", "tracker", "device", "save_every", "memory", "cache"}
    )


def _check_same_run(config: TrainConfig, checkpoint: Path) -> None:
    stored = read_json(checkpoint / "run.json")
    changed = [name for name, value in _identity(config).items() if stored.get(name) != value]
    if changed:
        raise InputError(
            f"{checkpoint} is of a run with other options ({', '.join(changed)}). "
            "Repeat those options, choose another --out, or start afresh with --no-resume."
        )


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
