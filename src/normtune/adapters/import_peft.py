"""Read adapters that PEFT wrote: `adapter_config.json` and `adapter_model.safetensors` in one directory.

| PEFT | what it becomes |
|---|---|
| LoRA, with rank and alpha patterns, rsLoRA or DoRA | PEFT's own layers on exactly the modules of the file |
| IA3 | the same |
| LN tuning, `modules_to_save`, trained biases | trained parameters of the base, as in Normtune's own adapters |
| prefix tuning (P-Tuning v2) | Normtune's prefix, with its keys rotated (see `_rotate_keys`) |

Every tensor of the file must have its place in the model; otherwise one error names those that have none. PEFT
records no fingerprint of the base, so that shapes and names are compared, not values.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from normtune.adapters.export_peft import PREFIX
from normtune.adapters.info import CONFIG_FILE, NOTICE, WEIGHTS_FILE, AdapterInfo, TrainedTensor
from normtune.adapters.storage import check_shapes, mismatch
from normtune.errors import InputError
from normtune.methods.adapt import TunedModel, adapt, restore_base
from normtune.methods.lora import exact_name_pattern, ia3_config, inject
from normtune.methods.prefix import Prefix
from normtune.methods.recipe import parse
from normtune.methods.registry import INTRINSIC
from normtune.methods.sites import AddedLayers, TargetLinear
from normtune.models.checkpoints.parameter_map import find_renaming
from normtune.models.checkpoints.reader import read_header, read_tensor
from normtune.models.parts import find_parts
from normtune.runtime.files import file_sha256, read_json

_log = logging.getLogger(__name__)
_LORA, _DORA = "lora", "dora"  # methods of tensors: a server can mix the rows of the first, not of the second
_ADDED = {  # end of PEFT's name -> end of our name
    ".lora_A.weight": ".lora_A",
    ".lora_B.weight": ".lora_B",
    ".lora_magnitude_vector": ".lora_magnitude_vector",
    ".ia3_l": ".ia3",
}
_LN_LAYERS = ".ln_tuning_layers."
_PREFIX_PART = "language"
_PREFIX_NAME = f"{_PREFIX_PART}.prefix.embedding.weight"
_METHODS = {"LORA": _LORA, "IA3": "ia3", "LN_TUNING": "ln", "PREFIX_TUNING": "ptuning"}
# options of LoRA that compute something else than W + (alpha / r) B A or DoRA's weight
_OTHER_LORAS = (
    *("layer_replication", "target_parameters", "trainable_token_indices", "alora_invocation_tokens", "lora_bias"),
    *("use_qalora", "use_bdlora", "arrow_config", "kasa_config", "velora_config", "monteclora_config"),
)
# language models with rotary positions of one kind in every layer, and no sliding window
_ROTARY_TYPES = ("llama", "mistral", "qwen2", "qwen3")


def read_peft_info(directory: Path) -> AdapterInfo:
    """Describe an adapter of PEFT as `adapter.json` describes one of Normtune's; its base has no fingerprint.

    Raises:
        InputError: the files are incomplete, or the adapter's kind is not supported.
    """
    config = read_json(directory / CONFIG_FILE)
    kind = str(config.get("peft_type"))
    if kind not in _METHODS:
        raise InputError(f"{directory} is a PEFT adapter of type {kind}. Supported: {', '.join(_METHODS)}.")
    if others := [name for name in _OTHER_LORAS if config.get(name)]:
        raise InputError(f"{directory / CONFIG_FILE}: {others[0]} is not supported. Merge the adapter with PEFT.")
    recipe, method = _describe(config, kind)
    tensors = {
        name: TrainedTensor(list(shape), "", "", method if is_added or kind == "LN_TUNING" else "full")
        for name, (shape, is_added) in _read_shapes(directory, kind).items()
    }
    return AdapterInfo(
        base_name=str(config.get("base_model_name_or_path") or "not recorded"),
        base_fingerprint="",
        recipe=recipe,
        trainable=sum(math.prod(tensor.shape) for tensor in tensors.values()),
        total=0,
        data=None,
        metrics=None,
        versions={"peft": str(config.get("peft_version") or "not recorded")},
        notice=NOTICE,
        sha256=file_sha256(directory / WEIGHTS_FILE),
        tensors=tensors,
    )


def read_peft_tensors(directory: Path, info: AdapterInfo) -> dict[str, Tensor]:
    """Read the tensors of an adapter of PEFT in fp32, under their names in `info`, which are in the file's order."""
    path = directory / WEIGHTS_FILE
    tensors = [read_tensor(path, key).float() for key in read_header(path)]
    return dict(zip(info.tensors, tensors, strict=True))


def fit_names(info: AdapterInfo, model: nn.Module, names: Collection[str]) -> AdapterInfo:
    """Give the tensors of an adapter their names in a model, by the rules that transformers has for checkpoints.

    Adapters that were made with transformers before 4.52 have the names of that time, such as
    `language_model.model.layers.0.mlp.up_proj` for `model.language_model.layers.0.mlp.up_proj`.

    Args:
        names: of the model's parameters.
    """
    names = frozenset(names)
    owners = {name: _owner(name, tensor) for name, tensor in info.tensors.items()}
    if names.issuperset(owners.values()) or not isinstance(model, PreTrainedModel):
        return info
    rename = find_renaming(model, names)
    tensors: dict[str, TrainedTensor] = {}
    for name, tensor in info.tensors.items():
        owner, _ = rename(owners[name])
        if owners[name] not in names and owner in names:
            name = owner if tensor.method in INTRINSIC else f"{owner.rpartition('.')[0]}.{name.rpartition('.')[2]}"
        tensors[name] = tensor
    return replace(info, tensors=tensors) if len(tensors) == len(info.tensors) else info


def _owner(name: str, tensor: TrainedTensor) -> str:
    """The parameter of the base that an adapter's tensor is, or the weight of the linear that it changes."""
    return name if tensor.method in INTRINSIC else f"{name.rpartition('.')[0]}.weight"


def attach_peft(model: nn.Module, directory: Path, info: AdapterInfo, *, keep_base: bool) -> TunedModel:
    """Add what an adapter of PEFT trains to a model, without its values.

    Args:
        keep_base: see `normtune.methods.adapt.adapt`.

    Raises:
        InputError: a tensor of the file has no place in the model, or another shape there.
    """
    _check_base_name(model, directory, info)
    if _PREFIX_NAME in info.tensors:
        tuned = _attach_prefix(model, directory, info, keep_base=keep_base)
    else:
        tuned = _attach_layers(model, directory, info, keep_base=keep_base)
    tuned.recipe = parse(info.recipe)
    tuned.base_name, tuned.is_imported = info.base_name, True
    return tuned


def prepare_values(tuned: TunedModel, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """The values of the trained parameters: the tensors of the file, with the keys of a prefix rotated."""
    if _PREFIX_NAME not in tensors:
        return tensors
    return {_PREFIX_NAME: _rotate_keys(tuned, tensors[_PREFIX_NAME])}


def _read_shapes(directory: Path, kind: str) -> dict[str, tuple[tuple[int, ...], bool]]:
    """Our name of each tensor in the file, in its order -> (shape, whether it was added to the base)."""
    path = directory / WEIGHTS_FILE
    if not path.is_file():
        raise InputError(f"{path} is missing. Copy the adapter again, or save it with safe_serialization=True.")
    shapes = {}
    for key, entry in read_header(path).items():
        name, is_added = _our_name(key, kind)
        shapes[name] = entry.shape, is_added
    return shapes


def _our_name(key: str, kind: str) -> tuple[str, bool]:
    if kind == "PREFIX_TUNING" and key == "prompt_embeddings":
        return _PREFIX_NAME, True
    name = key.removeprefix(PREFIX)
    for end, our_end in _ADDED.items():
        if name.endswith(end):
            return name.removesuffix(end) + our_end, True
    # a bias of a linear with a LoRA has the name of the linear inside PEFT's layer
    return name.replace(_LN_LAYERS, ".").replace(".base_layer.", "."), False


def _describe(config: Mapping[str, Any], kind: str) -> tuple[str, str]:
    """The recipe that describes an adapter, and the method of the tensors that it added.

    A LoRA's options are the ones that a server needs to mix its rows. The rows of a LoRA with patterns cannot be mixed,
    so that it has another method.
    """
    if kind == "PREFIX_TUNING":
        return f"{_PREFIX_PART}=ptuning(n={int(config['num_virtual_tokens'])})", _METHODS[kind]
    if kind != "LORA":
        return f"all={_METHODS[kind]}", _METHODS[kind]
    rank, alpha = int(config["r"]), float(config["lora_alpha"])
    if config.get("use_rslora"):
        alpha *= math.sqrt(rank)  # alpha / sqrt(r) = (alpha sqrt(r)) / r
    if config.get("use_dora"):
        return "all=lora", _DORA
    if config.get("rank_pattern") or config.get("alpha_pattern") or alpha != int(alpha):
        return "all=lora", "lora with patterns"
    return f"all=lora(r={rank},alpha={int(alpha)})", _LORA


def _check_base_name(model: nn.Module, directory: Path, info: AdapterInfo) -> None:
    """Warn if the adapter names another base than the one that is loaded; a copy may have any name."""
    loaded = str(getattr(getattr(model, "config", None), "name_or_path", "") or "")
    if loaded and info.base_name != "not recorded" and Path(loaded).name != Path(info.base_name).name:
        _log.warning(
            "%s names the base '%s', and '%s' is loaded. Only shapes are compared", directory, info.base_name, loaded
        )


def _attach_layers(model: nn.Module, directory: Path, info: AdapterInfo, *, keep_base: bool) -> TunedModel:
    """Train the base's own parameters that the file has, and add PEFT's layers to the linears that it names."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    names_of = Counter(id(parameter) for parameter in parameters.values())  # parameter -> number of its names
    linears: dict[str, TargetLinear] = {}  # those with added layers
    part_of: dict[str, str] = {}
    info_of = {parameter.name: parameter for parameter in find_parts(model).parameters}
    unplaced: list[str | None] = []
    for name, tensor in info.tensors.items():
        owner = _owner(name, tensor)
        module: Any = None if owner not in parameters else model.get_submodule(owner.rpartition(".")[0])
        if owner not in parameters or (tensor.method not in INTRINSIC and not isinstance(module, nn.Linear)):
            unplaced.append(mismatch(name, tensor.shape, None))
            continue
        if tensor.method in INTRINSIC and names_of[id(parameters[name])] > 1:  # PEFT's copies are not tied
            unplaced.append(f"{name} (tied to another tensor of this model)")
            continue
        if tensor.method in INTRINSIC:
            unplaced.append(mismatch(name, tensor.shape, parameters[name].shape))
        part_of[name] = info_of[owner].part
        if tensor.method not in INTRINSIC:
            linear = owner.removesuffix(".weight")
            linears[linear] = TargetLinear(linear, info_of[owner].role, info_of[owner].layer or 0, module)
    check_shapes(directory, info, unplaced)
    intrinsic = {name for name, tensor in info.tensors.items() if tensor.method in INTRINSIC}
    tuned = adapt(
        model, "all=full" if intrinsic else "all=frozen", keep_base=keep_base, train_unused=True, names=intrinsic
    )
    tuned.methods = {name: info.tensors[name].method for name in tuned.trained}
    if not linears:
        return tuned
    with _restored_on_error(tuned):
        layers, remove = inject(model, _layer_config(directory, info, list(linears)), list(linears.values()))
        added: dict[str, nn.Parameter] = {}
        for linear, layer in layers.items():
            for name, parameter in layer.named_parameters():
                attribute = name.partition(".")[0]  # lora_A.normtune.weight, ia3_l.normtune
                if attribute != "base_layer":
                    added[f"{linear}.{'ia3' if attribute == 'ia3_l' else attribute}"] = parameter
        tuned.additions.append(AddedLayers(added, remove, layers))
        for name, parameter in added.items():
            parameter.requires_grad_(True)
            tuned.trained[name] = parameter
            in_file = info.tensors.get(name)
            unplaced.append(mismatch(name, in_file.shape if in_file else None, parameter.shape))
            tuned.methods[name] = in_file.method if in_file else ""
            tuned.part_and_role[name] = (part_of.get(name, ""), tuned.methods[name])
        check_shapes(directory, info, unplaced)
    return tuned


def _layer_config(directory: Path, info: AdapterInfo, linears: list[str]) -> Any:
    """PEFT's config of the added layers, on exactly these linears."""
    from peft import LoraConfig, PeftConfig
    from peft.utils.other import get_pattern_key

    config = PeftConfig.from_pretrained(str(directory))
    if not isinstance(config, LoraConfig):
        inputs = [name.rpartition(".")[0] for name, tensor in info.tensors.items() if tensor.shape[:1] == [1]]
        return ia3_config([name for name in linears if name not in inputs], inputs)
    # the patterns are for the names in the file; the model may have newer names
    in_file = [name.rpartition(".")[0] for name in _read_shapes(directory, "LORA")]
    linear_in_file = dict(zip((name.rpartition(".")[0] for name in info.tensors), in_file, strict=True))

    def fit(pattern: dict[str, Any] | None) -> dict[str, Any]:
        values = {
            name: (pattern or {}).get(get_pattern_key([*(pattern or {})], linear_in_file[name])) for name in linears
        }
        return {exact_name_pattern([name]): value for name, value in values.items() if value is not None}

    return LoraConfig(
        r=config.r,
        lora_alpha=config.lora_alpha,
        use_rslora=config.use_rslora,
        use_dora=config.use_dora,
        rank_pattern=fit(config.rank_pattern),
        alpha_pattern=fit(config.alpha_pattern),
        target_modules=exact_name_pattern(linears),
    )


def _attach_prefix(model: nn.Module, directory: Path, info: AdapterInfo, *, keep_base: bool) -> TunedModel:
    """Add a prefix to the language model."""
    others = [name for name in info.tensors if name != _PREFIX_NAME]
    check_shapes(directory, info, [mismatch(name, info.tensors[name].shape, None) for name in others])
    config: Any = getattr(model, "config", None)
    text: Any = None if config is None else config.get_text_config()
    kind = getattr(text, "model_type", "")
    rope = str((getattr(text, "rope_parameters", None) or {}).get("rope_type", "default"))
    if (
        kind not in _ROTARY_TYPES
        or rope in ("dynamic", "longrope")
        or (getattr(text, "sliding_window", None) and getattr(text, "use_sliding_window", True))
    ):
        raise InputError(
            f"{directory} is a prefix for a language model of type '{kind}' with {rope} positions. PEFT moves the "
            f"positions of its tokens, which is supported for {', '.join(_ROTARY_TYPES)} without a sliding window."
        )
    tuned = adapt(model, info.recipe, keep_base=keep_base)
    shapes = info.tensors[_PREFIX_NAME].shape, tuned.trained[_PREFIX_NAME].shape
    with _restored_on_error(tuned):
        check_shapes(directory, info, [mismatch(_PREFIX_NAME, *shapes)])
    return tuned


def _rotate_keys(tuned: TunedModel, values: Tensor) -> Tensor:
    """Rotate the keys of a prefix so that tokens may keep their positions.

    PEFT passes the n keys k as a cache, which moves every token's position p to p + n. Normtune moves none. With
    the rotation R of rotary positions, (R(p + n) q) . k = (R(p) q) . (R(-n) k): the keys R(-n) k give the same
    attention.

    Args:
        values: [n, layers * 2 * width]: of each layer its keys, then its values.
    """
    model: Any = tuned.model
    prefix = next(module for module in model.modules() if isinstance(module, Prefix))
    n, head_dim = prefix.n, prefix.width // prefix.heads
    frequencies: Tensor = model.get_decoder().rotary_emb.inv_freq.detach().cpu().double()
    angles = (n * frequencies).repeat(2)  # [rotated dimensions]
    both = values.double().view(n, prefix.depth, 2, prefix.heads, head_dim).clone()
    keys = both[:, :, 0, :, : len(angles)]
    first, second = keys.chunk(2, dim=-1)
    both[:, :, 0, :, : len(angles)] = keys * angles.cos() - torch.cat([-second, first], -1) * angles.sin()
    return both.view(values.shape).to(values.dtype)


@contextmanager
def _restored_on_error(tuned: TunedModel) -> Iterator[None]:
    """Remove what was added so far if the block raises an InputError."""
    try:
        yield
    except InputError:
        with suppress(InputError):  # trained in place without `keep_base`: the values of the base are lost
            restore_base(tuned)
        raise
