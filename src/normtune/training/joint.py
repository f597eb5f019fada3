"""Trains several norm adapters in one pass over one base: seeds, learning rates, datasets, folds.

    train_together([config.model_copy(update={"seed": seed, "out": out / str(seed)}) for seed in range(8)])

Each adapter is a run (`AdapterRun`) with its own data order, schedule, optimiser state and clipping. It ends
with the values of a separate `normtune.training.train`, up to fp32 rounding. The runs share what the base
computes: linear layers multiply the rows of all adapters at once, and frozen layers run once per image for
all runs that use it.

One round of three runs, two adapters per forward pass (run 1 accumulates two batches per step):

             run 0 (batch a)   run 1 (batch b)   run 2 (batch c)
    pass 1   rows 0-7          rows 8-13         .                 one forward and backward pass; each row is
    pass 2   .                 .                 rows 0-5          normalised with the gains of its adapter
    update   step 1            -                 step 1            clip, AdamW, schedule: each run on its own

The next round takes one batch of each run that is not finished; run 1 then makes its first step.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import chain
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn

from normtune.adapters.fingerprint import fingerprint
from normtune.adapters.multi.bank import AdapterBank, build_bank
from normtune.adapters.multi.norms import MultiAdapterNorm
from normtune.adapters.multi.rows import RowAdapters
from normtune.data.batches import EpochBatches
from normtune.data.options import DataOptions
from normtune.data.records import Dataset, Example
from normtune.data.registry import open_configured
from normtune.errors import InputError
from normtune.methods.adapt import adapt
from normtune.methods.recipe import parse
from normtune.models.answer_loss import Head, answer_loss
from normtune.models.family import Family
from normtune.models.loading import load
from normtune.models.part_names import IMAGE_PARTS
from normtune.models.types import Batch, Pixels
from normtune.runtime import distributed, memory
from normtune.training.collator import Collator, build_collator
from normtune.training.config import TrainConfig
from normtune.training.joint_run import AdapterRun, Groups
from normtune.training.layer_wrapping import checkpoint_activations
from normtune.training.result import TrainResult, build_result
from normtune.training.saved_activations import save_fewer_activations
from normtune.training.token_counts import count_tokens
from normtune.training.train import save_run

StepProgress = Callable[[int, int], None]  # (optimiser steps done, steps in all), over all runs
BatchOfRun = tuple[AdapterRun, Groups]  # a run and the batch that it trains on next
# options that must be equal for all runs of a pass, since they decide how the one base is loaded and run
SHARED_OPTIONS = ("model", "dtype", "quantize", "device", "memory", "cache")


def train_together(
    configs: Sequence[TrainConfig], *, adapters_per_forward: int | None = None, progress: StepProgress | None = None
) -> list[TrainResult]:
    """Train one adapter per config in one pass over their base, and write each to its own `out`.

    Adapters, loss logs and result files are those of `normtune.training.train`, called for one config after
    the other. If a pass is killed, the same call resumes each run from its last complete checkpoint.

    Args:
        configs: one config per adapter.
        adapters_per_forward: adapters that share one forward pass; fewer need less memory. Default: all on a
            GPU; one on a CPU, which a single batch keeps busy.
        progress: called as `progress(done, total)` with the optimiser steps of all runs.

    Returns:
        One result per config, in their order.

    Raises:
        InputError: the configs cannot share a pass, or `train` would raise it for one of them.
    """
    check_can_share_pass(configs)
    first = configs[0]
    recipe = parse(first.tune)
    datasets = _Datasets(configs)
    family = load(first.model, dtype=first.dtype, device=first.device, quantize=first.quantize)
    base_fingerprint = fingerprint(family.model)
    tuned = adapt(family.model, recipe, seed=first.seed)
    if not tuned.trained:
        raise InputError(f"recipe '{tuned.recipe}' trains nothing. Choose another one with --tune.")
    bank = build_bank(tuned, len(configs))
    # all adapters start from the base's gains and biases, so that the first one's are those of all
    before = {name: parameter.detach().clone() for name, parameter in bank.parameters_of(0).items()}
    runs = datasets.build_runs(family, bank)
    for run in runs:
        run.resume()
    train_all(family, bank, runs, first, adapters_per_forward, progress)
    results = []
    for run in runs:
        adapter = bank.as_single(run.adapter)
        result, description = build_result(
            run.config,
            adapter,
            before,
            run.losses,
            pairs=run.pairs,
            steps=run.steps,
            resumed_pairs=run.resumed_pairs,
            resumed_from_step=run.resumed_from_step,
            seconds=run.seconds,
            computed_once=run.collate.cached_states,
            adapters_in_pass=len(runs),
        )
        save_run(run.config, adapter, run.dataset, len(run.examples), base_fingerprint, result, description)
        results.append(result)
    return results


def check_can_share_pass(configs: Sequence[TrainConfig]) -> None:
    """Check the configs of runs that are to share a pass.

    Raises:
        InputError: they cannot share one; the message names the option.
    """
    if not configs:
        raise InputError("no adapter to train: give at least one config.")
    if distributed.launched_count() > 1:
        raise InputError("several adapters train in one process. Run it without torchrun or accelerate launch.")
    first = configs[0]
    for config in configs:
        for name in SHARED_OPTIONS:
            if getattr(config, name) != getattr(first, name):
                raise InputError(
                    f"--{name.replace('_', '-')} is {getattr(first, name)} for {first.out} and "
                    f"{getattr(config, name)} for {config.out}: runs of one pass share it. Train separately."
                )
        if str(parse(config.tune)) != str(parse(first.tune)):
            raise InputError(
                f"--tune is {first.tune} for {first.out} and {config.tune} for {config.out}: runs of one "
                "pass train the same norms. Train separately."
            )
        if not config.group:
            raise InputError(
                "--no-group turns on the base's dropout, and the adapters of one pass would share its masks. "
                "Use --cap 1 for one question per group, or train the adapters one after the other."
            )
        if config.compile:
            raise InputError("--compile: layers of several adapters cannot be compiled. Leave out --compile.")
        if config.tracker != "none":
            raise InputError(
                f"--tracker {config.tracker}: a pass of several runs cannot log to it. Leave out --tracker."
            )
    outs = [config.out.absolute() for config in configs]
    if repeated := next((out for out in outs if outs.count(out) > 1), None):
        raise InputError(f"two adapters would be written to {repeated}. Give each its own --out.")


class _Datasets:
    """The datasets of the configs: each is opened once, and has one collator for all of its runs."""

    def __init__(self, configs: Sequence[TrainConfig]) -> None:
        self.configs = configs
        # runs with equal dataset options share the dataset; the options as JSON are its key
        self.keys = [config.model_dump_json(include={*DataOptions.model_fields}) for config in configs]
        self.datasets: dict[str, Dataset] = {}
        for key, config in zip(self.keys, configs, strict=True):
            if key not in self.datasets:
                self.datasets[key] = open_configured(config)
        self.examples: list[Sequence[Example]] = [
            config.select(self.datasets[key].split(config.split))
            for key, config in zip(self.keys, configs, strict=True)
        ]

    def build_runs(self, family: Family, bank: AdapterBank) -> list[AdapterRun]:
        """Build one run per config, in their order."""
        collators: dict[str, Collator] = {}
        for key, config in zip(self.keys, self.configs, strict=True):
            if key in collators:
                continue
            # the examples of all runs on this dataset, each once: one cache serves all of these runs
            by_run = [some for other, some in zip(self.keys, self.examples, strict=True) if other == key]
            union = list({example.id: example for example in chain.from_iterable(by_run)}.values())
            collators[key] = build_collator(config, family, bank.tuned, self.datasets[key], union)
        # a shared batch is built either from cached states or from images, for all of its groups
        if any(collator.states is None for collator in collators.values()):
            for collator in collators.values():
                collator.states = None
        runs = []
        for adapter, (key, config) in enumerate(zip(self.keys, self.configs, strict=True)):
            dataset, examples, collate = self.datasets[key], self.examples[adapter], collators[key]
            by_tokens = config.balance == "tokens"
            tokens = count_tokens(family, dataset, examples, collate.segment) if by_tokens else None
            batches = EpochBatches(examples, config.batch, config.cap, config.seed, token_costs=tokens)
            runs.append(AdapterRun(adapter, config, bank, dataset, examples, collate, batches))
        return runs


def train_all(
    family: Family,
    bank: AdapterBank,
    runs: Sequence[AdapterRun],
    config: TrainConfig,
    adapters_per_forward: int | None = None,
    progress: StepProgress | None = None,
) -> None:
    """Train all runs to their ends, in rounds of one batch per unfinished run; see `train_together`.

    Args:
        config: a config of any of the runs, for the options that they share.

    Raises:
        InputError: the device runs out of memory, or a checkpoint cannot be written.
    """
    if adapters_per_forward is None:
        adapters_per_forward = len(runs) if family.device.type == "cuda" else 1
    memory.reset_peak()
    started = time.perf_counter()
    total = sum(run.total for run in runs)
    with save_fewer_activations(family.model), checkpoint_activations(family.model, config.memory):
        while unfinished := [run for run in runs if not run.done]:
            batches_of_runs = [(run, run.next_batch()) for run in unfinished]
            losses: list[float] = []
            for first in range(0, len(batches_of_runs), adapters_per_forward):
                some = batches_of_runs[first : first + adapters_per_forward]
                try:
                    losses += accumulate_gradients(family, bank, some)
                except torch.OutOfMemoryError as error:
                    raise InputError(
                        f"the device ran out of memory with {len(some)} adapters at once and --memory "
                        f"{config.memory}. Lower adapters_per_forward or --batch, or use --memory tight."
                    ) from error
            for (run, batch), loss in zip(batches_of_runs, losses, strict=True):
                run.record_batch(batch, loss)
                if run.done:
                    run.seconds = time.perf_counter() - started
            if progress is not None:
                progress(sum(run.steps for run in runs), total)
    for run in runs:
        run.seconds = run.seconds or time.perf_counter() - started  # resumed when already finished


def accumulate_gradients(family: Family, bank: AdapterBank, batches_of_runs: Sequence[BatchOfRun]) -> list[float]:
    """Run one forward and backward pass over a batch of each run, and add the gradients to `bank.grads`.

    The loss of the pass is the sum of the runs' losses. An adapter's values enter its own rows only, so that
    the gradient of the sum is each run's own gradient.

    Args:
        batches_of_runs: runs, each with its batch. Below, a run's index is its position in this list.

    Returns:
        Each run's loss, as its part of its step's mean per answer token.
    """
    batch, images = collate_runs(family, bank, batches_of_runs)
    batch = send_to_device(batch, family.device)
    questions = [sum(map(len, groups)) for _, groups in batches_of_runs]
    # segments of run 0, then of run 1, ...: the index of each segment's run, [segments]
    run_of_segment = torch.arange(len(batches_of_runs)).repeat_interleave(torch.tensor(questions))
    adapters = [run.adapter for run, _ in batches_of_runs]
    # families lay segments out in rows differently: ask for the segment of each row, then for its adapter
    texts = RowAdapters([adapters[i] for i in run_of_segment[family.text_segments(batch).cpu()].tolist()])
    with bank.use(images, texts):  # the backward pass too: recomputed layers need the rows' adapters again
        # states: [answer tokens, width], before the head, in the order of the segments
        # labels, segments: [answer tokens]
        states, labels, segments = family.answer_states(batch)
        counts = torch.bincount(run_of_segment[segments.cpu()], minlength=len(batches_of_runs)).tolist()
        losses = [
            run.scale_loss(
                answer_loss(
                    head_for(family.head, bank, run.adapter),
                    run_states,
                    run_labels,
                    vocabulary=family.vocabulary,
                    label_smoothing=run.config.label_smoothing,
                )
            )
            for (run, _), run_states, run_labels in zip(
                batches_of_runs, states.split(counts), labels.split(counts), strict=True
            )
        ]
        stacked = torch.stack(losses)  # [runs]
        stacked.sum().backward()
    bank.collect_gradients()
    return stacked.detach().tolist()  # type: ignore[no-any-return]


def head_for(head: Head, bank: AdapterBank, adapter: int) -> Head:
    """Return the head with one adapter's norms, or the head itself if it has no tuned norms.

    The head is applied to the answer tokens of one run at a time, not to the rows of the batch.
    """
    if isinstance(head, nn.Module) and any(isinstance(part, MultiAdapterNorm) for part in head.modules()):
        return partial(_apply_head, head, bank, RowAdapters((adapter,)))
    return head


def _apply_head(head: Head, bank: AdapterBank, adapters: RowAdapters, states: Tensor) -> Tensor:
    with bank.text_rows.use(adapters):
        return head(states)


def collate_runs(
    family: Family, bank: AdapterBank, batches_of_runs: Sequence[BatchOfRun]
) -> tuple[Batch, RowAdapters | None]:
    """Join the batches of several runs into one, in their order.

    Returns:
        The batch, and the adapter of each of its images; None if no image part is tuned. If none is, runs
        share an image and its frozen encoder's output. Otherwise each run needs its own copy in the batch,
        since the same pixels give other features for each adapter.
    """
    tokenized = [(run, run.collate.tokenize_groups(groups)) for run, groups in batches_of_runs]
    groups = [group for _, run_groups in tokenized for group in run_groups]
    cache = batches_of_runs[0][0].collate.states
    if cache is not None:  # the trunk is frozen, so that no adapter's norms are in it
        states: list[Any] = []
        for run, run_groups in tokenized:
            assert run.collate.states is not None, "all runs have cached states, or none has"
            states += map(run.collate.states, run_groups)
        return cache.trunk.collate(groups, states), None
    tuned = bool({*IMAGE_PARTS} & {part for part, _ in bank.tuned.part_and_role.values()})
    # Families put the same object (`is`) into a batch once, in the order of their first use. A copy for each
    # run therefore becomes an image of its own, shared by the groups of that run.
    images_of_groups: list[list[Pixels]] = []
    # id of an image -> its adapter, in the order in which the family puts them into the batch
    adapter_of: dict[int, int] = {}
    sizes: list[int] = []  # units of each image that a norm sees as rows: patches, tiles or channels
    for run, run_groups in tokenized:
        # id of a cached image -> (the image, its copy); holding the image keeps its id from being reused
        copies: dict[int, tuple[Pixels, Pixels]] = {}
        for group in run_groups:
            images = run.collate.images_of(group)
            if tuned:
                images = [copies.setdefault(id(image), (image, dict(image)))[1] for image in images]
                for image in images:
                    if id(image) not in adapter_of:
                        adapter_of[id(image)] = run.adapter
                        sizes.append(len(image["pixel_values"]))
            images_of_groups.append(images)
    image_adapters = RowAdapters([*adapter_of.values()], sizes) if tuned else None
    return family.collate(groups, images_of_groups), image_adapters
