"""The commands that help to write a run's file: one writes it, one prints its JSON schema for editors."""

from __future__ import annotations

from json import dumps
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from normtune.commands.app import Json, app, emit
from normtune.data.options import DataOptions
from normtune.data.run_file import RUN_FILE, commented_run_file, schema
from normtune.errors import InputError
from normtune.methods.recipe import parse
from normtune.runtime.files import write_text
from normtune.training.config import TrainConfig

_QUESTIONS = {  # option -> (question, suggestion)
    "data": ("Data (a file, a folder, or the name of a dataset)", "phantom-b"),
    "model": ("Base model (a directory, a hub name, or nano)", "nano"),
    "tune": ("What to train (a recipe, such as ln, lora(r=8) or full)", "ln"),
    "epochs": ("Passes over the training pairs", "10"),
    "out": ("Folder of the adapter", "runs/ln"),
}


@app.command()
def init(
    file: Annotated[Path, typer.Argument(help="The file to write.")] = Path(RUN_FILE),
    data: Annotated[str | None, typer.Option(help="Dataset, or its file.")] = None,
    model: Annotated[str | None, typer.Option(help="Base model: a local directory, a hub name, or 'nano'.")] = None,
    tune: Annotated[str | None, typer.Option(help="Recipe: what is trained.")] = None,
    epochs: Annotated[str | None, typer.Option(help="Number of passes over the training pairs.")] = None,
    out: Annotated[str | None, typer.Option(help="Folder for the adapter.")] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Ask nothing; use the suggestions.")] = False,
    json: Json = False,
) -> None:
    """Write the file of a run, with a comment for every option.

    Asks for what is not given by an option. Then edit the file, and run it: `normtune train run.yaml`.
    """
    if file.exists():
        raise InputError(f"{file} exists. Give another name, or remove it.")
    given = {"data": data, "model": model, "tune": tune, "epochs": epochs, "out": out}
    answers: dict[str, Any] = {}
    for name, (question, suggestion) in _QUESTIONS.items():
        value = given[name]
        if value is None:
            value = suggestion if yes else typer.prompt(question, default=suggestion, err=json)
        answers[name] = value
    parse(answers["tune"])
    config = TrainConfig.checked(**answers)
    write_text(file, commented_run_file("train", config, list(_QUESTIONS)))
    next_steps = f"normtune train {file} --dry-run   # check it\nnormtune train {file}"
    emit(json, {"file": str(file), **answers}, f"wrote {file}\n{next_steps}")


@app.command("schema")
def print_schema(file: Annotated[Literal["train", "evaluate", "study"], typer.Argument(help="Kind of file.")]) -> None:
    """Print the JSON schema of a run's or a study's file, with which an editor checks and completes it.

    For example: `normtune schema train > train.json`, and `# yaml-language-server: $schema=train.json` as the first
    line of run.yaml.
    """
    from normtune.evaluation.config import EvaluateConfig
    from normtune.studies.spec import Study

    run_options: dict[str, type[DataOptions]] = {"train": TrainConfig, "evaluate": EvaluateConfig}
    values = schema(run_options[file]) if file in run_options else Study.model_json_schema()
    typer.echo(dumps(values, indent=2))
