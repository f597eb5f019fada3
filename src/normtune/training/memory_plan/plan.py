"""Plans the memory of a training run before any weights are loaded, by running its own code on fake tensors.

How the peak is counted:

1. Build the model without weights, adapt it, and replace modules by those that save fewer activations.
2. Replace parameters by fake tensors: they have a shape, dtype and device, but no values and no memory.
3. Take the largest batch of the run's first epoch, in tokens or in answer tokens, through the run's own
   collator and caches.
4. Run forward and backward. Every operation computes only the shape of its result, and `LiveTensorBytes`
   counts the bytes of all tensors that exist at a time. The highest count is the step's peak.

There is no formula per family: everything that a family, a memory tier or a kernel saves is counted.
The peak of the run is

    weights + optimiser + step + cached (host memory only) + program (host memory only) + allocator (glibc only)

The heap of glibc grows by more than the tensors in it, because freed blocks are not all used again. How much was
measured, not derived: on nano it kept 0.6 to 2.2 times the bytes that a step has in blocks below 32 MiB, in ten runs
of three recipes and three batch sizes. The plan counts these bytes once more: within 9% of each of the ten peaks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import Any

import torch
from accelerate.utils import send_to_device

from normtune.data.batches import EpochBatches, TokenCosts
from normtune.data.examples import Example, as_examples
from normtune.data.records import Dataset
from normtune.errors import InputError
from normtune.methods.adapt import adapt
from normtune.models.family import Family
from normtune.models.image_cache import LIMIT_BYTES
from normtune.models.loading import load_without_weights, resolve_device, resolve_dtype
from normtune.models.quantization import PACKAGES, quantised_linears
from normtune.runtime import distributed
from normtune.runtime.memory import available_bytes, keeps_freed_memory, resident_bytes
from normtune.runtime.text_table import text_table
from normtune.training.collator import Collator, count_tokens
from normtune.training.config import TrainConfig
from normtune.training.layer_wrapping import CHECKPOINT_EVERY, MemoryTier, checkpoint_activations
from normtune.training.memory_plan.fake_model import BooleanIndexing, model_bytes, use_fake_tensors
from normtune.training.memory_plan.live_bytes import LiveTensorBytes
from normtune.training.memory_plan.quantized import insert_placeholders, linear_bytes
from normtune.training.saved_activations import save_fewer_activations
from normtune.training.setup import TrainingSetup, find_run_strata, read_examples

USABLE_SHARE = 0.95  # share of the free memory that a run may take; allocators need more than their tensors
_COPIES = 3  # copies of the trained values: AdamW's two means, and the values before training
_ESTIMATED_ROWS, _ESTIMATED_IMAGES = 10_000, 200  # rows and groups of images that `estimate_memory` reads
_FP32_BYTES = 4  # trained values and AdamW's means are fp32 on a base of any dtype

Groups = Sequence[Sequence[Example]]  # a batch: the examples of each group


@dataclass(frozen=True)
class MemoryOption:
    """A memory tier with a quantisation, and the bytes that training takes with them."""

    memory: MemoryTier
    quantize: str | None
    weights: int  # parameters and buffers, the trained ones included
    optimiser: int  # AdamW's states, and the copy of the trained values from before training
    cached: int  # pixels or hidden states that the caches hold between steps, in the host's memory
    allocator: int  # what glibc's heap keeps of freed blocks, on a CPU without `tight` or a quantisation
    step: int  # what a step adds at its peak: activations, gradients, the image encoder's work
    program: int  # the interpreter and its libraries; 0 if the device has its own memory
    total: int  # sum for the device that trains
    pairs_that_fit: int | None  # about how many pairs per step fit into the free memory; None: unknown
    fits: bool | None  # whether the largest batch fits into the free memory; None: unknown


@dataclass(frozen=True)
class MemoryPlan:
    """The memory of a run as configured, and with every other memory tier and quantisation."""

    device: str  # resolved: cpu or cuda
    dtype: str
    free: int | None  # free bytes on the device; None if the system does not report them
    batch: int  # pairs per batch, as configured
    pairs: int  # question-answer pairs of the largest batch of the first epoch
    rows: int  # its rows
    tokens: int  # tokens per row, padding included
    requested: MemoryOption  # the run as configured
    options: tuple[MemoryOption, ...]  # all tiers and quantisations, the requested one among them

    def to_json(self) -> dict[str, Any]:
        """Return the plan with the keys that `normtune inspect --json` prints."""
        # field -> key; the keys are older than the fields and part of the file format
        keys = {"requested": "asked", "options": "ways", "pairs_that_fit": "pairs", "cached": "held"}

        # `asdict` turns the nested options into dictionaries as well
        def renamed(value: Any) -> Any:
            if isinstance(value, dict):
                return {keys.get(key, key): renamed(entry) for key, entry in value.items()}
            return [renamed(entry) for entry in value] if isinstance(value, tuple | list) else value

        return renamed(asdict(self))


def plan_memory(config: TrainConfig) -> MemoryPlan:
    """Plan the memory of a run, with its own and with every other memory tier and quantisation.

    Only the model's config and processor are read. Images are opened for their sizes, and one of each size is
    processed. Each tier is run on fake tensors; the other quantisations are derived from these numbers, since
    they change only the weights and the temporary weight of one linear layer at a time.

    Raises:
        InputError: an option, the data, the model or the recipe is invalid, or the model has no processor.
    """
    config = config.model_copy(update={"cache": None})  # a cache on disk takes no memory
    device = resolve_device(config.device)
    dataset, examples = read_examples(config)
    run = _WeightlessRun(config, dataset, examples, device)
    costs = _BatchCosts(run, dataset, examples)
    # a second, small batch: the step's bytes per token are the slope between the two
    whole = max(costs.candidates(config.batch), key=lambda groups: run.step_bytes(groups, config.memory))
    small = costs.candidates(1)[0]
    free = available_bytes(device)
    options = []
    for tier in CHECKPOINT_EVERY:
        # bytes of a step grow linearly with its tokens, apart from what does not depend on the batch
        step, small_step = run.step_bytes(whole, tier), run.step_bytes(small, tier)
        per_token = _slope(step, small_step, costs.padded_tokens(whole), costs.padded_tokens(small))
        # a further pair adds tokens as the pairs of the largest batch have on average
        per_pair = per_token * costs.padded_tokens(whole) / _pairs(whole)
        # a recipe that trains linear layers has only the configured quantisation: none
        for quantize in (None, *PACKAGES) if run.can_quantise else (config.quantize,):
            options.append(run.memory_option(tier, quantize, step, per_pair, _pairs(whole), free))
    requested = next(
        option for option in options if (option.memory, option.quantize) == (config.memory, config.quantize)
    )
    rows, tokens = costs.shape(whole)
    return MemoryPlan(
        str(device), run.config.dtype, free, config.batch, _pairs(whole), rows, tokens, requested, tuple(options)
    )


def estimate_memory(
    config: TrainConfig, dataset: Dataset, examples: Sequence[Example], family: Family | None = None
) -> dict[str, Any]:
    """Plan the memory of a run as configured, for the preflight: in about a second, from the first rows.

    Args:
        family: the base if it is loaded already.

    Returns:
        recipe, device, batch (pairs), and in bytes: weights, optimiser, cached, step, program, their sum `peak` on the
        device that trains, and `free` if the system reports it; `fits` says whether the peak is free. If planning
        fails, only `not_planned`, the reason: a run does not depend on its plan.
    """
    if distributed.is_sharded():
        return {"not_planned": "FSDP divides the model among devices"}
    config = config.model_copy(update={"cache": None})
    try:
        run = _WeightlessRun(config, dataset, examples, resolve_device(config.device))
        if family is not None and run.program:
            run.program -= model_bytes(family.model)  # it is in this process already
        costs = _BatchCosts(run, dataset, examples[:_ESTIMATED_ROWS], images=_ESTIMATED_IMAGES)
        steps = [(run.step_bytes(groups, config.memory), groups) for groups in costs.candidates(config.batch)]
        (step, groups), free = max(steps, key=lambda pair: pair[0]), available_bytes(run.device)
    except Exception as error:  # a model's code may raise any error for tensors without values
        return {"not_planned": str(error).split("\n")[0] or type(error).__name__}
    plan = run.memory_option(config.memory, config.quantize, step, step / _pairs(groups), _pairs(groups), free)
    names = ("weights", "optimiser", "cached", "step", "allocator", "program", "fits")
    parts = {name: getattr(plan, name) for name in names}
    about = {"recipe": config.tune, "device": str(run.device), "batch": config.batch, "peak": plan.total}
    return about | parts | ({} if free is None else {"free": free})


def _slope(step: int, small_step: int, tokens: int, small_tokens: int) -> float:
    """Return bytes per token from two batches, or from the first if the second is not smaller."""
    if tokens > small_tokens and step > small_step:
        return (step - small_step) / (tokens - small_tokens)
    return step / tokens


def _pairs(groups: Groups) -> int:
    return sum(len(members) for members in groups)


class _WeightlessRun:
    """The run of a config on a model of fake tensors.

    Attributes:
        can_quantise: whether the recipe leaves the layers frozen that quantisation would replace.
        sizes: (out, in) of these linear layers.
        weights, optimiser, program: bytes; see `MemoryOption`.
    """

    def __init__(
        self, config: TrainConfig, dataset: Dataset, examples: Sequence[Example], device: torch.device
    ) -> None:
        config = config.model_copy(update={"dtype": resolve_dtype(config.dtype, device)})
        self.config, self.device = config, device
        self.family: Family = load_without_weights(config.model)
        self.family.use_max_pixels(config.max_pixels)
        # parameters are on the meta device: shapes and dtypes only
        model = self.family.model.to(getattr(torch, config.dtype))
        names = quantised_linears(model)
        linears: list[Any] = [model.get_submodule(name) for name in names]
        self.sizes = [(linear.out_features, linear.in_features) for linear in linears]
        weights = {id(linear.weight) for linear in linears}
        tuned = adapt(model, config.tune, seed=config.seed)
        # quantisation needs frozen weights; where a weight is no direct parameter of its layer any more, the
        # recipe keeps it in fp32 in order to train it
        unchanged = {id(linear.weight) for linear in linears if "weight" in linear._parameters}
        trained = any(id(parameter) in weights for parameter in tuned.trained.values())
        self.can_quantise = bool(weights) and unchanged == weights and not trained
        if config.quantize is not None and not self.can_quantise:
            raise InputError(
                f"recipe '{tuned.recipe}' trains linear layers that --quantize {config.quantize} stores in "
                "fewer bits. Choose ln or lora for them, or leave out --quantize."
            )
        # never closed: nothing else uses the model, so that its modules need not be restored
        self._context = ExitStack()
        self._context.enter_context(save_fewer_activations(model))
        if config.quantize is not None:
            insert_placeholders(linears, config.quantize)
        fake = use_fake_tensors(model, device)  # id of the old parameter -> new
        tuned.trained = {name: fake[id(parameter)] for name, parameter in tuned.trained.items()}
        model.train(not config.group)  # as in training: grouped questions turn off the base's dropout
        if hasattr(self.family, "attention"):
            self.family.attention = "dense"  # block masks need compilation; their kernels save the same
        self.weights = model_bytes(model)
        self.optimiser = _COPIES * _FP32_BYTES * tuned.trainable
        with BooleanIndexing():
            self.collate: Collator = TrainingSetup(config, dataset, examples, self.family, tuned).collate
        self.examples = len(examples)
        self.images = as_examples(examples).codes("images")[1]
        self._heap_peaks: dict[MemoryTier, int] = {}
        self._collate_peaks: dict[tuple[str, int], int] = {}  # of batches, by their first example and their pairs
        self.program = resident_bytes()  # of this process, which has imported the same libraries

    def step_bytes(self, groups: Groups, tier: MemoryTier) -> int:
        """Return the peak of a step, on top of what exists before and after it.

        It is the larger of two peaks: while the batch is built, when the image encoder may run, and during the
        forward and backward pass. Entries of the caches stay for the whole run, and are counted as `cached`.
        """
        with BooleanIndexing(), LiveTensorBytes() as counter:
            # building the batch: images are processed, frozen encoders run, results go to the caches
            before = self._cache_size()[0]
            batch = self.collate(groups)
            newly_cached = self._cache_size()[0] - before
            # the first tier fills the caches; a run with another tier also builds its first batches without them
            peak = counter.peak - newly_cached
            key = groups[0][0].id, _pairs(groups)
            collate_peak = self._collate_peaks[key] = max(peak, self._collate_peaks.get(key, 0))
            batch = send_to_device(batch, self.device)
            counter.reset_peak()
            # forward: activations pile up; backward: they are freed layer by layer, gradients appear
            with checkpoint_activations(self.family.model, tier):
                self.family.loss(batch)[0].backward()
            self._heap_peaks[tier] = max(counter.heap_peak, self._heap_peaks.get(tier, 0))
        self.family.model.zero_grad(set_to_none=True)  # the next tier starts without gradients
        return max(collate_peak, counter.peak - newly_cached)

    def _cache_size(self) -> tuple[int, int]:
        """Return the bytes and the number of entries in the run's cache so far."""
        cache = self.collate.states or self.collate.images
        return cache.bytes, len(cache.entries)

    def cached_bytes(self) -> int:
        """Estimate the bytes of the cache once it holds all images, from the mean of the entries so far."""
        size, entries = self._cache_size()
        # hidden states have an entry per group of images (a study), pixels and encoder outputs one per image
        images = self.images if self.collate.states else {key for keys in self.images for key in keys}
        return min(LIMIT_BYTES, size * len(images) // max(1, entries))

    def memory_option(
        self, tier: MemoryTier, quantize: str | None, step: int, per_pair: float, pairs: int, free: int | None
    ) -> MemoryOption:
        """Plan one tier with one quantisation.

        Args:
            step: bytes of a step with `pairs` pairs in this tier, with the quantisation of the config.
            per_pair: further bytes of a step for each further pair.
            free: free bytes on the device; None if unknown.
        """
        itemsize = getattr(torch, self.config.dtype).itemsize
        configured = self.config.quantize
        weights = self.weights
        if quantize != configured:
            weights += linear_bytes(self.sizes, quantize, itemsize)
            weights -= linear_bytes(self.sizes, configured, itemsize)
            # a quantised layer dequantises its weight while it runs; one layer runs at a time
            if configured is None:
                step += max(rows * columns for rows, columns in self.sizes) * itemsize
        # on a GPU, caches and program are in the host's memory, which is not what limits training
        on_host = self.device.type == "cpu"
        cached, program = self.cached_bytes(), self.program if on_host else 0
        # with `tight` and with quantised weights the process returns freed memory at once: see `release_freed_memory`
        keeps = on_host and tier != "tight" and quantize is None and keeps_freed_memory()
        allocator = self._heap_peaks[tier] if keeps else 0
        total = weights + self.optimiser + step + program + allocator + (cached if on_host else 0)
        pairs_that_fit = None
        if free is not None:
            # The program is already running, so that `free` excludes it. What is left after the planned
            # batch, divided by the bytes of a pair, gives the further pairs: negative if the batch is too
            # large
            pairs_that_fit = int(pairs + (USABLE_SHARE * free - (total - program)) / per_pair)
            pairs_that_fit = max(0, min(pairs_that_fit, self.examples))
        return MemoryOption(
            memory=tier,
            quantize=quantize,
            weights=weights,
            optimiser=self.optimiser,
            cached=cached,
            allocator=allocator,
            step=step,
            program=program,
            total=total,
            pairs_that_fit=pairs_that_fit,
            fits=None if free is None else total - program <= USABLE_SHARE * free,
        )


class _BatchCosts:
    """Sizes of batches in tokens, padding included."""

    def __init__(
        self, run: _WeightlessRun, dataset: Dataset, examples: Sequence[Example], images: int | None = None
    ) -> None:
        self.config, self.examples = run.config, examples
        self.strata = find_run_strata(run.config, dataset, examples)
        self.shares_prefix = run.family.shares_prefix
        self.segment = run.collate.segment
        self.tokens: TokenCosts = count_tokens(run.family, dataset, examples, run.collate.segment, images)

    def candidates(self, pairs: int) -> list[Groups]:
        """Return the batches of the run's first epoch, of about `pairs` pairs, that may take the most memory.

        They are the batch with the most tokens, and the one with the most answer tokens if it is another one: each of
        its answer tokens takes several rows of the vocabulary's size.
        """
        cap = self.config.cap if self.config.group else 1
        # the same batches as the run's: see `normtune.training.train.fit`
        tokens = self.tokens if self.config.balance == "tokens" else None
        batches = EpochBatches(self.examples, pairs, cap, self.config.seed, token_costs=tokens, strata=self.strata)
        largest: list[Groups] = [max(batches, key=self.padded_tokens), max(batches, key=self.answer_tokens)]
        return largest[: 1 if largest[0] == largest[1] else 2]

    def answer_tokens(self, groups: Groups) -> int:
        """Return the answer tokens of a batch, padding included: pairs x length of the longest answer."""
        lengths = [len(self.segment(example).answer) for group in groups for example in group]
        return len(lengths) * max(lengths)

    # Families that share the prefix make a row of each group:    [image | question 1 | question 2 | padding]
    # The others make a row of each question:                    [image | question 1 | padding]
    def padded_tokens(self, groups: Groups) -> int:
        """Return the tokens of a batch: rows x length of the longest row."""
        rows, longest = self.shape(groups)
        return rows * longest

    def shape(self, groups: Groups) -> tuple[int, int]:
        """Return the number of rows and the length of the longest: a row is a group, or one question."""
        rows = groups if self.shares_prefix else [[example] for group in groups for example in group]
        return len(rows), max(self.tokens.cost_of(row) for row in rows)


def plan_text(plan: Mapping[str, Any]) -> str:
    """Format a plan, as `MemoryPlan.to_json` returns it, as text."""
    requested = plan["asked"]
    parts = [
        # (name, bytes); entries of 0 bytes are not printed
        ("weights", requested["weights"]),
        ("a step of the largest batch", requested["step"]),
        ("optimiser", requested["optimiser"]),
        ("cached between steps" + ("" if requested["program"] else " (host)"), requested["held"]),
        ("kept by the C library", requested["allocator"]),
        ("program", requested["program"]),
    ]
    lines = [
        f"training on {plan['device']} in {plan['dtype']}, --batch {plan['batch']}: at most "
        f"{plan['pairs']} pairs in {plan['rows']} rows of {plan['tokens']:,} tokens",
        f"peak memory {_size(requested['total'])} = "
        + " + ".join(f"{name} {_size(size)}" for name, size in parts if size),
        "" if plan["free"] is None else f"free: {_size(plan['free'])}",
    ]
    rows = [["--memory", "--quantize", "peak", "fits", "pairs per step that fit"]]
    for option in plan["ways"]:
        fits = {None: "?", True: "yes", False: "no"}[option["fits"]]
        count = option["pairs"]
        pairs = "?" if count is None else f"about {count:,}" if count else "none"
        rows.append([option["memory"], option["quantize"] or "-", _size(option["total"]), fits, pairs])
    lines += text_table(rows, "llrl")
    return "\n".join(line for line in lines if line)


def _size(count: int) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"
