"""A run as a file: `run.yaml` holds the options of `normtune train` or `normtune evaluate`.

Its fields are the fields of the command's config. A relative path in it starts at the folder in which the
command is run, as on the command line.
"""

from __future__ import annotations

import textwrap
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from normtune.data.options import DataOptions
from normtune.runtime.yaml_file import field_errors, read_yaml

RUN_FILE = "run.yaml"  # beside the adapter or the scores that the run wrote
SUFFIXES = (".yaml", ".yml")
_FOLDER_OPTIONS = frozenset({"resume", "overwrite"})  # about what --out holds already; no result depends on them


def read_run_file(path: Path, config: type[DataOptions]) -> dict[str, Any]:
    """Read the options of a run. Required options may be missing: the command line can give them.

    Args:
        config: its fields are those that the file may have.

    Raises:
        InputError: the file is not valid; the message names the line of each error.
    """
    file = read_yaml(path, "run", "model and data")
    try:
        config.model_validate(file.values)
    except ValidationError as error:
        errors = field_errors(error, lambda _: list(config.model_fields))
        if errors := [(field, message) for field, message in errors if message != "is missing"]:
            raise file.input_error(errors) from error
    return file.values


def run_file_text(command: str, options: DataOptions, *, resolved: Mapping[str, Any] | None = None) -> str:
    """The file of a run that has been done, with every option that has a value.

    Args:
        resolved: option -> the value that was used in its place, such as the device.
    """
    values = options.model_dump(mode="json", exclude=set(_FOLDER_OPTIONS)) | dict(resolved or {})
    lines = [
        f"# The options of a run. To repeat it: normtune {command} {RUN_FILE} --out FOLDER",
        "# Relative paths start at the folder in which the command is run.",
        *(_field(name, value) for name, value in values.items() if value is not None),
    ]
    return "\n".join(lines) + "\n"


def commented_run_file(command: str, options: DataOptions, set_fields: Collection[str]) -> str:
    """The file of a run to be edited: every option with its description; options that are not set are comments.

    Args:
        set_fields: the names of the options that are set in the file.
    """
    values = options.model_dump(mode="json")
    fields = type(options).model_fields
    lines = [f"# Run it with: normtune {command} {RUN_FILE}"]
    for name in set_fields:
        lines += ["", *_comment(fields[name].description or ""), _field(name, values[name])]
    lines += ["", "# The other options, with their defaults:"]
    for name in fields:
        if name not in set_fields:
            lines += ["", *_comment(fields[name].description or ""), f"# {_field(name, values[name])}"]
    return "\n".join(lines) + "\n"


def schema(options: type[DataOptions]) -> dict[str, Any]:
    """The JSON schema of a run's file, for editors. No field is required: the command line can give them."""
    values = options.model_json_schema()
    values.pop("required", None)
    return values


def _comment(text: str) -> list[str]:
    return textwrap.wrap(text, width=110, initial_indent="# ", subsequent_indent="# ")


def _field(name: str, value: Any) -> str:
    return yaml.safe_dump({name: value}, allow_unicode=True, width=10_000, sort_keys=False).rstrip("\n")
