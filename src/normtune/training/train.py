"""A training run: load the base, adapt it by a recipe, train on a dataset, write the adapter.

train     reads the options, loads data and base, calls `fit`, and writes the files
fit       trains the adapted model in place: collator, batches, checkpoint to resume from, Trainer
save_run  writes the adapter, the options and the result, and deletes the checkpoints
"""

from __future__ import annotations

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
from normtune.methods.adapt import TunedModel, adapt, restore_base
from normtune.methods.recipe import parse
from normtune.models.family import Family
from normtune.models.loading import load
from normtune.runtime import distributed, memory
from normtune.runtime.files import make_directory, write_json
from normtune.training.checkpoints import check_same_steps, delete_checkpoints, last_checkpoint, resumed_batch
from normtune.training.collator import build_collator
from normtune.training.config import TrainConfig
from normtune.training.layer_wrapping import checkpoint_activations, compile_layers
from normtune.training.result import TrainResult, build_result
from normtune.training.saved_activations import save_fewer_activations
from normtune.training.token_counts import count_tokens
from normtune.training.trainer import AdapterTrainer


def train(
    config: TrainConfig,
    *,
    family: Family | None = None,
    dataset: Dataset | None = None,
    progress: TrainerCallback | None = None,
) -> TrainResult:
    """Train the recipe `config.tune` on `config.data` and write the adapter to `config.out`.

    If a run is killed, the same call resumes from its last complete checkpoint and ends with the same adapter
    (bit for bit in fp32 on a CPU). Under torchrun or accelerate launch every process calls this function, and
    the first process writes the files.

    Args:
        config: the options of the run.
        family: the loaded base; it is the base again afterwards. None: `config.model` is loaded.
        dataset: the opened dataset; None: `config.data` is opened.
        progress: a callback that shows the progress, such as `PrintProgress`.

    Raises:
        InputError: an option, the data, the model or the recipe is invalid, or `config.out` cannot be written.
    """
    # --- read the options; every process reads all of them
    recipe = parse(config.tune)  # first: a misspelt recipe fails before anything is loaded
    distributed.init_processes(config.device)
    # tight is for machines with little memory: freed blocks return to the system at once
    if config.memory == "tight":
        memory.release_freed_memory()
    if dataset is None:
        dataset = open_configured(config)
    examples = config.select(dataset.split(config.split))
    # before the base, which may take minutes to load; below --out, since --out itself may exist and be read-only
    make_directory(config.out / "checkpoints")
    keep_base = family is not None
    # with FSDP the base may be larger than a device: it is loaded on the host, then sharded over the devices
    device = "cpu" if distributed.is_sharded() else config.device
    if family is None:
        family = load(config.model, dtype=config.dtype, device=device, quantize=config.quantize)
    # of the unchanged base, before `adapt`: the adapter is loaded only onto a base with the same fingerprint
    base_fingerprint = fingerprint(family.model)
    if len(set(distributed.all_gather(base_fingerprint))) > 1:
        raise InputError(f"the processes loaded different bases from {config.model}. Give all of them the same files.")
    # --- train, and write in one process; the others wait, so that none ends before the files are there
    tuned = adapt(family.model, recipe, seed=config.seed, keep_base=keep_base)
    try:
        result, description = fit(config, family, tuned, dataset, examples, progress=progress)
        if distributed.is_main_process():
            save_run(config, tuned, dataset, len(examples), base_fingerprint, result, description)
        distributed.barrier()
    finally:
        if keep_base:
            restore_base(tuned)
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
    """Write the adapter, the options and the result of a run to `config.out`, and delete its checkpoints.

    Args:
        pairs: number of question-answer pairs that the run trained on.
        base_fingerprint: identifies the base before training; see `normtune.adapters.fingerprint`.
        description: loss log and norm changes, for the adapter's `adapter.json`; see `build_result`.

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
    # the resolved options: the run can be repeated from them
    write_json(config.out / "train_config.json", config.model_dump(mode="json"))
    write_json(config.out / "train_result.json", asdict(result))
    # last: a kill before this line leaves checkpoints from which the run can finish again
    delete_checkpoints(config.out)


def fit(
    config: TrainConfig,
    family: Family,
    tuned: TunedModel,
    dataset: Dataset,
    examples: Sequence[Example],
    *,
    progress: TrainerCallback | None = None,
) -> tuple[TrainResult, dict[str, Any]]:
    """Train the parameters of `tuned.trained` in place.

    Under FSDP2 the model stays sharded afterwards, and `tuned.trained` holds unsharded copies of the trained
    parameters.

    Returns:
        The result, and a description with the loss log and the change of each norm; see `build_result`.

    Raises:
        InputError: the recipe trains nothing, a checkpoint under `config.out` belongs to another run, or the
            device runs out of memory.
    """
    if not tuned.trained:
        raise InputError(f"recipe '{tuned.recipe}' trains nothing. Choose another one with --tune.")
    if config.cache is not None and distributed.is_sharded():
        raise InputError("--cache: with FSDP no process has the whole image encoder. Leave out --cache.")
    # for dropout; initial values were drawn in `adapt`, and the data order has its own generator
    set_seed(config.seed)
    before = {name: parameter.detach().clone() for name, parameter in tuned.trained.items()}
    collate = build_collator(config, family, tuned, dataset, examples, use_caches=not distributed.is_sharded())
    # batches of equal token counts need the tokens of every group, counted from image sizes
    by_tokens = config.balance == "tokens"
    tokens = count_tokens(family, dataset, examples, collate.segment) if by_tokens else None
    cap = config.cap if config.group else 1  # groups of one question: no sharing
    # the first process decides, so that all resume from the same checkpoint even if a shared disk lags
    checkpoint = distributed.broadcast_from_first(lambda: last_checkpoint(config.out) if config.resume else None)
    pairs = config.batch if checkpoint is None else resumed_batch(config, checkpoint)
    batches = EpochBatches(examples, pairs, cap, config.seed, token_costs=tokens, ranks=distributed.world_size())
    if checkpoint is not None:
        check_same_steps(checkpoint, batches)
    try:
        trainer = AdapterTrainer(config, family, tuned, collate, batches, progress, resumed=checkpoint is not None)
    except (ValueError, RuntimeError, ImportError) as error:  # raised by HF for an unknown or missing tracker
        raise InputError(f"--tracker {config.tracker}: {error}") from error
    # incomplete checkpoints of an earlier run, or all of them with --no-resume
    if checkpoint is None and distributed.is_main_process():
        delete_checkpoints(config.out)
    distributed.barrier()  # no process may write a checkpoint before the old ones are deleted
    memory.reset_peak()
    started = time.perf_counter()
    # from the inside out: modules that save less, compilation of the layers, recomputation of compiled layers
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
                + ("" if config.memory == "tight" else "Resume with --memory tight, or ")
                + "lower --batch, raise --accumulate and start again with --no-resume."
            ) from error
    seconds = time.perf_counter() - started
    family.model.eval()  # the caller may evaluate the model next
    # the shards in the model stay; files and reports need the full tensors
    if distributed.is_sharded():
        tuned.trained = {name: nn.Parameter(value) for name, value in trainer.trained_values().items()}
    return build_result(
        config,
        tuned,
        before,
        # HF's log also has rows of other kinds, such as the summary at the end
        [(int(row["step"]), row["loss"]) for row in trainer.state.log_history if "loss" in row],
        pairs=sum(distributed.all_gather(trainer.pairs_seen)),
        steps=trainer.state.global_step,
        resumed_pairs=trainer.resumed_pairs,
        resumed_from_step=trainer.resumed_from_step,
        seconds=seconds,
        computed_once=collate.cached_states,
    )
