"""The arguments of HF's Trainer for a run: its device, its steps, and the steps between validations and log entries."""

from __future__ import annotations

import math

import torch
from transformers import TrainingArguments

from normtune.data.batches import EpochBatches
from normtune.runtime import distributed
from normtune.training.config import TrainConfig
from normtune.training.setup import TrainingSetup


def training_arguments(setup: TrainingSetup, batches: EpochBatches) -> TrainingArguments:
    """Return the arguments of HF's Trainer for a run, on the device of its base."""
    config, family, validates = setup.config, setup.family, setup.validation is not None
    save_every, sharded = config.save_every, distributed.is_sharded()
    of_epoch = steps_an_epoch(config, batches)
    if validates and save_every is None:
        save_every = of_epoch  # HF saves steps at their end, after the validation
    eval_steps = None
    if config.validate_every is not None:
        eval_steps = of_epoch if config.validate_every == "epoch" else int(config.validate_every)
    on_gpu = family.device.type == "cuda"
    arguments = TrainingArguments(
        output_dir=str(config.out / "checkpoints"),
        per_device_train_batch_size=1,  # unused: the batch sampler decides
        gradient_accumulation_steps=config.accumulate,
        num_train_epochs=config.epochs,
        max_steps=config.max_steps or -1,  # -1: as many as `num_train_epochs` needs
        # recorded by trackers only: the optimiser has one rate per method
        learning_rate=max(config.learning_rate(name) for name in set(setup.tuned.methods.values())),
        # it multiplies the rate of every parameter group; in transformers "constant" has no warmup, the others have
        lr_scheduler_type="constant_with_warmup" if config.schedule == "constant" else config.schedule,
        warmup_steps=int(config.warmup * optimizer_steps(config, batches)),
        weight_decay=config.weight_decay,  # recorded by trackers only; see `create_optimizer`
        max_grad_norm=config.max_grad_norm,
        save_strategy="steps" if save_every else "epoch",
        save_steps=save_every or 500,  # 500 is unused: with "epoch" HF ignores it
        # the one that is written, and the last complete one; HF keeps the one of the best step besides
        save_total_limit=3 if validates else 2,
        eval_strategy="steps" if validates else "no",
        eval_steps=eval_steps,
        logging_strategy="steps",
        logging_steps=max(1, batches.steps // (4 * config.accumulate)),  # four entries per epoch
        report_to=config.tracker,
        seed=config.seed,
        data_seed=config.seed,
        use_cpu=distributed.runs_on_cpu(config.device) if sharded else family.device.type == "cpu",
        average_tokens_across_devices=True,  # see `compute_loss`
        disable_tqdm=True,  # `PrintProgress` shows the progress
        dataloader_num_workers=0,  # the collator's caches live in this process
        # pinned memory is copied to a GPU without waiting for it
        dataloader_pin_memory=on_gpu,
        accelerator_config={"non_blocking": on_gpu},
        logging_nan_inf_filter=not on_gpu,  # it reads the loss of each step
        remove_unused_columns=False,  # a batch has keys that the signature of `forward` does not name
        label_names=["labels"],  # HF counts the tokens of a step here: labels other than -100
    )
    arguments._n_gpu = min(arguments.n_gpu, 1)  # no DataParallel: several GPUs need a launcher
    if not sharded:
        use_device(arguments, family.device)
    return arguments


def use_device(arguments: TrainingArguments, device: torch.device) -> None:
    """Train on the base's GPU: HF takes the first one, and accelerate moves batches to the current one."""
    if device.type == "cuda":
        arguments.__dict__["_setup_devices"] = device  # the cached value of `arguments.device`
        torch.cuda.set_device(device)


def steps_an_epoch(config: TrainConfig, batches: EpochBatches) -> int:
    """Return the number of optimiser steps of one pass over the training pairs."""
    # an epoch's last step may have fewer batches than `accumulate`; it is a step nevertheless
    return math.ceil(batches.steps / config.accumulate)


def optimizer_steps(config: TrainConfig, batches: EpochBatches) -> int:
    """Return the number of optimiser steps of the whole run."""
    return config.max_steps or math.ceil(config.epochs * steps_an_epoch(config, batches))
