"""What a training run works on: options, data, model and collator, prepared in one place.

dataset, examples = read_examples(config)
setup = build_setup(config, dataset, examples)       # loads the base and adapts it
fit(setup)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from normtune.adapters.fingerprint import fingerprint
from normtune.adapters.training_rows import TrainingRows
from normtune.data.batches import EpochBatches, TokenCosts
from normtune.data.choices import ChoiceFormat
from normtune.data.examples import as_examples
from normtune.data.preflight import Preflight
from normtune.data.records import Dataset, Example, Split
from normtune.data.registry import open_configured
from normtune.data.sampling import Strata, find_strata
from normtune.errors import InputError
from normtune.methods.adapt import TunedModel, adapt, restore_base
from normtune.models.family import Family
from normtune.models.loading import load
from normtune.runtime import distributed
from normtune.training.collator import Collator, build_collator
from normtune.training.config import TrainConfig
from normtune.training.identity import option_identity
from normtune.training.privacy import PoissonBatches


@dataclass
class TrainingSetup:
    """Everything that a run needs besides a checkpoint to resume from."""

    config: TrainConfig
    dataset: Dataset
    examples: Sequence[Example]
    family: Family
    tuned: TunedModel  # `family.model`, adapted by the recipe
    # digests of the examples and their pictures; None in runs that are neither resumed nor saved
    rows: TrainingRows | None = None
    # identifies the base before it was adapted; see `normtune.adapters.fingerprint`
    base_fingerprint: str | None = None
    preflight: Preflight | None = None  # the counts of the rows, with the limits of their texts
    # the validation rows; None: the run does not validate. `validation_digest` is their digest
    validation: Split | None = None
    validation_digest: str | None = None
    rounds: int = 1  # runs on the same patients, this one included, that share the privacy budget of the options
    collate: Collator = field(init=False)  # builds batches, with the caches that the recipe allows

    def __post_init__(self) -> None:
        if not self.tuned.trained:
            raise InputError(f"recipe '{self.tuned.recipe}' trains nothing. Choose another one with --tune.")
        trained_parts = {part for part, _ in self.tuned.part_and_role.values()}
        if others := sorted(self.config.part_rates.keys() - trained_parts):
            raise InputError(
                f"--part-lr: the recipe trains nothing in {', '.join(others)}. It trains: "
                f"{', '.join(sorted(trained_parts))}."
            )
        sharded = distributed.is_sharded()
        if self.config.cache is not None and sharded:
            raise InputError("--cache: with FSDP no process has the whole image encoder. Leave out --cache.")
        self.collate = build_collator(
            self.config, self.family, self.tuned, self.dataset, self.examples, use_caches=not sharded
        )

    @property
    def identity(self) -> dict[str, Any]:
        """Everything that decides the values of the adapter; see `normtune.training.identity`."""
        return option_identity(self.config) | {
            "rows_digest": self.rows and self.rows.digest,
            "base_fingerprint": self.base_fingerprint,
            # frozen layers that run once per image sum in another order than in a step
            "cached_states": self.collate.cached_states,
            **validation_identity(self.validation_digest),
        }


def validation_identity(digest: str | None) -> dict[str, Any]:
    """The part of a run's identity that a run with validation has: the digest of the validation rows."""
    return {} if digest is None else {"validation_digest": digest}


def read_examples(config: TrainConfig, dataset: Dataset | None = None) -> tuple[Dataset, Split]:
    """Open the dataset of a run and select the examples to train on.

    Raises:
        InputError: the data cannot be read, or the split does not exist.
    """
    dataset = open_configured(config) if dataset is None else dataset
    return dataset, Split(dataset, config.select(dataset.split(config.split)), config.split)


def find_run_strata(config: TrainConfig, dataset: Dataset, examples: Sequence[Example]) -> Strata | None:
    """How often a run takes its rows, by the weights of `config.data` and `config.sample`; None: once an epoch.

    Raises:
        InputError: see `normtune.data.sampling.find_strata`.
    """
    if config.dp_epsilon is not None and dataset.mixture:
        raise InputError(
            "--dp-epsilon: the weights of --data change how often a patient is taken. Join the rows in one."
        )
    weights = {name: part["weight"] for name, part in dataset.mixture.items()}
    return find_strata(as_examples(examples), weights, config.sample == "balanced")


def build_batches(
    config: TrainConfig,
    dataset: Dataset,
    examples: Sequence[Example],
    pairs: int | None = None,
    token_costs: TokenCosts | None = None,
) -> EpochBatches:
    """The batches of a run.

    Args:
        pairs: pairs per batch; None: as `config` says.
        token_costs: of the groups, if batches are to hold about the same number of tokens.

    Raises:
        InputError: rows cannot be taken as the options say, or there are too few.
    """
    pairs, cap = pairs or config.batch, config.cap if config.group else 1  # groups of one question: no sharing
    strata, ranks = find_run_strata(config, dataset, examples), distributed.world_size()
    if config.dp_epsilon is not None:
        return PoissonBatches(examples, pairs, cap, config.accumulate)
    return EpochBatches(examples, pairs, cap, config.seed, token_costs=token_costs, ranks=ranks, strata=strata)


def build_setup(
    config: TrainConfig,
    dataset: Dataset,
    examples: Sequence[Example],
    rows: TrainingRows | None = None,
    preflight: Preflight | None = None,
    *,
    family: Family | None = None,
    keep_base: bool = False,
) -> TrainingSetup:
    """Load the base, adapt it by the recipe and build the collator.

    Args:
        rows, preflight: see `TrainingSetup`.
        family: the base if it is loaded already; its model is adapted in place.
        keep_base: make `restore_base(setup.tuned)` possible for every recipe; see `normtune.methods.adapt.adapt`.

    Raises:
        InputError: the base cannot be loaded, the recipe does not fit it or trains nothing, or the processes
            of the run loaded different bases.
    """
    if family is None:
        # with FSDP the base may be larger than a device: it is loaded on the host, then sharded over the devices
        device = "cpu" if distributed.is_sharded() else config.device
        family = load(config.model, dtype=config.dtype, device=device, quantize=config.quantize)
        family.use_max_pixels(config.max_pixels)
    family.choices = ChoiceFormat().with_options(config)
    # of the unchanged base, before `adapt`: the adapter is loaded only onto a base with the same fingerprint
    base_fingerprint = fingerprint(family.model)
    if len(set(distributed.all_gather(base_fingerprint))) > 1:
        raise InputError(f"the processes loaded different bases from {config.model}. Give all of them the same files.")
    tuned = adapt(family.model, config.tune, seed=config.seed, keep_base=keep_base)
    try:
        return TrainingSetup(config, dataset, examples, family, tuned, rows, base_fingerprint, preflight)
    except InputError:
        if keep_base:
            restore_base(tuned)
        raise
