"""What was trained, on disk: a directory of `adapter.safetensors` and `adapter.json`.

The tensors are fp32 under the names of `Tuned.trained`. The JSON is written last and holds the digest of the tensors,
so a delta that was cut short, or put together from two, is refused. It also says which base it belongs to.
"""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import safetensors
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from normtune.adapt import Tuned, adapt, untune
from normtune.errors import InputError
from normtune.files import read_json, replacing, write_json
from normtune.recipe import INTRINSIC, parse

TENSORS_FILE = "adapter.safetensors"
INFO_FILE = "adapter.json"
FORMAT = 1
NOTICE = "For research use only; not for diagnosis."
QUANTISED = "quantised"

_SAMPLES = 64  # values of each tensor that the fingerprint reads
_SHOWN = 3  # mismatches that an error names


@dataclass(frozen=True)
class DeltaInfo:
    """The contents of `adapter.json`."""

    base_name: str
    base_fingerprint: str
    recipe: str
    trainable: int
    total: int
    tensors: dict[str, dict[str, Any]]  # name -> shape, part, role, method
    data: dict[str, Any] | None
    metrics: dict[str, Any] | None
    versions: dict[str, str]
    notice: str
    sha256: str  # of adapter.safetensors


def fingerprint(model: nn.Module) -> str:
    """What tells one base from another, whatever dtype it is loaded in; take it before `adapt`.

    Two digests of names, shapes and 64 sampled values a tensor, rounded to bf16: one of the linears' weights (the word
    "quantised" where they are), one of all else. A 7B model takes well under a second.
    """
    linear, rest = hashlib.sha256(), hashlib.sha256()
    quantised = False
    for module_name, module in model.named_modules():
        for attribute, parameter in module.named_parameters(recurse=False):
            name = f"{module_name}.{attribute}"
            if isinstance(module, nn.Linear) and attribute == "weight":
                if not parameter.is_floating_point() or type(parameter.data) is not Tensor:
                    quantised = True
                    continue
                digest = linear
            else:
                digest = rest
            digest.update(f"{name} {tuple(parameter.shape)}\n".encode())
            digest.update(_sample(parameter.detach()))
    return f"{rest.hexdigest()[:32]}-{QUANTISED if quantised else linear.hexdigest()[:32]}"


def same_base(one: str, other: str) -> bool:
    """Whether two fingerprints are of one base; a quantised one is compared by what is not quantised."""
    (rest, linear), (other_rest, other_linear) = one.split("-"), other.split("-")
    return rest == other_rest and (linear == other_linear or QUANTISED in (linear, other_linear))


def _sample(parameter: Tensor) -> bytes:
    if parameter.device.type == "meta":
        return b""
    count = parameter.numel()
    step = max(1, count // _SAMPLES)
    values = parameter.reshape(-1)[: step * _SAMPLES : step]
    return values.to(torch.bfloat16).view(torch.int16).cpu().numpy().tobytes()


def save_delta(
    tuned: Tuned,
    directory: Path | str,
    *,
    base_name: str,
    base_fingerprint: str,
    data: Mapping[str, Any] | None = None,
    metrics: Mapping[str, Any] | None = None,
) -> None:
    """Write what `tuned` trained to `directory`; `data` says what it was trained on, its licence included.

    Raises:
        InputError: the files cannot be written.
    """
    directory = Path(directory)
    tensors = {name: one.detach().cpu().contiguous().clone() for name, one in tuned.trained.items()}
    with replacing(directory / TENSORS_FILE) as temporary:
        save_file(tensors, temporary, metadata={"format": "pt"})
    described = {
        name: {
            "shape": list(tensor.shape),
            "part": tuned.places[name][0],
            "role": tuned.places[name][1],
            "method": tuned.methods[name],
        }
        for name, tensor in tensors.items()
    }
    write_json(
        directory / INFO_FILE,
        {
            "format": FORMAT,
            "notice": NOTICE,
            "base": {"name": base_name, "fingerprint": base_fingerprint},
            "recipe": str(tuned.recipe),
            "trainable": tuned.trainable,
            "total": tuned.total,
            "data": dict(data) if data is not None else None,
            "metrics": dict(metrics) if metrics is not None else None,
            "versions": {
                "python": platform.python_version(),
                "torch": torch.__version__,
                "transformers": transformers.__version__,
                "peft": peft.__version__,
            },
            "sha256": _digest(directory / TENSORS_FILE),
            "tensors": described,
        },
    )


def read_delta(directory: Path | str) -> DeltaInfo:
    """Read and check `adapter.json`.

    Raises:
        InputError: no delta there, one of another format, or one whose files do not belong together.
    """
    directory = Path(directory)
    if not (directory / INFO_FILE).is_file():
        raise InputError(
            f"{directory} holds no whole delta: {INFO_FILE} is missing. Give a directory written by normtune train."
        )
    found = read_json(directory / INFO_FILE)
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise InputError(f"{directory / INFO_FILE} is not a delta of format {FORMAT}. Was it written by normtune?")
    try:
        info = DeltaInfo(
            base_name=found["base"]["name"],
            base_fingerprint=found["base"]["fingerprint"],
            **{name: found[name] for name in DeltaInfo.__annotations__ if not name.startswith("base_")},
        )
    except (KeyError, TypeError) as error:
        raise InputError(f"{directory / INFO_FILE} lacks the entry {error}. Export the delta again.") from error
    if not (directory / TENSORS_FILE).is_file() or _digest(directory / TENSORS_FILE) != info.sha256:
        raise InputError(
            f"{directory / TENSORS_FILE} is not the file that {INFO_FILE} describes (cut short, or of another run). "
            "Train again, or copy both files anew."
        )
    return info


def read_tensors(directory: Path | str, device: str = "cpu") -> dict[str, Tensor]:
    """The trained tensors of a delta, fp32, by name.

    Raises:
        InputError: the file cannot be read.
    """
    path = Path(directory) / TENSORS_FILE
    try:
        return load_file(path, device=device)
    except (OSError, safetensors.SafetensorError) as error:
        raise InputError(f"cannot read {path}: {error}. Copy the delta anew.") from error


def load_delta(model: nn.Module, directory: Path | str, *, allow_other_base: bool = False) -> Tuned:
    """Adapt `model` as the delta's recipe says and give it the trained values.

    Raises:
        InputError: the delta is broken or belongs to another base. Equal shapes with other values are let pass by
            `allow_other_base`.
    """
    info = read_delta(directory)
    tensors = read_tensors(directory)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters(remove_duplicate=False)}
    own = {name: tuple(one["shape"]) for name, one in info.tensors.items() if one["method"] in INTRINSIC}
    _refuse(directory, info, [_mismatch(name, shape, shapes.get(name)) for name, shape in own.items()])
    if not allow_other_base and not same_base(info.base_fingerprint, fingerprint(model)):
        raise InputError(
            f"delta {directory} was trained on '{info.base_name}' and this base has other values or parts. Load that "
            "base, or pass allow_other_base if you know that they belong together."
        )
    tuned = adapt(model, parse(info.recipe))
    have = {name: tuple(parameter.shape) for name, parameter in tuned.trained.items()}
    wanted = {name: tuple(one["shape"]) for name, one in info.tensors.items()}
    faults = [_mismatch(name, wanted.get(name), have.get(name)) for name in {**wanted, **have}]
    if any(faults):
        if not any(one["method"] in INTRINSIC for one in info.tensors.values()):
            untune(tuned)
        _refuse(directory, info, faults)
    with torch.no_grad():
        for name, parameter in tuned.trained.items():
            parameter.copy_(tensors[name])
    return tuned


def _mismatch(name: str, wanted: tuple[int, ...] | None, have: tuple[int, ...] | None) -> str | None:
    if wanted == have:
        return None
    shown = ["absent" if shape is None else str(list(shape)) for shape in (wanted, have)]
    return f"{name} (delta {shown[0]}, model {shown[1]})"


def _refuse(directory: Path | str, info: DeltaInfo, faults: list[str | None]) -> None:
    found = [fault for fault in faults if fault]
    if found:
        more = f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
        raise InputError(
            f"delta {directory} of base '{info.base_name}' does not fit this model: {', '.join(found[:_SHOWN])}{more}. "
            "Load the base that it was trained on."
        )


def _digest(path: Path) -> str:
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
