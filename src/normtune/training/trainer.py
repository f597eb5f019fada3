"""Hugging Face's Trainer for a family's batches; its checkpoints hold only what is trained."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, cast

import torch
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import set_seed

from normtune.data.batches import EpochBatches
from normtune.data.records import Example
from normtune.errors import InputError
from normtune.methods.adapt import TunedModel
from normtune.models.family import Family
from normtune.models.parts import parameter_holders
from normtune.runtime import distributed
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
from normtune.training.fsdp import copy_into, full_state, gather_full, load_state, shard_by_layers


class Objective(nn.Module):
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

    def train(self, mode: bool = True) -> Objective:
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


class Examples(TorchDataset[list[list[Example]]]):
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


class AdapterTrainer(Trainer):
    """HF's Trainer for a family's batches; its checkpoints hold only what is trained."""

    def __init__(
        self,
        config: TrainConfig,
        family: Family,
        tuned: TunedModel,
        collate: Collator,
        batches: EpochBatches,
        progress: TrainerCallback | None,
    ) -> None:
        self.config, self.tuned, self.batches = config, tuned, batches
        self.pairs_seen = 0  # by this process
        self._unlogged, self._logged_at = torch.zeros(()), 0  # loss summed since that step; HF's is not saved
        # sharding replaces the parameters, but not the modules that hold them
        holders = parameter_holders(family.model, tuned.trained)
        self._holders = {name: places[0] for name, places in holders.items()}
        every, sharded = config.save_every, distributed.sharded()
        arguments = TrainingArguments(
            output_dir=str(config.out / "checkpoints"),
            per_device_train_batch_size=1,
            gradient_accumulation_steps=config.accumulate,
            num_train_epochs=config.epochs,
            max_steps=config.max_steps or -1,
            learning_rate=max(config.learning_rate(name) for name in set(tuned.methods.values())),
            lr_scheduler_type=scheduler_name(config),
            warmup_steps=int(config.warmup * optimizer_steps(config, batches)),
            weight_decay=config.weight_decay,
            max_grad_norm=config.max_grad_norm,
            save_strategy="steps" if every else "epoch",
            save_steps=every or 500,
            save_total_limit=2,
            logging_strategy="steps",
            logging_steps=logging_steps(config, batches),
            report_to=config.tracker,
            seed=config.seed,
            data_seed=config.seed,
            use_cpu=distributed.on_cpu(config.device) if sharded else family.device.type == "cpu",
            average_tokens_across_devices=True,
            disable_tqdm=True,
            dataloader_num_workers=0,
            dataloader_pin_memory=False,
            remove_unused_columns=False,
            label_names=["labels"],
        )
        arguments._n_gpu = min(arguments.n_gpu, 1)  # several GPUs are for a launcher's processes
        objective = Objective(family, config.label_smoothing, dropout=not config.group)
        # what is frozen is the same everywhere already, and may be of a kind that cannot be sent
        frozen = [name for name, one in objective.named_parameters() if not one.requires_grad]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(
            objective, [*frozen, *(name for name, _ in objective.named_buffers())]
        )
        super().__init__(
            model=objective,
            args=arguments,
            train_dataset=Examples(batches),
            data_collator=collate,
            callbacks=[progress] if progress else None,
        )
        self.model_accepts_loss_kwargs = True  # the loss is normalised by tokens over all accumulated batches
        self.loss_is_scaled_for_ga = True
        self.remove_callback(PrinterCallback)
        if sharded:
            shard_by_layers(self.accelerator, family.model)
            self.is_fsdp_enabled = True
        if rank := distributed.rank():
            set_seed(config.seed + rank)  # each process draws its own dropout

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
        loss = super().training_step(model, inputs, *args, **kwargs)
        self._unlogged = self._unlogged.to(loss.device) + loss
        return loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Of a run that was resumed too, an entry is about all steps since the one before."""
        if "loss" in logs:
            mean = self._mean_unlogged() / (self.state.global_step - self._logged_at)
            if math.isfinite(mean):
                logs["loss"] = mean
            self._unlogged, self._logged_at = torch.zeros(()), self.state.global_step
        super().log(logs, *args, **kwargs)

    def _mean_unlogged(self) -> float:
        found = distributed.all_gather(self._unlogged.item())
        return sum(found) / len(found)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        return 0  # HF's estimate assumes one token stream

    def trained_values(self) -> dict[str, Tensor]:
        """What is trained, each tensor whole and on the CPU; all processes call it."""
        present = {name: getattr(module, attribute) for name, (module, attribute) in self._holders.items()}
        return {name: gather_full(parameter).cpu().contiguous() for name, parameter in present.items()}

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        tensors = self.trained_values()
        if self.args.should_save:
            directory = Path(output_dir or str(self.args.output_dir))
            directory.mkdir(parents=True, exist_ok=True)
            save_file(tensors, directory / TRAINED_FILE)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """As a run of one process does, so that any number of them can go on."""
        assert self.optimizer is not None and self.lr_scheduler is not None
        state = full_state(self.optimizer)
        if self.args.should_save:
            torch.save(state, Path(output_dir) / OPTIMIZER_FILE)
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER_FILE)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        assert self.optimizer is not None and self.lr_scheduler is not None
        optimizer, scheduler = (
            torch.load(Path(checkpoint) / name, "cpu", weights_only=True)
            for name in (OPTIMIZER_FILE, SCHEDULER_FILE)
        )
        load_state(self.optimizer, optimizer)
        self.lr_scheduler.load_state_dict(scheduler)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        try:
            super()._save_checkpoint(model, trial)
        except (OSError, SafetensorError) as error:
            raise InputError(
                f"cannot write a checkpoint under {self.args.output_dir}: {error}. "
                "Free some space and run the same command again: it goes on from the last whole checkpoint."
            ) from error
        pairs_seen = sum(distributed.all_gather(self.pairs_seen))  # by now all have written their part
        unlogged = self._mean_unlogged()
        if distributed.is_main_process():
            directory = Path(str(self.args.output_dir)) / f"checkpoint-{self.state.global_step}"
            position = {
                "pairs_seen": pairs_seen,
                "pairs_a_step": self.batches.pairs * self.batches.ranks,
                "steps_an_epoch": self.batches.steps,
                "unlogged_loss": unlogged,
                "logged_at": self._logged_at,
            }
            write_json(directory / "run.json", run_identity(self.config) | position)
            (directory / CHECKPOINT_MARK).touch()

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        stored = load_file(Path(resume_from_checkpoint) / TRAINED_FILE)
        for name, (module, attribute) in self._holders.items():
            copy_into(getattr(module, attribute), stored[name])
        position = read_json(Path(resume_from_checkpoint) / "run.json")
        self._unlogged = torch.tensor(position["unlogged_loss"])
        self._logged_at = int(position["logged_at"])
        if distributed.is_main_process():
            self.pairs_seen = int(position["pairs_seen"])


def optimizer_steps(config: TrainConfig, batches: EpochBatches) -> int:
    """Optimiser steps of the whole run."""
    return config.max_steps or math.ceil(config.epochs * math.ceil(batches.steps / config.accumulate))


def logging_steps(config: TrainConfig, batches: EpochBatches) -> int:
    """Optimiser steps between two entries of the loss log: four an epoch."""
    return max(1, batches.steps // (4 * config.accumulate))


def scheduler_name(config: TrainConfig) -> str:
    """Transformers' name of the run's schedule."""
    return {"constant": "constant_with_warmup"}.get(config.schedule, config.schedule)
