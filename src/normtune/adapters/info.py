"""What a delta says of itself: `adapter.json` for programs and `README.md`, a model card, for people."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from normtune.errors import InputError

FORMAT = 1
NOTICE = "research use, not for diagnosis"
_FINGERPRINT = re.compile(r"[0-9a-f]{32}-([0-9a-f]{32}|quantised)")


@dataclass(frozen=True)
class TrainedTensor:
    """One tensor of a delta."""

    shape: list[int]
    part: str
    role: str  # of an added tensor: its method
    method: str


@dataclass(frozen=True)
class AdapterInfo:
    """The contents of `adapter.json`."""

    base_name: str
    base_fingerprint: str
    recipe: str
    trainable: int
    total: int
    data: dict[str, Any] | None  # what it was trained on: name, split, licence ...
    metrics: dict[str, Any] | None
    versions: dict[str, str]
    notice: str
    sha256: str  # of adapter.safetensors
    tensors: dict[str, TrainedTensor]

    def to_json(self) -> dict[str, Any]:
        """The object that `adapter.json` holds."""
        values = asdict(self)
        base = {"name": values.pop("base_name"), "fingerprint": values.pop("base_fingerprint")}
        return {"format": FORMAT, "base": base, **values}


def parse_info(found: Any, path: Path) -> AdapterInfo:
    """Check what was read from `path`.

    Raises:
        InputError: another format, or an entry that is missing or of the wrong kind.
    """
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise InputError(f"{path} is not a delta of format {FORMAT}. Was it written by normtune?")
    values = {name: value for name, value in found.items() if name not in ("format", "base")}
    if isinstance(base := found.get("base"), dict):
        values |= {f"base_{name}": value for name, value in base.items()}
    try:
        info = _adapter_info().validate_python(values)
    except ValidationError as error:
        fault = error.errors()[0]
        entry = ".".join(str(step) for step in fault["loc"]).replace("base_", "base.", 1)
        raise InputError(f"{path}, entry {entry}: {fault['msg'].lower()}. Copy the delta anew.") from error
    if not _FINGERPRINT.fullmatch(info.base_fingerprint):
        raise InputError(f"{path}, entry base.fingerprint: no fingerprint. Copy the delta anew.")
    return info


@cache
def _adapter_info() -> TypeAdapter[AdapterInfo]:
    return TypeAdapter(AdapterInfo)  # takes longer to build than to use, and a server reads thousands
