"""Prefix tuning and P-Tuning v2: learned keys and values before those of each self-attention."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from peft import PrefixEncoder, PrefixTuningConfig
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from normtune.errors import InputError
from normtune.methods.sites import CROSS, FUSED, KEY, AddedLayers, NoTarget, TargetLinear

PREFIX_ATTENTION = "normtune_prefix"


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

    def shared_parameters(self) -> Iterator[nn.Parameter]:
        """The parameters of the part's prefix, which this layer uses but does not own."""
        return self.bank.parameters()

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


def _uses_attention_interface(attention: nn.Module) -> bool:
    """Whether the module calls the attention that its config names (transformers' AttentionInterface)."""
    return "ALL_ATTENTION_FUNCTIONS" in inspect.unwrap(type(attention).forward).__code__.co_names


def add_prefix(
    model: nn.Module, part: str, n: int, projection: bool, sites: Sequence[TargetLinear]
) -> AddedLayers:
    attentions = self_attentions(model, sites)
    if not attentions:
        raise NoTarget(
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
        if _uses_attention_interface(attention):
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
    return AddedLayers(parameters, remove)


def self_attentions(model: nn.Module, sites: Sequence[TargetLinear]) -> list[tuple[TargetLinear, Any]]:
    """(key projection, attention) of each self-attention that can take a prefix, in the model's order."""
    found = []
    for site in sites:
        if site.role != "attention" or site.leaf not in KEY + FUSED or set(site.name.split(".")) & set(CROSS):
            continue
        attention: Any = model.get_submodule(site.name.rpartition(".")[0])
        if hasattr(attention, "prefix") or _uses_attention_interface(attention):
            found.append((site, attention))
    return found


def _key_shape(part: str, attentions: Sequence[tuple[TargetLinear, Any]]) -> tuple[int, int]:
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
