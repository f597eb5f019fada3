"""The training step: Hugging Face's Trainer with our batches, loss normalisation and checkpoints.

The Trainer provides the loop (epochs, gradient accumulation, clipping, schedules, trackers, callbacks,
skipping the batches of a resumed epoch) and, through accelerate, DDP and FSDP2. `AdapterTrainer` overrides
the rest:

| overridden              | why                                                                           |
|-------------------------|-------------------------------------------------------------------------------|
| `get_train_dataloader`  | `EpochBatches` yields whole batches of groups, a function of (seed, epoch)    |
| `create_optimizer`      | one learning rate per method; weight decay on matrices only                   |
| `training_step`         | private training: one clipped gradient for each patient; see `privacy`        |
| `compute_loss`          | mean over the answer tokens of a whole step: all batches, all processes       |
| `log`                   | a loss entry that a resume cuts in two still covers all of its steps          |
| `evaluate`              | answers and loss of the validation rows; best step and early stopping         |
| `save_model`, `_save_*` | checkpoints hold trained values only, not the base                            |
| `_load_*`               | these values are loaded into a base that is already in memory, sharded or not |
"""

from __future__ import annotations

import math
import time
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from transformers import PrinterCallback, Trainer, TrainerCallback
from transformers.integrations import TensorBoardCallback
from transformers.trainer_callback import TrainerState
from transformers.trainer_utils import set_seed

from normtune.data.batches import EpochBatches
from normtune.errors import InputError
from normtune.models.parts import parameter_holders
from normtune.runtime import distributed
from normtune.runtime.files import write_json
from normtune.runtime.tensors import write_tensors
from normtune.training.arguments import optimizer_steps, training_arguments
from normtune.training.checkpoints import (
    CHECKPOINT_MARK,
    OPTIMIZER_FILE,
    RUN_FILE,
    SCHEDULER_FILE,
    TRAINED_FILE,
    Checkpoint,
    log_folder,
)
from normtune.training.fsdp import copy_into, full_state, gather_full, load_state, shard_by_layers
from normtune.training.objective import IdentityDataset, LookaheadBatches, Objective, worker_count
from normtune.training.privacy import PoissonBatches, PrivateGradients, plan_privacy
from normtune.training.setup import TrainingSetup
from normtune.training.validation import CurvePoint, Validation, best_point, curve, is_stopped, log_entry


class AdapterTrainer(Trainer):
    """HF's Trainer for a family's batches, with checkpoints of trained values only.

    Args:
        checkpoint: what `train` will resume from; logs then continue in the same place.

    Attributes:
        pairs_seen: question-answer pairs that this process trained on, resumed ones included.
        validation: computes loss and scores of the validation rows; None without validation.
        validation_seconds: time of the validations, those before a resume included.
        private: computes the gradients of a private run; None in an ordinary one.
    """

    def __init__(
        self,
        setup: TrainingSetup,
        batches: EpochBatches,
        checkpoint: Checkpoint | None,
        progress: TrainerCallback | None,
    ) -> None:
        config, family, tuned = setup.config, setup.family, setup.tuned
        self.setup, self.config, self.tuned, self.batches = setup, config, tuned, batches
        self.checkpoint = checkpoint
        self.pairs_seen = 0
        # loss summed since the step of the last log entry; HF does not keep its own sum in checkpoints
        self._unlogged, self._logged_at = torch.zeros(()), 0
        # FSDP2 replaces the parameter objects, but not the modules that hold them
        # {name: (module, attribute)}; of tied parameters the first place is enough
        holders = parameter_holders(family.model, tuned.trained)
        self._holders = {name: tied[0] for name, tied in holders.items()}
        self.validation: Validation | None = None
        if setup.validation is not None:
            self.validation = Validation(config, family, setup.validation, setup.collate)
        self.validation_seconds = 0.0 if checkpoint is None else checkpoint.validation_seconds
        # `train_seconds` is the time since this moment, less the time of the validations
        self._started: float | None = None
        self.private: PrivateGradients | None = None
        if isinstance(batches, PoissonBatches):
            noise = None if checkpoint is None else checkpoint.noise_multiplier
            privacy = plan_privacy(config, batches, setup.rounds * optimizer_steps(config, batches), noise)
            self.private = PrivateGradients(config, family, tuned.trained, setup.collate, batches, privacy)
        arguments = training_arguments(setup, batches)
        objective = Objective(family, config.label_smoothing, dropout=not config.group)
        # DDP broadcasts parameters and buffers at the start. Frozen ones are equal in all processes already,
        # and may be quantised tensors, which cannot be broadcast
        frozen = [name for name, parameter in objective.named_parameters() if not parameter.requires_grad]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(
            objective, [*frozen, *(name for name, _ in objective.named_buffers())]
        )
        super().__init__(
            model=objective,
            args=arguments,
            train_dataset=IdentityDataset(batches),
            eval_dataset=cast(Any, setup.validation),  # HF asks for one; `evaluate` reads it
            data_collator=setup.collate,
            callbacks=[progress] if progress else None,
        )
        # HF counts the answer tokens of all batches of a step before it runs them and hands the count to
        # `compute_loss`, which divides by it; HF must then not divide by the number of batches as well
        self.model_accepts_loss_kwargs = True
        self.loss_is_scaled_for_ga = True
        self.remove_callback(PrinterCallback)  # prints each log entry to stdout
        for callback in self.callback_handler.callbacks:
            # by default HF logs under `output_dir`, which is for checkpoints. TENSORBOARD_LOGGING_DIR is used if set
            if isinstance(callback, TensorBoardCallback) and callback.logging_dir is None:
                callback.logging_dir = str(log_folder(config.out, resumed=checkpoint is not None))
        # accelerate shards the model in `train()`, when HF prepares it; from here on HF treats it as FSDP
        if distributed.is_sharded():
            shard_by_layers(self.accelerator, family.model)
            self.is_fsdp_enabled = True
        if rank := distributed.rank():
            set_seed(config.seed + rank)  # processes draw different dropout masks

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Return a loader over `EpochBatches`; accelerate gives each process its own batches of a step."""
        # one item of the loader is one batch: a list of groups, which the collator turns into tensors
        batches: Any = self.batches
        workers = worker_count(self.config.workers, self.args.device.type)
        if workers:
            batches = LookaheadBatches(batches, partial(cast(Any, self.data_collator).prefetch, workers=workers))
        loader: DataLoader[Any] = DataLoader(
            cast(Any, self.train_dataset),
            batch_sampler=batches,
            collate_fn=self.private.collate if self.private is not None else self.data_collator,
            pin_memory=self.args.dataloader_pin_memory,
        )
        return cast(DataLoader[Any], self.accelerator.prepare(loader))

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Create the optimiser with one parameter group for each method, learning rate and dimensionality.

        Each method has its own learning rate, or each part (`part_lr`), and only matrices have weight decay: decaying
        norm gains towards 0 would shrink the layer's output.
        """
        if self.optimizer is None:
            # (method, learning rate, is a matrix) -> parameters
            groups: dict[tuple[str, float, bool], list[nn.Parameter]] = {}
            for name, parameter in self.tuned.trained.items():
                method = self.tuned.methods[name]
                rate = self.config.learning_rate(method, self.tuned.part_and_role[name][0])
                groups.setdefault((method, rate, parameter.ndim > 1), []).append(parameter)
            optimizer: Any = torch.optim.SGD if self.config.optimizer == "sgd" else torch.optim.AdamW
            self.optimizer = optimizer(
                [
                    {"params": parameters, "lr": rate, "weight_decay": self.config.weight_decay if is_matrix else 0.0}
                    for (_, rate, is_matrix), parameters in groups.items()
                ],
                # one kernel for many parameters in place of about ten
                fused=all(parameter.is_cuda for parameter in self.tuned.trained.values()) or None,
            )
        return self.optimizer

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Return a batch's part of the step's loss: its summed cross-entropy / tokens of the whole step.

        A mean per batch would weigh a token of a batch with few tokens more. With batches b of one step, on
        all processes, the step's loss is sum_b(loss_b) / sum_b(tokens_b), for any number of accumulated batches.

        Args:
            num_items_in_batch: answer tokens of all accumulated batches of the step, on all processes.
        """
        assert num_items_in_batch is not None and not return_outputs
        # DDP and FSDP2 average gradients over processes: the factor turns that mean into a sum
        return model(**inputs) * self.accelerator.num_processes / num_items_in_batch

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """Run HF's step (forward, backward), or that of a private run, and add up pairs and loss."""
        self.pairs_seen += int(inputs["pairs"])
        if self.private is None:
            loss = super().training_step(model, inputs, num_items_in_batch)
        else:
            model.train()  # as HF's step does
            is_last = self.accelerator.gradient_state.sync_gradients  # of the batches of an optimiser step
            loss = self.private.add(inputs["batch"].groups, int(num_items_in_batch or 0), is_last)
        self._unlogged = self._unlogged.to(loss.device) + loss  # on the device: no synchronisation per step
        return loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log, with the mean loss per step since the previous entry in place of HF's.

        HF averages over the steps since the process started; our sum is in the checkpoint. For example, with
        entries every 4 steps and a resume from the checkpoint of step 6, the entry of step 8 covers steps 5
        and 6 of the first process and 7 and 8 of the second.
        """
        if "loss" in logs:
            # the sum is over steps: each step's loss is already a mean over its answer tokens
            mean = self._mean_unlogged() / (self.state.global_step - self._logged_at)
            if math.isfinite(mean):  # HF replaces losses that are not finite; its value stays then
                logs["loss"] = mean
            self._unlogged, self._logged_at = torch.zeros(()), self.state.global_step
        super().log(logs, *args, **kwargs)

    def _mean_unlogged(self) -> float:
        # `compute_loss` multiplies by the number of processes, so that the mean over them is the step's loss
        losses = distributed.all_gather(self._unlogged.item())
        return sum(losses) / len(losses)

    def train_seconds(self) -> float:
        """Seconds of training so far, those before a resume included; without set-up and validation."""
        start = self.checkpoint
        earlier = 0.0 if start is None else start.train_seconds + start.validation_seconds
        since = 0.0 if self._started is None else time.perf_counter() - self._started
        return earlier + since - self.validation_seconds

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Validate, log the point of the curve, and have a checkpoint written of the best step and of the last one."""
        assert self.validation is not None
        seconds, started = self.train_seconds(), time.perf_counter()
        logged = [row["loss"] for row in self.state.log_history if "loss" in row]
        steps = self.state.global_step - self._logged_at  # since the last entry of the loss log
        if distributed.is_sharded():
            with torch.no_grad():
                loss, scores = self.model_wrapped(call=self.validation.run)
        else:
            loss, scores = self.validation.run()
        point = CurvePoint(
            step=self.state.global_step,
            pairs=sum(distributed.all_gather(self.pairs_seen)),
            passes=self.state.epoch or 0.0,
            seconds=seconds,
            train_loss=self._mean_unlogged() / steps if steps else logged[-1],
            validation_loss=loss,
            metrics=scores,
        )
        self.validation_seconds += time.perf_counter() - started
        entry = log_entry(point)
        self.log(entry)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, entry)
        points = curve(self.state.log_history)
        best = best_point(points, self.validation.metric)
        self.state.best_global_step = best.step  # HF does not delete the checkpoint of this step
        if is_stopped(points, self.validation.metric, self.config.patience):
            self.control.should_training_stop = True
        if best.step == point.step or self.control.should_training_stop:
            self.control.should_save = True
        return entry

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        return 0  # HF's estimate assumes one sequence of tokens per row

    def trained_values(self) -> dict[str, Tensor]:
        """Return the trained tensors by name, unsharded and on the CPU; all processes must call it."""
        parameters = {name: getattr(module, attribute) for name, (module, attribute) in self._holders.items()}
        return {name: gather_full(parameter).cpu().contiguous() for name, parameter in parameters.items()}

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the trained tensors; HF would write the whole base to every checkpoint."""
        tensors = self.trained_values()  # a collective call: before the check for the writing process
        if self.args.should_save:
            directory = Path(output_dir or str(self.args.output_dir))
            directory.mkdir(parents=True, exist_ok=True)
            write_tensors(directory / TRAINED_FILE, tensors)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """Write the states unsharded, so that a run with another number of processes can resume from them."""
        assert self.optimizer is not None and self.lr_scheduler is not None
        state = full_state(self.optimizer)  # a collective call as well
        if self.args.should_save:
            torch.save(state, Path(output_dir) / OPTIMIZER_FILE)
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER_FILE)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Load what `_save_optimizer_and_scheduler` wrote; each process takes its shards."""
        if checkpoint is None:
            return
        assert self.optimizer is not None and self.lr_scheduler is not None
        # weights_only: no pickled code is run; to the CPU first, since the stored tensors are unsharded
        optimizer, scheduler = (
            torch.load(Path(checkpoint) / name, "cpu", weights_only=True) for name in (OPTIMIZER_FILE, SCHEDULER_FILE)
        )
        load_state(self.optimizer, optimizer)
        self.lr_scheduler.load_state_dict(scheduler)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write a checkpoint, then `run.json` with the run's identity and position, and last of all the mark."""
        try:
            super()._save_checkpoint(model, trial)
        except OSError as error:
            raise InputError(
                f"cannot write a checkpoint under {self.args.output_dir}: {error}. "
                "Free some space and run the same command again to resume from the last complete checkpoint."
            ) from error
        pairs_seen = sum(distributed.all_gather(self.pairs_seen))  # waits until all processes have written
        unlogged = self._mean_unlogged()
        if distributed.is_main_process():
            directory = Path(str(self.args.output_dir)) / f"checkpoint-{self.state.global_step}"
            # the position: what a resumed run needs besides HF's trainer_state.json (step, epoch, log)
            position = {
                "pairs_seen": pairs_seen,
                "pairs_a_step": self.batches.pairs * self.batches.ranks,
                "steps_an_epoch": self.batches.steps,
                "max_group_size": self.batches.max_group_size,
                "unlogged_loss": unlogged,
                "logged_at": self._logged_at,
                "train_seconds": self.train_seconds(),
                "validation_seconds": self.validation_seconds,
            }
            if self.private is not None:
                position["noise_multiplier"] = self.private.privacy.noise_multiplier
            write_json(directory / RUN_FILE, self.setup.identity | position)
            (directory / CHECKPOINT_MARK).touch()

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Load trained values into the model, and the run's position."""
        checkpoint = self.checkpoint
        assert checkpoint is not None
        self._load_values(checkpoint.folder)
        self._unlogged, self._logged_at = torch.tensor(checkpoint.unlogged_loss), checkpoint.logged_at
        if distributed.is_main_process():  # the stored number is the sum over processes: only one takes it
            self.pairs_seen = checkpoint.pairs_seen

    def _load_values(self, folder: Path) -> None:
        """Load the trained values of a checkpoint into the model.

        They are copied into the parameters in place, since the optimiser, DDP and FSDP2 refer to these objects.
        """
        stored = load_file(folder / TRAINED_FILE)
        if stored.keys() != self._holders.keys():
            raise InputError(
                f"{folder} was written by another version of Normtune, which trained other parameters. "
                "Start again with --no-resume."
            )
        for name, (module, attribute) in self._holders.items():
            copy_into(getattr(module, attribute), stored[name])

    def run(self) -> None:
        """Train to the end, from the checkpoint if there is one; the model then has the values of the best step.

        Without validation, or with `keep="last"`, it has the values of the last step.
        """
        checkpoint = self.checkpoint
        self._started = time.perf_counter()
        if checkpoint is None:
            self.train()
        elif not self._has_ended(checkpoint):
            self.train(resume_from_checkpoint=str(checkpoint.folder))
        else:  # of the last step; HF would make another one if that is in the middle of an epoch
            self._load_from_checkpoint(str(checkpoint.folder))
            self.state = TrainerState.load_from_json(str(checkpoint.folder / "trainer_state.json"))
        if self.validation is not None and self.config.keep != "last":
            best = best_point(curve(self.state.log_history), self.validation.metric)
            if best.step != self.state.global_step:
                self._load_values(Path(str(self.args.output_dir)) / f"checkpoint-{best.step}")

    def _has_ended(self, checkpoint: Checkpoint) -> bool:
        """Whether a checkpoint is of the run's last step: all steps are done, or it was stopped early."""
        if self.validation is not None:
            state = TrainerState.load_from_json(str(checkpoint.folder / "trainer_state.json"))
            if is_stopped(curve(state.log_history), self.validation.metric, self.config.patience):
                return True
        return checkpoint.step >= optimizer_steps(self.config, self.batches)
