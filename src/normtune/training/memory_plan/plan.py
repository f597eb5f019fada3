"""The memory of a training run before anything is loaded: the run's own code on tensors without values.

A hollow model is adapted, made lean, and run forward and backward on the largest batch of the run's first
epoch, through the run's own collator; the bytes that live are counted as they come and go. There is no
formula for each family, and whatever a family, a tier or a kernel comes to keep is seen.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import Any

import torch
from accelerate.utils import send_to_device

from normtune.data.batches import EpochBatches, TokenCosts
from normtune.data.records import Dataset, Example
from normtune.data.registry import open_configured
from normtune.errors import InputError
from normtune.methods.adapt import adapt
from normtune.models.family import Family
from normtune.models.image_cache import LIMIT_BYTES
from normtune.models.loading import load_without_weights, resolve_device
from normtune.models.quantization import PACKAGES, quantised_linears
from normtune.runtime.memory import available_bytes, resident_bytes
from normtune.training.collator import Collator, build_collator
from normtune.training.config import TrainConfig
from normtune.training.layer_wrapping import CHECKPOINT_EVERY, MemoryTier, checkpoint_activations
from normtune.training.memory_plan.fake_model import BooleanIndexing, bytes_of, use_fake_tensors
from normtune.training.memory_plan.live_bytes import LiveTensorBytes
from normtune.training.memory_plan.quantized import insert_placeholders, linear_bytes
from normtune.training.saved_activations import save_fewer_activations
from normtune.training.token_counts import count_tokens

USABLE_SHARE = 0.95  # share of what is free that a run may take; allocators hold more than their tensors
_COPIES = 3  # of what is trained, besides itself and its gradient: AdamW's two means, and the values before
_WORD = 4  # bytes of an fp32 value

Groups = Sequence[Sequence[Example]]  # a batch: the examples of each group


@dataclass(frozen=True)
class MemoryOption:
    """One way to train, and the bytes that it takes.

    Attributes:
        weights: the base as it is held, and what is trained.
        optimiser: AdamW's states and the values before training.
        held: states or pixels that are kept between steps, in the host's memory.
        step: what a step adds at its peak: activations, gradients, and the image encoder at work.
        program: the interpreter and its libraries; 0 where the device has memory of its own.
        total: on the device that trains.
        pairs: about so many of the run's pairs a step fit into what is free; None where that is not known.
    """

    memory: MemoryTier
    quantize: str | None
    weights: int
    optimiser: int
    held: int
    step: int
    program: int
    total: int
    pairs_that_fit: int | None
    fits: bool | None


@dataclass(frozen=True)
class MemoryPlan:
    """The run as asked (`asked`) and its other tiers and quantisations (`ways`, that one among them).

    Attributes:
        free: bytes that can be had on the device; None where the system does not say.
        pairs, rows, tokens: of the largest batch of the first epoch, padding included.
    """

    device: str
    dtype: str
    free: int | None
    batch: int
    pairs: int
    rows: int
    tokens: int
    requested: MemoryOption
    options: tuple[MemoryOption, ...]

    def to_json(self) -> dict[str, Any]:
        """The plan with the keys that `normtune inspect --json` prints."""
        keys = {"requested": "asked", "options": "ways", "pairs_that_fit": "pairs"}

        def renamed(value: Any) -> Any:
            if isinstance(value, dict):
                return {keys.get(key, key): renamed(entry) for key, entry in value.items()}
            return [renamed(entry) for entry in value] if isinstance(value, tuple | list) else value

        plan: dict[str, Any] = renamed(asdict(self))
        return plan


def plan(config: TrainConfig) -> MemoryPlan:
    """What training as `config` says would take, and what its other tiers and quantisations would.

    Of the model its config and processor are read. The images are opened for their sizes, and one of each
    size is processed. Other quantisations than the run's are counted from it: they change the weights, and
    what one linear makes of its own at a time.

    Raises:
        InputError: bad option, data, model or recipe, or a model that has no processor.
    """
    config = config.model_copy(update={"cache": None})  # what is on disk takes no memory
    device = resolve_device(config.device)
    dataset = open_configured(config)
    examples = config.select(dataset.split(config.split))
    run = _WeightlessRun(config, dataset, examples, device)
    costs = _Costs(run, dataset, examples)
    whole, small = costs.largest(config.batch), costs.largest(1)
    free = available_bytes(device)
    ways = []
    for tier in CHECKPOINT_EVERY:
        step, least = run.step(whole, tier), run.step(small, tier)
        per_token = _slope(step, least, costs.of(whole), costs.of(small))
        per_pair = per_token * costs.of(whole) / _pairs(whole)
        for quantize in (None, *PACKAGES) if run.quantises else (config.quantize,):
            ways.append(run.way(tier, quantize, step, per_pair, _pairs(whole), free))
    asked = next(way for way in ways if (way.memory, way.quantize) == (config.memory, config.quantize))
    rows, tokens = costs.shape(whole)
    return MemoryPlan(
        str(device), config.dtype, free, config.batch, _pairs(whole), rows, tokens, asked, tuple(ways)
    )


def _slope(step: int, least: int, tokens: int, fewest: int) -> float:
    """Bytes a token, by two batches; by one where the run has no smaller one."""
    return (step - least) / (tokens - fewest) if tokens > fewest and step > least else step / tokens


def _pairs(groups: Groups) -> int:
    return sum(len(members) for members in groups)


class _WeightlessRun:
    """The run of a config on a model without values.

    Attributes:
        quantises: whether the recipe leaves alone what would be quantised.
    """

    def __init__(
        self, config: TrainConfig, dataset: Dataset, examples: Sequence[Example], device: torch.device
    ) -> None:
        self.config, self.device = config, device
        self.family: Family = load_without_weights(config.model)
        model = self.family.model.to(getattr(torch, config.dtype))
        names = quantised_linears(model)
        linears: list[Any] = [model.get_submodule(name) for name in names]
        self.sizes = [(one.out_features, one.in_features) for one in linears]
        weights = {id(one.weight) for one in linears}
        tuned = adapt(model, config.tune, seed=config.seed)
        if not tuned.trained:
            raise InputError(f"recipe '{tuned.recipe}' trains nothing. Choose another with --tune.")
        own = {id(one.weight) for one in linears if "weight" in one._parameters}  # others are held in fp32
        taken = any(id(one) in weights for one in tuned.trained.values())
        self.quantises = bool(weights) and own == weights and not taken
        if config.quantize is not None and not self.quantises:
            raise InputError(
                f"recipe '{tuned.recipe}' trains linears that --quantize {config.quantize} holds in fewer "
                "bits: choose ln or lora there, or leave --quantize out."
            )
        self._lean = ExitStack()  # held, and never closed: the model serves nothing else
        self._lean.enter_context(save_fewer_activations(model))
        if config.quantize is not None:
            insert_placeholders(linears, config.quantize)
        new = use_fake_tensors(model, device)
        tuned.trained = {name: new[id(one)] for name, one in tuned.trained.items()}
        model.train(not config.group)
        if hasattr(self.family, "attention"):
            self.family.attention = "dense"  # block masks are compiled; their kernels keep the same
        self.weights = bytes_of(model)
        self.optimiser = _COPIES * _WORD * tuned.trainable
        with BooleanIndexing():
            self.collate: Collator = build_collator(config, self.family, tuned, dataset, examples)
        self.examples = len(examples)
        self.images = {example.images for example in examples}
        self.program = resident_bytes()

    def step(self, groups: Groups, tier: MemoryTier) -> int:
        """The most that a step adds to what is held before and after it."""
        with BooleanIndexing(), LiveTensorBytes() as live:
            before = self._kept()[0]
            batch = self.collate(groups)
            grown = self._kept()[0] - before
            seen = live.peak
            batch = send_to_device(batch, self.device)
            live.reset_peak()
            with checkpoint_activations(self.family.model, tier):
                self.family.loss(batch)[0].backward()
        self.family.model.zero_grad(set_to_none=True)
        return max(seen, live.peak) - grown

    def _kept(self) -> tuple[int, int]:
        """Bytes that the run's caches hold by now, and of how many entries."""
        cache = self.collate.states or self.collate.images
        return cache.bytes, len(cache.held)

    def held(self) -> int:
        """Bytes of the caches once they have seen all images."""
        now, entries = self._kept()
        images = self.images if self.collate.states else {key for keys in self.images for key in keys}
        return min(LIMIT_BYTES, now * len(images) // max(1, entries))

    def way(
        self, tier: MemoryTier, quantize: str | None, step: int, per_pair: float, pairs: int, free: int | None
    ) -> MemoryOption:
        """One way, where the run's own quantisation takes `step` bytes a step of `pairs` pairs."""
        width = getattr(torch, self.config.dtype).itemsize
        asked = self.config.quantize
        weights = self.weights
        if quantize != asked:
            weights += linear_bytes(self.sizes, quantize, width) - linear_bytes(self.sizes, asked, width)
            if asked is None:  # one linear at a time is made whole again
                step += max(rows * columns for rows, columns in self.sizes) * width
        on_host = self.device.type == "cpu"
        held, program = self.held(), self.program if on_host else 0
        total = weights + self.optimiser + step + program + (held if on_host else 0)
        fitting = None
        if free is not None:
            fitting = int(pairs + (USABLE_SHARE * free - (total - program)) / per_pair)
            fitting = max(0, min(fitting, self.examples))
        return MemoryOption(
            memory=tier,
            quantize=quantize,
            weights=weights,
            optimiser=self.optimiser,
            held=held,
            step=step,
            program=program,
            total=total,
            pairs_that_fit=fitting,
            fits=None if free is None else total - program <= USABLE_SHARE * free,
        )


class _Costs:
    """What batches hold, in tokens with their padding."""

    def __init__(self, run: _WeightlessRun, dataset: Dataset, examples: Sequence[Example]) -> None:
        self.config, self.examples, self.shares = run.config, examples, run.family.shares_prefix
        self.tokens: TokenCosts = count_tokens(run.family, dataset, examples, run.collate.segment)

    def largest(self, pairs: int) -> Groups:
        """The dearest batch of about so many pairs in the run's first epoch."""
        cap = self.config.cap if self.config.group else 1
        tokens = self.tokens if self.config.balance == "tokens" else None
        batches = EpochBatches(self.examples, pairs, cap, self.config.seed, tokens=tokens)
        return max(batches, key=self.of)

    def of(self, groups: Groups) -> int:
        """Rows times the length of the longest."""
        rows, longest = self.shape(groups)
        return rows * longest

    def shape(self, groups: Groups) -> tuple[int, int]:
        rows = groups if self.shares else [[one] for members in groups for one in members]
        return len(rows), max(self.tokens.cost_of(row) for row in rows)


def plan_text(found: Mapping[str, Any]) -> str:
    """A plan (as `Plan.to_json`) for people."""
    asked = found["asked"]
    parts = [
        ("weights", asked["weights"]),
        ("a step of the largest batch", asked["step"]),
        ("optimiser", asked["optimiser"]),
        ("kept between steps" + ("" if asked["program"] else " (host)"), asked["held"]),
        ("program", asked["program"]),
    ]
    lines = [
        f"training on {found['device']} in {found['dtype']}, --batch {found['batch']}: at most "
        f"{found['pairs']} pairs in {found['rows']} rows of {found['tokens']:,} tokens",
        f"peak memory {_size(asked['total'])} = "
        + " + ".join(f"{what} {_size(size)}" for what, size in parts if size),
        "" if found["free"] is None else f"free: {_size(found['free'])}",
        f"{'--memory':<10}{'--quantize':<12}{'peak':>10}  fits  pairs a step that fit",
    ]
    for way in found["ways"]:
        fits = {None: "?", True: "yes", False: "no"}[way["fits"]]
        pairs = "?" if way["pairs"] is None else f"about {way['pairs']:,}" if way["pairs"] else "none"
        lines.append(
            f"{way['memory']:<10}{way['quantize'] or '-':<12}{_size(way['total']):>10}  {fits:<4}  {pairs}"
        )
    if asked["program"]:
        lines.append(
            "of tensors and program; the C library may keep freed memory without --quantize or --memory tight"
        )
    return "\n".join(line for line in lines if line)


def _size(count: int) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"
