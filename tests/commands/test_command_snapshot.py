"""The commands and their options are those of `command_options.json`, so that scripts of users keep working.

Regenerate the file after an intended change:

    python -m tests.commands.test_command_snapshot
"""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import typer

import normtune.cli  # noqa: F401  # registers every command
from normtune.commands.app import app
from tests.support.snapshot import assert_matches_snapshot, write_snapshot

SNAPSHOT = Path(__file__).with_name("command_options.json")


def command_options() -> dict[str, list[dict[str, Any]]]:
    """Return the parameters of every command, sorted by their flags; help texts are left out."""
    group: Any = typer.main.get_command(app)
    annotations = {
        info.name or info.callback.__name__.replace("_", "-"): {
            name: parameter.annotation
            for name, parameter in inspect.signature(info.callback, eval_str=True).parameters.items()
        }
        for info in app.registered_commands
        if info.callback is not None
    }
    return {
        name: sorted(
            (_described(parameter, annotations[name][parameter.name]) for parameter in command.params),
            key=lambda described: described["flags"],
        )
        for name, command in sorted(group.commands.items())
    }


def _described(parameter: Any, annotation: Any) -> dict[str, Any]:
    described = {
        "flags": sorted([*parameter.opts, *parameter.secondary_opts]),
        "kind": parameter.param_type_name,
        "type": _type_name(annotation),
        "required": parameter.required,
        "default": _json_value(parameter.default),
        "multiple": bool(getattr(parameter, "multiple", False)),
        "nargs": parameter.nargs,
        "hidden": bool(getattr(parameter, "hidden", False)),
    }
    if choices := _choices(annotation):
        described["choices"] = choices
    for info in getattr(annotation, "__metadata__", ()):
        bounds = {bound: getattr(info, bound, None) for bound in ("min", "max")}
        described |= {bound: value for bound, value in bounds.items() if value is not None}
    return described


def _type_name(annotation: Any) -> str:
    """Name a type without `None` and without what `Annotated` adds: `str`, `Path`, `list[str]`, `choice`."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _type_name(arguments[0])
    if origin is Literal:
        return "choice"
    if origin in (Union, UnionType):
        return " | ".join(_type_name(argument) for argument in arguments if argument is not type(None))
    if origin is list:
        return f"list[{_type_name(arguments[0])}]"
    return str(annotation.__name__)


def _choices(annotation: Any) -> list[Any]:
    if get_origin(annotation) is Literal:
        return list(get_args(annotation))
    return [choice for argument in get_args(annotation) for choice in _choices(argument)]


def _json_value(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_json_value(item) for item in value] or None
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return str(value) if isinstance(value, Path) else None  # click marks a missing default with an object


def snapshot_text() -> str:
    return json.dumps(command_options(), indent=1, ensure_ascii=False) + "\n"


def test_commands_and_options_match_the_snapshot() -> None:
    assert_matches_snapshot(SNAPSHOT, snapshot_text(), "the current commands")


if __name__ == "__main__":
    write_snapshot(SNAPSHOT, snapshot_text())
