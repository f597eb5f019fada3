"""The command that trains one adapter across sites that keep their data."""

from __future__ import annotations

from typing import Any

from normtune.commands.app import app, emit, options_from
from normtune.federated.config import FederateConfig, parse_sites
from normtune.runtime.transformers_import import without_scipy


@app.command()
@options_from(FederateConfig, positional="model")
def federate(*, as_json: bool, **options: Any) -> None:
    """Train one adapter across several sites, which exchange adapters and keep their data.

    Simulates the sites on this machine, each in a process of its own. If the command is interrupted, run it again
    to continue after the last finished round.
    """
    config = FederateConfig.checked(**options)
    sites = parse_sites(config.site)
    with without_scipy():
        from normtune.federated.rounds import federate
        from normtune.federated.simulation import Simulation
    emit(as_json, federate(config, list(sites), Simulation(config, sites), quiet=as_json))
