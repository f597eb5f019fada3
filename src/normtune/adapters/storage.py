"""What was trained, on disk (`adapter.safetensors`, `adapter.json`, `README.md`) and folded into a model.

The tensors are fp32 under the names of `Tuned.trained`. The JSON takes its name last and holds the digest of
the tensors, so a delta that was cut short, or put together from two, is refused. It also says which base it
belongs to.
"""

from __future__ import annotations

import copy
import hashlib
import platform
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import peft
import safetensors
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.utils import parametrize

from normtune.adapters.fingerprint import fingerprint, same_base
from normtune.adapters.info import NOTICE, AdapterInfo, TrainedTensor, parse_info
from normtune.adapters.merged_weights import changed_by, quantised_site, refuse_unmergeable, with_addition
from normtune.adapters.model_card import model_card
from normtune.errors import InputError
from normtune.methods.adapt import Cast, TunedModel, adapt, restore_base
from normtune.methods.recipe import parse
from normtune.methods.registry import INTRINSIC
from normtune.models.family import Family
from normtune.models.parts import is_quantized
from normtune.runtime.files import atomic_write, json_text, read_json

TENSORS_FILE = "adapter.safetensors"
INFO_FILE = "adapter.json"
CARD_FILE = "README.md"
_MAX_NAMED = 3  # mismatches that an error names


def save_adapter(
    tuned: TunedModel,
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
    with (  # the names are taken from the last to the first
        atomic_write(directory / INFO_FILE) as info_file,
        atomic_write(directory / TENSORS_FILE) as tensors_file,
        atomic_write(directory / CARD_FILE) as card_file,
    ):
        write_tensors(tensors_file, tensors)
        info = AdapterInfo(
            base_name=base_name,
            base_fingerprint=base_fingerprint,
            recipe=str(tuned.recipe),
            trainable=tuned.trainable,
            total=tuned.total,
            data=dict(data) if data is not None else None,
            metrics=dict(metrics) if metrics is not None else None,
            versions={
                "python": platform.python_version(),
                "torch": torch.__version__,
                "transformers": transformers.__version__,
                "peft": peft.__version__,
            },
            notice=NOTICE,
            sha256=_digest(tensors_file),
            tensors={
                name: TrainedTensor(list(tensor.shape), *tuned.part_and_role[name], tuned.methods[name])
                for name, tensor in tensors.items()
            },
        )
        info_file.write_text(json_text(info.to_json()), encoding="utf-8", errors="backslashreplace")
        card_file.write_text(model_card(info), encoding="utf-8", errors="backslashreplace")


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors to a new file.

    Raises:
        OSError: as for any file (safetensors has an exception of its own for a full disk).
    """
    try:
        save_file(dict(tensors), path, metadata={"format": "pt"})
    except safetensors.SafetensorError as error:
        raise OSError(str(error)) from error


def read_adapter_info(directory: Path | str) -> AdapterInfo:
    """Read and check `adapter.json`.

    Raises:
        InputError: no delta there, one of another format, or one whose files do not belong together.
    """
    directory = Path(directory)
    if not (directory / INFO_FILE).is_file():
        raise InputError(
            f"{directory} holds no whole delta: {INFO_FILE} is missing. "
            "Give a directory written by normtune train."
        )
    info = parse_info(read_json(directory / INFO_FILE), directory / INFO_FILE)
    if not (directory / TENSORS_FILE).is_file() or _digest(directory / TENSORS_FILE) != info.sha256:
        raise InputError(
            f"{directory / TENSORS_FILE} is not the file that {INFO_FILE} describes "
            "(cut short, or of another run). Train again, or copy both files anew."
        )
    return info


def read_tensors(directory: Path | str, info: AdapterInfo) -> dict[str, Tensor]:
    """The trained tensors of a delta, fp32, by name.

    Raises:
        InputError: the file cannot be read, or does not hold what `info` says.
    """
    path = Path(directory) / TENSORS_FILE
    try:
        tensors = load_file(path)
    except (OSError, safetensors.SafetensorError) as error:
        raise InputError(f"cannot read {path}: {error}. Copy the delta anew.") from error
    for name in {**info.tensors, **tensors}:
        told, held = info.tensors.get(name), tensors.get(name)
        if told is None or held is None or told.shape != list(held.shape):
            raise InputError(f"{path} and {INFO_FILE} differ about {name}. Copy the delta anew.")
    return tensors


def load_adapter(model: nn.Module, directory: Path | str, *, allow_other_base: bool = False) -> TunedModel:
    """Adapt `model` as the delta's recipe says and give it the trained values.

    Raises:
        InputError: the delta is broken or belongs to another base. Equal shapes with other values are let
            pass by `allow_other_base`.
    """
    info = read_adapter_info(directory)
    tensors = read_tensors(directory, info)

    def is_base(mark: str) -> bool:
        return allow_other_base or same_base(mark, fingerprint(model))

    tuned = attach_adapter(model, directory, info, is_base)
    with torch.no_grad():
        for name, parameter in tuned.trained.items():
            parameter.copy_(tensors[name])
    return tuned


def attach_adapter(
    model: nn.Module, directory: Path | str, info: AdapterInfo, is_base: Callable[[str], bool]
) -> TunedModel:
    """Adapt `model` as the delta's recipe says; it has not the trained values yet, and may be on meta.

    `is_base` says whether the fingerprint of the delta's base is that of `model`.

    Raises:
        InputError: the delta belongs to another base.
    """
    shapes = {
        name: tuple(parameter.shape) for name, parameter in model.named_parameters(remove_duplicate=False)
    }
    own = {name: tuple(one.shape) for name, one in info.tensors.items() if one.method in INTRINSIC}
    _refuse(directory, info, [_mismatch(name, shape, shapes.get(name)) for name, shape in own.items()])
    if not is_base(info.base_fingerprint):
        raise InputError(
            f"delta {directory} was trained on '{info.base_name}' and this base has other values or parts. "
            "Load that base, or pass allow_other_base if you know that they belong together."
        )
    tuned = adapt(model, parse(info.recipe))
    have = {name: tuple(parameter.shape) for name, parameter in tuned.trained.items()}
    wanted = {name: tuple(one.shape) for name, one in info.tensors.items()}
    faults = [_mismatch(name, wanted.get(name), have.get(name)) for name in {**wanted, **have}]
    if any(faults):
        if not any(one.method in INTRINSIC for one in info.tensors.values()):
            restore_base(tuned)
        _refuse(directory, info, faults)
    return tuned


def _mismatch(name: str, wanted: tuple[int, ...] | None, have: tuple[int, ...] | None) -> str | None:
    if wanted == have:
        return None
    shown = ["absent" if shape is None else str(list(shape)) for shape in (wanted, have)]
    return f"{name} (delta {shown[0]}, model {shown[1]})"


def _refuse(directory: Path | str, info: AdapterInfo, faults: list[str | None]) -> None:
    found = [fault for fault in faults if fault]
    if found:
        more = f" and {len(found) - _MAX_NAMED} more" if len(found) > _MAX_NAMED else ""
        raise InputError(
            f"delta {directory} of base '{info.base_name}' does not fit this model: "
            f"{', '.join(found[:_MAX_NAMED])}{more}. Load the base that it was trained on."
        )


def merged_tensors(tuned: TunedModel) -> dict[str, Tensor]:
    """What merging writes: the base's name -> the tensor that stands for base and delta together, in fp32.

    Raises:
        InputError: a method that no weight of the base can stand for.
    """
    refuse_unmergeable(tuned.methods.values())
    merged = {name: one.detach() for name, one in tuned.trained.items() if tuned.methods[name] in INTRINSIC}
    for addition in tuned.additions:
        for site, layer in addition.layers.items():
            for key in changed_by(layer):
                name, old = f"{site}.{key}", getattr(layer.get_base_layer(), key).detach()
                if is_quantized(old):
                    raise quantised_site(site)
                merged[name] = with_addition(site, layer, key, merged.get(name, old), tuned.trained)
    return merged


def merge_adapter(tuned: TunedModel) -> nn.Module:
    """Fold what was trained into plain modules of the base, in the base's dtype.

    In an fp32 base trained norms keep their values to the bit; a lower-precision base rounds them.
    `unmerge_delta` goes back, to the bit.

    Raises:
        InputError: a method that cannot be merged, or a model that is merged already.
    """
    if tuned.unmerge is not None:
        raise InputError("the model is merged already. Call unmerge_delta first.")
    merged = merged_tensors(tuned)
    undo: list[Callable[[], None]] = []
    for name, base_norm in tuned.base_norms.items():
        undo.append(_merge_norm(tuned.model, name, base_norm))
    undo += _merge_cast(tuned.cast)
    for addition in tuned.additions:
        for site, layer in addition.layers.items():
            undo.append(_merge_linear(tuned.model, site, layer, merged))

    def unmerge() -> None:
        for step in reversed(undo):
            step()

    tuned.unmerge = unmerge
    return tuned.model


def unmerge_adapter(tuned: TunedModel) -> nn.Module:
    """Undo `merge_delta`, bit for bit.

    Raises:
        InputError: the model is not merged.
    """
    if tuned.unmerge is None:
        raise InputError("the model is not merged. Call merge_delta first.")
    tuned.unmerge()
    tuned.unmerge = None
    return tuned.model


def _merge_norm(model: nn.Module, name: str, base_norm: nn.Module) -> Callable[[], None]:
    tuned_norm = model.get_submodule(name)
    plain = copy.deepcopy(base_norm).train(tuned_norm.training).requires_grad_(False)
    with torch.no_grad():
        for attribute, parameter in plain.named_parameters(recurse=False):
            parameter.copy_(getattr(tuned_norm, attribute))
    model.set_submodule(name, plain)
    return partial(model.set_submodule, name, tuned_norm)


def _merge_cast(cast: Iterable[tuple[nn.Module, str]]) -> list[Callable[[], None]]:
    """Plain parameters in the base's dtype for those held in fp32; tied ones stay tied."""
    plain: dict[int, nn.Parameter] = {}
    undo: list[Callable[[], None]] = []
    for module, attribute in cast:
        chain: Any = module.get_submodule(f"parametrizations.{attribute}")
        wide, dtype = chain.original, chain[0].dtype
        parametrize.remove_parametrizations(module, attribute, leave_parametrized=False)
        setattr(module, attribute, plain.setdefault(id(wide), nn.Parameter(wide.detach().to(dtype), False)))
        undo.append(partial(_hold_again, module, attribute, wide, dtype))
    return undo


def _hold_again(module: nn.Module, attribute: str, wide: nn.Parameter, dtype: torch.dtype) -> None:
    setattr(module, attribute, wide)
    parametrize.register_parametrization(module, attribute, Cast(dtype), unsafe=True)


def _merge_linear(
    model: nn.Module, site: str, layer: Any, merged: Mapping[str, Tensor]
) -> Callable[[], None]:
    linear = layer.get_base_layer()
    old = {key: one for key, one in linear.named_parameters(recurse=False) if f"{site}.{key}" in merged}
    for key, one in old.items():
        setattr(linear, key, nn.Parameter(merged[f"{site}.{key}"].to(one.dtype), False))
    model.set_submodule(site, linear)

    def undo() -> None:
        model.set_submodule(site, layer)
        for key, one in old.items():
            setattr(linear, key, one)

    return undo


def _digest(path: Path) -> str:
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def load_model(
    model: str,
    adapter: Path | None = None,
    *,
    dtype: str = "float32",
    device: str | None = None,
    quantize: str | None = None,
) -> Family:
    """Load a base, with an adapter's trained tensors in place where one is given.

    Raises:
        InputError: no such model, or an adapter of another base.
    """
    from normtune.models.loading import load

    family = load(model, dtype=dtype, device=device, quantize=quantize)
    if adapter is not None:
        load_adapter(family.model, adapter)
    family.model.eval()
    return family
