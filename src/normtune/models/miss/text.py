"""The text parts: a BERT (Devlin et al. 2019) with cross-attention in every layer, as encoder and as decoder.

Names are BERT's, as in MISS's and BLIP's checkpoints.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer

from normtune.models.miss.attention import (
    Slots,
    causal_mask,
    join_heads,
    see_prefix,
    split_heads,
    with_prefix,
)
from normtune.models.miss.config import TextDims

KeysValues = tuple[Tensor, Tensor]  # each [batch, heads, length, head_dim]


class LayerCache:
    """What one decoder layer keeps between steps: its own keys and values, and those of the question."""

    def __init__(self) -> None:
        self.own: KeysValues | None = None  # [rows, ...], prefix included
        self.cross: KeysValues | None = None  # [questions, ...]


class DecoderCache:
    """The caches of all decoder layers, and how many tokens they hold."""

    def __init__(self, layers: int) -> None:
        self.layers = [LayerCache() for _ in range(layers)]
        self.length = 0

    @property
    def rows(self) -> int:
        """The number of rows (questions x beams) that are held."""
        own = self.layers[0].own
        assert own is not None, "the cache is empty"
        return own[0].shape[0]

    def select(self, rows: Tensor, questions: Tensor | None) -> None:
        """Row r goes on from the former row `rows[r]`; only `questions` stay (None: all of them)."""
        for layer in self.layers:
            assert layer.own is not None and layer.cross is not None, "select after the first step"
            key, value = layer.own
            layer.own = key.index_select(0, rows), value.index_select(0, rows)
            if questions is not None:
                key, value = layer.cross
                layer.cross = key.index_select(0, questions), value.index_select(0, questions)


class QueryKeyValue(nn.Module):
    """Projections of one attention; keys and values are made from states of width `memory_size`."""

    def __init__(self, dims: TextDims, memory_size: int) -> None:
        super().__init__()
        self.heads = dims.num_attention_heads
        self.dropout = dims.attention_probs_dropout_prob
        self.query = nn.Linear(dims.hidden_size, dims.hidden_size)
        self.key = nn.Linear(memory_size, dims.hidden_size)
        self.value = nn.Linear(memory_size, dims.hidden_size)

    def keys_values(self, memory: Tensor) -> KeysValues:
        """memory [batch, length, memory_size] -> keys and values, [batch, heads, length, head_dim] each."""
        return split_heads(self.key(memory), self.heads), split_heads(self.value(memory), self.heads)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
        """Scaled dot-product attention; query [batch, heads, length, head_dim] -> [batch, length, width]."""
        dropout = self.dropout if self.training else 0.0
        out = F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, dropout_p=dropout, is_causal=causal
        )
        return join_heads(out)


class SelfAttention(QueryKeyValue):
    """Attention of a text to itself.

    Attributes:
        prefix: None, or a module whose call returns learned (key, value), [heads, n, head_dim] each, which
            stand before the text's own and which every query sees.
    """

    prefix: nn.Module | None

    def __init__(self, dims: TextDims) -> None:
        super().__init__(dims, dims.hidden_size)
        self.register_module("prefix", None)

    def forward(self, hidden: Tensor, mask: Tensor | None, causal: bool, cache: LayerCache | None) -> Tensor:
        """hidden [batch, length, width]; `mask` additive, or None.

        A step with a filled cache takes one new token a row; there `hidden` may be [questions, beams, width],
        and each beam is a row of its own.
        """
        if cache is not None and cache.own is not None:
            return self._step(hidden, cache, cache.own)
        query = split_heads(self.query(hidden), self.heads)
        key, value = self.keys_values(hidden)
        key, value, prefix = with_prefix(self.prefix, key, value)
        if cache is not None:
            cache.own = key, value
        if causal and prefix:  # SDPA's own causal mask would start at the prefix
            mask, causal = causal_mask(hidden.shape[1], prefix, query), False
        else:
            mask = see_prefix(mask, prefix)
        return self.attend(query, key, value, mask, causal)

    def _step(self, hidden: Tensor, cache: LayerCache, past: KeysValues) -> Tensor:
        rows = (hidden.shape[0] * hidden.shape[1], self.heads, 1, -1)
        query = self.query(hidden).view(rows)
        key = torch.cat((past[0], self.key(hidden).view(rows)), 2)
        value = torch.cat((past[1], self.value(hidden).view(rows)), 2)
        cache.own = key, value
        return self.attend(query, key, value, None, False).view_as(hidden)


class CrossAttention(QueryKeyValue):
    """Attention of a text to an image, or of an answer to its question."""

    def forward(
        self,
        hidden: Tensor,
        memory: Tensor,
        mask: Tensor | None,
        slots: Slots | None,
        cache: LayerCache | None,
    ) -> Tensor:
        """hidden [segments, length, width], memory [groups, keys, width] -> [segments, length, width].

        Keys and values are made once a group; `slots` (None: one segment a group) lays the queries of a
        group's segments one after another. Queries don't see each other here, so the result is that of
        separate calls.
        """
        if cache is not None and cache.cross is not None:
            key, value = cache.cross
        else:
            key, value = self.keys_values(memory)
            if cache is not None:
                cache.cross = key, value
        query = self.query(hidden)
        if slots is not None:
            query = slots.gather(query)
        context = self.attend(split_heads(query, self.heads), key, value, mask, False)
        return context if slots is None else slots.scatter(context, hidden.shape[1])


class AddNorm(nn.Module):
    """The end of every sub-layer: projection, dropout, residual, LayerNorm (post-norm)."""

    def __init__(self, dims: TextDims, width: int) -> None:
        super().__init__()
        self.dense = nn.Linear(width, dims.hidden_size)
        self.LayerNorm = nn.LayerNorm(dims.hidden_size, eps=dims.layer_norm_eps)
        self.dropout = nn.Dropout(dims.hidden_dropout_prob)

    def forward(self, hidden: Tensor, residual: Tensor) -> Tensor:
        return self.LayerNorm(self.dropout(self.dense(hidden)) + residual)


class AttentionBlock(nn.Module):
    """One attention (named `self`, as BERT has it) with its output."""

    def __init__(self, dims: TextDims, attention: QueryKeyValue) -> None:
        super().__init__()
        self.self = attention
        self.output = AddNorm(dims, dims.hidden_size)


class Intermediate(nn.Module):
    """The first half of the feed-forward part."""

    def __init__(self, dims: TextDims) -> None:
        super().__init__()
        self.dense = nn.Linear(dims.hidden_size, dims.intermediate_size)
        self.act = ACT2FN[dims.hidden_act]

    def forward(self, hidden: Tensor) -> Tensor:
        return self.act(self.dense(hidden))


class TextLayer(GradientCheckpointingLayer):
    """Self-attention, cross-attention, feed-forward."""

    def __init__(self, dims: TextDims, memory_size: int) -> None:
        super().__init__()
        self.attention = AttentionBlock(dims, SelfAttention(dims))
        self.crossattention = AttentionBlock(dims, CrossAttention(dims, memory_size))
        self.intermediate = Intermediate(dims)
        self.output = AddNorm(dims, dims.intermediate_size)

    def forward(
        self,
        hidden: Tensor,
        memory: Tensor,
        mask: Tensor | None,
        causal: bool,
        memory_mask: Tensor | None,
        slots: Slots | None,
        cache: LayerCache | None = None,
    ) -> Tensor:
        hidden = self.attention.output(self.attention.self(hidden, mask, causal, cache), hidden)
        context = self.crossattention.self(hidden, memory, memory_mask, slots, cache)
        hidden = self.crossattention.output(context, hidden)
        return self.output(self.intermediate(hidden), hidden)


class TextEmbeddings(nn.Module):
    """Word and position embeddings."""

    def __init__(self, dims: TextDims, vocab_size: int, pad_token_id: int) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(vocab_size, dims.hidden_size, padding_idx=pad_token_id)
        self.position_embeddings = nn.Embedding(dims.max_position_embeddings, dims.hidden_size)
        self.LayerNorm = nn.LayerNorm(dims.hidden_size, eps=dims.layer_norm_eps)
        self.dropout = nn.Dropout(dims.hidden_dropout_prob)

    def forward(self, input_ids: Tensor, positions: Tensor) -> Tensor:
        hidden = self.word_embeddings(input_ids) + self.position_embeddings(positions)
        return self.dropout(self.LayerNorm(hidden))


class TextStack(nn.Module):
    """The layers, under BERT's name for them."""

    def __init__(self, dims: TextDims, memory_size: int) -> None:
        super().__init__()
        self.layer = nn.ModuleList([TextLayer(dims, memory_size) for _ in range(dims.num_hidden_layers)])


class TextModel(nn.Module):
    """BERT without pooler, with cross-attention to `memory`."""

    def __init__(self, dims: TextDims, memory_size: int, vocab_size: int, pad_token_id: int) -> None:
        super().__init__()
        self.embeddings = TextEmbeddings(dims, vocab_size, pad_token_id)
        self.encoder = TextStack(dims, memory_size)

    def forward(
        self,
        input_ids: Tensor,
        memory: Tensor,
        *,
        mask: Tensor | None = None,
        causal: bool = False,
        memory_mask: Tensor | None = None,
        slots: Slots | None = None,
        cache: DecoderCache | None = None,
    ) -> Tensor:
        """input_ids [rows, length] -> states [rows, length, hidden_size].

        With a filled cache, `input_ids` are the next tokens, [questions, beams], all at the same position.
        """
        start = 0 if cache is None else cache.length
        length = 1 if start else input_ids.shape[1]
        positions = torch.arange(start, start + length, device=input_ids.device)
        hidden = self.embeddings(input_ids, positions)
        for index, layer in enumerate(self.encoder.layer):
            own = None if cache is None else cache.layers[index]
            hidden = layer(hidden, memory, mask, causal, memory_mask, slots, own)
        if cache is not None:
            cache.length += length
        return hidden


class HeadTransform(nn.Module):
    """The dense layer and norm before the vocabulary."""

    def __init__(self, dims: TextDims) -> None:
        super().__init__()
        self.dense = nn.Linear(dims.hidden_size, dims.hidden_size)
        self.act = ACT2FN[dims.hidden_act]
        self.LayerNorm = nn.LayerNorm(dims.hidden_size, eps=dims.layer_norm_eps)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.LayerNorm(self.act(self.dense(hidden)))


class Predictions(nn.Module):
    """States -> logits; `decoder.weight` is tied to the word embeddings."""

    def __init__(self, dims: TextDims, vocab_size: int) -> None:
        super().__init__()
        self.transform = HeadTransform(dims)
        self.decoder = nn.Linear(dims.hidden_size, vocab_size)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.decoder(self.transform(hidden))


class LanguageHead(nn.Module):
    """BERT's name for the head: `cls.predictions`."""

    def __init__(self, dims: TextDims, vocab_size: int) -> None:
        super().__init__()
        self.predictions = Predictions(dims, vocab_size)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.predictions(hidden)


class TextDecoder(nn.Module):
    """A BERT that writes: causal self-attention, cross-attention to the question's states, a tied head."""

    def __init__(self, dims: TextDims, memory_size: int, vocab_size: int, pad_token_id: int) -> None:
        super().__init__()
        self.bert = TextModel(dims, memory_size, vocab_size, pad_token_id)
        self.cls = LanguageHead(dims, vocab_size)
