"""Models and adapters: load, adapt, merge, export."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from torch import nn

from normtune.adapters.hub import local_folder
from normtune.errors import InputError
from normtune.methods.adapt import TunedModel
from normtune.models.family import Family

if TYPE_CHECKING:
    from normtune.adapters.export_peft import Exported
    from normtune.adapters.merge import Merged
    from normtune.methods.recipe import Recipe

Model = str | Path | Family  # a name of the hub, a local directory, 'nano', or a loaded model
Adapter = str | Path | TunedModel  # a directory, a name of the hub, or the adapter that is in a model


def load(model: str | Path, *, dtype: str = "auto", device: str | None = None, quantize: str | None = None) -> Family:
    """Load a model with its processor.

    Every other function takes the result in place of a name, and does not load the model again.

    Args:
        model: 'nano', a local directory, or a name of the hub.
        dtype: the dtype of the weights: float32, bfloat16, or auto: bfloat16 on a GPU that supports it, else float32.
        device: cpu or cuda; None: cuda if available.
        quantize: int8 or nf4: quantise the language model's linear layers.

    Returns:
        A family: `.model` is the transformers model, `.processor` its processor.

    Raises:
        InputError: there is no such model or device, or no family loads it.
    """
    from normtune.models import loading

    return loading.load(str(model), dtype=dtype, device=device, quantize=quantize)


def adapt(model: Model | nn.Module, recipe: str | Recipe, *, seed: int = 0) -> TunedModel:
    """Make a model trainable as a recipe describes; everything else is frozen.

    ```python
    tuned = normtune.adapt(model, "language=ln,vision=ln")
    optimizer = torch.optim.AdamW(tuned.trained.values(), lr=1e-3)
    ```

    `tuned.model` trains in any loop, with the Hugging Face Trainer too. `normtune.save_adapter` writes what was
    trained, and `normtune.restore_base` removes it.

    Args:
        model: a name, a loaded model, or any transformers model; it is changed in place.
        recipe: a recipe, such as `ln` or `vision=ln,language=lora(r=8)`.
        seed: seeds the initial values of added layers.

    Raises:
        InputError: the recipe is not valid, does not fit the model, or an adapter is in the model already.
    """
    from normtune.adapters.fingerprint import fingerprint
    from normtune.methods import adapt as methods

    base = _open_base(model)
    network = base.model if isinstance(base, Family) else base
    base_fingerprint = fingerprint(network)
    tuned = methods.adapt(network, recipe, seed=seed)
    tuned.base_name, tuned.base_fingerprint = _base_name(base), base_fingerprint
    if isinstance(base, Family):
        base.adapter = tuned
    return tuned


def load_adapter(model: Model | nn.Module, adapter: str | Path, *, allow_other_base: bool = False) -> TunedModel:
    """Put an adapter of a directory or of the hub into a model.

    ```python
    tuned = normtune.load_adapter("nano", "runs/ln")
    ```

    Args:
        model: a name, a loaded model, or a transformers model; it is changed in place.
        adapter: directory of the adapter, which PEFT may have written, or its name on the hub.
        allow_other_base: accept a base with other values, if its shapes fit.

    Raises:
        InputError: the adapter is damaged, belongs to another base, or an adapter is in the model already.
    """
    from normtune.adapters import storage

    base = _open_base(model)
    network = base.model if isinstance(base, Family) else base
    tuned = storage.load_adapter(network, local_folder(adapter), allow_other_base=allow_other_base)
    if isinstance(base, Family):
        base.adapter = tuned
    return tuned


def merge(model: Model, *, adapter: Adapter, out: str | Path) -> Merged:
    """Merge an adapter into its base model, as a checkpoint that plain transformers loads.

    Args:
        model: the base: a name, or a loaded model; its files are read again.
        adapter: directory of the adapter, or the adapter that is in a model.
        out: directory of the merged model; it must be new or empty.

    Raises:
        InputError: `out` is in use, the adapter belongs to another base, or its method cannot be merged.
    """
    from normtune.adapters.merge import merge_to_disk

    with _adapter_directory(adapter) as directory:
        return merge_to_disk(_base_name(model), directory, Path(out))


def export_peft(model: Model | None = None, *, adapter: Adapter, out: str | Path) -> Exported:
    """Export an adapter to the PEFT format, for `PeftModel.from_pretrained`.

    Args:
        model: the base that the exported adapter names; None: as the adapter names it.
        adapter: directory of the adapter, or the adapter that is in a model.
        out: directory of the exported adapter; it must be new or empty.

    Raises:
        InputError: `out` is in use, the adapter is damaged, or PEFT has no equivalent for it.
    """
    from normtune.adapters import export_peft as peft

    with _adapter_directory(adapter) as directory:
        return peft.export_peft(directory, Path(out), model=None if model is None else _base_name(model))


@contextmanager
def open_model(model: Model, adapter: Adapter | None, **options: str | None) -> Iterator[Family]:
    """Yield a model in evaluation mode with an adapter in it; a loaded model is the base again afterwards.

    Args:
        model: a name, or a loaded model.
        adapter: directory of the adapter, or the adapter that is in the loaded model; None: the base.
        options: device and quantize, for a model that is loaded here.

    Raises:
        InputError: the model cannot be loaded, or the adapter does not belong to it.
    """
    from normtune.adapters import storage

    family = loaded_or_none(model)
    if family is not None:
        refuse_options([name for name, value in options.items() if value is not None], "normtune.load")
        with storage.use_adapter(family, local_adapter(adapter)):
            yield family
        return
    yield storage.load_model(str(model), adapter_path(adapter), **options)  # type: ignore[arg-type]


def loaded_or_none(model: Any) -> Family | None:
    """Return the model if it is loaded, None if it is a name; raise an `InputError` if it is neither."""
    if isinstance(model, Family):
        return model
    if not isinstance(model, str | Path):
        raise InputError(
            f"a {type(model).__name__} is not a model with its processor. Give a name, or normtune.load(name)."
        )
    return None


def adapter_path(adapter: Adapter | None) -> Path | None:
    """Return the directory of an adapter for a model that is loaded by its name.

    Raises:
        InputError: the adapter is in another model.
    """
    if isinstance(adapter, TunedModel):
        raise InputError("this adapter is in a loaded model. Give that model instead of a name.")
    return None if adapter is None else local_folder(adapter)


def local_adapter(adapter: Adapter | None) -> Path | TunedModel | None:
    """Return an adapter with its folder in place of its name on the hub."""
    return adapter if adapter is None or isinstance(adapter, TunedModel) else local_folder(adapter)


def refuse_options(names: Sequence[str], function: str) -> None:
    """Refuse options that have no effect, because an object was made by another function."""
    if names:
        raise InputError(f"{names[0]} is an option of {function}, which has made this object already. Give it there.")


def check_is_base(model: object) -> None:
    """Raise an `InputError` if there is an adapter in a loaded model."""
    if isinstance(model, Family) and model.adapter is not None:
        raise InputError(
            f"the model has an adapter in it ('{model.adapter.recipe}'). Remove it: normtune.restore_base(tuned)."
        )


def _open_base(model: Model | nn.Module) -> Family | nn.Module:
    """Load a model that is given by its name, and check that no adapter is in it."""
    check_is_base(model)
    return load(model) if isinstance(model, str | Path) else model


def _base_name(base: Model | nn.Module) -> str:
    """The directory or hub name of a base, else the name of its class."""
    if isinstance(base, str | Path):
        return str(base)
    source = base.source if isinstance(base, Family) else getattr(base, "name_or_path", "")
    return str(source) or type(base).__name__


@contextmanager
def _adapter_directory(adapter: Adapter) -> Iterator[Path]:
    """Yield the directory of an adapter; an adapter in a model is written to a temporary one."""
    if not isinstance(adapter, TunedModel):
        yield local_folder(adapter)
        return
    from normtune.adapters import storage

    with TemporaryDirectory() as directory:
        storage.save_adapter(adapter, directory)
        yield Path(directory)
