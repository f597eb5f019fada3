"""MISS: image encoder, question encoder with attention to the image ("JTM"), and answer decoder.

One forward pass handles many questions of one image: the image is encoded once, and every layer of the
question encoder computes the image's keys and values once. Loss and gradients are the same as for separate
questions. In shapes, a segment is one question with its answer, and a group is the image that segments ask
about, or all images of one study.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForVisualQuestionAnswering, PreTrainedModel
from transformers import initialization as init
from transformers.utils import ModelOutput

from normtune.models.generation import Generated, OnTokens, generate
from normtune.models.miss.attention import QuerySlots, padding_mask
from normtune.models.miss.config import MissConfig
from normtune.models.miss.text import DecoderCache, TextDecoder, TextModel
from normtune.models.miss.vision import VisionTransformer


@dataclass
class MissOutput(ModelOutput):
    """The output of one forward pass."""

    loss: Tensor | None = None  # mean cross-entropy of the labelled tokens; None without labels
    logits: Tensor | None = None  # [segments, answer length, vocabulary]; None without `decoder_input_ids`
    image_states: Tensor | None = None  # [images, 1 + patches, width]
    question_states: Tensor | None = None  # [segments, question length, width]


class MissForQuestionAnswering(PreTrainedModel):
    """MISS (Chen et al. 2024, arXiv 2401.05163) for question answering and report generation."""

    config_class = MissConfig
    config: MissConfig
    base_model_prefix = ""
    main_input_name = "input_ids"
    input_modalities = ["image", "text"]  # noqa: RUF012
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _no_split_modules = ["VisionBlock", "TextLayer"]  # noqa: RUF012
    _tied_weights_keys = {  # noqa: RUF012
        "text_decoder.cls.predictions.decoder.weight": "text_decoder.bert.embeddings.word_embeddings.weight"
    }

    def __init__(self, config: MissConfig) -> None:
        super().__init__(config)
        vision, encoder, decoder = config.vision(), config.text("encoder"), config.text("decoder")
        vocabulary, pad = config.vocab_size, config.pad_token_id
        self.visual_encoder = VisionTransformer(vision)
        self.text_encoder = TextModel(encoder, vision.hidden_size, vocabulary, pad)
        self.text_decoder = TextDecoder(decoder, encoder.hidden_size, vocabulary, pad)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, VisionTransformer):
            init.trunc_normal_(module.cls_token, std=0.02)
            init.trunc_normal_(module.pos_embed, std=0.02)

    def get_input_embeddings(self) -> nn.Module:
        return self.text_encoder.embeddings.word_embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.text_encoder.embeddings.word_embeddings = value  # type: ignore[assignment]

    def get_output_embeddings(self) -> nn.Module:
        return self.text_decoder.cls.predictions.decoder

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.text_decoder.cls.predictions.decoder = new_embeddings  # type: ignore[assignment]

    def _encode_images(self, pixel_values: Tensor | None, image_states: Tensor | None) -> Tensor:
        """The states of images: as given, or of the image encoder for their pixels."""
        if image_states is not None:
            return image_states
        assert pixel_values is not None, "pixel_values or image_states"
        return self.visual_encoder(pixel_values)

    def encode_questions(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        image_states: Tensor,
        image_index: Sequence[int] | Tensor | None = None,
        view_index: Sequence[Sequence[int]] | None = None,
    ) -> Tensor:
        """Encode questions with attention to their images, as for `forward`: [segments, question length, width]."""
        image_mask = None
        if view_index is not None:
            views = torch.tensor(view_index)  # [groups, views], on the host
            complete = bool((views >= 0).all())
            views = views.to(image_states.device, non_blocking=True)
            tokens = image_states.shape[1]
            # the images of a group one after another: [groups, views * tokens, width]; a missing view (-1) is
            # filled with image 0 and masked
            image_states = image_states[views.clamp(min=0)].flatten(1, 2)
            if not complete:
                image_mask = padding_mask((views >= 0).repeat_interleave(tokens, 1), image_states.dtype)
        segments, groups = len(input_ids), len(image_states)
        shared = image_index is not None or segments != groups
        return self.text_encoder(
            input_ids,
            image_states,
            mask=padding_mask(attention_mask, image_states.dtype),
            memory_mask=image_mask,
            slots=QuerySlots.from_image_index(image_index, segments, groups, input_ids.device) if shared else None,
        )

    def forward(
        self,
        input_ids: Tensor,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_index: Sequence[int] | Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        labels: Tensor | None = None,
        image_states: Tensor | None = None,
        view_index: Sequence[Sequence[int]] | None = None,
    ) -> MissOutput:
        """Encode images and questions, and compute the logits of the answers' next tokens.

        Args:
            input_ids: questions, padded on the right: [segments, question length].
            pixel_values: [images, 3, height, width].
            attention_mask: [segments, question length], 1 for a token and 0 for padding; None: no padding.
            image_index: [segments], the image (or row of `view_index`) that each question asks about; None:
                every image has the same number of questions, in order.
            decoder_input_ids: [DEC] and the answer so far, padded on the right: [segments, answer length].
            labels: the token that follows each of `decoder_input_ids` (aligned, not shifted), -100 for
                padding: [segments, answer length].
            image_states: [images, 1 + patches, width], output of the image encoder; replaces `pixel_values`.
            view_index: [groups, views], the images of each group, -1 if a group has fewer; None: every image
                is a group.
        """
        image_states = self._encode_images(pixel_values, image_states)
        states = self.encode_questions(input_ids, attention_mask, image_states, image_index, view_index)
        logits = loss = None
        if decoder_input_ids is not None:
            logits = self.text_decoder.cls(self._decode(decoder_input_ids, states, attention_mask))
            if labels is not None:
                # in fp32: the log-sum-exp over the vocabulary is inaccurate in half precision
                loss = nn.functional.cross_entropy(logits.flatten(0, -2).float(), labels.flatten())
        return MissOutput(loss=loss, logits=logits, image_states=image_states, question_states=states)

    def answer_states(
        self,
        input_ids: Tensor,
        decoder_input_ids: Tensor,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_index: Sequence[int] | Tensor | None = None,
        image_states: Tensor | None = None,
        view_index: Sequence[Sequence[int]] | None = None,
        question_states: Tensor | None = None,
    ) -> Tensor:
        """The decoder's states before its head; other arguments as for `forward`.

        Args:
            question_states: output of the question encoder, [segments, question length, width]; with it,
                neither images nor questions are encoded.

        Returns:
            [segments, answer length, width].
        """
        if question_states is None:
            image_states = self._encode_images(pixel_values, image_states)
            question_states = self.encode_questions(input_ids, attention_mask, image_states, image_index, view_index)
        return self._decode(decoder_input_ids, question_states, attention_mask)

    def _decode(self, answers: Tensor, states: Tensor, attention_mask: Tensor | None) -> Tensor:
        """Decoder states of the answers so far: [segments, answer length, width].

        Answers are padded on the right and need no mask: no token attends to the padding after it.
        """
        mask = padding_mask(attention_mask, states.dtype)
        return self.text_decoder.bert(answers, states, causal=True, memory_mask=mask)

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_index: Sequence[int] | Tensor | None = None,
        image_states: Tensor | None = None,
        view_index: Sequence[Sequence[int]] | None = None,
        *,
        max_new_tokens: int = 9,
        beams: int = 3,
        on_select: Callable[[Tensor], None] | None = None,
        on_tokens: OnTokens | None = None,
    ) -> list[Generated]:
        """Answer every question, all in one batch; images and their keys are computed once.

        The defaults are MISS's: 3 beams, at most 10 tokens including [DEC].

        Args:
            on_select: called with the indices of the remaining questions when some are finished.

        Other arguments as for `forward` and `normtune.models.generation.generate`.
        """
        image_states = self._encode_images(pixel_values, image_states)
        states = self.encode_questions(input_ids, attention_mask, image_states, image_index, view_index)
        mask = padding_mask(attention_mask, states.dtype)
        decoder = self.text_decoder
        cache = DecoderCache(len(decoder.bert.encoder.layer))

        def step(tokens: Tensor, cache_rows: Tensor | None) -> Tensor:
            nonlocal states, mask
            if cache_rows is not None:
                # Which previous questions remain. The rows of a question are adjacent: 1 each after the first
                # call, then `beams`. With 2 rows each, previous rows 4 and 5 belong to question 2.
                rows = cache.rows // len(states)
                questions = (cache_rows[::beams] // rows) if len(cache_rows) < len(states) * beams else None
                cache.select(cache_rows, questions)
                if questions is not None:
                    if on_select is not None:
                        on_select(questions)
                    states = states.index_select(0, questions)
                    mask = None if mask is None else mask.index_select(0, questions)
            # [questions, beams]: the beams of a question share the keys and values of its cross-attention
            hidden = decoder.bert(tokens.view(len(states), -1), states, memory_mask=mask, cache=cache)
            return decoder.cls(hidden).flatten(0, 1)  # [questions * beams, vocabulary]

        start = input_ids.new_full((len(input_ids), 1), self.config.bos_token_id)
        first = decoder.bert(start, states, causal=True, memory_mask=mask, cache=cache)
        return generate(
            decoder.cls(first)[:, 0],
            step,
            end=(self.config.eos_token_id,),
            max_new_tokens=max_new_tokens,
            beams=beams,
            on_tokens=on_tokens,
        )


def register() -> None:
    """Register MISS with transformers' Auto classes; importing this module does."""
    AutoConfig.register("miss", MissConfig, exist_ok=True)
    AutoModel.register(MissConfig, MissForQuestionAnswering, exist_ok=True)
    AutoModelForVisualQuestionAnswering.register(MissConfig, MissForQuestionAnswering, exist_ok=True)


register()
