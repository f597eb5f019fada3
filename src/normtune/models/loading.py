"""Loads models: `load` with weights, `load_without_weights` and `meta_model` for planning and counting.

The `model_type` of a checkpoint's config determines the family.
"""

from __future__ import annotations

import sys
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
    **dict.fromkeys(
        ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe", "glm4v"),
        ("normtune.models.families.qwen_vl", "QwenVLFamily"),
    ),
    "llava_onevision": ("normtune.models.families.llava_onevision", "LlavaOnevisionFamily"),
    "gemma3": ("normtune.models.families.gemma3", "Gemma3Family"),
    "gemma4": ("normtune.models.families.gemma4", "Gemma4Family"),
    "lfm2_vl": ("normtune.models.families.lfm2_vl", "Lfm2VlFamily"),
    "mistral3": ("normtune.models.families.mistral3", "Mistral3Family"),
    "mllama": ("normtune.models.families.mllama", "MllamaFamily"),
    "idefics3": ("normtune.models.families.idefics3", "Idefics3Family"),
    "smolvlm": ("normtune.models.families.idefics3", "Idefics3Family"),
    "internvl": ("normtune.models.families.internvl", "InternVLFamily"),
    "paligemma": ("normtune.models.families.paligemma", "PaliGemmaFamily"),
}
_GENERIC = ("normtune.models.families.generic", "GenericFamily")  # loads all other types of transformers
BUILT_IN = ("nano",)  # checkpoints that are part of the package
_TOKENIZER_ADVICE = "Or put the same tokenizer into the directory as tokenizer.json."
_SHAPES = "shapes"  # directory with configs of well-known models, for counting without their files


def load(
    model: str, *, dtype: str | torch.dtype = "auto", device: str | None = "cpu", quantize: str | None = None
) -> Family:
    """Load a base model with its processor.

    Args:
        model: 'nano', a local directory, or a name of the hub.
        dtype: the dtype of the weights, or "auto"; see `resolve_dtype`.
        device: where the model is put; None is CUDA if there is one, else the CPU.
        quantize: "int8" or "nf4": the linears of the language model's layers are quantised while they are
            read, so that the whole base is never in memory in `dtype`.

    Raises:
        InputError: there is no such model or device, no family for the model's type, or the package for
            quantisation is not installed.
    """
    import torch

    target = resolve_device(device)
    source = _source(model)
    family = family_type(model)
    torch_dtype = getattr(torch, resolve_dtype(dtype, target)) if isinstance(dtype, str) else dtype
    check_sentencepiece(Path(source), _TOKENIZER_ADVICE)
    loaded: Family
    if quantize is None:
        with quiet_loading(source):
            loaded = _load_or_explain(model, lambda: family.load(source, torch_dtype, target))
        loaded.source = model
        _show_self_test(loaded)
        return loaded
    from normtune.models.quantization import (
        allow_gradients_through,
        check_installed,
        keep_unquantised_samples,
        quantization_config,
        quiet_quantization,
    )
    from normtune.runtime.memory import release_freed_memory

    check_installed(quantize)
    release_freed_memory()
    with quiet_loading(source), quiet_quantization():
        structure = meta_model(model)
        config = quantization_config(structure, quantize, torch_dtype)
        loaded = _load_or_explain(model, lambda: family.load(source, torch_dtype, target, quantization=config))
    loaded.source, loaded.quantize = model, quantize
    _show_self_test(loaded)
    allow_gradients_through(loaded.model)
    keep_unquantised_samples(loaded.model, structure, source, torch_dtype)
    return loaded


def _show_self_test(family: Family) -> None:
    from normtune.runtime.distributed import is_main_process

    if family.self_test is not None and is_main_process():
        print(family.self_test.text(), file=sys.stderr)


def load_without_weights(model: str) -> Family:
    """Load a family with its processor around a model on the meta device, which can tokenise and collate.

    Raises:
        InputError: there is no such model, it has no processor, or no family loads it.
    """
    from transformers import GenerationConfig

    if model in known_architectures():
        raise InputError(f"'{model}' is a shape without a processor. Give a model: a directory or hub name.")
    family = family_type(model)
    source = _source(model)
    check_sentencepiece(Path(source), _TOKENIZER_ADVICE)
    body: Any = meta_model(model)
    with quiet_loading(source):
        processor = _load_or_explain(model, lambda: family.load_processor(source, str(body.config.model_type)))

    def build() -> Family:
        with suppress(OSError):  # not every checkpoint has this config; it names the tokens that end an answer
            body.generation_config = GenerationConfig.from_pretrained(source)
        return family(body.eval(), processor)

    loaded: Family = _load_or_explain(model, build)
    return loaded


def family_type(model: str) -> type[Family]:
    """The family class that loads a model. Raises `InputError` if there is no such model, or no family for its type."""
    config = _read_config(_source(model))
    model_type = str(config.get("model_type"))
    if model_type not in _FAMILIES:
        _check_generic(model, model_type, config)
    module, name = _FAMILIES.get(model_type, _GENERIC)
    family: type[Family] = getattr(import_module(module), name)
    return family


def self_test_report(model: str) -> dict[str, Any]:
    """For `normtune inspect`: the self-test of a model that the generic family loads; empty for other models.

    Returns:
        `self_test`: the fields of `SelfTest`, and its text. Of a model that cannot be loaded: `passed` and `text`.
    """
    if model in known_architectures() or str(_read_config(_source(model)).get("model_type")) in _FAMILIES:
        return {}
    try:
        family = load_without_weights(model)
    except InputError as error:
        return {"self_test": {"passed": False, "text": str(error)}}
    assert family.self_test is not None, "the generic family has one"
    return {"self_test": family.self_test_record()["self_test"] | {"text": family.self_test.text()}}


def _check_generic(model: str, model_type: str, config: dict[str, Any]) -> None:
    """Check that transformers itself has a vision-language model of this type.

    Raises:
        InputError: it has none, so that the generic family cannot load it.
    """
    from transformers import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

    if model_type in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
        return
    if model_type in CONFIG_MAPPING:
        reason = "which is no model that answers questions about images in transformers."
    elif config.get("auto_map"):
        reason = (
            "and its code is in the checkpoint. Normtune never runs such code (trust_remote_code). "
            "Use a checkpoint that was converted to a type of transformers."
        )
    else:
        reason = "which the installed transformers does not have. Upgrade it: pip install -U transformers."
    raise InputError(f"model {model} is of type '{model_type}', {reason} Families: {', '.join(_FAMILIES)}.")


def meta_model(model: str) -> nn.Module:
    """Make a model's modules on the meta device from its config, without reading weights.

    Args:
        model: a model as for `load`, or one of `known_architectures()`.

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
    raise InputError(f"model {model} of type '{config.model_type}' is not a supported vision-language model.")


def resolve_device(name: str | None) -> torch.device:
    """The device of this name; None is CUDA if there is one, else the CPU.

    Raises:
        InputError: this machine has no such device.
    """
    import torch

    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise InputError(
            f"device '{name}' is not available on this machine. Use cpu, or cuda if there is a GPU."
        ) from error
    return torch.device(name)


def resolve_dtype(name: str, device: torch.device) -> str:
    """The name of the dtype in which a base is loaded; "auto" depends on the device.

    Auto is bfloat16 on a GPU that computes in it (about ten times as fast as float32, with half the memory), and
    float32 elsewhere: on CPUs, most of which multiply bf16 matrices slowly, and on GPUs before NVIDIA's Ampere.
    """
    import torch

    if name != "auto":
        return name
    on_gpu = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return "bfloat16" if on_gpu else "float32"


def known_architectures() -> list[str]:
    """Names of well-known models with a config in the package, for `normtune inspect`."""
    folder = files("normtune.models").joinpath(_SHAPES)
    return sorted(entry.name.removesuffix(".json") for entry in folder.iterdir() if entry.name.endswith(".json"))


def _source(model: str) -> str:
    """The directory or hub name from which transformers loads `model`. Raises `InputError` if `model` is neither."""
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
        raise InputError(f"no model '{model}'{known or '.'} Give a local directory, a hub name owner/name, or 'nano'.")
    return model


def _read_config(source: str) -> dict[str, Any]:
    """The values of a checkpoint's config, also if transformers does not support its type."""
    from huggingface_hub import hf_hub_download

    config = Path(source) / "config.json"
    if not config.is_file():
        config = Path(_load_or_explain(source, lambda: hf_hub_download(source, "config.json")))
    values: dict[str, Any] = read_json(config)
    return values


@contextmanager
def quiet_loading(source: str) -> Iterator[None]:
    """Silence transformers' progress bars and warnings while a local model is loaded, not in downloads."""
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
    """Call `read()`, and turn its many kinds of errors into an InputError."""
    try:
        return read()
    except InputError:
        raise
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, ImportError, AttributeError) as error:
        if type(error).__name__ == "OutOfMemoryError":  # torch's; this module does not import torch at the top
            raise InputError(
                f"model {model} does not fit into the device's memory. Use --dtype bfloat16 or --quantize int8."
            ) from error
        reason = str(error).strip().split("\n")[0]
        raise InputError(
            f"cannot load model {model}: {reason} Check the name, or point at a whole local directory."
        ) from error
