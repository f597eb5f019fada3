"""Model families by the `model_type` of a checkpoint's config: `load` for work, `skeleton` for counting."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib import import_module
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from normtune.errors import InputError, did_you_mean
from normtune.models.processors import check_sentencepiece
from normtune.runtime.files import read_json

if TYPE_CHECKING:
    import torch
    from torch import nn

    from normtune.models.family import Family

# model_type -> (module, class) of the family that loads it
_FAMILIES = {
    "miss": ("normtune.models.families.miss", "MissFamily"),
    "llava": ("normtune.models.families.llava", "LlavaFamily"),
    "llava_next": ("normtune.models.families.llava_next", "LlavaNextFamily"),
    "qwen2_vl": ("normtune.models.families.qwen_vl", "QwenVLFamily"),
    "qwen2_5_vl": ("normtune.models.families.qwen_vl", "QwenVLFamily"),
    "qwen3_vl": ("normtune.models.families.qwen_vl", "QwenVLFamily"),
    "gemma3": ("normtune.models.families.gemma3", "Gemma3Family"),
    "idefics3": ("normtune.models.families.idefics3", "Idefics3Family"),
    "smolvlm": ("normtune.models.families.idefics3", "Idefics3Family"),
    "internvl": ("normtune.models.families.internvl", "InternVLFamily"),
    "paligemma": ("normtune.models.families.paligemma", "PaliGemmaFamily"),
}
BUILT_IN = ("nano",)  # checkpoints that come with the package
_AS_JSON = "Or put the same tokenizer beside it as tokenizer.json."
_SHAPES = "shapes"  # folder of configs of well-known models, for counting without their files


def load(
    model: str,
    *,
    dtype: str | torch.dtype = "float32",
    device: str | None = "cpu",
    quantize: str | None = None,
) -> Family:
    """Load a base: 'nano', a local directory, or a name of the hub; `device` None is CUDA where there is one.

    With `quantize` ("int8", "nf4") the linears of the language model's layers are quantised while they are
    read, so that the base is never held whole in `dtype`.

    Raises:
        InputError: there is no such model or device, no family for the model's kind, or the package that
            quantises is not installed.
    """
    import torch

    place = resolve_device(device)
    source = _source(model)
    family = family_type(model)
    wanted = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    check_sentencepiece(Path(source), _AS_JSON)
    if quantize is None:
        with quiet_loading(source):
            return _load_or_explain(model, lambda: family.load(source, wanted, place))
    from normtune.models.quantization import check_installed, frozen_linears, quantization_config, quiet
    from normtune.runtime.memory import release_freed_memory

    check_installed(quantize)
    release_freed_memory()
    with quiet_loading(source), quiet():
        how = quantization_config(meta_model(model), quantize, wanted)
        loaded: Family = _load_or_explain(model, lambda: family.load(source, wanted, place, quantization=how))
    frozen_linears(loaded.model)
    return loaded


def load_without_weights(model: str) -> Family:
    """The family with its processor around a model on the meta device: questions can be laid out.

    Raises:
        InputError: there is no such model, it has no processor, or no family loads it.
    """
    if model in known_architectures():
        raise InputError(f"'{model}' is a shape without a processor. Give a model: a directory or hub name.")
    family = family_type(model)
    source = _source(model)
    check_sentencepiece(Path(source), _AS_JSON)
    body: Any = meta_model(model)
    with quiet_loading(source):
        processor = _load_or_explain(
            model, lambda: family.load_processor(source, str(body.config.model_type))
        )
    made: Family = _load_or_explain(model, lambda: family(_generating(body.eval(), source), processor))
    return made


def _generating(body: Any, source: str) -> Any:
    """The model with its checkpoint's generation config, which says what ends an answer."""
    from transformers import GenerationConfig

    with suppress(OSError):  # not every checkpoint has one
        body.generation_config = GenerationConfig.from_pretrained(source)
    return body


def family_type(model: str) -> type[Family]:
    """The class that loads a model.

    Raises:
        InputError: there is no such model, or no family for its kind.
    """
    model_type = _model_type(_source(model))
    if model_type not in _FAMILIES:
        raise InputError(
            f"model {model} is of type '{model_type}', which no family loads. "
            f"Families: {', '.join(_FAMILIES)}. (normtune inspect can count it all the same.)"
        )
    module, name = _FAMILIES[model_type]
    found: type[Family] = getattr(import_module(module), name)
    return found


def meta_model(model: str) -> nn.Module:
    """The model's modules on the meta device, made from its config alone: no weights are read.

    `model` may also be the name of a shape: see `shapes()`.

    Raises:
        InputError: there is no such model.
    """
    import torch
    from transformers import (
        AutoConfig,
        AutoModelForCausalLM,
        AutoModelForImageTextToText,
        AutoModelForVisualQuestionAnswering,
    )

    from normtune.models.miss.model import register

    register()
    shape = files("normtune.models").joinpath(_SHAPES, f"{model}.json")
    if model in known_architectures():
        values = read_json(Path(str(shape)))
        config = AutoConfig.for_model(**values)
    else:
        config = _load_or_explain(model, lambda: AutoConfig.from_pretrained(_source(model)))
    for auto in (AutoModelForImageTextToText, AutoModelForVisualQuestionAnswering, AutoModelForCausalLM):
        if type(config) in auto._model_mapping:
            with torch.device("meta"):
                return auto.from_config(config)
    raise InputError(f"model {model} of type '{config.model_type}' is no vision-language model known here.")


def resolve_device(name: str | None) -> torch.device:
    """The device of that name; None is CUDA where there is one.

    Raises:
        InputError: there is no such device here.
    """
    import torch

    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise InputError(
            f"device '{name}' is not to be had here. Use cpu, or cuda where there is one."
        ) from error
    return torch.device(name)


def known_architectures() -> list[str]:
    """Names of well-known models whose config comes with the package, for `inspect`."""
    folder = files("normtune.models").joinpath(_SHAPES)
    return sorted(
        entry.name.removesuffix(".json") for entry in folder.iterdir() if entry.name.endswith(".json")
    )


def _source(model: str) -> str:
    """What transformers loads `model` from."""
    if model in BUILT_IN:
        return str(files("normtune.models").joinpath(model))
    path = Path(model)
    if path.is_dir():
        if not (path / "config.json").is_file():
            hint = "an adapter: give it as --adapter" if (path / "adapter.json").is_file() else "no model"
            raise InputError(f"{model} holds no config.json: it is {hint}. Point at a model's directory.")
        return model
    if path.exists():
        raise InputError(f"{model} is a file. Point at the directory that holds the model's config.json.")
    if model.count("/") != 1 or model.startswith((".", "/", "~")):
        known = did_you_mean(model, (*BUILT_IN, *known_architectures()))
        raise InputError(
            f"no model '{model}'{known or '.'} Give a local directory, a hub name owner/name, or 'nano'."
        )
    return model


def _model_type(source: str) -> str:
    """The `model_type` of a checkpoint's config, whether or not transformers knows it."""
    from huggingface_hub import hf_hub_download

    config = Path(source) / "config.json"
    if not config.is_file():
        config = Path(_load_or_explain(source, lambda: hf_hub_download(source, "config.json")))
    return str(read_json(config).get("model_type"))


@contextmanager
def quiet_loading(source: str) -> Iterator[None]:
    """Transformers draws bars and warns of types that it does not know; only a download needs them."""
    from huggingface_hub.utils import are_progress_bars_disabled
    from transformers.utils import logging

    if not Path(source).is_dir():
        yield
        return
    level = logging.get_verbosity()
    bars = logging.is_progress_bar_enabled() and not are_progress_bars_disabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def _load_or_explain(model: str, read: Callable[[], Any]) -> Any:
    """`read()`, its many kinds of failure turned into one error."""
    try:
        return read()
    except InputError:
        raise
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        if type(error).__name__ == "OutOfMemoryError":  # torch's, which this module does not import
            raise InputError(
                f"model {model} does not fit into the device's memory. Hold it in --dtype bfloat16, or in "
                "fewer bits: --quantize int8."
            ) from error
        reason = str(error).strip().split("\n")[0]
        raise InputError(
            f"cannot load model {model}: {reason} Check the name, or point at a whole local directory."
        ) from error
