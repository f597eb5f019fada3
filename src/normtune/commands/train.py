"""The command that trains an adapter."""

from __future__ import annotations

from dataclasses import asdict

from normtune.commands.app import app, emit, takes
from normtune.runtime import distributed
from normtune.training.config import TrainConfig


@app.command()
@takes(TrainConfig, positional="model")
def train(config: TrainConfig, *, as_json: bool) -> None:
    """Train a recipe on a dataset; writes the adapter to --out. Run again after a kill, and it goes on."""
    from normtune.training.progress import PrintProgress
    from normtune.training.train import train

    quiet = as_json or not distributed.is_main_process()
    result = train(config, progress=None if quiet else PrintProgress())
    emit(as_json, asdict(result), result.text())
