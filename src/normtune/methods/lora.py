"""Methods that add parameters to a frozen model: LoRA and IA3 (by PEFT), prefixes, bottleneck adapters.

Each function changes the model in place and returns an `Addition`: the new parameters under names of our own,
which say on which of the base's modules they sit, and how to take them off again.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import IA3Config, LoraConfig, PeftConfig, PrefixEncoder, PrefixTuningConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from normtune.errors import InputError
from normtune.methods import Method

QUERY = ("query", "q_proj")
KEY = ("key", "k_proj")
VALUE = ("value", "v_proj")
FUSED = ("qkv", "qkv_proj", "query_key_value")  # query, key and value in one linear
BERT_OUTPUT = "dense"  # the attention's output projection in models of BERT's layout
CROSS = ("crossattention", "cross_attn", "cross_attention", "encoder_attn")

PREFIX_ATTENTION = "normtune_prefix"
_PEFT_NAME = "normtune"


@dataclass(frozen=True)
class Site:
    """A linear layer of the base where something may be added."""

    name: str  # the module's dotted name in the base
    role: str  # "attention" or "ffn"
    layer: int
    module: nn.Linear

    @property
    def leaf(self) -> str:
        return self.name.rpartition(".")[2]


class NoSite(InputError):
    """A part has no place for the method."""


@dataclass
class Addition:
    """What one method added to one part."""

    parameters: dict[str, nn.Parameter]
    remove: Callable[[], None]
    layers: dict[str, BaseTunerLayer] = field(default_factory=dict)  # PEFT's, by the base module's name


def add(model: nn.Module, part: str, method: Method, sites: Sequence[Site]) -> Addition:
    """Add `method` to the linears `sites` of one part.

    Raises:
        NoSite: the part has no place for it.
        InputError: another method stands there, or the part's layers differ too much for it.
    """
    if method.name == "lora":
        return _add_lora(model, part, method, sites)
    if method.name == "ia3":
        return _add_ia3(model, part, sites)
    if method.name == "adapter":
        return _add_adapters(part, int(method.option("width")), sites)
    assert method.name in ("prefix", "ptuning"), method.name
    return _add_prefix(model, part, int(method.option("n")), method.name == "prefix", sites)


# --- LoRA and IA3 -------------------------------------------------------------------------------------------


def lora_targets(sites: Sequence[Site]) -> list[Site]:
    """Query and value of every self- and cross-attention (Hu et al. 2021); the whole of a fused one."""
    return [site for site in sites if site.role == "attention" and site.leaf in QUERY + VALUE + FUSED]


def ia3_targets(sites: Sequence[Site]) -> tuple[list[Site], list[Site]]:
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


def ffn_outputs(sites: Sequence[Site]) -> list[Site]:
    """The last linear of each layer's feed-forward."""
    last = {site.layer: site for site in sites if site.role == "ffn" and hasattr(site.module, "in_features")}
    return list(last.values())


def lora_config(method: Method, targets: Sequence[str]) -> LoraConfig:
    """PEFT's config for exactly the modules named."""
    return LoraConfig(
        r=int(method.option("r")),
        lora_alpha=int(method.option("alpha")),
        lora_dropout=float(method.option("dropout")),
        target_modules=exactly(targets),
    )


def ia3_config(outputs: Sequence[str], inputs: Sequence[str]) -> IA3Config:
    """PEFT's config for exactly the modules named; `inputs` are the feed-forward ones."""
    return IA3Config(target_modules=exactly([*outputs, *inputs]), feedforward_modules=exactly(inputs))


def exactly(names: Sequence[str]) -> str:
    """A pattern that matches these full names alone (a list of names would match their suffixes too)."""
    return "|".join(re.escape(name) for name in names)


def _add_lora(model: nn.Module, part: str, method: Method, sites: Sequence[Site]) -> Addition:
    targets = lora_targets(sites)
    if not targets:
        raise NoSite(
            f"lora finds no query or value projection in part '{part}'. Choose another method there."
        )
    layers, remove = _inject(model, lora_config(method, [site.name for site in targets]), targets)
    parameters: dict[str, nn.Parameter] = {}
    for name, layer in layers.items():
        parameters[f"{name}.lora_A"] = layer.lora_A[_PEFT_NAME].weight
        parameters[f"{name}.lora_B"] = layer.lora_B[_PEFT_NAME].weight
    return Addition(parameters, remove, layers)


def _add_ia3(model: nn.Module, part: str, sites: Sequence[Site]) -> Addition:
    outputs, inputs = ia3_targets(sites)
    if not outputs:
        raise NoSite(f"ia3 finds no key or value projection in part '{part}'. Choose another method there.")
    config = ia3_config([site.name for site in outputs], [site.name for site in inputs])
    layers, remove = _inject(model, config, [*outputs, *inputs])
    return Addition(
        {f"{name}.ia3": layer.ia3_l[_PEFT_NAME] for name, layer in layers.items()}, remove, layers
    )


def _inject(
    model: nn.Module, config: PeftConfig, targets: Sequence[Site]
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
            set_submodule(model, name, layer.get_base_layer())

    return layers, remove


def set_submodule(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put `module` where the module of that dotted name is."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


# --- Bottleneck adapters ------------------------------------------------------------------------------------


class Bottleneck(nn.Module):
    """x + up(relu(down(x))), the identity at first (Houlsby et al. 2019), one a layer (Pfeiffer et al. 2021).

    Weights are fp32 and cast to the input's dtype at use.
    """

    def __init__(self, width: int, bottleneck: int, device: torch.device) -> None:
        super().__init__()
        self.down = nn.Linear(width, bottleneck, device=device, dtype=torch.float32)
        self.up = nn.Linear(bottleneck, width, device=device, dtype=torch.float32)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., width]; returns the same shape and dtype."""
        inner = F.relu(F.linear(x, self.down.weight.to(x.dtype), self.down.bias.to(x.dtype)))
        return x + F.linear(inner, self.up.weight.to(x.dtype), self.up.bias.to(x.dtype))


def _adapt_output(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
    adapter = module.adapter
    assert isinstance(adapter, Bottleneck)
    return adapter(output)


def _add_adapters(part: str, width: int, sites: Sequence[Site]) -> Addition:
    targets = ffn_outputs(sites)
    if not targets:
        raise NoSite(f"adapter finds no feed-forward in part '{part}'. Choose another method.")
    parameters: dict[str, nn.Parameter] = {}
    hooks = []
    for site in targets:
        adapter = Bottleneck(site.module.out_features, width, site.module.weight.device)
        site.module.adapter = adapter
        hooks.append(site.module.register_forward_hook(_adapt_output))
        parameters |= {f"{site.name}.adapter.{name}": p for name, p in adapter.named_parameters()}

    def remove() -> None:
        for hook, site in zip(hooks, targets, strict=True):
            hook.remove()
            del site.module.adapter

    return Addition(parameters, remove)


# --- Prefixes -----------------------------------------------------------------------------------------------


class Prefix(nn.Module):
    """Learned keys and values before those of every layer's self-attention.

    The parametrisation is PEFT's: with `projection` a two-layer network makes them from n embeddings (Li and
    Liang 2021), without it they are learned as they are (P-Tuning v2, Liu et al. 2022).
    """

    def __init__(self, part: str, n: int, width: int, heads: int, depth: int, projection: bool) -> None:
        super().__init__()
        self.of_part = part  # where it counts, though it stands beside the model's parts
        self.n, self.width, self.heads, self.depth = n, width, heads, depth
        config = PrefixTuningConfig(
            num_virtual_tokens=n,
            token_dim=width,
            num_attention_heads=heads,
            num_layers=depth,
            encoder_hidden_size=width,
            prefix_projection=projection,
        )
        self.encoder = PrefixEncoder(config)

    def forward(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values of one layer, each [heads, n, head_dim]."""
        rows = slice(layer * 2 * self.width, (layer + 1) * 2 * self.width)
        embedding = self.encoder.embedding.weight  # [n, width], or [n, depth * 2 * width] without projection
        if self.encoder.prefix_projection:
            inner, squash, outer = self.encoder.transform
            both = F.linear(squash(inner(embedding)), outer.weight[rows], outer.bias[rows])
        else:
            both = embedding[:, rows]
        keys, values = both.view(self.n, 2, self.heads, -1).permute(1, 2, 0, 3)
        return keys, values


class LayerPrefix(nn.Module):
    """One layer's view of its part's `Prefix`; sits as `prefix` on the attention module."""

    def __init__(self, prefix: Prefix, layer: int) -> None:
        super().__init__()
        self._prefix = (prefix,)  # in a tuple: the parameters belong to the model once, not to each layer
        self.layer = layer

    @property
    def bank(self) -> Prefix:
        """What holds the parameters."""
        return self._prefix[0]

    def forward(self) -> tuple[Tensor, Tensor]:
        """Keys and values, each [heads, n, head_dim] fp32."""
        return self.bank(self.layer)


def prefix_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Transformers' SDPA attention with the module's prefix before its keys, visible to every query.

    query: [batch, heads, q, head_dim]; key, value: [batch, kv_heads, k, head_dim], rotated and cached without
    the prefix; attention_mask: [batch or 1, heads or 1, q, k], bool (True = visible) or additive, or None.
    """
    prefix = getattr(module, "prefix", None)
    if prefix is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, is_causal=is_causal, **kwargs
        )
    queries, keys = query.shape[2], key.shape[2]
    if attention_mask is None:
        causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        if causal and queries > 1:  # SDPA's own causal mask would start at the prefix
            rows = torch.arange(queries, device=key.device)
            attention_mask = (rows[:, None] >= torch.arange(keys, device=key.device))[None, None]
    more_keys, more_values = (one.to(key.dtype).expand(key.shape[0], -1, -1, -1) for one in prefix())
    if attention_mask is not None:
        visible = 1.0 if attention_mask.dtype == torch.bool else 0.0
        attention_mask = F.pad(attention_mask[..., :keys], (more_keys.shape[2], 0), value=visible)
    key, value = torch.cat([more_keys, key], dim=2), torch.cat([more_values, value], dim=2)
    return sdpa_attention_forward(module, query, key, value, attention_mask, is_causal=False, **kwargs)


def _takes_attention_functions(attention: nn.Module) -> bool:
    """Whether the module calls the attention that its config names (transformers' AttentionInterface)."""
    return "ALL_ATTENTION_FUNCTIONS" in inspect.unwrap(type(attention).forward).__code__.co_names


def _add_prefix(model: nn.Module, part: str, n: int, projection: bool, sites: Sequence[Site]) -> Addition:
    attentions = self_attentions(model, sites)
    if not attentions:
        raise NoSite(
            f"prefix finds no self-attention that takes one in part '{part}'. Choose another method."
        )
    if any(getattr(one, "attn_logit_softcapping", None) is not None for _, one in attentions):
        raise InputError(
            f"prefix does not know capped attention, as part '{part}' has. Choose another method."
        )
    width, heads = _key_shape(part, attentions)
    device = attentions[0][0].module.weight.device
    prefix = Prefix(part, n, width, heads, len(attentions), projection).to(device)
    bank = f"normtune_prefix_{part}"
    model.add_module(bank, prefix)
    configs: dict[int, tuple[Any, str | None]] = {}
    for index, (_, attention) in enumerate(attentions):
        attention.prefix = LayerPrefix(prefix, index)
        if _takes_attention_functions(attention):
            config = attention.config
            configs.setdefault(id(config), (config, config._attn_implementation))
    if configs:
        AttentionInterface.register(PREFIX_ATTENTION, prefix_attention)
        AttentionMaskInterface.register(PREFIX_ATTENTION, sdpa_mask)
    for config, _ in configs.values():
        config._attn_implementation = PREFIX_ATTENTION

    def remove() -> None:
        for _, attention in attentions:
            attention.prefix = None
        delattr(model, bank)
        for config, implementation in configs.values():
            config._attn_implementation = implementation

    parameters = {f"{part}.prefix.{name}": p for name, p in prefix.encoder.named_parameters()}
    return Addition(parameters, remove)


def self_attentions(model: nn.Module, sites: Sequence[Site]) -> list[tuple[Site, Any]]:
    """(key projection, attention) of each self-attention that can take a prefix, in the model's order."""
    found = []
    for site in sites:
        if site.role != "attention" or site.leaf not in KEY + FUSED or set(site.name.split(".")) & set(CROSS):
            continue
        attention: Any = model.get_submodule(site.name.rpartition(".")[0])
        if hasattr(attention, "prefix") or _takes_attention_functions(attention):
            found.append((site, attention))
    return found


def _key_shape(part: str, attentions: Sequence[tuple[Site, Any]]) -> tuple[int, int]:
    """(width, heads) of the keys, the same in every layer."""
    shapes = set()
    for site, attention in attentions:
        width = site.module.out_features // (3 if site.leaf in FUSED else 1)
        shapes.add((width, attention.heads if hasattr(attention, "heads") else width // attention.head_dim))
    if len(shapes) > 1:
        raise InputError(
            f"the layers of part '{part}' differ in their keys' shapes {sorted(shapes)}: no prefix fits. "
            "Choose another method."
        )
    return shapes.pop()
