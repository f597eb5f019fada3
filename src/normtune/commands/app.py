"""The typer application, and helpers that the commands share.

Commands import torch and transformers only when they run, so that `--help` is fast.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Mapping
from json import dumps
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic.fields import FieldInfo
from typer.core import TyperGroup

import normtune
from normtune.data.options import DataOptions, Options
from normtune.data.run_file import SUFFIXES, read_run_file
from normtune.runtime import distributed

# The order of the commands in `normtune --help`: the main job first.
_COMMANDS = (
    *("demo", "inspect", "data", "train", "evaluate", "ask", "describe", "compare", "review", "score"),
    *("init", "schema", "split", "advise", "study", "federate", "federate-kits", "serve"),
    *("merge", "mix", "export", "push", "export-predictions"),
    *("import-miss", "import-llava-med", "bench", "doctor"),
)


class _Commands(TyperGroup):
    """Lists the commands in the order of `_COMMANDS`."""

    def list_commands(self, ctx: Any) -> list[str]:
        return sorted(super().list_commands(ctx), key=_COMMANDS.index)


app = typer.Typer(
    name="normtune",
    cls=_Commands,
    help="Fine-tune medical vision-language models by training parts that they already have, such as their "
    "norms. Research use, not for diagnosis.\n\nTo try it: normtune demo",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # rich takes 0.2 s to import
    context_settings={"max_content_width": 110},
)


def _print_version(requested: bool) -> None:
    if requested:
        print(f"normtune {normtune.__version__}")
        raise typer.Exit


@app.callback()
def main_options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None: ...


Json = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]
Model = Annotated[str, typer.Argument(help="Base model: a local directory, a hub name, or 'nano'.")]
Adapter = Annotated[
    Path | None, typer.Option(help="Folder of an adapter, or its name on the hub; default: the base alone.")
]
Quantize = Annotated[str | None, typer.Option(help="Quantise the base to 8 or 4 bits: int8 or nf4.")]
Device = Annotated[str | None, typer.Option(help="cpu or cuda; default: cuda if available.")]

MaxPixels = Annotated[
    int | None,
    typer.Option(min=1, help="Most pixels of an image that the model reads; default: as in the adapter's training."),
]


def options_from(
    config: type[Options], positional: str, *, run_file: bool = False
) -> Callable[[Callable[..., None]], Any]:
    """Decorate a command so that its options are the fields of a pydantic config.

    The decorated function receives the fields that the user may set, `as_json` for `--json`, and the other
    keyword arguments that it names, which are options of the command alone.

    Args:
        config: its field descriptions are the help texts.
        positional: the field that is an argument instead of an option.
        run_file: accept a YAML file of options in place of that argument. Options of the command line replace
            those of the file.
    """

    def decorate(run: Callable[..., None]) -> Callable[..., None]:
        own_parameters = [
            parameter
            for parameter in inspect.signature(run, eval_str=True).parameters.values()
            if parameter.kind is parameter.KEYWORD_ONLY and parameter.name != "as_json"
        ]

        def command(context: typer.Context, **values: Any) -> None:
            as_json = values.pop("json")
            command_values = {parameter.name: values.pop(parameter.name) for parameter in own_parameters}
            if run_file:
                path = str(values[positional])
                given = {name: value for name, value in values.items() if _is_given(context, name)}
                if path.endswith(SUFFIXES):
                    assert issubclass(config, DataOptions)
                    del given[positional]
                    values = _replace_options(path, read_run_file(Path(path), config), given)
                else:
                    values = {name: value for name, value in values.items() if value is not None or name in given}
            run(as_json=as_json, **command_values, **values)

        parameters = [
            _parameter(name, field, name == positional, run_file) for name, field in config.model_fields.items()
        ]
        parameters.sort(key=lambda parameter: parameter.name != positional)
        parameters.insert(0, inspect.Parameter("context", inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context))
        parameters += own_parameters
        parameters.append(inspect.Parameter("json", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=Json))
        command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        command.__doc__ = run.__doc__
        command.__name__ = run.__name__
        return command

    return decorate


def _is_given(context: typer.Context, name: str) -> bool:
    """Whether the user gave an option, rather than leaving it at its default."""
    source = context.get_parameter_source(name)
    return source is not None and source.name != "DEFAULT"


def _replace_options(path: str, in_file: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a run's file, replaced by the command line's; a line on stderr names each replaced one."""
    for name, value in given.items():
        if name in in_file and str(in_file[name]) != str(value) and distributed.is_main_process():
            print(f"{path}: --{name.replace('_', '-')} {value} replaces {in_file[name]}", file=sys.stderr)
    return {**in_file, **given}


def _parameter(name: str, field: FieldInfo, positional: bool, run_file: bool) -> inspect.Parameter:
    description = field.description or ""
    default = inspect.Parameter.empty if field.is_required() else field.default
    if run_file and positional:
        description += " Or a run's YAML file with any of the options; see normtune init."
    elif run_file and field.is_required():  # the file may give it
        description, default = f"{description} Required, here or in the file.", None
    info = typer.Argument(help=description) if positional else typer.Option(help=description)
    annotation = field.annotation if default is not None else field.annotation | None  # type: ignore[operator]
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[annotation, info]
    )


def emit(as_json: bool, result: Any, text: str | None = None) -> None:
    """Print a result, as JSON or as text. In a distributed run only the main process prints.

    Args:
        result: JSON values, or a result with `to_dict`.
        text: the result as text; None: `str(result)`.
    """
    if distributed.is_main_process():
        value = result.to_dict() if hasattr(result, "to_dict") else result
        print(dumps(value, ensure_ascii=False) if as_json else str(result) if text is None else text)
