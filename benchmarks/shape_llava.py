"""LLaVA's shape at a small width: CLIP at 336 pixels, 576 image tokens, a projector and a LLaMA.

The peer is the same model class of transformers, with one row per question.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from shape import NO_END_BIAS, AnswerTokens, Shape, apply_peft
from tokenizers import AddedToken, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers import models as token_models
from tokenizers.trainers import BpeTrainer
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    CLIPVisionConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

from normtune.data.groups import Group
from normtune.data.records import Example
from normtune.models.families.llava import VICUNA_TEMPLATE, LlavaFamily
from normtune.models.types import Pixels

SPECIAL = ["<unk>", "<s>", "</s>", "<image>", "<pad>"]
SIZE, PATCH = 336, 14  # pixels at the side of an image, and of one of its patches
IGNORED = -100  # label of a token outside the answer
VISION = {"hidden_size": 192, "intermediate_size": 768, "num_hidden_layers": 4, "num_attention_heads": 3}
TEXT = {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 4, "num_attention_heads": 4}


class Row(NamedTuple):
    """One question with its answer and its own image; S is its number of tokens."""

    pixel_values: Tensor  # [3, size, size]
    ids: Tensor  # [S] long
    labels: Tensor  # [S] long, `IGNORED` outside the answer


class LlavaShape(Shape):
    """LLaVA at a small width.

    Args:
        size: pixels at the side of the square image.
        vision, text: dimensions that replace those of `VISION` and `TEXT`.
    """

    name = "llava"

    def __init__(
        self, size: int = SIZE, vision: dict[str, Any] | None = None, text: dict[str, Any] | None = None
    ) -> None:
        super().__init__()
        self.size, self.vision, self.text = size, VISION | (vision or {}), TEXT | (text or {})
        self._processor: Any = None

    def learn_words(self, texts: Sequence[str]) -> None:
        """Train a BPE tokenizer like LLaMA's on the data, so that token counts are near the real ones."""
        tokenizer = Tokenizer(token_models.BPE(byte_fallback=True, unk_token="<unk>"))
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
        pieces = SPECIAL + [f"<0x{byte:02X}>" for byte in range(256)]
        trainer = BpeTrainer(
            vocab_size=4000,
            special_tokens=[AddedToken(piece, special=True, normalized=False) for piece in pieces],
            show_progress=False,
        )
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
        tokenizer.train_from_iterator([*texts, "USER: ASSISTANT:"], trainer)
        tokenizer.pre_tokenizer = None  # type: ignore[assignment]
        named_tokens = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
        self._processor = LlavaProcessor(
            LlavaImageProcessorPil(
                size={"shortest_edge": self.size}, crop_size={"height": self.size, "width": self.size}
            ),
            PreTrainedTokenizerFast(tokenizer_object=tokenizer, **named_tokens),
            patch_size=PATCH,
            vision_feature_select_strategy="default",
            num_additional_image_tokens=1,
            chat_template=VICUNA_TEMPLATE,
        )

    @property
    def image_tokens(self) -> int:
        return (self.size // PATCH) ** 2

    def describe(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "image_tokens": self.image_tokens,
            "vision": self.vision,
            "language": self.text,
            "vocabulary": len(self._processor.tokenizer),
        }

    def _build_model(self) -> LlavaForConditionalGeneration:
        return LlavaForConditionalGeneration(self._build_config())

    def _build_config(self) -> LlavaConfig:
        tokenizer = self._processor.tokenizer
        ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
        return LlavaConfig(
            vision_config=CLIPVisionConfig(image_size=self.size, patch_size=PATCH, projection_dim=192, **self.vision),
            text_config={"model_type": "llama", "vocab_size": len(tokenizer), **self.text, **ids},
            image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        )

    def build_family(self) -> LlavaFamily:
        return LlavaFamily(self._build_model().eval(), self._processor)

    def build_pair(self) -> tuple[LlavaFamily, nn.Module]:
        family, peer = self.build_family(), self._build_model().eval()
        for head in (family.model.lm_head, peer.lm_head):
            bias = torch.zeros(head.out_features)
            bias[list(family.end_tokens)] = NO_END_BIAS
            head.bias = nn.Parameter(bias)
        peer.load_state_dict(family.model.state_dict())
        return family, peer

    def build_peft(self, method: str) -> nn.Module:
        # a new model: the family replaces the attention function of its own model
        return apply_peft(self._build_model(), method, ("q_proj", "v_proj"))

    def build_row(self, family: Any, example: Example, pixels: Pixels) -> Row:
        segment = family.tokenize(example.id, example.question, example.answer, history=example.history)
        batch = family.collate([Group(example.images, (segment,))], [[pixels]])
        labels = torch.full_like(batch["input_ids"][0], IGNORED)
        labels[batch["answer_rows"] + 1] = batch["labels"]
        return Row(pixels["pixel_values"], batch["input_ids"][0], labels)

    def collate(self, rows: Sequence[Row]) -> dict[str, Any]:
        labels = pad_sequence([row.labels for row in rows], True, IGNORED)
        return self._padded(rows, [row.ids for row in rows], "right") | {"labels": labels}

    def question_batch(self, rows: Sequence[Row]) -> dict[str, Any]:
        return self._padded(rows, [row.ids[: self.question_length(row)] for row in rows], "left")

    def question_length(self, row: Row) -> int:
        return int((row.labels == IGNORED).sum())

    def _padded(self, rows: Sequence[Row], ids: list[Tensor], side: str) -> dict[str, Any]:
        pad = self._processor.tokenizer.pad_token_id
        padded = pad_sequence(ids, True, pad, padding_side=side)
        return {
            "pixel_values": torch.stack([row.pixel_values for row in rows]),
            "input_ids": padded,
            "attention_mask": (padded != pad).long(),
        }

    def answer_with_transformers(
        self, model: Any, inputs: dict[str, Any], beams: int, tokens: int
    ) -> list[AnswerTokens]:
        sequences = model.generate(**inputs, num_beams=beams, max_new_tokens=tokens, do_sample=False)
        return [tuple(row) for row in sequences[:, inputs["input_ids"].shape[1] :].tolist()]

    def answer_with_normtune(
        self, family: LlavaFamily, groups: Sequence[Group], pixels: Sequence[Sequence[Pixels]], beams: int, tokens: int
    ) -> list[AnswerTokens]:
        answers = family.generate_tokens(groups, pixels, max_new_tokens=tokens, beams=beams)
        return [answer.tokens for answer in answers]
