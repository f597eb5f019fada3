"""A training run: load the base, adapt it by a recipe, train on a dataset, write the adapter.

train     reads the options, prepares the run (`normtune.training.setup`), calls `fit`, and writes the files
fit       trains the adapted model in place: batches, checkpoint to resume from, Trainer
save_run  writes the adapter, the options and the result, and deletes the checkpoints
"""

from __future__ import annotations

import sys
from contextlib import nullcontext
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback
from transformers.trainer_utils import set_seed

from normtune.adapters import storage
from normtune.adapters.training_rows import hash_rows
from normtune.data.examples import as_examples
from normtune.data.records import Dataset
from normtune.data.run_file import RUN_FILE as RUN_OPTIONS
from normtune.data.run_file import run_file_text
from normtune.data.sampling import sampling_text
from normtune.errors import InputError
from normtune.inference.limits import check_run
from normtune.methods.adapt import restore_base
from normtune.methods.recipe import parse
from normtune.models.family import Family
from normtune.models.loading import resolve_device, resolve_dtype
from normtune.runtime import distributed, memory
from normtune.runtime.files import write_json, write_text
from normtune.training.checkpoints import RUN_FILE, Checkpoint, delete_checkpoints, last_checkpoint
from normtune.training.collator import count_tokens
from normtune.training.config import TrainConfig
from normtune.training.identity import check_identity, locked_folder, move_earlier_run, option_identity
from normtune.training.layer_wrapping import checkpoint_activations, compile_layers
from normtune.training.memory_plan.plan import estimate_memory
from normtune.training.privacy import check_private_options
from normtune.training.result import TrainResult, build_result, read_result
from normtune.training.saved_activations import save_fewer_activations
from normtune.training.setup import (
    TrainingSetup,
    build_batches,
    build_setup,
    find_run_strata,
    read_examples,
    validation_identity,
)
from normtune.training.trainer import AdapterTrainer
from normtune.training.validation import read_validation


def train(
    config: TrainConfig,
    *,
    family: Family | None = None,
    dataset: Dataset | None = None,
    progress: TrainerCallback | None = None,
    memory_plan: dict[str, Any] | None = None,
) -> TrainResult:
    """Train the recipe `config.tune` on `config.data` and write the adapter to `config.out`.

    If a run is killed, the same call resumes from its last complete checkpoint and ends with the same adapter
    (bit for bit in fp32 on a CPU). If the adapter of the same run is there already, nothing is trained. Under
    torchrun or accelerate launch every process calls this function, and the first process writes the files.

    Args:
        family: the loaded base; it is the base again afterwards. None: `config.model` is loaded.
        dataset: the opened dataset; None: `config.data` is opened.
        progress: a callback that shows the progress, such as `PrintProgress`.
        memory_plan: what `estimate_memory` returned for such a run; None: the memory is planned.

    Raises:
        InputError: an option, the data, the model or the recipe is invalid, `config.out` cannot be written, or
            it holds another run (see `TrainConfig.overwrite`).
    """
    parse(config.tune)  # first: a misspelt recipe fails before anything is loaded
    distributed.init_processes(config.device)
    # resolved once: checkpoints and results name the dtype that was used, and a loaded base stays where it is
    device = resolve_device(config.device) if family is None else family.device
    updates = {"dtype": resolve_dtype(config.dtype, device)} | ({} if family is None else {"device": str(device)})
    config = config.model_copy(update=updates)
    # tight is for machines with little memory: freed blocks return to the system at once
    if config.memory == "tight":
        memory.release_freed_memory()
    options = option_identity(config)
    check_identity(config, options)
    check_private_options(config)
    dataset, examples = read_examples(config, dataset)
    validation = read_validation(config, dataset)
    # before the base, which may take minutes to load
    pixels = nullcontext() if family is None else family.pixel_limit(config.max_pixels)
    with distributed.lost_process_as_error(), locked_folder(config.out), pixels:
        examples, preflight = check_run(config, examples, family or config.model, training=True)
        find_run_strata(config, dataset, examples)  # refuses what cannot be sampled
        preflight.memory = memory_plan or distributed.broadcast_from_first(
            lambda: estimate_memory(config, dataset, examples, family)
        )
        if distributed.is_main_process() and preflight.memory.get("fits") is False:
            print(f"preflight: too little memory, {preflight.memory_text()}", file=sys.stderr)
        rows = distributed.broadcast_from_first(lambda: hash_rows(dataset, examples))
        validation_digest: str | None = None
        if validation is not None:
            checked, _ = check_run(config, validation, family or config.model, training=True)
            validation = checked
            validation_digest = distributed.broadcast_from_first(lambda: hash_rows(dataset, checked).digest)
        check_identity(config, options | {"rows_digest": rows.digest} | validation_identity(validation_digest))
        keep_base, before = family is not None, family and family.choices
        setup = build_setup(config, dataset, examples, rows, preflight, family=family, keep_base=keep_base)
        setup.validation, setup.validation_digest = validation, validation_digest
        try:
            return _train_in_folder(setup, progress)
        finally:
            if keep_base:
                restore_base(setup.tuned)
                setup.family.choices = before or setup.family.choices


def _train_in_folder(setup: TrainingSetup, progress: TrainerCallback | None) -> TrainResult:
    """Train and write the adapter, unless the output folder has the adapter of the same run already."""
    config = setup.config
    state = distributed.broadcast_from_first(lambda: check_identity(config, setup.identity))
    if state == "finished" and not config.overwrite:
        storage.read_adapter_info(config.out)  # the files are complete
        return replace(read_result(config.out), already_finished=True)
    earlier_run: str | None = None
    if state in ("finished", "other") and distributed.is_main_process():
        earlier_run = str(move_earlier_run(config.out))
    result, description = fit(setup, progress=progress)
    result = replace(result, earlier_run=earlier_run)
    # in one process; the others wait, so that none ends before the files are there
    if distributed.is_main_process():
        save_run(setup, result, description)
    distributed.barrier()
    return result


def save_run(setup: TrainingSetup, result: TrainResult, description: dict[str, Any]) -> None:
    """Write the adapter, the options and the result of a run to its output folder, and delete its checkpoints.

    Args:
        description: loss log and norm changes, for the adapter's `adapter.json`; see `build_result`.

    Raises:
        InputError: the files cannot be written.
    """
    config, dataset = setup.config, setup.dataset
    assert setup.rows is not None and setup.base_fingerprint is not None and setup.preflight is not None
    write_json(config.out / RUN_FILE, setup.identity)
    figures = setup.preflight.adapter_figures()
    has_choices = "choice" in as_examples(setup.examples).codes("kind")[1]
    storage.save_adapter(
        setup.tuned,
        config.out,
        base_name=config.model,
        base_fingerprint=setup.base_fingerprint,
        data={
            "name": dataset.name,
            "split": config.split,
            "licence": dataset.licence,
            "task": config.task,
            "pairs": len(setup.examples),
            **({"mixture": dataset.mixture} if dataset.mixture else {}),
            # of a private run no counts of the texts of rows
            **({"limits": figures["limits"], "privacy": result.privacy} if result.privacy else figures),
            **({"choices": asdict(setup.family.choices)} if has_choices else {}),
        },
        metrics={"training": description} | setup.family.self_test_record(),
        rows=None if result.privacy else setup.rows,  # hashes would show whether a row is in the training data
    )
    setup.preflight.save(config.out)
    # the resolved options, twice: in JSON as written by version 0.1, and as a file that `normtune train` reads
    write_text(config.out / RUN_OPTIONS, run_file_text("train", config, resolved={"device": setup.identity["device"]}))
    write_json(config.out / "train_config.json", config.model_dump(mode="json"))
    write_json(config.out / "train_result.json", asdict(result))
    if result.curve:
        result.save_plot()
    # last: a kill before this line leaves checkpoints from which the run can finish again
    delete_checkpoints(config.out)


def fit(setup: TrainingSetup, *, progress: TrainerCallback | None = None) -> tuple[TrainResult, dict[str, Any]]:
    """Train the parameters of `setup.tuned` in place.

    Under FSDP2 the model stays sharded afterwards, and `tuned.trained` holds unsharded copies of the trained
    parameters.

    Returns:
        The result, and a description with the loss log and the change of each norm; see `build_result`.

    Raises:
        InputError: the checkpoint under `config.out` cannot be continued with this number of processes, or the
            device runs out of memory.
    """
    config, family, tuned, examples = setup.config, setup.family, setup.tuned, setup.examples
    # for dropout; initial values were drawn in `adapt`, and the data order has its own generator
    set_seed(config.seed)
    before = {name: parameter.detach().clone() for name, parameter in tuned.trained.items()}
    # batches of equal token counts need the tokens of every group, counted from image sizes
    by_tokens = config.balance == "tokens"
    tokens = count_tokens(family, setup.dataset, examples, setup.collate.segment) if by_tokens else None
    # the first process decides, so that all resume from the same checkpoint even if a shared disk lags
    folder = distributed.broadcast_from_first(lambda: last_checkpoint(config.out) if config.resume else None)
    checkpoint = None if folder is None else Checkpoint.read(folder)
    pairs = config.batch if checkpoint is None else checkpoint.batch_size()
    batches = build_batches(config, setup.dataset, examples, pairs, tokens)
    if batches.sampler is not None and distributed.is_main_process():
        print(sampling_text(batches.sampler.counts(1)), file=sys.stderr)
    if checkpoint is not None:
        checkpoint.check_steps(batches)
    try:
        trainer = AdapterTrainer(setup, batches, checkpoint, progress)
    except (ValueError, RuntimeError, ImportError) as error:  # raised by HF for an unknown or missing tracker
        raise InputError(f"--tracker {config.tracker}: {error}") from error
    # incomplete checkpoints of an earlier run, or all of them with --no-resume
    if checkpoint is None and distributed.is_main_process():
        delete_checkpoints(config.out)
    distributed.barrier()  # no process may write a checkpoint before the old ones are deleted
    memory.reset_peak(trainer.args.device)
    base_bytes = memory.peak_memory_bytes(trainer.args.device)  # of the loaded base and the process, before training
    # from the inside out: modules that save less, compilation of the layers, recomputation of compiled layers
    with (
        save_fewer_activations(family.model),
        compile_layers(family.model, config.compile),
        checkpoint_activations(family.model, config.memory),
        distributed.lost_process_as_error(),
    ):
        try:
            trainer.run()
        except torch.OutOfMemoryError as error:
            raise InputError(
                f"the device ran out of memory with --batch {config.batch} --memory {config.memory}. "
                + ("" if config.memory == "tight" else "Resume with --memory tight, or ")
                + "lower --batch, raise --accumulate and start again with --no-resume."
            ) from error
    family.model.eval()  # the caller may evaluate the model next
    # the shards in the model stay; files and reports need the full tensors
    if distributed.is_sharded():
        tuned.trained = {name: nn.Parameter(value) for name, value in trainer.trained_values().items()}
    return build_result(setup, before, trainer, base_bytes)
