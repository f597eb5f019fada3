"""Export an adapter in the layout of Hugging Face PEFT, for `PeftModel.from_pretrained(base, directory)`.

- ln, bias, attention, ffn, full: PEFT's LN tuning, on exact module names. It copies the modules it is given,
  norms or not, and swaps the copies in. PEFT warns about modules that are not linear, and about tensors that
  are not in the file because only a bias was trained; these keep the base's values, which is correct.
- lora: LoRA on exact modules, with each part's rank and alpha.
- ia3: IA3 on exact modules.
- prefix, ptuning, adapter, and mixtures of the above: refused, with the reason.

PEFT keeps LN tuning's tensors in the base's dtype: on a bf16 base the trained gains are rounded, whereas
Normtune keeps them in fp32. On an fp32 base the logits are equal. The config has no task type, so that PEFT
passes a model's arguments through unchanged; MISS accepts none of those that PEFT's task classes add.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from peft import IA3Config, LNTuningConfig, LoraConfig, PeftConfig
from torch import Tensor

from normtune.adapters.info import CONFIG_FILE, WEIGHTS_FILE, AdapterInfo
from normtune.adapters.model_card import model_card
from normtune.adapters.storage import CARD_FILE, read_adapter_info, read_tensors
from normtune.errors import InputError
from normtune.methods.lora import MAGNITUDE, exact_name_pattern
from normtune.methods.recipe import parse
from normtune.methods.registry import OUTPUT_VECTORS, PEFT_VECTORS, TEXT_ONLY, Method
from normtune.runtime.files import atomic_directory, write_json, write_text
from normtune.runtime.notebook import Result
from normtune.runtime.tensors import write_tensors

PREFIX = "base_model.model."  # PEFT's wrappers, in the names of the tensors that it saves
_PEFT_METHODS = {"lora": "LoRA", "ia3": "IA3"}  # method -> PEFT's method; all others use LN tuning
_LEAVES = ("weight", "bias")  # parameters of modules that have no submodules
_REASONS = {  # method -> why PEFT cannot hold it
    **dict.fromkeys(
        TEXT_ONLY, "PEFT passes a prefix as a cache, which moves every token's position, and Normtune's moves none"
    ),
    "adapter": "PEFT has no bottleneck adapters",
    **dict.fromkeys(OUTPUT_VECTORS, "PEFT has no such vectors"),
    **dict.fromkeys(PEFT_VECTORS, "the export supports LoRA, IA3 and LN tuning"),
}


@dataclass(frozen=True)
class Exported(Result):
    """What an export wrote: PEFT's method, the base, and numbers of modules, tensors and values."""

    out: str
    method: str  # LN tuning, LoRA or IA3
    base: str
    modules: int
    tensors: int
    values: int

    def __str__(self) -> str:
        return (
            f"wrote {self.out}: PEFT's {self.method} on {self.modules} modules, "
            f"{self.values:,} values\n"
            f"load it with PeftModel.from_pretrained(base, '{self.out}'), base being {self.base}"
        )


def export_peft(adapter: Path, out: Path, *, model: str | None = None) -> Exported:
    """Write an adapter in PEFT's layout; no weights of the base are needed.

    Args:
        out: directory to write; it must be new or empty.
        model: name of the base in the config; None: the name in `adapter.json`.

    Raises:
        InputError: `out` is in use, the adapter is damaged, or PEFT has no equivalent for it (the message names
            the part and the reason).
    """
    info = read_adapter_info(adapter)
    if not info.base_fingerprint:
        raise InputError(f"{adapter} is an adapter of PEFT already. Copy its folder.")
    peft_method = _peft_method(info)
    config, key_of = _CONFIGS[peft_method](info)
    config.base_model_name_or_path = model or info.base_name
    config.inference_mode = True
    tensors = read_tensors(adapter, info)
    renamed: dict[str, Tensor] = {PREFIX + key_of(name): tensor for name, tensor in tensors.items()}
    with atomic_directory(out) as building:
        write_json(building / CONFIG_FILE, config.to_dict())
        write_tensors(building / WEIGHTS_FILE, renamed)
        write_text(building / CARD_FILE, _card(info))
    return Exported(
        out=str(out),
        method=peft_method,
        base=str(config.base_model_name_or_path),
        modules=len({_module(name) for name in tensors}),
        tensors=len(tensors),
        values=sum(tensor.numel() for tensor in tensors.values()),
    )


def _card(info: AdapterInfo) -> str:
    """The model card, with PEFT's way to load the adapter in place of Normtune's."""
    head, _, _ = model_card(info).partition("\n`adapter.safetensors`")
    return head + "\nIn PEFT's layout: load it with `PeftModel.from_pretrained(base, directory)`.\n"


def _peft_method(info: AdapterInfo) -> str:
    """The PEFT method that can hold the whole adapter: a key of `_CONFIGS`."""
    parts: dict[str, dict[str, str]] = {}  # PEFT's method -> part -> method
    for tensor in info.tensors.values():
        if tensor.method in _REASONS:
            raise InputError(
                f"part '{tensor.part}' was trained by {tensor.method}, which can't be exported: "
                f"{_REASONS[tensor.method]}. Use the adapter with --adapter."
            )
        peft_method = _PEFT_METHODS.get(tensor.method, "LN tuning")
        parts.setdefault(peft_method, {}).setdefault(tensor.part, tensor.method)
    if len(parts) > 1:
        needed = "; ".join(
            f"{name} for " + ", ".join(f"part '{part}' ({method})" for part, method in methods.items())
            for name, methods in parts.items()
        )
        raise InputError(
            f"a PEFT adapter holds one method and this adapter needs {len(parts)} ({needed}). "
            "Use normtune merge instead."
        )
    if not parts:
        raise InputError("the adapter has no tensors: there is nothing to export.")
    return next(iter(parts))


def _module(name: str) -> str:
    return name.rpartition(".")[0]


def _ln_tuning(info: AdapterInfo) -> tuple[PeftConfig, Callable[[str], str]]:
    """Config of LN tuning on the modules that hold the trained tensors, and PEFT's name of a tensor."""
    for name, tensor in info.tensors.items():
        leaf = name.rpartition(".")[2]
        if leaf not in _LEAVES:  # such as a class token: copying its module would copy a whole tower
            reason = f"'{leaf}' is a tensor next to other modules, and PEFT swaps whole modules"
        elif leaf == "weight" and len(tensor.shape) == 2 and tensor.role in ("embedding", "head"):
            reason = "it may be tied to another tensor, and PEFT's copies are not"
        else:
            continue
        raise InputError(
            f"{name} (part '{tensor.part}', {tensor.method}) can't be exported: {reason}. Use normtune merge instead."
        )
    modules = list(dict.fromkeys(_module(name) for name in info.tensors))
    config = LNTuningConfig(target_modules=exact_name_pattern(modules))
    return config, lambda name: f"{_module(name)}.ln_tuning_layers.{name.rpartition('.')[2]}"


def _lora(info: AdapterInfo) -> tuple[PeftConfig, Callable[[str], str]]:
    """Config of a LoRA, and PEFT's name of a tensor.

    Parts with another rank or alpha than the first part's get an entry in PEFT's patterns.
    """
    modules: dict[str, list[str]] = {}  # part -> linears with a LoRA
    for name, tensor in info.tensors.items():
        if name.endswith(".lora_A"):
            modules.setdefault(tensor.part, []).append(_module(name))
    recipe = parse(info.recipe)  # resolved: each part has an entry
    methods: dict[str, Method] = {}
    for part in modules:
        loras = [method for method in recipe.methods_of(part) if method.name == "lora"]
        if len(loras) != 1:
            raise InputError(f"the adapter's recipe '{info.recipe}' and its tensors differ about part '{part}'.")
        methods[part] = loras[0]
    ranks = {part: int(method.option("r")) for part, method in methods.items()}
    alphas = {part: method.option("alpha") for part, method in methods.items()}
    variants = {(bool(method.option("dora")), bool(method.option("rslora"))) for method in methods.values()}
    if len(variants) > 1:
        raise InputError(
            "the parts differ in dora or rslora, which PEFT sets for all of them. Use normtune merge instead."
        )
    dora, rslora = variants.pop()
    dropouts = {float(method.option("dropout")) for method in methods.values()}
    first = next(iter(modules))
    config = LoraConfig(
        target_modules=exact_name_pattern(list(chain(*modules.values()))),
        r=ranks[first],
        lora_alpha=alphas[first],  # type: ignore[arg-type]  # PEFT accepts any number
        use_dora=dora,
        use_rslora=rslora,
        # matters only for further training, not for the logits
        lora_dropout=dropouts.pop() if len(dropouts) == 1 else 0.0,
        rank_pattern={exact_name_pattern(modules[part]): rank for part, rank in ranks.items() if rank != ranks[first]},
        alpha_pattern={
            exact_name_pattern(modules[part]): alpha for part, alpha in alphas.items() if alpha != alphas[first]
        },
    )
    return config, lambda name: name if name.endswith(MAGNITUDE) else f"{name}.weight"


def _ia3(info: AdapterInfo) -> tuple[PeftConfig, Callable[[str], str]]:
    """Config of an IA3, and PEFT's name of a tensor."""
    modules = [_module(name) for name in info.tensors]
    # [1, in] scales its module's input (PEFT's "feedforward_modules"), [out, 1] the output
    inputs = [_module(name) for name, tensor in info.tensors.items() if tensor.shape[0] == 1]
    # PEFT requires the field: "(?!)" matches no name
    config = IA3Config(
        target_modules=exact_name_pattern(modules), feedforward_modules=exact_name_pattern(inputs) if inputs else "(?!)"
    )
    return config, lambda name: f"{name}_l"


_CONFIGS = {"LN tuning": _ln_tuning, "LoRA": _lora, "IA3": _ia3}
