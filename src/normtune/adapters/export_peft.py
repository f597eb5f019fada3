"""A delta as an adapter of Hugging Face PEFT, for `PeftModel.from_pretrained(base, directory)`.

- ln, bias, attention, ffn, full: PEFT's LN tuning, which copies whatever modules it is told, norms or not,
  and swaps the copies in; each is told by its full name. PEFT warns of modules that are not linear, and of
  tensors that are not in the file where only a bias was trained: they keep the base's values, as they should.
- lora: LoRA on exact modules, with each part's rank and alpha. ia3: IA3 on exact modules.
- prefix, ptuning, adapter, mixtures of the above: refused, with the reason.

PEFT keeps LN tuning's tensors in the base's dtype: loaded on a bf16 base the trained gains are rounded, where
Normtune keeps them in fp32. On an fp32 base the logits are equal. The config names no task type, so PEFT
passes a model's arguments through as they are; MISS takes none of those that PEFT's task classes add.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from peft import IA3Config, LNTuningConfig, LoraConfig, PeftConfig
from torch import Tensor

from normtune.adapters.info import AdapterInfo
from normtune.adapters.model_card import model_card
from normtune.adapters.storage import CARD_FILE, read_adapter_info, read_tensors, write_tensors
from normtune.errors import InputError
from normtune.methods.lora import exact_name_pattern
from normtune.methods.recipe import parse
from normtune.methods.registry import Method
from normtune.runtime.files import atomic_directory, write_json, write_text

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"

_PREFIX = "base_model.model."  # PEFT's wrappers, in the names of the tensors it saves
_KINDS = {"lora": "LoRA", "ia3": "IA3"}
_LEAVES = ("weight", "bias")  # parameters of modules that hold nothing else
_PREFIX_REASON = (
    "PEFT passes a prefix as a cache, which moves every token's position, and Normtune's moves none"
)
_REASONS = {
    "prefix": _PREFIX_REASON,
    "ptuning": _PREFIX_REASON,
    "adapter": "PEFT has no bottleneck adapters",
}


@dataclass(frozen=True)
class Exported:
    """What an export wrote."""

    out: str
    method: str  # PEFT's name of it
    base: str
    modules: int
    tensors: int
    values: int


def export_peft(adapter: Path, out: Path, *, model: str | None = None) -> Exported:
    """Write a delta in PEFT's layout; no weights of the base are needed.

    `model` is the base's name in the config, where it is another than the one the delta was trained with.

    Raises:
        InputError: `out` is in use, the delta is broken, or PEFT can't hold what it trained (the error says
            which part, and why).
    """
    info = read_adapter_info(adapter)
    kind = _kind(info)
    config, key_of = _METHODS[kind](info)
    config.base_model_name_or_path = model or info.base_name
    config.inference_mode = True
    found = read_tensors(adapter, info)
    tensors: dict[str, Tensor] = {_PREFIX + key_of(name): tensor for name, tensor in found.items()}
    with atomic_directory(out) as building:
        write_json(building / CONFIG_FILE, config.to_dict())
        write_tensors(building / WEIGHTS_FILE, tensors)
        write_text(building / CARD_FILE, _card(info))
    return Exported(
        out=str(out),
        method=kind,
        base=str(config.base_model_name_or_path),
        modules=len({_module(name) for name in found}),
        tensors=len(found),
        values=sum(tensor.numel() for tensor in found.values()),
    )


def export_text(exported: Exported) -> str:
    """The result for people."""
    return (
        f"wrote {exported.out}: PEFT's {exported.method} on {exported.modules} modules, "
        f"{exported.values:,} values\n"
        f"load it with PeftModel.from_pretrained(base, '{exported.out}'), base being {exported.base}"
    )


def _card(info: AdapterInfo) -> str:
    head, _, _ = model_card(info).partition("\n`adapter.safetensors`")
    return head + "\nIn PEFT's layout: load it with `PeftModel.from_pretrained(base, directory)`.\n"


def _kind(info: AdapterInfo) -> str:
    """The one PEFT method that holds the delta: a key of `_METHODS`.

    Raises:
        InputError: none does.
    """
    parts: dict[str, dict[str, str]] = {}  # kind -> part -> method
    for one in info.tensors.values():
        if one.method in _REASONS:
            raise InputError(
                f"part '{one.part}' was trained by {one.method}, which can't be exported: "
                f"{_REASONS[one.method]}. Use the delta with --adapter."
            )
        kind = _KINDS.get(one.method, "LN tuning")
        parts.setdefault(kind, {}).setdefault(one.part, one.method)
    if len(parts) > 1:
        told = "; ".join(f"{kind} holds {_listed(where)}" for kind, where in parts.items())
        raise InputError(
            f"a PEFT adapter holds one method and this delta needs {len(parts)} ({told}). "
            "Use normtune merge instead."
        )
    if not parts:
        raise InputError("the delta holds no tensors: there is nothing to export.")
    return next(iter(parts))


def _listed(where: Mapping[str, str]) -> str:
    return ", ".join(f"part '{part}' ({method})" for part, method in where.items())


def _module(name: str) -> str:
    return name.rpartition(".")[0]


def _ln_tuning(info: AdapterInfo) -> tuple[PeftConfig, Callable[[str], str]]:
    """PEFT's LN tuning, on whatever modules hold the trained tensors."""
    for name, one in info.tensors.items():
        leaf = name.rpartition(".")[2]
        if leaf not in _LEAVES:
            reason = f"'{leaf}' is a tensor beside other modules, and PEFT swaps whole modules"
        elif leaf == "weight" and len(one.shape) == 2 and one.role in ("embedding", "head"):
            reason = "it may be tied to another tensor, and PEFT's copies aren't"
        else:
            continue
        raise InputError(
            f"{name} (part '{one.part}', {one.method}) can't be exported: {reason}. "
            "Use normtune merge instead."
        )
    modules = list(dict.fromkeys(_module(name) for name in info.tensors))
    return LNTuningConfig(target_modules=exact_name_pattern(modules)), _ln_key


def _ln_key(name: str) -> str:
    module, _, leaf = name.rpartition(".")
    return f"{module}.ln_tuning_layers.{leaf}"


def _lora(info: AdapterInfo) -> tuple[PeftConfig, Callable[[str], str]]:
    """One LoRA config; parts that differ from the first in rank or alpha have a pattern of their own."""
    modules: dict[str, list[str]] = {}
    for name, one in info.tensors.items():
        if name.endswith(".lora_A"):
            modules.setdefault(one.part, []).append(_module(name))
    methods = {part: _method_of(info, part, "lora") for part in modules}
    ranks = {part: int(method.option("r")) for part, method in methods.items()}
    alphas = {part: method.option("alpha") for part, method in methods.items()}
    rates = {float(method.option("dropout")) for method in methods.values()}
    first = next(iter(modules))
    config = LoraConfig(
        target_modules=exact_name_pattern(_flat(modules.values())),
        r=ranks[first],
        lora_alpha=alphas[first],  # type: ignore[arg-type]  # PEFT divides it by r and takes any number
        lora_dropout=rates.pop() if len(rates) == 1 else 0.0,  # for training on; the logits don't know it
        rank_pattern={
            exact_name_pattern(modules[part]): rank for part, rank in ranks.items() if rank != ranks[first]
        },
        alpha_pattern={
            exact_name_pattern(modules[part]): one for part, one in alphas.items() if one != alphas[first]
        },
    )
    return config, lambda name: f"{name}.weight"


def _ia3(info: AdapterInfo) -> tuple[PeftConfig, Callable[[str], str]]:
    """IA3; a vector of shape [1, width] scales its module's input, which PEFT calls feed-forward."""
    modules = [_module(name) for name in info.tensors]
    inputs = [_module(name) for name, one in info.tensors.items() if one.shape[0] == 1]
    # a pattern that matches nothing where no input is scaled: PEFT wants the field with its targets
    config = IA3Config(
        target_modules=exact_name_pattern(modules),
        feedforward_modules=exact_name_pattern(inputs) if inputs else "(?!)",
    )
    return config, lambda name: f"{name}_l"


_METHODS = {"LN tuning": _ln_tuning, "LoRA": _lora, "IA3": _ia3}


def _method_of(info: AdapterInfo, part: str, name: str) -> Method:
    """The part's method of that name; the delta's recipe is resolved, so that it names every part."""
    found = [method for method in parse(info.recipe).methods_of(part) if method.name == name]
    if len(found) != 1:
        raise InputError(f"the delta's recipe '{info.recipe}' and its tensors differ about part '{part}'.")
    return found[0]


def _flat(lists: Iterable[list[str]]) -> list[str]:
    return [name for one in lists for name in one]
