"""Differentially private training (DP-SGD, Abadi et al. 2016, arXiv 1607.00133), with a guarantee for each patient.

A unit is a patient with all images and questions, or an image where the data name no patient. Each step

1. takes every unit with the same probability, independently of the others (`PoissonBatches`);
2. scales the gradient of each unit's loss down to an L2 norm of at most `clip` (`PrivateGradients`);
3. adds Gaussian noise of standard deviation noise multiplier * clip to their sum, and divides by the expected number of
   units.

Adding or removing one unit changes the sum by at most `clip`. What these steps reveal about a unit is bounded by
(epsilon, delta), which Opacus computes with its PRV accountant (Gopi et al. 2021, arXiv 2106.02848).

Sampling and noise come from torch's generators, which the operating system seeds; `--seed` does not decide them, since
files of a run record it. A resumed run draws others, and counts the steps of its checkpoint and those after it.
"""

from __future__ import annotations

import math
import secrets
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cache
from itertools import chain, pairwise
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn

from normtune.data.batches import EpochBatches
from normtune.data.examples import Example, Examples
from normtune.data.groups import Group
from normtune.data.splits import group_columns, patient_of_image
from normtune.errors import InputError
from normtune.models.answer_loss import answer_loss
from normtune.models.family import Family
from normtune.runtime import distributed
from normtune.runtime.environment import package_version
from normtune.training.collator import Collator
from normtune.training.config import TrainConfig
from normtune.training.unit_gradients import MAX_UNITS, UnitGradients

DEFAULT_CLIP = 1.0
# Devices on which one unit at a time is computed, also for norms: on a CPU that is about as fast as all units of a
# batch together, and takes less memory (benchmarks/private.json).
ONE_BY_ONE = ("cpu",)
GENERATOR = "torch.Generator, seeded by the operating system"
Members = list[Examples]  # the groups of a unit


@dataclass(frozen=True)
class Privacy:
    """The guarantee of a private run and the mechanism behind it. The names are JSON keys of `adapter.json`."""

    epsilon: float | None  # that the steps so far have spent; None: there is no guarantee
    delta: float
    unit: str  # what is protected
    units: int
    clip: float | None  # largest L2 norm of the gradient of a unit; None: no limit
    noise_multiplier: float  # standard deviation of the noise / clip
    sampling_rate: float  # probability of a unit in a step
    steps: int
    target_epsilon: float | None  # for all planned steps; None: infinity
    sampling: str = "Poisson"
    neighbours: str = "one unit is added or removed"
    accountant: str = "none"
    generator: str = GENERATOR

    def __str__(self) -> str:
        if self.epsilon is None:
            return f"no privacy: epsilon infinity, {self.units:,} units ({self.unit})"
        return (
            f"privacy: epsilon {self.epsilon:.2f}, delta {self.delta:.1e} for each {self.unit} of {self.units:,}; "
            f"noise multiplier {self.noise_multiplier:.3f}, clip {self.clip:g}, sampling rate "
            f"{self.sampling_rate:.4f}, {self.steps:,} steps"
        )


def check_private_options(config: TrainConfig) -> None:
    """Refuse options that the guarantee does not cover, or that need it.

    Raises:
        InputError: there is such an option.
    """
    if config.dp_epsilon is None:
        for name in ("dp_delta", "dp_clip"):
            if getattr(config, name) is not None:
                raise InputError(f"--{name.replace('_', '-')} has no effect without --dp-epsilon.")
        return
    is_unbounded = math.isinf(config.dp_clip or DEFAULT_CLIP) and not math.isinf(config.dp_epsilon)
    refused = [
        (config.sample is not None, "--sample: private training takes every unit with the same probability"),
        (config.balance == "tokens", "--balance tokens: private batches are random"),
        (config.validate_every is not None, "--validate-every: the choice of a step depends on the validation rows, "
         "which nothing protects. Evaluate the finished adapter"),
        (config.compile, "--compile: compiled layers hide the gradients of single patients"),
        (distributed.launched_count() > 1, "several processes: private training runs in one"),
        (is_unbounded, "--dp-clip inf: without a limit no noise is enough. Give --dp-epsilon inf too"),
    ]  # fmt: skip
    for applies, reason in refused:
        if applies:
            raise InputError(f"--dp-epsilon does not allow {reason}.")


class PoissonBatches(EpochBatches):
    """Batches of a private run: each step takes every unit with probability `rate`, and all of its groups.

    A step's units are divided among its `accumulate` batches, which may be empty. An epoch has as many steps as take
    every unit once on average. Unlike `EpochBatches`, no two iterations are equal: see the module's docstring.

    Attributes:
        rate: the sampling rate.
        unit: what a unit is, in words.
        unit_groups: the groups of each unit.
    """

    def __init__(self, examples: Sequence[Example], pairs: int, max_group_size: int | None, accumulate: int) -> None:
        super().__init__(examples, pairs, max_group_size, seed=0)
        self.accumulate, self.rate = accumulate, pairs * accumulate / len(self.examples)
        if self.rate >= 1:
            raise InputError(
                f"--dp-epsilon: a step of {pairs * accumulate} of {len(self.examples)} pairs takes every patient, so "
                "that sampling protects none. Lower --batch or --accumulate."
            )
        self.steps = math.ceil(1 / self.rate) * accumulate
        columns = ", ".join(group_columns(self.examples))
        self.unit = f"patient ({columns})" if columns else "image (the data name no patients)"
        self._patients = patient_of_image(self.examples)
        groups = pairwise(self.groups.ends.tolist())
        units = self.units_of([self.examples.take(self.groups.order[start:stop]) for start, stop in groups])
        self.unit_groups = units
        self.generator = seeded_generator("cpu")

    def units_of(self, groups: Sequence[Examples]) -> list[Members]:
        """The groups of each unit."""
        units: dict[str, Members] = {}
        for group in groups:  # rows without an image are one unit
            patient = self._patients[group[0].images[0]] if group[0].images else ""
            units.setdefault(patient, []).append(group)
        return list(units.values())

    def __iter__(self) -> Iterator[list[Examples]]:
        for _ in range(self.steps // self.accumulate):
            # float64: the numbers of float32 are 2^-24 apart
            draws = torch.rand(len(self.unit_groups), generator=self.generator, dtype=torch.float64)
            taken = (draws < self.rate).nonzero()[:, 0].tolist()
            for batch in range(self.accumulate):
                yield [group for unit in taken[batch :: self.accumulate] for group in self.unit_groups[unit]]


def seeded_generator(device: torch.device | str) -> torch.Generator:
    """A generator with 63 random bits of the operating system as its seed."""
    return torch.Generator(device).manual_seed(secrets.randbits(63))


def plan_privacy(config: TrainConfig, batches: PoissonBatches, steps: int, noise: float | None = None) -> Privacy:
    """The mechanism that has the guarantee of the options after `steps` steps.

    Args:
        noise: the noise multiplier of the checkpoint from which the run resumes; None: it is computed.

    Raises:
        InputError: Opacus is missing, or no noise is large enough.
    """
    assert config.dp_epsilon is not None
    delta = config.dp_delta or 1 / (10 * len(batches.unit_groups))
    if math.isinf(config.dp_epsilon):
        noise = 0.0
    elif noise is None:
        noise = _noise_multiplier(config.dp_epsilon, delta, batches.rate, steps)
    clip = config.dp_clip or DEFAULT_CLIP
    return Privacy(
        epsilon=None, delta=delta, unit=batches.unit, units=len(batches.unit_groups),
        clip=None if math.isinf(clip) else clip, noise_multiplier=noise, sampling_rate=batches.rate, steps=steps,
        target_epsilon=None if math.isinf(config.dp_epsilon) else config.dp_epsilon,
        accountant="none" if not noise else f"PRV (opacus {package_version('opacus')})",
    )  # fmt: skip


def spent(privacy: Privacy, steps: int) -> Privacy:
    """The guarantee after `steps` steps: the planned mechanism, with the epsilon that these steps have spent."""
    if not privacy.noise_multiplier:
        return replace(privacy, steps=steps)
    history = [(privacy.noise_multiplier, privacy.sampling_rate, steps)]
    return replace(privacy, steps=steps, epsilon=total_epsilon(history, privacy.delta))


def total_epsilon(history: Sequence[tuple[float, float, int]], delta: float) -> float:
    """The epsilon of several runs on the same units: (noise multiplier, sampling rate, steps) of each."""
    _, accountant = _opacus()
    accountant.history = list(history)
    return float(accountant.get_epsilon(delta))


@cache
def _noise_multiplier(epsilon: float, delta: float, rate: float, steps: int) -> float:
    find, _ = _opacus()
    try:
        return float(find(target_epsilon=epsilon, target_delta=delta, sample_rate=rate, steps=steps, accountant="prv"))
    except (ValueError, RuntimeError) as error:
        raise InputError(
            f"--dp-epsilon {epsilon:g} cannot be reached in {steps:,} steps ({error}). Raise it, or lower --epochs or "
            "--batch."
        ) from error


def _opacus() -> tuple[Any, Any]:
    """Opacus' search for the noise multiplier, and a PRV accountant."""
    try:
        from opacus.accountants import PRVAccountant
        from opacus.accountants.utils import get_noise_multiplier
    except ImportError as error:
        raise InputError("--dp-epsilon needs opacus. Run: pip install 'normtune[privacy]'.") from error
    # about a bound that the PRV accountant uses to choose its grid only
    warnings.filterwarnings("ignore", "Optimal order is the (largest|smallest) alpha", UserWarning)
    return get_noise_multiplier, PRVAccountant()


class PrivateGradients:
    """Adds up the clipped gradients of the units of a step, and replaces `.grad` by their noisy mean.

    Attributes:
        shares_passes: whether all units of a chunk are computed in the same passes; otherwise one after the other.
        dropped: how often the gradient of a unit was not finite and counted as zero.
    """

    def __init__(
        self,
        config: TrainConfig,
        family: Family,
        trained: Mapping[str, nn.Parameter],
        collator: Collator,
        batches: PoissonBatches,
        privacy: Privacy,
    ) -> None:
        if not config.group and any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in family.model.modules()):
            raise InputError("--dp-epsilon: batch norms mix the images of a batch. Leave out --no-group.")
        self.family, self.collator, self.batches, self.privacy = family, collator, batches, privacy
        self.smoothing, self.pairs = config.label_smoothing, config.batch
        self.gradients = UnitGradients(family.model, trained)
        self.shares_passes = self.gradients.many and self.gradients.device.type not in ONE_BY_ONE
        self.generator = seeded_generator(self.gradients.device)
        self.dropped = 0
        self._sum = torch.zeros(self.gradients.values, dtype=self.gradients.dtype, device=self.gradients.device)

    def collate(self, groups: Sequence[Examples]) -> dict[str, Any]:
        """What the Trainer sees of a batch; `add` makes its tensors, a chunk at a time."""
        tokens = sum(len(self.collator.segment(example).answer) for example in chain.from_iterable(groups))
        # one label for each answer token: the Trainer counts them
        return {
            "labels": torch.zeros(tokens, dtype=torch.long),
            "pairs": sum(map(len, groups)),
            "batch": PrivateBatch(groups),
        }

    def add(self, groups: Sequence[Examples], step_tokens: int, last: bool) -> Tensor:
        """Add the clipped gradients of a batch; after the last one of a step set `.grad`.

        Args:
            groups: the groups of all units of the batch; there may be none.
            step_tokens: answer tokens of the whole step.
            last: whether the step ends with this batch.

        Returns:
            The batch's part of the step's mean loss, for the log; it is not private.
        """
        clip = math.inf if self.privacy.clip is None else self.privacy.clip
        total = torch.zeros((), device=self.gradients.device)
        with self.gradients.watch() if self.shares_passes else nullcontext():
            for chunk in self._chunks(self.batches.units_of(groups)):
                matrix, loss = self._chunk_gradients(chunk, step_tokens)  # [units, values]
                total = total + loss
                norms = matrix.norm(dim=1)
                finite = norms.isfinite()
                self.dropped += int((~finite).sum())
                factors = torch.where(finite, (clip / norms).clamp(max=1), 0)
                self._sum += factors.to(matrix.dtype) @ matrix.nan_to_num(0, 0, 0)
        if last:
            self._set_gradients(clip)
        return total / max(1, step_tokens)

    def _chunks(self, units: Sequence[Members]) -> Iterator[Sequence[Members]]:
        """Units that are computed together: at most `batch` pairs, or a single unit."""
        chunk: list[Members] = []
        pairs = 0
        for unit in units:
            size = sum(map(len, unit))
            if chunk and (not self.shares_passes or len(chunk) == MAX_UNITS or pairs + size > self.pairs):
                yield chunk
                chunk, pairs = [], 0
            chunk.append(unit)
            pairs += size
        if chunk:
            yield chunk

    def _chunk_gradients(self, units: Sequence[Members], step_tokens: int) -> tuple[Tensor, Tensor]:
        """(gradients [units, values], the sum of the row losses)."""
        if len(units) > 1:
            tokenized = [self.collator.tokenize_groups(unit) for unit in units]
            losses, unit_of = self._row_losses([(u, group) for u, groups in enumerate(tokenized) for group in groups])
            weights = self._weights(tokenized, step_tokens)
            matrix = self.gradients.of_many(losses * losses.new_tensor(weights)[unit_of], unit_of, len(units))
            return matrix, losses.detach().sum()
        (unit,) = units
        groups = [(0, group) for group in self.collator.tokenize_groups(unit)]
        weight = self._weights([[group for _, group in groups]], step_tokens)[0]
        matrix = torch.zeros(1, self.gradients.values, dtype=self._sum.dtype, device=self._sum.device)
        total = torch.zeros((), device=self._sum.device)
        while groups:  # a patient with many images: in parts of at most `batch` pairs
            part = [groups.pop(0)]
            while groups and sum(len(group.segments) for _, group in [*part, groups[0]]) <= self.pairs:
                part.append(groups.pop(0))
            losses, _ = self._row_losses(part)
            matrix += self.gradients.of_one(losses * weight)
            total = total + losses.detach().sum()
        return matrix, total

    def _weights(self, units: Sequence[Sequence[Group]], step_tokens: int) -> list[float]:
        """The weight of each unit's row losses: its loss is the mean over its answer tokens.

        Without a clip nothing is private, and the loss is the ordinary one: the mean over the tokens of the step.
        """
        if self.privacy.clip is None:
            return [1 / max(1, step_tokens)] * len(units)
        tokens = [sum(len(segment.answer) for group in unit for segment in group.segments) for unit in units]
        return [1 / max(1, count) for count in tokens]

    def _row_losses(self, groups: Sequence[tuple[int, Group]]) -> tuple[Tensor, Tensor]:
        """The cross-entropy of each answer token, [N], and its unit, [N] long."""
        family = self.family
        batch = self.collator.collate([group for _, group in groups])
        states, labels, segments = family.answer_states(send_to_device(batch, family.device))
        losses = answer_loss(
            family.head, states, labels, vocabulary=family.vocabulary, label_smoothing=self.smoothing, reduction="none"
        )
        unit_of = [unit for unit, group in groups for _ in group.segments]
        return losses, torch.tensor(unit_of, device=losses.device)[segments]

    def _set_gradients(self, clip: float) -> None:
        mean, self._sum = self._sum, torch.zeros_like(self._sum)
        if self.privacy.noise_multiplier:
            noise = torch.empty_like(mean).normal_(generator=self.generator)
            mean = mean + self.privacy.noise_multiplier * clip * noise
        if self.privacy.clip is not None:
            mean = mean / (self.privacy.sampling_rate * self.privacy.units)
        parts = mean.split([parameter.numel() for parameter in self.gradients.parameters])
        for parameter, part in zip(self.gradients.parameters, parts, strict=True):
            parameter.grad = part.view_as(parameter).to(parameter.dtype)


@dataclass(frozen=True)
class PrivateBatch:
    """Groups that the data loader hands on as they are: it would copy lists and sequences."""

    groups: Sequence[Examples]
