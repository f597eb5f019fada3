"""The command that trains an adapter."""

from __future__ import annotations

from typing import Any

from normtune.commands.app import app, emit, options_from
from normtune.training.config import TrainConfig


@app.command()
@options_from(TrainConfig, positional="model")
def train(*, as_json: bool, **options: Any) -> None:
    """Train an adapter on a dataset.

    The recipe (--tune) chooses what is trained. The adapter is written to --out. If the command is
    interrupted, run it again to resume from the last checkpoint.
    """
    from normtune.api.runs import train

    emit(as_json, train(**options, progress=not as_json))
