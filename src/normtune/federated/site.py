"""One site of a federation: it trains on its own data from the values of the server.

Everything that a site writes is in its own folder: values that stay there (`local.safetensors`), its account of
privacy (`privacy.json`) and the final adapter (`adapter/`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.numpy import load_file
from torch import Tensor, nn
from transformers import TrainerCallback

from normtune.adapters.info import AdapterInfo
from normtune.adapters.storage import write_adapter
from normtune.data.examples import Examples
from normtune.data.records import Split
from normtune.data.splits import part_of_images
from normtune.errors import InputError
from normtune.federated.config import FederateConfig, SiteOptions
from normtune.federated.rules import SiteUpdate, Values
from normtune.inference.limits import check_run
from normtune.methods.adapt import TunedModel
from normtune.models.loading import resolve_device, resolve_dtype
from normtune.runtime.files import atomic_write, read_json, write_json
from normtune.runtime.tensors import write_tensors
from normtune.training.checkpoints import delete_checkpoints
from normtune.training.config import TrainConfig
from normtune.training.privacy import Privacy, check_private_options, total_epsilon
from normtune.training.setup import TrainingSetup, build_setup, read_examples
from normtune.training.train import fit

LOCAL_FILE, PRIVACY_FILE = "local.safetensors", "privacy.json"
_ACCOUNTING_ERROR = 0.01  # relative: of the noise multiplier that Opacus finds for a budget


@dataclass(frozen=True)
class RoundTask:
    """What the server sends to every site in a round."""

    config: FederateConfig
    round: int  # from 1
    values: Values  # of the averaged adapter, without those that stay at the sites


def train_at_site(task: RoundTask, site: SiteOptions, folder: Path) -> SiteUpdate:
    """Load the base and train one round at a site.

    Args:
        site: the data of the site.
        folder: of the site, for its local values.

    Raises:
        InputError: the data, the model or the recipe is not valid, or the server's values do not fit the recipe.
    """
    setup = _prepare(task.config.train_config(site, folder), site)
    # another order of the data and other dropout masks in each round
    setup.config = setup.config.model_copy(update={"seed": task.config.seed + task.round})
    tuned = setup.tuned
    local = {name for name, (part, _) in tuned.part_and_role.items() if part in task.config.local_parts}
    path = folder / LOCAL_FILE
    stored = load_file(path) if local and task.round > 1 and path.is_file() else {}
    _set_values(tuned, {**task.values, **stored}, local)
    start = {name: parameter.detach().clone() for name, parameter in tuned.trained.items()}
    strength = task.config.proximal
    setup.rounds = task.config.rounds
    result, _ = fit(setup, progress=Proximal(tuned.trained, start, strength) if strength else None)
    delete_checkpoints(folder)  # the one that HF's Trainer writes at the end
    trained = {name: parameter.detach().cpu().numpy().copy() for name, parameter in tuned.trained.items()}
    if local:
        with atomic_write(path) as temporary:
            write_tensors(temporary, {name: torch.from_numpy(trained[name]) for name in local})
    assert setup.base_fingerprint is not None
    privacy = None if result.privacy is None else _spend(folder, Privacy(**result.privacy), setup.config.dp_epsilon)
    return SiteUpdate(
        values={name: value for name, value in trained.items() if name not in local},
        pairs=len(setup.examples),
        steps=result.steps,
        seconds=result.seconds,
        loss=None if privacy else result.final_loss,  # nothing would protect it
        base_fingerprint=setup.base_fingerprint,
        epsilon=None if privacy is None else privacy.epsilon,
        delta=None if privacy is None else privacy.delta,
    )


def _spend(folder: Path, this_round: Privacy, budget: float | None) -> Privacy:
    """Add a round to the site's account, before its update is sent.

    A server could ask for more rounds than it has announced, or for a round again: the site counts what it sends.

    Raises:
        InputError: the update would spend more than the budget. It is not sent.
    """
    path = folder / PRIVACY_FILE
    history = read_json(path)["history"] if path.is_file() else []
    # an entry for each update: [noise multiplier, sampling rate, steps], such as [1.1, 0.02, 50]
    history.append([this_round.noise_multiplier, this_round.sampling_rate, this_round.steps])
    total = replace(this_round, steps=sum(steps for *_, steps in history))
    if this_round.noise_multiplier:
        total = replace(total, epsilon=total_epsilon([tuple(entry) for entry in history], total.delta))
        assert budget is not None and total.epsilon is not None
        if total.epsilon > budget * (1 + _ACCOUNTING_ERROR):
            raise InputError(f"epsilon {total.epsilon:.3g} of {len(history)} updates is above --dp-epsilon {budget:g}.")
    write_json(path, {"history": history, "privacy": asdict(total)})
    return total


def _prepare(config: TrainConfig, site: SiteOptions) -> TrainingSetup:
    """The data and the adapted base of a site."""
    check_private_options(config)
    config = config.model_copy(update={"dtype": resolve_dtype(config.dtype, resolve_device(config.device))})
    dataset, examples = read_examples(config)
    if site.part is not None:
        examples = Split(dataset, select_part(examples, site), config.split)
    examples, preflight = check_run(config, examples, config.model, training=True)
    return build_setup(config, dataset, examples, preflight=preflight)


def select_part(examples: Examples, site: SiteOptions) -> Examples:
    """The examples of the site's part of the images, such as the first of two for "1/2"; all without a part."""
    if site.part is None:
        return examples
    part, parts = map(int, site.part.split("/"))
    return part_of_images(examples, part, parts)


def _set_values(tuned: TunedModel, values: Mapping[str, Any], local: set[str]) -> None:
    """Set the trained values; local ones may be missing in the first round, and then keep their initial values."""
    differing = sorted((tuned.trained.keys() - local) ^ (values.keys() - local))
    if differing:
        raise InputError(
            f"the server's adapter and the recipe '{tuned.recipe}' differ about {differing[0]}. Give all sites the "
            "base and the version of Normtune that the server has."
        )
    with torch.no_grad():
        for name, value in values.items():
            tuned.trained[name].copy_(torch.from_numpy(value))


class Proximal(TrainerCallback):
    """FedProx (Li et al. 2020): adds the gradient of `strength / 2 * |values - start|^2` before each optimiser step.

    It is added after clipping, which therefore sees the gradient of the data alone.
    """

    def __init__(self, trained: Mapping[str, nn.Parameter], start: Mapping[str, Tensor], strength: float) -> None:
        self.trained, self.start, self.strength = trained, start, strength

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        for name, parameter in self.trained.items():
            if parameter.grad is not None:
                parameter.grad.add_(parameter.detach() - self.start[name], alpha=self.strength)


def write_site_adapter(folder: Path, info: AdapterInfo, values: Values) -> None:
    """Write the final adapter of a site: the averaged values, and its own where they stayed at the site."""
    path = folder / LOCAL_FILE
    local = load_file(path) if path.is_file() else {}
    tensors = {name: torch.from_numpy(local.get(name, value)) for name, value in values.items()}
    if local:
        info = replace(info, data={**(info.data or {}), "local_tensors": len(local)})
    if (folder / PRIVACY_FILE).is_file():
        info = replace(info, data={**(info.data or {}), "privacy": read_json(folder / PRIVACY_FILE)["privacy"]})
    write_adapter(folder / "adapter", info, tensors)
