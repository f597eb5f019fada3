"""The text encoder and decoder: BERT (Devlin et al. 2019) with cross-attention in every layer.

The encoder attends to image states, the decoder to question states; both call these states `memory`. Modules
have BERT's names, as in the checkpoints of MISS and BLIP.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer

from normtune.models.miss.attention import (
    QuerySlots,
    causal_mask,
    extend_mask_for_prefix,
    join_heads,
    prepend_prefix,
    split_heads,
)
from normtune.models.miss.config import TextDims

KeysValues = tuple[Tensor, Tensor]  # each [batch, heads, length, head_dim]


@dataclass
class LayerCache:
    """Keys and values that one decoder layer reuses in every decoding step; None before the first step."""

    # of the tokens so far, learned prefix included: each [rows, heads, length, head_dim]
    self_attention: KeysValues | None = None
    # of the question: each [questions, heads, length, head_dim]
    cross_attention: KeysValues | None = None


class DecoderCache:
    """The caches of all decoder layers, and `length`, the number of tokens in them."""

    def __init__(self, layers: int) -> None:
        self.layers = [LayerCache() for _ in range(layers)]
        self.length = 0

    @property
    def rows(self) -> int:
        """The number of rows in the cache (questions x beams)."""
        cached = self.layers[0].self_attention
        assert cached is not None, "the cache is empty"
        return cached[0].shape[0]

    def select(self, rows: Tensor, questions: Tensor | None) -> None:
        """Reorder the rows after a step of beam search, and drop finished questions.

        Args:
            rows: [new rows], the previous row that each new row continues.
            questions: [remaining questions], their previous indices; None: all remain.
        """
        for layer in self.layers:
            assert layer.self_attention is not None and layer.cross_attention is not None, "select after the first step"
            key, value = layer.self_attention
            layer.self_attention = key.index_select(0, rows), value.index_select(0, rows)
            if questions is not None:
                key, value = layer.cross_attention
                layer.cross_attention = key.index_select(0, questions), value.index_select(0, questions)


class QueryKeyValue(nn.Module):
    """The projections of one attention; keys and values are computed from states of width `memory_size`."""

    def __init__(self, dims: TextDims, memory_size: int) -> None:
        super().__init__()
        self.heads = dims.num_attention_heads
        self.dropout = dims.attention_probs_dropout_prob
        self.query = nn.Linear(dims.hidden_size, dims.hidden_size)
        self.key = nn.Linear(memory_size, dims.hidden_size)
        self.value = nn.Linear(memory_size, dims.hidden_size)

    def keys_values(self, memory: Tensor) -> KeysValues:
        """[batch, length, memory_size] -> keys and values, each [batch, heads, length, head_dim]."""
        return split_heads(self.key(memory), self.heads), split_heads(self.value(memory), self.heads)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
        """Scaled dot-product attention.

        Args:
            query: [batch, heads, length, head_dim].
            key, value: [batch, heads, keys, head_dim].
            mask: additive, broadcast to [batch, heads, length, keys]; None: every key is visible.
            causal: apply SDPA's own causal mask; only without `mask`.

        Returns:
            [batch, length, width].
        """
        dropout = self.dropout if self.training else 0.0
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout, is_causal=causal)
        return join_heads(out)


class SelfAttention(QueryKeyValue):
    """Attention of a text to itself.

    Attributes:
        prefix: None, or a module that returns a learned (key, value) when called, each [heads, n, head_dim].
            They are prepended to the keys and values of the text, and every query attends to them.
    """

    prefix: nn.Module | None

    def __init__(self, dims: TextDims) -> None:
        super().__init__(dims, dims.hidden_size)
        self.register_module("prefix", None)

    def forward(self, hidden: Tensor, mask: Tensor | None, causal: bool, cache: LayerCache | None) -> Tensor:
        """[batch, length, width] -> the same shape.

        With a filled cache, `hidden` has one new token a row. It may then be [questions, beams, width]; each
        beam is a separate row of the cache.

        Args:
            mask: additive, see `padding_mask`; None: nothing is padded.
            causal: each token attends only to the tokens before it and to itself.
            cache: of this layer; it is filled by the first call and extended by the next ones.
        """
        if cache is not None and cache.self_attention is not None:
            return self._step(hidden, cache, cache.self_attention)
        query = split_heads(self.query(hidden), self.heads)
        key, value = self.keys_values(hidden)
        key, value, prefix = prepend_prefix(self.prefix, key, value)
        if cache is not None:
            cache.self_attention = key, value
        if causal and prefix:  # SDPA's own causal mask would count the prefix as tokens of the text
            mask, causal = causal_mask(hidden.shape[1], prefix, query), False
        else:
            mask = extend_mask_for_prefix(mask, prefix)
        return self.attend(query, key, value, mask, causal)

    def _step(self, hidden: Tensor, cache: LayerCache, past: KeysValues) -> Tensor:
        """One new token a row: it attends to all cached tokens and to itself, so that no mask is needed."""
        shape = (hidden.shape[0] * hidden.shape[1], self.heads, 1, -1)  # [rows, heads, 1, head_dim]
        query = self.query(hidden).view(shape)
        key = torch.cat((past[0], self.key(hidden).view(shape)), 2)  # [rows, heads, length + 1, head_dim]
        value = torch.cat((past[1], self.value(hidden).view(shape)), 2)
        cache.self_attention = key, value
        return self.attend(query, key, value, None, False).view_as(hidden)


class CrossAttention(QueryKeyValue):
    """Attention of a question to its image, or of an answer to its question."""

    def forward(
        self, hidden: Tensor, memory: Tensor, mask: Tensor | None, slots: QuerySlots | None, cache: LayerCache | None
    ) -> Tensor:
        """hidden [segments, length, width], memory [groups, keys, width] -> [segments, length, width].

        Keys and values are computed once a group. `slots` puts the queries of a group's segments one after
        another into one sequence. Queries do not attend to each other in cross-attention, so the result
        is the same as in separate calls.

        Args:
            mask: additive, hides padding of `memory`: [groups, 1, 1, keys]; None: nothing is padded.
            slots: the slot of each segment; None: one segment a group, in order.
            cache: of this layer; with one, keys and values are computed only in the first call.
        """
        if cache is not None and cache.cross_attention is not None:
            key, value = cache.cross_attention
        else:
            key, value = self.keys_values(memory)
            if cache is not None:
                cache.cross_attention = key, value
        query = self.query(hidden)
        if slots is not None:
            query = slots.gather(query)  # [groups, slots * length, width]
        context = self.attend(split_heads(query, self.heads), key, value, mask, False)
        return context if slots is None else slots.scatter(context, hidden.shape[1])


class AddNorm(nn.Module):
    """The end of every sub-layer: projection, dropout, residual connection, LayerNorm (post-norm)."""

    def __init__(self, dims: TextDims, width: int) -> None:
        super().__init__()
        self.dense = nn.Linear(width, dims.hidden_size)
        self.LayerNorm = nn.LayerNorm(dims.hidden_size, eps=dims.layer_norm_eps)
        self.dropout = nn.Dropout(dims.hidden_dropout_prob)

    def forward(self, hidden: Tensor, residual: Tensor) -> Tensor:
        return self.LayerNorm(self.dropout(self.dense(hidden)) + residual)


class AttentionBlock(nn.Module):
    """One attention with its output; the attention is named `self`, as in BERT."""

    def __init__(self, dims: TextDims, attention: QueryKeyValue) -> None:
        super().__init__()
        self.self = attention
        self.output = AddNorm(dims, dims.hidden_size)


class Intermediate(nn.Module):
    """The first half of the feed-forward network."""

    def __init__(self, dims: TextDims) -> None:
        super().__init__()
        self.dense = nn.Linear(dims.hidden_size, dims.intermediate_size)
        self.act = ACT2FN[dims.hidden_act]

    def forward(self, hidden: Tensor) -> Tensor:
        return self.act(self.dense(hidden))


class TextLayer(GradientCheckpointingLayer):
    """One layer: self-attention, cross-attention, feed-forward network."""

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
        slots: QuerySlots | None,
        cache: LayerCache | None = None,
    ) -> Tensor:
        """hidden [segments, length, width] -> the same shape; arguments as for the two attentions."""
        hidden = self.attention.output(self.attention.self(hidden, mask, causal, cache), hidden)
        context = self.crossattention.self(hidden, memory, memory_mask, slots, cache)
        hidden = self.crossattention.output(context, hidden)
        return self.output(self.intermediate(hidden), hidden)


class TextEmbeddings(nn.Module):
    """Word and position embeddings."""

    def __init__(self, dims: TextDims, vocab_size: int, pad_token_id: int) -> None:
        super().__init__()
        # `post_init` sets the weights; nn.Embedding's own initialisation takes 0.4 s on the meta device (sympy)
        words = torch.empty(vocab_size, dims.hidden_size)
        positions = torch.empty(dims.max_position_embeddings, dims.hidden_size)
        self.word_embeddings = nn.Embedding.from_pretrained(words, freeze=False, padding_idx=pad_token_id)
        self.position_embeddings = nn.Embedding.from_pretrained(positions, freeze=False)
        self.LayerNorm = nn.LayerNorm(dims.hidden_size, eps=dims.layer_norm_eps)
        self.dropout = nn.Dropout(dims.hidden_dropout_prob)

    def forward(self, input_ids: Tensor, positions: Tensor) -> Tensor:
        """input_ids [rows, length], positions [length] -> [rows, length, hidden_size]."""
        hidden = self.word_embeddings(input_ids) + self.position_embeddings(positions)
        return self.dropout(self.LayerNorm(hidden))


class TextStack(nn.Module):
    """The list of layers; BERT calls it `encoder.layer`."""

    def __init__(self, dims: TextDims, memory_size: int) -> None:
        super().__init__()
        self.layer = nn.ModuleList([TextLayer(dims, memory_size) for _ in range(dims.num_hidden_layers)])


class TextModel(nn.Module):
    """BERT without pooler, with cross-attention to `memory` in every layer."""

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
        slots: QuerySlots | None = None,
        cache: DecoderCache | None = None,
    ) -> Tensor:
        """input_ids [rows, length], memory [groups, keys, memory_size] -> states [rows, length, hidden_size].

        With a filled cache, `input_ids` are the next tokens: [questions, beams], all at the same position.

        Args:
            mask: additive, hides padding of `input_ids`: [rows, 1, 1, length].
            causal: each token attends only to the tokens before it and to itself.
            memory_mask: additive, hides padding of `memory`: [groups, 1, 1, keys].
            slots: the slot of each row; None: one row a group, in order.
            cache: keys and values of the tokens before `input_ids`; it is extended.
        """
        start = 0 if cache is None else cache.length
        length = 1 if start else input_ids.shape[1]  # with a filled cache, axis 1 are the beams
        positions = torch.arange(start, start + length, device=input_ids.device)
        hidden = self.embeddings(input_ids, positions)
        for index, layer in enumerate(self.encoder.layer):
            layer_cache = None if cache is None else cache.layers[index]
            hidden = layer(hidden, memory, mask, causal, memory_mask, slots, layer_cache)
        if cache is not None:
            cache.length += length
        return hidden


class HeadTransform(nn.Module):
    """The dense layer and the norm before the projection to the vocabulary."""

    def __init__(self, dims: TextDims) -> None:
        super().__init__()
        self.dense = nn.Linear(dims.hidden_size, dims.hidden_size)
        self.act = ACT2FN[dims.hidden_act]
        self.LayerNorm = nn.LayerNorm(dims.hidden_size, eps=dims.layer_norm_eps)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.LayerNorm(self.act(self.dense(hidden)))


class Predictions(nn.Module):
    """[..., hidden_size] -> logits [..., vocabulary]; `decoder.weight` is tied to the word embeddings."""

    def __init__(self, dims: TextDims, vocab_size: int) -> None:
        super().__init__()
        self.transform = HeadTransform(dims)
        self.decoder = nn.Linear(dims.hidden_size, vocab_size)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.decoder(self.transform(hidden))


class LanguageHead(nn.Module):
    """The language-model head; BERT calls it `cls.predictions`."""

    def __init__(self, dims: TextDims, vocab_size: int) -> None:
        super().__init__()
        self.predictions = Predictions(dims, vocab_size)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.predictions(hidden)


class TextDecoder(nn.Module):
    """The answer decoder: causal self-attention, cross-attention to the question's states, a tied head."""

    def __init__(self, dims: TextDims, memory_size: int, vocab_size: int, pad_token_id: int) -> None:
        super().__init__()
        self.bert = TextModel(dims, memory_size, vocab_size, pad_token_id)
        self.cls = LanguageHead(dims, vocab_size)
