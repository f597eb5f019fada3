"""YAML files that users write: read with the line of every field, so that an error names its line."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from normtune.errors import InputError, did_you_mean

FieldPath = tuple[str | int, ...]  # names and list indices from the top of the file to a field
FieldError = tuple[FieldPath, str]  # a field and what is wrong with it


@dataclass(frozen=True)
class YamlFile:
    """The contents of a YAML file, and the line of each field."""

    path: Path
    values: dict[str, Any]
    lines: dict[FieldPath, int]

    def input_error(self, errors: Iterable[FieldError]) -> InputError:
        """One error for all errors of the file, each with its line and its field."""
        return InputError(
            "; ".join(f"{self.path}, {_describe_position(field, self.lines)}: {message}" for field, message in errors)
        )


def read_yaml(path: Path, name: str, fields: str) -> YamlFile:
    """Read a YAML file that has a mapping at its top level.

    Args:
        name: what the file is, in messages, such as "study".
        fields: the fields that the file must have, in messages.

    Raises:
        InputError: the file cannot be read, is not YAML, has a field twice, or has no fields.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise InputError(f"cannot read the {name} {path}: {reason}. Check the path.") from error
    try:
        node = yaml.compose(text, yaml.SafeLoader)
        lines = dict(_field_lines(node, ())) if node is not None else {}
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        problem_mark = getattr(error, "problem_mark", None)
        position = f", line {problem_mark.line + 1}" if problem_mark else ""
        raise InputError(f"{path}{position}: not valid YAML ({getattr(error, 'problem', None) or error}).") from error
    except _DuplicateField as error:
        raise InputError(f"{path}, line {error.line}: '{error.name}' appears twice. Keep one.") from error
    if not isinstance(values, dict):
        raise InputError(f"{path}: a {name}'s file must have the fields {fields}.")
    return YamlFile(path, values, lines)


def field_errors(error: ValidationError, known_fields: Callable[[FieldPath], Sequence[str]]) -> list[FieldError]:
    """Convert the errors of pydantic; `known_fields` returns the fields that the section of a path may have."""
    return [_convert_error(fault, known_fields) for fault in error.errors()]


class _DuplicateField(Exception):
    """A mapping of the file has the same key twice; YAML itself would keep the last one."""

    def __init__(self, name: str, line: int) -> None:
        self.name, self.line = name, line


def _field_lines(node: yaml.Node, path: FieldPath) -> Iterator[tuple[FieldPath, int]]:
    """The line number of each field, and of each element of a list."""
    yield path, node.start_mark.line + 1
    if isinstance(node, yaml.MappingNode):
        keys = set()
        for key, value in node.value:
            if key.value in keys:
                raise _DuplicateField(key.value, key.start_mark.line + 1)
            keys.add(key.value)
            yield from _field_lines(value, (*path, key.value))
            yield (*path, key.value), key.start_mark.line + 1
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            yield from _field_lines(value, (*path, index))


def _describe_position(path: FieldPath, lines: dict[FieldPath, int]) -> str:
    """The line and name of a field: `line 7: grids.main.seeds`.

    A field that is not in the file (a missing one) has the line of the nearest field around it.
    """
    known_path = next(path[:end] for end in range(len(path), -1, -1) if path[:end] in lines or not end)
    shown_path = path if len(path) <= len(known_path) + 1 else known_path
    field = ".".join(str(part) for part in shown_path)
    return f"line {lines.get(known_path, 1)}" + (f": {field}" if field else "")


def _convert_error(error: Any, known_fields: Callable[[FieldPath], Sequence[str]]) -> FieldError:
    """One of pydantic's errors as the field's path and a message."""
    # the other parts of pydantic's path are members of a union, or a mapping's key
    internal = ("literal[", "function-", "list[", "[key]")
    path = tuple(part for part in error["loc"] if not str(part).startswith(internal))
    if error["type"] == "extra_forbidden":
        fields = known_fields(path[:-1])
        return path, f"unknown{did_you_mean(str(path[-1]), fields)} (known: {', '.join(fields)})"
    if error["type"] == "missing":
        return path, "is missing"
    message = error["msg"].removeprefix("Value error, ")
    value = error["input"]
    show_value = isinstance(value, str | int | float) and not isinstance(error.get("ctx", {}).get("error"), ValueError)
    return path, f"{message[:1].lower()}{message[1:]}" + (f" (got {value!r})" if show_value else "")
