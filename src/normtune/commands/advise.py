"""The command that searches a recipe and its learning rate."""

from __future__ import annotations

from typing import Any

from normtune.advice.config import AdviseConfig
from normtune.commands.app import app, emit, options_from


@app.command()
@options_from(AdviseConfig, positional="model")
def advise(*, as_json: bool, **options: Any) -> None:
    """Search which recipe fits a model and your data, at which learning rate.

    Trains small and large recipes within a budget, each at several rates, and compares their scores on the
    validation split with what they cost. Prints a recommendation and the command to train it. If the command is
    interrupted, run it again to continue.
    """
    from normtune.api.runs import advise

    emit(as_json, advise(**AdviseConfig.checked(**options).model_dump(), progress=not as_json))
