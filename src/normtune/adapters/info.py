"""`adapter.json`: what an adapter is, on which base and data it was trained, and what its tensors are."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from normtune.errors import InputError

FORMAT = 1  # of adapter.json; a change that older versions cannot read gets the next number
NOTICE = "research use, not for diagnosis"
CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"  # of an adapter of PEFT
ROWS_FILE = "training_rows.json"  # beside it; see `normtune.adapters.training_rows`
_FINGERPRINT = re.compile(r"[0-9a-f]{32}-([0-9a-f]{32}|quantised)")


@dataclass(frozen=True)
class TrainedTensor:
    """One tensor of an adapter."""

    shape: list[int]
    part: str
    role: str  # for a tensor that was added to the base: its method
    method: str


@dataclass(frozen=True)
class AdapterInfo:
    """The contents of `adapter.json`."""

    base_name: str
    base_fingerprint: str
    recipe: str
    trainable: int
    total: int
    data: dict[str, Any] | None  # the training data: name, split, licence ...
    metrics: dict[str, Any] | None
    versions: dict[str, str]  # of Python and the libraries
    notice: str
    sha256: str  # of adapter.safetensors
    tensors: dict[str, TrainedTensor]

    def to_json(self) -> dict[str, Any]:
        """The JSON object of `adapter.json`."""
        values = asdict(self)
        base = {"name": values.pop("base_name"), "fingerprint": values.pop("base_fingerprint")}
        return {"format": FORMAT, "base": base, **values}


def parse_info(contents: Any, path: Path) -> AdapterInfo:
    """Check the contents of an `adapter.json` that was read from `path`.

    Raises:
        InputError: the format is another one, or an entry is missing or has a wrong type.
    """
    if not isinstance(contents, dict) or contents.get("format") != FORMAT:
        raise InputError(f"{path} is not an adapter of format {FORMAT}. Was it written by normtune?")
    values = {name: value for name, value in contents.items() if name not in ("format", "base")}
    if isinstance(base := contents.get("base"), dict):
        values |= {f"base_{name}": value for name, value in base.items()}
    try:
        info = _info_validator().validate_python(values)
    except ValidationError as error:
        first = error.errors()[0]
        entry = ".".join(str(step) for step in first["loc"]).replace("base_", "base.", 1)
        raise InputError(f"{path}, entry {entry}: {first['msg'].lower()}. Copy the adapter again.") from error
    if not _FINGERPRINT.fullmatch(info.base_fingerprint):
        raise InputError(f"{path}, entry base.fingerprint: not a fingerprint. Copy the adapter again.")
    return info


@cache
def _info_validator() -> TypeAdapter[AdapterInfo]:
    return TypeAdapter(AdapterInfo)  # slow to build, fast to use; a server reads thousands of adapters
