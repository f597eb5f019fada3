"""The command that trains an adapter."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from normtune.commands.app import app, emit, options_from
from normtune.runtime.transformers_import import without_scipy
from normtune.training.config import TrainConfig


@app.command()
@options_from(TrainConfig, positional="model", run_file=True)
def train(
    *,
    as_json: bool,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check the run and show its steps and memory, but train nothing.")
    ] = False,
    **options: Any,
) -> None:
    """Train an adapter on a dataset.

    The recipe (--tune) chooses what is trained. The adapter is written to --out, with the options of the run in
    run.yaml: `normtune train run.yaml` repeats it. If the command is interrupted, run it again to resume from
    the last checkpoint.
    """
    config = TrainConfig.checked(**options)  # an option may be missing
    if dry_run:
        from normtune.training.dry_run import plan_run

        emit(as_json, *plan_run(config))
        return
    from normtune.api.runs import train

    with without_scipy():
        import normtune.training.train  # noqa: F401
    emit(as_json, train(**config.model_dump(), progress=not as_json))
