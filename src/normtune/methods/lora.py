"""LoRA (also DoRA and rsLoRA) and IA3, as PEFT implements them.

Each `add_...` function changes the model in place and returns `AddedLayers`: the new parameters and a
function that removes them again. The parameters are named after the linear of the base that they change, for
example `layers.0.self_attn.q_proj.lora_A`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

from peft import IA3Config, LoraConfig, PeftConfig, PeftType
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from normtune.errors import InputError
from normtune.methods.registry import Method
from normtune.methods.sites import (
    BERT_OUTPUT,
    FUSED,
    KEY,
    QUERY,
    VALUE,
    AddedLayers,
    NoTarget,
    TargetLinear,
    ffn_outputs,
    linears_of_names,
)
from normtune.models.parts import is_quantized

MAGNITUDE = "lora_magnitude_vector"  # last component of the name of DoRA's norms of the rows
PEFT_NAME = "normtune"  # the adapter's name inside PEFT's layers


def _lora_targets(method: Method, linears: Sequence[TargetLinear]) -> list[TargetLinear]:
    """The linears that the option `targets` names; by default query and value projections of self- and cross-attention.

    The default is from Hu et al. 2021, section 7.1. A fused query-key-value linear is a target as a whole.
    """
    if targets := str(method.option("targets")):
        return linears_of_names(linears, targets)
    return [linear for linear in linears if linear.role == "attention" and linear.leaf in QUERY + VALUE + FUSED]


def ia3_config(outputs: Sequence[str], inputs: Sequence[str]) -> IA3Config:
    """PEFT's config for an IA3 on exactly these modules; `inputs` are PEFT's "feed-forward modules"."""
    return IA3Config(
        target_modules=exact_name_pattern([*outputs, *inputs]), feedforward_modules=exact_name_pattern(inputs)
    )


def exact_name_pattern(names: Sequence[str]) -> str:
    """A regular expression that matches these full names only.

    PEFT treats a string as a pattern for the full name, but a list as suffixes: `layers.1` in a list would
    also match `vision.layers.1`.
    """
    return "|".join(re.escape(name) for name in names)


def add_lora(model: nn.Module, part: str, method: Method, linears: Sequence[TargetLinear]) -> AddedLayers:
    """Add a LoRA to the query and value projections of a part, or to the linears that its option `targets` names.

    Raises:
        NoTarget: the part has no such linear.
        InputError: another added method already changes one of them, or DoRA would have to scale a quantised one.
    """
    targets = _lora_targets(method, linears)
    if not targets:
        what = f"linear of '{method}'" if method.option("targets") else "query or value projection"
        raise NoTarget(f"lora finds no {what} in part '{part}'. Choose another method there.")
    if method.option("dora") and any(is_quantized(target.module.weight) for target in targets):
        raise InputError(f"part '{part}' is quantised, and DoRA needs the norms of its weights. Use lora without dora.")
    config = LoraConfig(
        r=int(method.option("r")),
        lora_alpha=int(method.option("alpha")),
        lora_dropout=float(method.option("dropout")),
        use_dora=bool(method.option("dora")),
        use_rslora=bool(method.option("rslora")),
        target_modules=exact_name_pattern([target.name for target in targets]),
    )
    layers, remove = inject(model, config, targets)
    parameters: dict[str, nn.Parameter] = {}
    for name, layer in layers.items():
        parameters[f"{name}.lora_A"] = layer.lora_A[PEFT_NAME].weight  # [rank, in]
        parameters[f"{name}.lora_B"] = layer.lora_B[PEFT_NAME].weight  # [out, rank]
        if method.option("dora"):
            parameters[f"{name}.{MAGNITUDE}"] = layer.lora_magnitude_vector[PEFT_NAME].weight  # [out]
    return AddedLayers(parameters, remove, layers)


def add_ia3(model: nn.Module, part: str, method: Method, linears: Sequence[TargetLinear]) -> AddedLayers:
    """Add IA3 vectors to a part (Liu et al. 2022, section 3.3).

    They scale the outputs of key and value projections, and the inputs of the last linear of each feed-forward. As in
    MISS and MILE, the output projections of BERT-like attentions are scaled too. A fused query-key-value linear is
    scaled as a whole.

    Raises:
        NoTarget: the part has no key or value projection.
        InputError: another added method already changes one of the linears.
    """
    scaled_outputs = (*KEY, *VALUE, *FUSED, BERT_OUTPUT)
    outputs = [linear for linear in linears if linear.role == "attention" and linear.leaf in scaled_outputs]
    inputs = ffn_outputs(linears)
    if not outputs:
        raise NoTarget(f"ia3 finds no key or value projection in part '{part}'. Choose another method there.")
    config = ia3_config([target.name for target in outputs], [target.name for target in inputs])
    layers, remove = inject(model, config, [*outputs, *inputs])
    return AddedLayers({f"{name}.ia3": layer.ia3_l[PEFT_NAME] for name, layer in layers.items()}, remove, layers)


def inject(
    model: nn.Module, config: PeftConfig, targets: Sequence[TargetLinear]
) -> tuple[dict[str, Any], Callable[[], None]]:
    """Wrap linears in PEFT's layers; returns these by the linears' names, and a function to remove them."""
    for target in targets:
        # A linear takes one PEFT layer. Check the linear that was looked up and the module that has its name
        # now, which another method may have put there.
        if isinstance(target.module, BaseTunerLayer) or isinstance(model.get_submodule(target.name), BaseTunerLayer):
            raise InputError(f"two added methods change {target.name}. Give each part only one of lora and ia3.")
    # as `inject_adapter_in_model` does, which refuses VeRA for its shared matrices
    PEFT_TYPE_TO_TUNER_MAPPING[PeftType(config.peft_type)](model, config, adapter_name=PEFT_NAME)
    del model.peft_config  # PEFT's record on the model: with it, PEFT would treat the next part's as a second adapter
    layers: dict[str, Any] = {}  # PEFT's layers; Any: their tensors are not declared in their common type
    for target in targets:
        layer = model.get_submodule(target.name)
        assert isinstance(layer, BaseTunerLayer), f"PEFT did not change {target.name}"
        # PEFT creates the new tensors in the base's dtype. Make them fp32; PEFT's forward casts the input.
        for attribute in layer.adapter_layer_names:
            if isinstance(tensors := getattr(layer, attribute), nn.Module):
                tensors.float()
        layers[target.name] = layer.train(target.module.training)
        for name, parameter in layer.named_parameters():
            if not name.startswith("base_layer."):
                parameter.data = parameter.data.float()

    def remove() -> None:
        for name, layer in layers.items():
            model.set_submodule(name, layer.get_base_layer())

    return layers, remove
