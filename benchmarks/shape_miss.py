"""MISS's shape at a small width: 480 pixels and 900 patches.

The peer is transformers' BLIP, which has the same architecture (`read_blip_weights` converts its weights to MISS).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from shape import NO_END_BIAS, AnswerTokens, Shape, apply_peft
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import BlipConfig, BlipForQuestionAnswering

from normtune.data.groups import Group
from normtune.data.records import Example
from normtune.models.families.miss import MissFamily, miss_processor
from normtune.models.importers.miss.from_blip import read_blip_weights
from normtune.models.importers.miss.weights import build_model
from normtune.models.miss.config import MissConfig
from normtune.models.miss.model import MissForQuestionAnswering
from normtune.models.miss.tokenizer import ENCODE, build_bert_tokenizer
from normtune.models.types import Pixels


class Row(NamedTuple):
    """One question with its answer and its own image, as BLIP takes them."""

    pixel_values: Tensor  # [3, size, size]
    question: Tensor  # [question tokens] long
    answer: Tensor  # [1 + answer tokens] long; the first is the start token


class MissShape(Shape):
    """MISS at 480 pixels, with fewer layers and a smaller width than MISS-base."""

    name = "miss"
    width, heads, layers, image_size = 192, 3, 4, 480

    def describe(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "image_size": self.image_size,
            "image_tokens": (self.image_size // 16) ** 2 + 1,
            "width": self.width,
            "layers": [self.layers] * 3,
            "vocabulary": len(self._tokenizer()),
        }

    def _dims(self) -> dict[str, Any]:
        """The dimensions that the vision, encoder and decoder parts of MISS and of BLIP share."""
        return {
            "hidden_size": self.width,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "intermediate_size": 4 * self.width,
        }

    def _tokenizer(self) -> Any:
        signs = [chr(code) for code in range(33, 127) if not chr(code).isupper()]
        pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *signs, *(f"##{s}" for s in signs), *self.words]
        return build_bert_tokenizer({piece: index for index, piece in enumerate(dict.fromkeys(pieces))})

    def build_family(self) -> MissFamily:
        tokenizer = self._tokenizer()
        dims = self._dims()
        config = MissConfig(
            vision_dims={**dims, "image_size": self.image_size, "patch_size": 16},
            encoder_dims=dims,
            decoder_dims=dims,
            vocab_size=len(tokenizer),
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.sep_token_id,
            encode_token_id=tokenizer.convert_tokens_to_ids(ENCODE),
        )
        return MissFamily(MissForQuestionAnswering(config), miss_processor(tokenizer, self.image_size))

    def build_pair(self) -> tuple[MissFamily, nn.Module]:
        blip = self._blip()
        model, tokenizer = build_model(read_blip_weights(blip)), self._tokenizer()
        model.config.encode_token_id = tokenizer.convert_tokens_to_ids(ENCODE)
        end = model.config.eos_token_id
        with torch.no_grad():
            for head in (model.text_decoder.cls, blip.text_decoder.cls):
                head.predictions.decoder.bias[end] = NO_END_BIAS
        return MissFamily(model.eval(), miss_processor(tokenizer, self.image_size)), blip.eval()

    def _blip(self) -> BlipForQuestionAnswering:
        tokenizer = self._tokenizer()
        dims = self._dims()
        vision = {**dims, "image_size": self.image_size, "patch_size": 16}
        text = {
            **dims,
            "encoder_hidden_size": self.width,
            "vocab_size": len(tokenizer),
            "bos_token_id": tokenizer.bos_token_id,
            "sep_token_id": tokenizer.sep_token_id,
            "pad_token_id": 0,
        }
        return BlipForQuestionAnswering(BlipConfig(vision_config=vision, text_config=text))

    def build_peft(self, method: str) -> nn.Module:
        return apply_peft(self._blip(), method, ("query", "value", "qkv"))

    def build_row(self, family: Any, example: Example, pixels: Pixels) -> Row:
        segment = family.tokenize(example.id, example.question, example.answer)
        answer = torch.tensor((family.config.bos_token_id, *segment.answer))
        return Row(pixels["pixel_values"], torch.tensor(segment.prompt), answer)

    def collate(self, rows: Sequence[Row]) -> dict[str, Any]:
        answers = [row.answer for row in rows]
        decoder_ids = pad_sequence(answers, True, 0)
        return self.question_batch(rows) | {
            "decoder_input_ids": decoder_ids,
            "decoder_attention_mask": (decoder_ids != 0).long(),
            "labels": pad_sequence(answers, True, -100),
        }

    def question_batch(self, rows: Sequence[Row]) -> dict[str, Any]:
        ids = pad_sequence([row.question for row in rows], True, 0)
        return {
            "pixel_values": torch.stack([row.pixel_values for row in rows]),
            "input_ids": ids,
            "attention_mask": (ids != 0).long(),
        }

    def question_length(self, row: Row) -> int:
        return len(row.question)

    def answer_with_transformers(
        self, model: Any, inputs: dict[str, Any], beams: int, tokens: int
    ) -> list[AnswerTokens]:
        sequences = model.generate(**inputs, num_beams=beams, max_new_tokens=tokens, do_sample=False)
        return [tuple(row) for row in sequences[:, 1:].tolist()]

    def answer_with_normtune(
        self, family: MissFamily, groups: Sequence[Group], pixels: Sequence[Sequence[Pixels]], beams: int, tokens: int
    ) -> list[AnswerTokens]:
        answers = family.model.generate(max_new_tokens=tokens, beams=beams, **family._questions(groups, pixels))
        return [answer.tokens for answer in answers]
