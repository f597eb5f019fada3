"""Methods that add parameters to a frozen model: LoRA and IA3 (by PEFT), prefixes, bottleneck adapters.

Each function changes the model in place and returns an `Addition`: the new parameters under names of our own,
which say on which of the base's modules they sit, and how to take them off again.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

from peft import IA3Config, LoraConfig, PeftConfig, inject_adapter_in_model
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
)

_PEFT_NAME = "normtune"


def lora_targets(sites: Sequence[TargetLinear]) -> list[TargetLinear]:
    """Query and value of every self- and cross-attention (Hu et al. 2021); the whole of a fused one."""
    return [site for site in sites if site.role == "attention" and site.leaf in QUERY + VALUE + FUSED]


def ia3_targets(sites: Sequence[TargetLinear]) -> tuple[list[TargetLinear], list[TargetLinear]]:
    """Linears whose output is scaled, and those whose input is, each feed-forward's last (Liu et al. 2022).

    As in MISS and MILE the output projections of BERT-like attentions are scaled too; a fused query-key-value
    linear is scaled whole.
    """
    outputs = [
        site
        for site in sites
        if site.role == "attention" and (site.leaf in KEY + VALUE + FUSED or site.leaf == BERT_OUTPUT)
    ]
    return outputs, ffn_outputs(sites)


def lora_config(method: Method, targets: Sequence[str]) -> LoraConfig:
    """PEFT's config for exactly the modules named."""
    return LoraConfig(
        r=int(method.option("r")),
        lora_alpha=int(method.option("alpha")),
        lora_dropout=float(method.option("dropout")),
        target_modules=exact_name_pattern(targets),
    )


def ia3_config(outputs: Sequence[str], inputs: Sequence[str]) -> IA3Config:
    """PEFT's config for exactly the modules named; `inputs` are the feed-forward ones."""
    return IA3Config(
        target_modules=exact_name_pattern([*outputs, *inputs]), feedforward_modules=exact_name_pattern(inputs)
    )


def exact_name_pattern(names: Sequence[str]) -> str:
    """A pattern that matches these full names alone (a list of names would match their suffixes too)."""
    return "|".join(re.escape(name) for name in names)


def add_lora(model: nn.Module, part: str, method: Method, sites: Sequence[TargetLinear]) -> AddedLayers:
    targets = lora_targets(sites)
    if not targets:
        raise NoTarget(
            f"lora finds no query or value projection in part '{part}'. Choose another method there."
        )
    layers, remove = _inject(model, lora_config(method, [site.name for site in targets]), targets)
    parameters: dict[str, nn.Parameter] = {}
    for name, layer in layers.items():
        parameters[f"{name}.lora_A"] = layer.lora_A[_PEFT_NAME].weight
        parameters[f"{name}.lora_B"] = layer.lora_B[_PEFT_NAME].weight
    return AddedLayers(parameters, remove, layers)


def add_ia3(model: nn.Module, part: str, sites: Sequence[TargetLinear]) -> AddedLayers:
    outputs, inputs = ia3_targets(sites)
    if not outputs:
        raise NoTarget(f"ia3 finds no key or value projection in part '{part}'. Choose another method there.")
    config = ia3_config([site.name for site in outputs], [site.name for site in inputs])
    layers, remove = _inject(model, config, [*outputs, *inputs])
    return AddedLayers(
        {f"{name}.ia3": layer.ia3_l[_PEFT_NAME] for name, layer in layers.items()}, remove, layers
    )


def _inject(
    model: nn.Module, config: PeftConfig, targets: Sequence[TargetLinear]
) -> tuple[dict[str, Any], Callable[[], None]]:
    for site in targets:
        if isinstance(site.module, BaseTunerLayer) or isinstance(
            model.get_submodule(site.name), BaseTunerLayer
        ):
            raise InputError(
                f"two added methods change {site.name}. Give each part only one of lora and ia3."
            )
    inject_adapter_in_model(config, model, adapter_name=_PEFT_NAME)
    del model.peft_config  # PEFT's mark on the model; a second part would be taken for a second adapter
    layers: dict[str, Any] = {}  # PEFT's layers: their tensors are not in the type that they share
    for site in targets:
        layer = model.get_submodule(site.name)
        assert isinstance(layer, BaseTunerLayer), f"PEFT did not change {site.name}"
        for added in layer.adapter_layer_names:  # injected in the base's dtype; its forward casts the input
            if isinstance(tensors := getattr(layer, added), nn.Module):
                tensors.float()
        layers[site.name] = layer.train(site.module.training)
        for name, parameter in layer.named_parameters():
            if not name.startswith("base_layer."):
                parameter.data = parameter.data.float()
    found = {name for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)}
    assert found >= set(layers)

    def remove() -> None:
        for name, layer in layers.items():
            model.set_submodule(name, layer.get_base_layer())

    return layers, remove
