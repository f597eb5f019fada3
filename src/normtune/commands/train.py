"""The command that trains an adapter."""

from __future__ import annotations

from dataclasses import asdict

from normtune.commands.app import app, emit, options_from
from normtune.runtime import distributed
from normtune.training.config import TrainConfig


@app.command()
@options_from(TrainConfig, positional="model")
def train(config: TrainConfig, *, as_json: bool) -> None:
    """Train an adapter on a dataset.

    The recipe (--tune) chooses what is trained. The adapter is written to --out. If the command is
    interrupted, run it again to resume from the last checkpoint.
    """
    from normtune.training.progress import PrintProgress
    from normtune.training.train import train

    quiet = as_json or not distributed.is_main_process()
    result = train(config, progress=None if quiet else PrintProgress())
    emit(as_json, asdict(result), result.text())
