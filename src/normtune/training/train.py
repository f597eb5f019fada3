"""The training run: a recipe on a dataset, through the Hugging Face Trainer, to a delta on disk."""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback
from transformers.trainer_utils import set_seed

from normtune.adapters import storage
from normtune.adapters.fingerprint import fingerprint
from normtune.data.batches import EpochBatches
from normtune.data.records import Dataset, Example
from normtune.data.registry import open_configured
from normtune.errors import InputError
from normtune.methods.adapt import TunedModel, adapt
from normtune.methods.recipe import parse
from normtune.models.family import Family
from normtune.models.loading import load
from normtune.runtime import distributed, memory
from normtune.runtime.files import write_json
from normtune.training.checkpoints import check_same_steps, last_checkpoint, resumed_batch
from normtune.training.collator import build_collator
from normtune.training.config import TrainConfig
from normtune.training.layer_wrapping import checkpoint_activations, compile_layers
from normtune.training.result import TrainResult, build_result
from normtune.training.saved_activations import save_fewer_activations
from normtune.training.token_counts import count_tokens
from normtune.training.trainer import AdapterTrainer


def train(config: TrainConfig, *, progress: TrainerCallback | None = None) -> TrainResult:
    """Train `config.tune` on `config.data` and write the delta to `config.out`.

    A run that was killed goes on from its last whole checkpoint and ends with the same delta (fp32, CPU).
    Under a launcher all its processes call this, and the first of them writes.

    Raises:
        InputError: bad option, data, model or recipe.
    """
    recipe = parse(config.tune)  # a misspelt word is told before anything is loaded
    distributed.init_processes(config.device)
    if config.memory == "tight":
        memory.release_freed_memory()
    dataset = open_configured(config)
    examples = config.select(dataset.split(config.split))
    # a base that is to be dealt out may be larger than a device
    device = "cpu" if distributed.sharded() else config.device
    family = load(config.model, dtype=config.dtype, device=device, quantize=config.quantize)
    base_fingerprint = fingerprint(family.model)
    if len(set(distributed.all_gather(base_fingerprint))) > 1:
        raise InputError(f"the processes loaded different bases as {config.model}. Give all the same files.")
    tuned = adapt(family.model, recipe, seed=config.seed)
    result, description = fit(config, family, tuned, dataset, examples, progress=progress)
    if distributed.is_main_process():
        save_run(config, tuned, dataset, len(examples), base_fingerprint, result, description)
    distributed.barrier()
    return result


def save_run(
    config: TrainConfig,
    tuned: TunedModel,
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
    storage.save_adapter(
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
    tuned: TunedModel,
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
    if config.cache is not None and distributed.sharded():
        raise InputError("--cache: under FSDP no process holds the whole image encoder. Leave --cache out.")
    set_seed(config.seed)
    before = {name: parameter.detach().clone() for name, parameter in tuned.trained.items()}
    collate = build_collator(config, family, tuned, dataset, examples, hold=not distributed.sharded())
    by_tokens = config.balance == "tokens"
    tokens = count_tokens(family, dataset, examples, collate.segment) if by_tokens else None
    cap = config.cap if config.group else 1
    checkpoint = distributed.broadcast_from_first(
        lambda: last_checkpoint(config.out) if config.resume else None
    )
    pairs = config.batch if checkpoint is None else resumed_batch(config, checkpoint)
    batches = EpochBatches(examples, pairs, cap, config.seed, tokens=tokens, ranks=distributed.count())
    if checkpoint is not None:
        check_same_steps(checkpoint, batches)
    try:
        trainer = AdapterTrainer(config, family, tuned, collate, batches, progress)
    except (ValueError, RuntimeError, ImportError) as error:  # what the Trainer says of a tracker
        raise InputError(f"--tracker {config.tracker}: {error}") from error
    if checkpoint is None and distributed.is_main_process():
        shutil.rmtree(config.out / "checkpoints", ignore_errors=True)
    distributed.barrier()
    memory.reset_peak()
    started = time.perf_counter()
    with (
        save_fewer_activations(family.model),
        compile_layers(family.model, config.compile),
        checkpoint_activations(family.model, config.memory),
        distributed.lost_process_as_error(),
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
    if distributed.sharded():
        tuned.trained = {name: nn.Parameter(value) for name, value in trainer.trained_values().items()}
    return build_result(
        config,
        tuned,
        before,
        [(int(row["step"]), row["loss"]) for row in trainer.state.log_history if "loss" in row],
        pairs=sum(distributed.all_gather(trainer.pairs_seen)),
        steps=trainer.state.global_step,
        seconds=seconds,
        computed_once=collate.cached_states,
    )
