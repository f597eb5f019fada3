"""The command that trains one adapter across sites that keep their data."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from normtune.commands.app import Json, app, emit, options_from
from normtune.errors import InputError
from normtune.federated.config import FederateConfig, parse_sites, site_names
from normtune.runtime.transformers_import import without_scipy


@app.command()
@options_from(FederateConfig, positional="model")
def federate(*, as_json: bool, **options: Any) -> None:
    """Train one adapter across several sites, which exchange adapters and keep their data.

    Simulates the sites on this machine, each in a process of its own, or with --kit runs on the sites of a
    deployment. If the command is interrupted, run it again to continue after the last finished round.
    """
    config = FederateConfig.checked(**options)
    if config.kit is not None:
        with _packages():
            from normtune.federated.flare import run_deployed
        emit(as_json, run_deployed(config, site_names(config.site), config.kit, quiet=as_json))
        return
    sites = parse_sites(config.site)
    with without_scipy():
        from normtune.federated.rounds import federate
        from normtune.federated.simulation import Simulation
    emit(as_json, federate(config, list(sites), Simulation(config, sites), quiet=as_json))


@app.command()
def federate_kits(
    site: Annotated[list[str], typer.Option(help="Name of a site; repeat it for each site.")],
    server: Annotated[str, typer.Option(help="Host name of the server, as the sites reach it.")],
    out: Annotated[Path, typer.Option(help="Folder for the startup kits.")],
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port of the server.")] = 8002,
    secure: Annotated[
        bool, typer.Option("--secure", help="Add keys with which sites encrypt their updates; the server has none.")
    ] = False,
    json: Json = False,
) -> None:
    """Write the startup kits of a federation's server, sites and administrator, with NVFlare.

    Each kit is a folder for its owner. A site names its data in local/site.yaml, and starts with startup/start.sh.
    """
    with _packages():
        import nvflare  # noqa: F401

        if secure:
            import tenseal  # noqa: F401
    from normtune.federated.kits import prepare_kits

    kits = prepare_kits(out, site_names(site), server, port, secure=secure)
    emit(json, kits, "\n".join(f"{owner}: {kit}" for owner, kit in kits.items()))


@contextmanager
def _packages() -> Iterator[None]:
    """Import NVFlare and TenSEAL inside the block, or say how to install them."""
    try:
        yield
    except ModuleNotFoundError as error:
        extras = {"nvflare": "federate", "tenseal": "secure"}
        if (package := (error.name or "").partition(".")[0]) not in extras:
            raise
        message = f"this needs {package}, which is not installed: pip install normtune[{extras[package]}]."
        raise InputError(message) from error
