"""Prefix tuning and P-Tuning v2: learned keys and values that every self-attention reads before the tokens' keys."""

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
from normtune.methods.registry import Method
from normtune.methods.sites import CROSS, FUSED, KEY, AddedLayers, NoTarget, TargetLinear

PREFIX_ATTENTION = "normtune_prefix"  # name of `prefix_attention` in transformers' AttentionInterface


class Prefix(nn.Module):
    """The learned keys and values of one part: n for every self-attention layer.

    The parametrisation is PEFT's. With `projection` a two-layer network computes keys and values from n
    embeddings (prefix tuning, Li and Liang 2021). Without it they are the parameters themselves (P-Tuning v2,
    Liu et al. 2022).

    Args:
        part: the part of the model to which the prefix belongs.
        n: keys (and values) per layer.
        width: width of the keys, all heads together.
        heads: number of key heads.
        depth: number of self-attention layers.
    """

    def __init__(self, part: str, n: int, width: int, heads: int, depth: int, projection: bool) -> None:
        super().__init__()
        # `find_parts` reads `of_part`: the module is a child of the whole model, outside its part.
        self.of_part = part
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
        # PEFT stores the layers next to each other: layer 0's keys, its values, layer 1's keys, ... Computing
        # one layer's slice only gives the same numbers without the other layers' activations.
        rows = slice(layer * 2 * self.width, (layer + 1) * 2 * self.width)
        embedding = self.encoder.embedding.weight  # [n, width], or [n, depth * 2 * width] without projection
        if self.encoder.prefix_projection:
            inner, squash, outer = self.encoder.transform
            both = F.linear(squash(inner(embedding)), outer.weight[rows], outer.bias[rows])  # [n, 2 * width]
        else:
            both = embedding[:, rows]  # [n, 2 * width]
        keys, values = both.view(self.n, 2, self.heads, -1).permute(1, 2, 0, 3)
        return keys, values


class LayerPrefix(nn.Module):
    """One layer's view of its part's `Prefix`, set as attribute `prefix` of the attention module."""

    def __init__(self, prefix: Prefix, layer: int) -> None:
        super().__init__()
        # In a tuple, so that it is not a submodule: the model has the parameters once, not once a layer.
        self._prefix = (prefix,)
        self.layer = layer

    def shared_parameters(self) -> Iterator[nn.Parameter]:
        """The parameters of the part's prefix, which all layers of the part share."""
        return self._prefix[0].parameters()

    def forward(self) -> tuple[Tensor, Tensor]:
        """Keys and values of this layer, each [heads, n, head_dim] fp32."""
        return self._prefix[0](self.layer)


def prefix_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Transformers' SDPA attention, with the module's prefix in front of its keys, visible to every query.

    Args:
        query: [batch, heads, q, head_dim].
        key, value: [batch, kv_heads, k, head_dim], with rotary positions applied; the cache does not contain
            the prefix.
        attention_mask: [batch or 1, heads or 1, q, k], bool (True = visible) or additive, or None.
    """
    prefix = getattr(module, "prefix", None)
    if prefix is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, is_causal=is_causal, **kwargs)
    queries, keys = query.shape[2], key.shape[2]
    if attention_mask is None:
        causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        if causal and queries > 1:
            # SDPA's own causal mask would count the prefix as the first tokens: query 0 would see the first
            # prefix key only. Build the mask over the real keys, before the prefix is put in front.
            rows = torch.arange(queries, device=key.device)
            attention_mask = (rows[:, None] >= torch.arange(keys, device=key.device))[None, None]
    # [heads, n, head_dim] -> [batch, heads, n, head_dim]
    prefix_keys, prefix_values = (tensor.to(key.dtype).expand(key.shape[0], -1, -1, -1) for tensor in prefix())
    if attention_mask is not None:
        visible = 1.0 if attention_mask.dtype == torch.bool else 0.0
        # [..., q, k] -> [..., q, n + k]: n visible columns on the left
        attention_mask = F.pad(attention_mask[..., :keys], (prefix_keys.shape[2], 0), value=visible)
    key, value = torch.cat([prefix_keys, key], dim=2), torch.cat([prefix_values, value], dim=2)
    return sdpa_attention_forward(module, query, key, value, attention_mask, is_causal=False, **kwargs)


def _uses_attention_interface(attention: nn.Module) -> bool:
    """Whether the module calls the attention that its config names (transformers' AttentionInterface)."""
    return "ALL_ATTENTION_FUNCTIONS" in inspect.unwrap(type(attention).forward).__code__.co_names


def add_prefix(model: nn.Module, part: str, method: Method, linears: Sequence[TargetLinear]) -> AddedLayers:
    """Add n learned keys and values to every self-attention of a part (`prefix(n=10)`, `ptuning(n=10)`).

    Raises:
        NoTarget: the part has no self-attention that supports a prefix.
        InputError: its attention caps its logits, or its layers' keys differ in shape.
    """
    attentions = self_attentions(model, linears)
    if not attentions:
        raise NoTarget(f"prefix finds no self-attention that takes one in part '{part}'. Choose another method.")
    if any(getattr(attention, "attn_logit_softcapping", None) is not None for _, attention in attentions):
        raise InputError(
            f"prefix does not support attention with capped logits, as in part '{part}'. Choose another method."
        )
    width, heads = _key_shape(part, attentions)
    device = attentions[0][0].module.weight.device
    n, has_projection = int(method.option("n")), method.name == "prefix"
    prefix = Prefix(part, n, width, heads, len(attentions), has_projection).to(device)
    module_name = f"normtune_prefix_{part}"
    model.add_module(module_name, prefix)
    configs: dict[int, tuple[Any, str | None]] = {}  # id -> (config, its attention implementation)
    for index, (_, attention) in enumerate(attentions):
        attention.prefix = LayerPrefix(prefix, index)
        # A transformers attention finds its function by a name in its config: it gets the name of
        # `prefix_attention`. MISS's own attention reads its attribute `prefix`.
        if _uses_attention_interface(attention):
            config = attention.config
            configs.setdefault(id(config), (config, config._attn_implementation))
    if configs:
        AttentionInterface.register(PREFIX_ATTENTION, prefix_attention)
        AttentionMaskInterface.register(PREFIX_ATTENTION, sdpa_mask)  # masks as SDPA has them
    # The layers of a part usually share one config object: each was recorded once, with its former value.
    for config, _ in configs.values():
        config._attn_implementation = PREFIX_ATTENTION

    def remove() -> None:
        for _, attention in attentions:
            attention.prefix = None
        delattr(model, module_name)
        for config, implementation in configs.values():
            config._attn_implementation = implementation

    parameters = {f"{part}.prefix.{name}": p for name, p in prefix.encoder.named_parameters()}
    return AddedLayers(parameters, remove)


def self_attentions(model: nn.Module, linears: Sequence[TargetLinear]) -> list[tuple[TargetLinear, Any]]:
    """(key projection, attention) of each self-attention that supports a prefix, in the model's order."""
    attentions = []
    for linear in linears:
        is_cross = bool(set(linear.name.split(".")) & set(CROSS))
        if linear.role != "attention" or linear.leaf not in KEY + FUSED or is_cross:
            continue
        attention: Any = model.get_submodule(linear.name.rpartition(".")[0])
        if hasattr(attention, "prefix") or _uses_attention_interface(attention):
            attentions.append((linear, attention))
    return attentions


def _key_shape(part: str, attentions: Sequence[tuple[TargetLinear, Any]]) -> tuple[int, int]:
    """(width, heads) of the keys; all layers must agree, since one `Prefix` serves them all."""
    shapes = set()
    for linear, attention in attentions:
        width = linear.module.out_features // (3 if linear.leaf in FUSED else 1)
        shapes.add((width, attention.heads if hasattr(attention, "heads") else width // attention.head_dim))
    if len(shapes) > 1:
        raise InputError(
            f"the layers of part '{part}' differ in their keys' shapes {sorted(shapes)}: no prefix fits. "
            "Choose another method."
        )
    return shapes.pop()
