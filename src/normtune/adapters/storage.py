"""Save and load adapters: `adapter.safetensors`, `adapter.json` and `README.md` in one directory.

The tensors are fp32, under the names of `TunedModel.trained`. The JSON file names the base and holds the
digest of the tensors' file. It is renamed into place last, so that an adapter that is incomplete, or mixed
from two, is refused.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import safetensors
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from normtune.adapters.fingerprint import QUANTISED, fingerprint, same_base
from normtune.adapters.info import CONFIG_FILE, NOTICE, ROWS_FILE, AdapterInfo, TrainedTensor, parse_info
from normtune.adapters.model_card import model_card
from normtune.adapters.training_rows import TrainingRows
from normtune.errors import InputError
from normtune.methods.adapt import TunedModel, adapt, restore_base
from normtune.methods.recipe import parse
from normtune.methods.registry import INTRINSIC
from normtune.models.family import Family
from normtune.models.parts import find_parts, unused_parameters
from normtune.runtime.environment import versions
from normtune.runtime.files import atomic_write, file_sha256, json_text, read_json
from normtune.runtime.tensors import write_tensors

TENSORS_FILE = "adapter.safetensors"
INFO_FILE = "adapter.json"
CARD_FILE = "README.md"
_log = logging.getLogger(__name__)
_MAX_NAMED = 3  # mismatches that an error names; it counts the others
_PACKAGES = ("python", "torch", "transformers", "peft")  # their versions are recorded


def save_adapter(
    tuned: TunedModel,
    directory: Path | str,
    *,
    base_name: str | None = None,
    base_fingerprint: str | None = None,
    data: Mapping[str, Any] | None = None,
    metrics: Mapping[str, Any] | None = None,
    rows: TrainingRows | None = None,
) -> None:
    """Write the trained parameters of a model to a directory, which `load_adapter` and every command read.

    Args:
        tuned: the adapted model, from `normtune.adapt`.
        directory: where the files are written; they replace the files of an earlier adapter.
        base_name: directory or hub name of the base; None: as `normtune.adapt` recorded it.
        base_fingerprint: `fingerprint` of the base, before it was adapted; None: as recorded.
        data: the training data: name, split, licence ...
        metrics: results to record in `adapter.json` and the model card.
        rows: digests of the training rows, for `training_rows.json`; None: they are not recorded.

    Raises:
        InputError: the files cannot be written, or the base's fingerprint is unknown.
    """
    directory = Path(directory)
    base_name, base_fingerprint = base_name or tuned.base_name, base_fingerprint or tuned.base_fingerprint
    if tuned.is_imported:
        raise InputError("this adapter was made by PEFT. Keep its folder, which every command reads.")
    if not base_fingerprint:
        raise InputError("the fingerprint of the base is unknown. Adapt the model with normtune.adapt.")
    if rows is not None:
        data = {**(data or {}), "rows_digest": rows.digest}
        rows.write(directory / ROWS_FILE)
    tensors = {name: parameter.detach().cpu().contiguous().clone() for name, parameter in tuned.trained.items()}
    info = AdapterInfo(
        base_name=base_name,
        base_fingerprint=base_fingerprint,
        recipe=str(tuned.recipe),
        trainable=tuned.trainable,
        total=tuned.total,
        data=dict(data) if data is not None else None,
        metrics=dict(metrics) if metrics is not None else None,
        versions=library_versions(),
        notice=NOTICE,
        sha256="",
        tensors={
            name: TrainedTensor(list(tensor.shape), *tuned.part_and_role[name], tuned.methods[name])
            for name, tensor in tensors.items()
        },
    )
    write_adapter(directory, info, tensors)


def library_versions() -> dict[str, str]:
    """The versions that an adapter records."""
    return {name: version for name, version in versions().items() if name in _PACKAGES}


def write_adapter(directory: Path, info: AdapterInfo, tensors: Mapping[str, Tensor]) -> None:
    """Write the three files of an adapter.

    Args:
        info: its description; `sha256` is replaced by the digest of the tensors' file.
        tensors: name -> fp32 values.

    Raises:
        InputError: the files cannot be written.
    """
    with (
        # The files get their names when the blocks end, in reverse order: the JSON, which vouches for the
        # tensors by their digest, is the last.
        atomic_write(directory / INFO_FILE) as info_file,
        atomic_write(directory / TENSORS_FILE) as tensors_file,
        atomic_write(directory / CARD_FILE) as card_file,
    ):
        write_tensors(tensors_file, tensors)
        info = replace(info, sha256=file_sha256(tensors_file))
        info_file.write_text(json_text(info.to_json()), encoding="utf-8", errors="backslashreplace")
        card_file.write_text(model_card(info), encoding="utf-8", errors="backslashreplace")


def read_adapter_info(directory: Path | str, *, verify: bool = True) -> AdapterInfo:
    """Read and check the description of an adapter, which may be one of PEFT's.

    Args:
        verify: check that the tensors' file has the digest that `adapter.json` records.

    Raises:
        InputError: the directory has no adapter, or one of another format, or its files do not belong
        together.
    """
    directory = Path(directory)
    if not (directory / INFO_FILE).is_file():
        if import_peft := _import_peft(directory):
            return import_peft.read_peft_info(directory)
        raise InputError(
            f"{directory} is not a complete adapter: {INFO_FILE} is missing. "
            "Give a directory written by normtune train, or by PEFT."
        )
    info = parse_info(read_json(directory / INFO_FILE), directory / INFO_FILE)
    if not verify and (directory / TENSORS_FILE).is_file():
        return info
    if not (directory / TENSORS_FILE).is_file() or file_sha256(directory / TENSORS_FILE) != info.sha256:
        raise InputError(
            f"{directory / TENSORS_FILE} is not the file that {INFO_FILE} describes "
            "(truncated, or from another run). Train again, or copy both files again."
        )
    return info


def read_tensors(directory: Path | str, info: AdapterInfo) -> dict[str, Tensor]:
    """Read the trained tensors of an adapter, fp32, by name.

    Raises:
        InputError: the file cannot be read, or its names and shapes differ from those in `info`.
    """
    if import_peft := _import_peft(Path(directory)):
        return import_peft.read_peft_tensors(Path(directory), info)
    path = Path(directory) / TENSORS_FILE
    try:
        tensors = load_file(path)
    except (OSError, safetensors.SafetensorError) as error:
        raise InputError(f"cannot read {path}: {error}. Copy the adapter again.") from error
    for name in {**info.tensors, **tensors}:
        expected, actual = info.tensors.get(name), tensors.get(name)
        if expected is None or actual is None or expected.shape != list(actual.shape):
            raise InputError(f"{path} and {INFO_FILE} differ about {name}. Copy the adapter again.")
    return tensors


def load_adapter(
    model: nn.Module, directory: Path | str, *, allow_other_base: bool = False, keep_base: bool = False
) -> TunedModel:
    """Adapt a model by an adapter's recipe and set the trained values.

    Args:
        model: the base, without an adapter; it is changed in place.
        allow_other_base: accept a base with other values, if its shapes fit.
        keep_base: see `normtune.methods.adapt.adapt`.

    Raises:
        InputError: the adapter is damaged or belongs to another base.
    """
    info = fit_names(read_adapter_info(directory), model)
    tensors = read_tensors(directory, info)

    def is_base(base_fingerprint: str) -> bool:
        current = fingerprint(model)
        if QUANTISED in f"{base_fingerprint} {current}" and not allow_other_base:
            _log.warning("%s: the linear layers of a quantised base could not be compared with this base's", directory)
        return allow_other_base or same_base(base_fingerprint, current)

    tuned = attach_adapter(model, directory, info, is_base, keep_base=keep_base)
    values = import_peft.prepare_values(tuned, tensors) if (import_peft := _import_peft(Path(directory))) else tensors
    with torch.no_grad():
        for name, parameter in tuned.trained.items():
            parameter.copy_(values[name])
    return tuned


def attach_adapter(
    model: nn.Module,
    directory: Path | str,
    info: AdapterInfo,
    is_base: Callable[[str], bool],
    *,
    keep_base: bool = False,
) -> TunedModel:
    """Adapt a model by an adapter's recipe, without its trained values.

    Args:
        model: the base; it may be on the meta device.
        directory: the adapter's, for error messages.
        is_base: called with the fingerprint of the adapter's base; returns whether `model` is this base.
        keep_base: see `normtune.methods.adapt.adapt`.

    Raises:
        InputError: the adapter belongs to another base.
    """
    if import_peft := _import_peft(Path(directory)):
        return import_peft.attach_peft(model, Path(directory), info, keep_base=keep_base)
    # Shapes first: they explain a wrong base better than its fingerprint does.
    model_shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters(remove_duplicate=False)}
    base_shapes = {name: tuple(tensor.shape) for name, tensor in info.tensors.items() if tensor.method in INTRINSIC}
    check_shapes(
        directory, info, [mismatch(name, shape, model_shapes.get(name)) for name, shape in base_shapes.items()]
    )
    if not is_base(info.base_fingerprint):
        raise InputError(
            f"adapter {directory} was trained on '{info.base_name}', but this base has other values or "
            "parts. Load that base. In Python, load_adapter(..., allow_other_base=True) takes another one."
        )
    # adapters of version 0.1 may hold parameters that the model never uses
    modules = tuple({f"{name.rpartition('.')[0]}." for name in unused_parameters(model, find_parts(model))})
    train_unused = any(name.startswith(modules) for name in info.tensors)
    tuned = adapt(model, parse(info.recipe), keep_base=keep_base, train_unused=train_unused)
    tuned.base_name, tuned.base_fingerprint = info.base_name, info.base_fingerprint
    # Then all tensors, including the added ones, which exist only now.
    actual = {name: tuple(parameter.shape) for name, parameter in tuned.trained.items()}
    expected = {name: tuple(tensor.shape) for name, tensor in info.tensors.items()}
    mismatches = [mismatch(name, expected.get(name), actual.get(name)) for name in {**expected, **actual}]
    if any(mismatches):
        if keep_base or not any(tensor.method in INTRINSIC for tensor in info.tensors.values()):
            restore_base(tuned)
        check_shapes(directory, info, mismatches)
    return tuned


def fit_names(info: AdapterInfo, model: nn.Module, names: Collection[str] | None = None) -> AdapterInfo:
    """Give the tensors of an adapter of PEFT their names in a model; Normtune's adapters have these names already.

    Args:
        names: of the model's parameters, if modules of it were replaced since; None: as they are.
    """
    if info.base_fingerprint:
        return info
    from normtune.adapters import import_peft

    return import_peft.fit_names(
        info, model, names or [name for name, _ in model.named_parameters(remove_duplicate=False)]
    )


def _import_peft(directory: Path) -> ModuleType | None:
    """The module that reads PEFT's adapters, if the directory holds one and none of Normtune's."""
    if (directory / INFO_FILE).is_file() or not (directory / CONFIG_FILE).is_file():
        return None
    from normtune.adapters import import_peft  # PEFT takes a second to import

    return import_peft


@contextmanager
def use_adapter(family: Family, adapter: Path | str | TunedModel | None) -> Iterator[None]:
    """Answer with an adapter, in evaluation mode; an adapter that is loaded from a directory is removed afterwards.

    Args:
        adapter: a directory, or the adapter that is in the model already; None: the base.

    Raises:
        InputError: the adapter is damaged or belongs to another base, or another adapter is in the model.
    """
    tuned = adapter if isinstance(adapter, TunedModel) else None
    if tuned is not None and (tuned.model is not family.model or not tuned.active):
        raise InputError(
            "this adapter is not in this model. Adapt the loaded model: tuned = normtune.adapt(model, recipe)."
        )
    if tuned is None and family.adapter is not None:
        raise InputError(
            f"the model has an adapter in it ('{family.adapter.recipe}'). Use it by adapter=tuned, or remove it: "
            "normtune.restore_base(tuned)."
        )
    is_training, prompt_limit, choices = family.model.training, family.prompt_limit, family.choices
    max_pixels = family.max_pixels
    family.model.eval()
    loaded = load_adapter(family.model, adapter, keep_base=True) if isinstance(adapter, Path | str) else None
    family.adapter = tuned or loaded
    if isinstance(adapter, Path | str):
        family.use_training_texts(read_adapter_info(adapter, verify=False).data)
    try:
        yield
    finally:
        if loaded is not None:
            restore_base(loaded)
        family.model.train(is_training)
        family.prompt_limit, family.choices = prompt_limit, choices
        family.use_max_pixels(max_pixels)


def mismatch(name: str, adapter_shape: Sequence[int] | None, model_shape: Sequence[int] | None) -> str | None:
    """How the shapes of a tensor differ; None: not at all. A shape is None if there is no such tensor."""
    texts = ["absent" if shape is None else str(list(shape)) for shape in (adapter_shape, model_shape)]
    if texts[0] == texts[1]:
        return None
    return f"{name} (adapter {texts[0]}, model {texts[1]})"


def check_shapes(directory: Path | str, info: AdapterInfo, mismatches: list[str | None]) -> None:
    """Raise InputError if there are mismatches; None in the list is a tensor that fits."""
    texts = [mismatch for mismatch in mismatches if mismatch]
    if texts:
        more = f" and {len(texts) - _MAX_NAMED} more" if len(texts) > _MAX_NAMED else ""
        raise InputError(
            f"adapter {directory} of base '{info.base_name}' does not fit this model: "
            f"{', '.join(texts[:_MAX_NAMED])}{more}. Load the base that it was trained on."
        )


def load_model(
    model: str,
    adapter: Path | None = None,
    *,
    dtype: str = "auto",
    device: str | None = None,
    quantize: str | None = None,
) -> Family:
    """Load a base, and an adapter on top of it if one is given, in evaluation mode.

    Args:
        model: directory or hub name of the base.
        dtype, device, quantize: see `normtune.models.loading.load`.

    Raises:
        InputError: the model does not exist, or the adapter belongs to another base.
    """
    from normtune.models.loading import load

    family = load(model, dtype=dtype, device=device, quantize=quantize)
    if adapter is not None:
        family.adapter = load_adapter(family.model, adapter)
        family.use_training_texts(read_adapter_info(adapter, verify=False).data)
    family.model.eval()
    return family
