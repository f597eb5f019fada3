"""The server of a federation: rounds, their record, and how a killed server continues.

`federate` asks an engine to train a round at all sites, refuses updates by the rules of
`normtune.federated.rules`, averages the others, and writes the state before the next round. The engine is a
simulation on this machine (`normtune.federated.simulation`) or NVFlare (`normtune.federated.flare`).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from time import perf_counter
from typing import Any, Protocol

import torch
from safetensors import safe_open

from normtune.adapters.fingerprint import fingerprint
from normtune.adapters.info import AdapterInfo
from normtune.adapters.storage import INFO_FILE, read_adapter_info, read_tensors, save_adapter, write_adapter
from normtune.errors import InputError
from normtune.federated.config import FederateConfig
from normtune.federated.rules import ServerAdam, SiteUpdate, Values, average, find_refusals, site_weights, update_norm
from normtune.federated.site import RoundTask
from normtune.methods.adapt import adapt
from normtune.methods.recipe import parse
from normtune.models.loading import load
from normtune.runtime.files import atomic_write, try_lock, write_json
from normtune.runtime.notebook import Result
from normtune.runtime.tensors import write_tensors
from normtune.runtime.text_table import text_table

RECORD_FILE, STATE_FILE, START_FOLDER = "federation.json", "state.safetensors", "start"
# options that a continued federation may change: they do not change what a finished round has computed
_MAY_CHANGE = {"out", "site", "kit", "rounds", "quorum", "deadline", "max_update", "workers", "device", "memory"}


class Engine(Protocol):
    """Trains at the sites, wherever they are."""

    def train_round(self, task: RoundTask) -> dict[str, SiteUpdate | str]:
        """Train one round; returns for each site its update, or the reason why there is none."""

    def finish(self, info: AdapterInfo, values: Values) -> None:
        """Hand every site the final adapter."""


@dataclass(frozen=True)
class Federation(Result):
    """A finished federation. Its fields are the keys of `--json`."""

    out: str
    recipe: str
    rounds: list[dict[str, Any]]  # see `run_round`
    refused: dict[str, list[str]]  # site -> round and reason of each refusal
    bytes_a_round: int  # to one site and back
    resumed_after: int  # rounds that an earlier start had finished
    seconds: float  # of this start
    secure: bool = False  # updates were encrypted, and `out` has no adapter

    @classmethod
    def from_rounds(
        cls, config: FederateConfig, recipe: str, rounds: list[dict[str, Any]], size: int, resumed: int, seconds: float
    ) -> Federation:
        """The result of these rounds, with the refusals by site."""
        refused: dict[str, list[str]] = {}
        for entry in rounds:
            for site, reason in entry["refused"].items():
                refused.setdefault(site, []).append(f"round {entry['round']}: {reason}")
        return cls(str(config.out), recipe, rounds, refused, size, resumed, seconds, config.secure)

    def __str__(self) -> str:
        header = ("round", "sites", "pairs", "change", "loss", "seconds")
        rows = [header, *(_round_row(entry) for entry in self.rounds)]
        lines = [*text_table(rows, "r" * len(header)), ""]
        if self.resumed_after:
            lines.append(f"resumed after round {self.resumed_after}")
        lines += [f"{site}: refused in {reason}" for site, reasons in self.refused.items() for reason in reasons]
        lost = [entry["lost"] for entry in self.rounds if entry["lost"] is not None]
        if lost:
            lines.append(f"LoRA: the rank loses at most {max(lost):.2%} of the squared size of the averaged products")
        lines.append(f"{self.recipe}: {self.bytes_a_round:,} bytes to each site and back in a round")
        where = "; the adapter is at the sites" if self.secure else ""
        return "\n".join([*lines, f"Written: {self.out}{where}"])


def _round_row(entry: dict[str, Any]) -> tuple[str, ...]:
    accepted, change = entry["accepted"].values(), entry["change"]
    losses = [site["loss"] for site in accepted if site["loss"] is not None]
    return (
        str(entry["round"]),
        f"{len(accepted)} of {len(accepted) + len(entry['refused'])}",
        f"{sum(site['pairs'] for site in accepted):,}",
        "-" if change is None else f"{change:.3g}",
        f"{sum(losses) / len(losses):.4f}" if losses else "-",
        f"{entry['seconds']:.1f}",
    )


@dataclass
class ServerState:
    """The averaged adapter after a number of rounds; one file, so that a kill never leaves half of it."""

    values: Values
    adam: ServerAdam
    rounds: list[dict[str, Any]] = field(default_factory=list)

    def write(self, path: Path, options: dict[str, Any]) -> None:
        """Write the state and the options that it belongs to."""
        tensors = {f"values/{name}": value for name, value in self.values.items()}
        tensors |= {f"adam/{name}": value for name, value in self.adam.moments.items()}
        record = {"options": options, "rounds": self.rounds, "adam_steps": self.adam.steps}
        with atomic_write(path) as temporary:
            write_tensors(
                temporary,
                {name: torch.from_numpy(value) for name, value in tensors.items()},
                {"record": json.dumps(record)},
            )

    @classmethod
    def read(cls, path: Path, options: dict[str, Any], rate: float) -> ServerState:
        """Read the state of the same federation.

        Raises:
            InputError: the folder holds another federation.
        """
        with safe_open(path, framework="numpy") as file:
            record = json.loads(file.metadata()["record"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # not a mapping
        if changed := [name for name, value in options.items() if record["options"].get(name) != value]:
            raise InputError(
                f"{path.parent} holds a federation that differs in {', '.join(changed)}. Repeat its options, or choose "
                "another --out."
            )
        values = {name.removeprefix("values/"): value for name, value in tensors.items() if name.startswith("values/")}
        moments = {name.removeprefix("adam/"): value for name, value in tensors.items() if name.startswith("adam/")}
        return cls(values, ServerAdam(rate, record["adam_steps"], moments), record["rounds"])


def federate(
    config: FederateConfig, sites: Sequence[str], engine: Engine, *, quiet: bool = False, context: Any = None
) -> Federation:
    """Run all rounds of a federation and write the averaged adapter to `config.out`.

    A killed federation continues after its last finished round when this function is called again.

    Args:
        sites: names of the sites.
        engine: trains at the sites.
        quiet: print no line for each round.
        context: TenSEAL's context without a secret key, if updates are encrypted. The sites then write the adapter.

    Raises:
        InputError: the model or the recipe is not valid, the folder holds another federation, or too few sites
            sent a usable update in a round.
    """
    if len(sites) < config.needed(len(sites)):
        raise InputError(f"--quorum {config.quorum}: there are only {len(sites)} sites.")
    if config.secure and context is None:
        raise InputError("--secure needs --kit: a simulation hides nothing from its server.")
    started = perf_counter()
    with try_lock(config.out / "lock", remove=True) as acquired:
        if not acquired:
            raise InputError(f"another federation is writing to {config.out}. Wait, or choose another --out.")
        info, initial = read_start(config)
        shared = _shared_names(config, info)
        options = config.model_dump(mode="json", exclude=_MAY_CHANGE) | {"sites": sorted(sites)}
        path = config.out / STATE_FILE
        if path.is_file():
            state = ServerState.read(path, options, config.server_lr)
        else:
            state = ServerState({name: initial[name] for name in shared}, ServerAdam(config.server_lr))
        resumed_after = len(state.rounds)
        for number in range(resumed_after + 1, config.rounds + 1):
            entry = run_round(config, number, state, engine, sites, info.base_fingerprint, context)
            state.write(path, options)
            _write_record(config, options, info.recipe, state)
            if not quiet:
                print(_round_line(entry, config.rounds), file=sys.stderr, flush=True)
        values = {**initial, **state.values}
        info = _final_info(config, info, state, sites)
        if context is None:
            write_adapter(config.out, info, {name: torch.from_numpy(value) for name, value in values.items()})
        engine.finish(info, values)
        _write_record(config, options, info.recipe, state, finished=True)
    seconds, size = perf_counter() - started, _bytes_a_round(state)
    return Federation.from_rounds(config, info.recipe, state.rounds, size, resumed_after, seconds)


def run_round(
    config: FederateConfig,
    number: int,
    state: ServerState,
    engine: Engine,
    sites: Sequence[str],
    base_fingerprint: str,
    context: Any = None,
) -> dict[str, Any]:
    """Run one round and set the values of the next one in `state`.

    Args:
        context: as for `federate`.

    Returns:
        The round's entry in `federation.json`: accepted sites with their figures, refused ones with the reason.
        An example, shortened:

            {"round": 2, "accepted": {"a": {"weight": 0.75, "pairs": 90, "loss": 1.2, "update_norm": 0.31},
                                      "b": {"weight": 0.25, "pairs": 30, "loss": 1.4, "update_norm": 0.44}},
             "refused": {"c": "norm.bias has values that are not finite"}, "change": 0.29}

    Raises:
        InputError: fewer sites than the quorum sent a usable update. The state is then unchanged.
    """
    started = perf_counter()
    answers = engine.train_round(RoundTask(config, number, state.values))
    updates = {site: answer for site, answer in sorted(answers.items()) if isinstance(answer, SiteUpdate)}
    refused = {site: "no answer" for site in sites if site not in answers}
    refused |= {site: answer for site, answer in answers.items() if isinstance(answer, str)}
    if context is None:
        earlier = [site["update_norm"] for entry in state.rounds[-1:] for site in entry["accepted"].values()]
        refused |= find_refusals(updates, state.values, base_fingerprint, config.max_update, earlier)
    else:
        from normtune.federated import secure

        start, _ = secure.split(state.values)
        refused |= secure.find_refusals(updates, start, base_fingerprint, context)
    accepted = {site: update for site, update in updates.items() if site not in refused}
    if len(accepted) < config.needed(len(sites)):
        reasons = "; ".join(f"{site}: {reason}" for site, reason in refused.items())
        raise InputError(
            f"round {number}: {len(accepted)} of {len(sites)} sites sent a usable update and "
            f"{config.needed(len(sites))} are needed ({reasons}). The rounds before it are kept in {config.out}: run "
            "the same command again, or lower --quorum."
        )
    weights = site_weights(accepted, config.weights)
    values, shares, lost = [update.values for update in accepted.values()], list(weights.values()), None
    if context is not None:
        after = start | secure.average(values, shares, context)
    else:
        after, lost = average(values, shares, config.average)
        if config.server == "adam":
            after = state.adam.step(state.values, after)
    entry = {
        "round": number,
        "accepted": {
            site: {
                "weight": weights[site],
                "pairs": update.pairs,
                "steps": update.steps,
                "seconds": update.seconds,
                "loss": update.loss,
                "bytes": _size(update.values),
                "update_norm": None if context is not None else update_norm(update.values, state.values),
                **({} if update.epsilon is None else {"epsilon": update.epsilon, "delta": update.delta}),
            }
            for site, update in accepted.items()
        },
        "refused": dict(sorted(refused.items())),
        "change": None if context is not None else update_norm(after, state.values),
        "lost": lost,
        "bytes": _size(state.values) * len(sites) + sum(_size(update.values) for update in updates.values()),
        "seconds": perf_counter() - started,
    }
    state.values = after
    state.rounds.append(entry)
    return entry


def read_start(config: FederateConfig) -> tuple[AdapterInfo, Values]:
    """The adapter before training, which is written to `start/` at the first call: the base is loaded once.

    Raises:
        InputError: the model or the recipe is not valid, or the recipe trains nothing.
    """
    parse(config.tune)
    folder = config.out / START_FOLDER
    if not (folder / INFO_FILE).is_file():
        family = load(config.model, dtype="float32" if config.dtype == "auto" else config.dtype, device="cpu")
        base_fingerprint = fingerprint(family.model)
        tuned = adapt(family.model, config.tune, seed=config.seed)
        if not tuned.trained:
            raise InputError(f"recipe '{tuned.recipe}' trains nothing. Choose another one with --tune.")
        save_adapter(tuned, folder, base_name=config.model, base_fingerprint=base_fingerprint)
    info = read_adapter_info(folder)
    return info, {name: tensor.numpy() for name, tensor in read_tensors(folder, info).items()}


def _shared_names(config: FederateConfig, info: AdapterInfo) -> list[str]:
    """The tensors that the server averages: all but those of local parts."""
    parts = {tensor.part for tensor in info.tensors.values()}
    if unknown := config.local_parts - parts:
        raise InputError(f"--local: the recipe trains nothing in {', '.join(sorted(unknown))}. It trains: {parts}.")
    shared = [name for name, tensor in info.tensors.items() if tensor.part not in config.local_parts]
    if not shared:
        raise InputError("--local: all trained values would stay at the sites, and the server would have nothing.")
    return shared


def _final_info(config: FederateConfig, info: AdapterInfo, state: ServerState, sites: Sequence[str]) -> AdapterInfo:
    """The description of the averaged adapter: no name of a data set, which only the sites know."""
    last = state.rounds[-1]["accepted"] if state.rounds else {}
    data = {
        "name": f"federated, {len(sites)} sites",
        "pairs": sum(site["pairs"] for site in last.values()),
        "rounds": len(state.rounds),
        "sites": {site: figures["pairs"] for site, figures in last.items()},
        **({"local": sorted(config.local_parts)} if config.local_parts else {}),
    }
    private = {site: {k: f[k] for k in ("epsilon", "delta")} for site, f in last.items() if "epsilon" in f}
    if private:
        data["private_sites"] = private
    return replace(info, data=data)


def _write_record(
    config: FederateConfig, options: dict[str, Any], recipe: str, state: ServerState, *, finished: bool = False
) -> None:
    record = {"options": options, "rounds": state.rounds, "bytes_a_round": _bytes_a_round(state), "recipe": recipe}
    write_json(config.out / RECORD_FILE, record | {"finished": finished})


def _bytes_a_round(state: ServerState) -> int:
    """Bytes of the values to one site, and of its update."""
    sent = [site["bytes"] for site in state.rounds[-1]["accepted"].values()] if state.rounds else [0]
    return _size(state.values) + max(sent)


def _size(values: Values) -> int:
    return sum(value.nbytes for value in values.values())


def _round_line(entry: dict[str, Any], rounds: int) -> str:
    refused = "".join(f"; refused {site}: {reason}" for site, reason in entry["refused"].items())
    _, sites, _, change, *_ = _round_row(entry)
    return f"round {entry['round']} of {rounds}: {sites} sites, change {change}{refused}"
