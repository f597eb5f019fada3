"""The command line's application, and what its commands share. Heavy imports wait until a command runs."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import asdict
from json import dumps, loads
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic.fields import FieldInfo

from normtune.data.options import DataOptions
from normtune.runtime import distributed

app = typer.Typer(
    name="normtune",
    help="Fine-tune medical vision-language models by training what is already inside them. "
    "Research use, not for diagnosis.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # its help imports for 0.2 s
    context_settings={"max_content_width": 110},
)

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]
Model = Annotated[str, typer.Argument(help="A local directory, a hub name, or 'nano'.")]
Adapter = Annotated[Path | None, typer.Option(help="A trained adapter; none uses the base as it is.")]
Quantize = Annotated[str | None, typer.Option(help="Hold the base in 8 or 4 bits: int8 or nf4.")]
Device = Annotated[str | None, typer.Option(help="cpu or cuda; by default CUDA where there is one.")]


def takes(config: type[DataOptions], positional: str | None = None) -> Callable[[Callable[..., None]], Any]:
    """Give a command the fields of `config` as its options, so that each is written once."""

    def decorate(run: Callable[..., None]) -> Callable[..., None]:
        def command(**values: Any) -> None:
            as_json = values.pop("json")
            run(config.checked(**values), as_json=as_json)

        parameters = [
            _parameter(name, field, name == positional) for name, field in config.model_fields.items()
        ]
        parameters.sort(key=lambda parameter: parameter.name != positional)
        parameters.append(
            inspect.Parameter("json", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=Json)
        )
        command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        command.__doc__ = run.__doc__
        command.__name__ = run.__name__
        return command

    return decorate


def _parameter(name: str, field: FieldInfo, positional: bool) -> inspect.Parameter:
    info = typer.Argument(help=field.description) if positional else typer.Option(help=field.description)
    default = inspect.Parameter.empty if field.is_required() else field.default
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[field.annotation, info]
    )


def emit(as_json: bool, value: Any, text: str) -> None:
    if distributed.is_main_process():
        print(dumps(value, ensure_ascii=False) if as_json else text)


def plain(found: Any) -> dict[str, Any]:
    """A result as JSON takes it: paths as text."""
    plain: dict[str, Any] = loads(dumps(asdict(found), default=str))
    return plain
