"""Several norm adapters trained in one pass over one base: seeds, learning rates, datasets, folds.

    train_together([config.model_copy(update={"seed": seed, "out": out / str(seed)}) for seed in range(8)])

Each adapter has its own data order, schedule, optimiser state and clipping, and its delta is that of
`normtune.training.train` by itself, up to the rounding of fp32. What the base computes for all is computed at once:
one matmul for the rows of all adapters, and what is frozen once an image for all that see it.
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

Tick = Callable[[int, int], None]  # of progress: steps that are done, and all
SHARED = ("model", "dtype", "quantize", "device", "memory", "cache")  # options that all runs of a pass share


def train_together(
    configs: Sequence[TrainConfig], *, at_once: int | None = None, progress: Tick | None = None
) -> list[TrainResult]:
    """Train one adapter a config in one pass over their base; each is written to its own `out`.

    Deltas, loss logs and run records are those of `normtune.training.train`, one config after the other. A pass that
    was killed goes on from each adapter's last whole checkpoint.

    Args:
        configs: one an adapter.
        at_once: adapters whose batches go through the model as one; fewer need less memory. By default all on
            a GPU, and one on a CPU, which one batch fills.
        progress: `progress(done, of)` counts optimiser steps.

    Raises:
        InputError: the configs cannot share a pass, or whatever `train` raises for one of them.
    """
    check_together(configs)
    first = configs[0]
    recipe = parse(first.tune)
    data = _Data(configs)
    family = load(first.model, dtype=first.dtype, device=first.device, quantize=first.quantize)
    base_fingerprint = fingerprint(family.model)
    tuned = adapt(family.model, recipe, seed=first.seed)
    if not tuned.trained:
        raise InputError(f"recipe '{tuned.recipe}' trains nothing. Choose another with --tune.")
    mixed = build_bank(tuned, len(configs))
    before = {name: one.detach().clone() for name, one in mixed.trained(0).items()}
    lanes = data.lanes(family, mixed)
    for lane in lanes:
        lane.resume()
    train_all(family, mixed, lanes, first, at_once, progress)
    results = []
    for lane in lanes:
        alone = mixed.as_single(lane.adapter)
        result, description = build_result(
            lane.config,
            alone,
            before,
            lane.losses,
            pairs=lane.pairs,
            steps=lane.steps,
            seconds=lane.seconds,
            computed_once=lane.collate.cached_states,
            together=len(lanes),
        )
        save_run(lane.config, alone, lane.dataset, len(lane.examples), base_fingerprint, result, description)
        results.append(result)
    return results


def check_together(configs: Sequence[TrainConfig]) -> None:
    """Check that runs can share a pass, as far as their configs tell.

    Raises:
        InputError: they cannot; the message names the option.
    """
    if not configs:
        raise InputError("there is nothing to train together: give at least one config.")
    if distributed.launched_count() > 1:
        raise InputError(
            "adapters share a pass in one process. Run it without torchrun or accelerate launch."
        )
    first = configs[0]
    for config in configs:
        for name in SHARED:
            if getattr(config, name) != getattr(first, name):
                raise InputError(
                    f"--{name.replace('_', '-')} is {getattr(first, name)} for {first.out} and "
                    f"{getattr(config, name)} for {config.out}: runs of one pass share it. Train them apart."
                )
        if str(parse(config.tune)) != str(parse(first.tune)):
            raise InputError(
                f"--tune is {first.tune} for {first.out} and {config.tune} for {config.out}: runs of one "
                "pass train the same norms. Train them apart."
            )
        if not config.group:
            raise InputError(
                "--no-group turns the base's dropout on, whose draws the adapters of one pass would share. "
                "Say --cap 1 for questions that stand alone, or train one after the other."
            )
        if config.compile:
            raise InputError("--compile: layers of several adapters are not compiled. Leave it out.")
        if config.tracker != "none":
            raise InputError(
                f"--tracker {config.tracker}: one pass of several runs logs to none. Leave it out."
            )
    outs = [config.out.absolute() for config in configs]
    if twice := next((out for out in outs if outs.count(out) > 1), None):
        raise InputError(f"two adapters would be written to {twice}. Give each its own --out.")


class _Data:
    """The datasets of the configs, each opened once, and each with one collator for all its runs."""

    def __init__(self, configs: Sequence[TrainConfig]) -> None:
        self.configs = configs
        self.keys = [config.model_dump_json(include={*DataOptions.model_fields}) for config in configs]
        self.datasets: dict[str, Dataset] = {}
        for key, config in zip(self.keys, configs, strict=True):
            if key not in self.datasets:
                self.datasets[key] = open_configured(config)
        self.examples: list[Sequence[Example]] = [
            config.select(self.datasets[key].split(config.split))
            for key, config in zip(self.keys, configs, strict=True)
        ]

    def lanes(self, family: Family, mixed: AdapterBank) -> list[AdapterRun]:
        """One a config, in their order."""
        collators: dict[str, Collator] = {}
        for key, config in zip(self.keys, self.configs, strict=True):
            if key in collators:
                continue
            own = [some for other, some in zip(self.keys, self.examples, strict=True) if other == key]
            every = list({example.id: example for example in chain.from_iterable(own)}.values())
            collators[key] = build_collator(config, family, mixed.tuned, self.datasets[key], every)
        if any(one.states is None for one in collators.values()):
            for one in collators.values():
                one.states = None  # a batch holds states for all of its groups, or images
        lanes = []
        for adapter, (key, config) in enumerate(zip(self.keys, self.configs, strict=True)):
            dataset, examples, collate = self.datasets[key], self.examples[adapter], collators[key]
            by_tokens = config.balance == "tokens"
            tokens = count_tokens(family, dataset, examples, collate.segment) if by_tokens else None
            batches = EpochBatches(examples, config.batch, config.cap, config.seed, tokens=tokens)
            lanes.append(AdapterRun(adapter, config, mixed, dataset, examples, collate, batches))
        return lanes


def train_all(
    family: Family,
    mixed: AdapterBank,
    lanes: Sequence[AdapterRun],
    config: TrainConfig,
    at_once: int | None = None,
    progress: Tick | None = None,
) -> None:
    """Train all lanes to their ends, a batch of every one that is not done at a time; see `train_together`.

    Raises:
        InputError: the device runs out of memory, or a checkpoint cannot be written.
    """
    if at_once is None:
        at_once = len(lanes) if family.device.type == "cuda" else 1
    memory.reset_peak()
    started = time.perf_counter()
    of = sum(lane.total for lane in lanes)
    with save_fewer_activations(family.model), checkpoint_activations(family.model, config.memory):
        while under_way := [lane for lane in lanes if not lane.done]:
            parts = [(lane, lane.next()) for lane in under_way]
            losses: list[float] = []
            for first in range(0, len(parts), at_once):
                some = parts[first : first + at_once]
                try:
                    losses += backward(family, mixed, some)
                except torch.OutOfMemoryError as error:
                    raise InputError(
                        f"the device ran out of memory with {len(some)} adapters at once and --memory "
                        f"{config.memory}. Take fewer (at_once), --memory tight or a smaller --batch."
                    ) from error
            for (lane, batch), loss in zip(parts, losses, strict=True):
                lane.record_batch(batch, loss)
                if lane.done:
                    lane.seconds = time.perf_counter() - started
            if progress is not None:
                progress(sum(lane.steps for lane in lanes), of)
    for lane in lanes:
        lane.seconds = lane.seconds or time.perf_counter() - started  # its checkpoint was its last


def backward(family: Family, mixed: AdapterBank, parts: Sequence[tuple[AdapterRun, Groups]]) -> list[float]:
    """Add the gradients of one batch of each lane to the adapters'; returns the scaled losses."""
    batch, images = collated(family, mixed, parts)
    batch = send_to_device(batch, family.device)
    questions = [sum(map(len, groups)) for _, groups in parts]
    lane_of = torch.arange(len(parts)).repeat_interleave(torch.tensor(questions))  # [segments]
    adapters = [lane.adapter for lane, _ in parts]
    texts = RowAdapters([adapters[i] for i in lane_of[family.text_segments(batch).cpu()].tolist()])
    with mixed.use(images, texts):
        states, labels, segments = family.answer_states(batch)
        counts = torch.bincount(lane_of[segments.cpu()], minlength=len(parts)).tolist()
        losses = [
            lane.scale_loss(
                answer_loss(
                    head_for(family.head, mixed, lane.adapter),
                    some,
                    wanted,
                    vocabulary=family.vocabulary,
                    label_smoothing=lane.config.label_smoothing,
                )
            )
            for (lane, _), some, wanted in zip(parts, states.split(counts), labels.split(counts), strict=True)
        ]
        every = torch.stack(losses)
        every.sum().backward()
    mixed.collect_gradients()
    return every.detach().tolist()  # type: ignore[no-any-return]


def head_for(head: Head, mixed: AdapterBank, adapter: int) -> Head:
    """The head for the states of one adapter; itself where it holds no norms of theirs."""
    if isinstance(head, nn.Module) and any(isinstance(one, MultiAdapterNorm) for one in head.modules()):
        return partial(_headed, head, mixed, RowAdapters((adapter,)))
    return head


def _headed(head: Head, mixed: AdapterBank, owners: RowAdapters, states: Tensor) -> Tensor:
    with mixed.texts.use(owners):
        return head(states)


def collated(
    family: Family, mixed: AdapterBank, parts: Sequence[tuple[AdapterRun, Groups]]
) -> tuple[Batch, RowAdapters | None]:
    """The batches of several lanes as one, in their order, and whose its images are (None: nobody asks).

    Adapters share the images that a frozen encoder has seen; where it is tuned, each sees its own.
    """
    packed = [(lane, lane.collate.tokenize_groups(groups)) for lane, groups in parts]
    groups = [group for _, some in packed for group in some]
    kept = parts[0][0].collate.states
    if kept is not None:
        states: list[Any] = []
        for lane, some in packed:
            assert lane.collate.states is not None, "all lanes hold states, or none does"
            states += map(lane.collate.states, some)
        return kept.below.collate(groups, states), None
    tuned = bool({*IMAGE_PARTS} & {part for part, _ in mixed.tuned.part_and_role.values()})
    shown: list[list[Pixels]] = []
    owner: dict[int, int] = {}  # of each image, in the order in which the family takes them
    sizes: list[int] = []
    for lane, some in packed:
        own: dict[int, tuple[Pixels, Pixels]] = {}  # id -> the image, kept so that its id is, and a copy
        for group in some:
            images = lane.collate.images_of(group)
            if tuned:
                images = [own.setdefault(id(one), (one, dict(one)))[1] for one in images]
                for image in images:
                    if id(image) not in owner:
                        owner[id(image)] = lane.adapter
                        sizes.append(len(image["pixel_values"]))  # patches, tiles, or channels: as many each
            shown.append(images)
    return family.collate(groups, shown), RowAdapters([*owner.values()], sizes) if tuned else None
