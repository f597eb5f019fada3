"""LLaVA's shape at a small width: 576 image tokens, CLIP at 336 pixels, a LLaMA behind a projector."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from shape import Shape, tuned_by_peft
from tokenizers import AddedToken, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers import models as token_models
from tokenizers.trainers import BpeTrainer
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    CLIPVisionConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

from normtune.data.records import Dataset, Example
from normtune.models.llava import VICUNA_TEMPLATE, LlavaFamily
from normtune.packing import Group

SPECIAL = ["<unk>", "<s>", "</s>", "<image>", "<pad>"]
SIZE, PATCH = 336, 14
VISION = {"hidden_size": 192, "intermediate_size": 768, "num_hidden_layers": 4, "num_attention_heads": 3}
TEXT = {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 4, "num_attention_heads": 4}


class LlavaShape(Shape):
    """The peer is the same model of transformers, one row a question."""

    name = "llava"

    def __init__(self) -> None:
        super().__init__()
        self._processor: Any = None

    def learn_words(self, texts: Sequence[str]) -> None:
        """A BPE tokenizer of the data's texts, as LLaMA's: lengths in tokens are near the real ones."""
        tokenizer = Tokenizer(token_models.BPE(byte_fallback=True, unk_token="<unk>"))
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        tokenizer.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        )
        pieces = SPECIAL + [f"<0x{byte:02X}>" for byte in range(256)]
        trainer = BpeTrainer(
            vocab_size=4000,
            special_tokens=[AddedToken(piece, special=True, normalized=False) for piece in pieces],
            show_progress=False,
        )
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
        tokenizer.train_from_iterator([*texts, "USER: ASSISTANT:"], trainer)
        tokenizer.pre_tokenizer = None  # type: ignore[assignment]
        named = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
        self._processor = LlavaProcessor(
            LlavaImageProcessorPil(size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE}),
            PreTrainedTokenizerFast(tokenizer_object=tokenizer, **named),
            patch_size=PATCH,
            vision_feature_select_strategy="default",
            num_additional_image_tokens=1,
            chat_template=VICUNA_TEMPLATE,
        )

    def describe(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "image_tokens": (SIZE // PATCH) ** 2,
            "vision": VISION,
            "language": TEXT,
            "vocabulary": len(self._processor.tokenizer),
        }

    def _model(self) -> LlavaForConditionalGeneration:
        tokenizer = self._processor.tokenizer
        ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
        config = LlavaConfig(
            vision_config=CLIPVisionConfig(image_size=SIZE, patch_size=PATCH, projection_dim=192, **VISION),
            text_config={"model_type": "llama", "vocab_size": len(tokenizer), **TEXT, **ids},
            image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        )
        return LlavaForConditionalGeneration(config)

    def family(self) -> LlavaFamily:
        return LlavaFamily(self._model().eval(), self._processor)

    def peer(
        self, method: str, dataset: Dataset, examples: Sequence[Example]
    ) -> tuple[nn.Module, list[Any], Any]:
        family = self.family()
        keys = dict.fromkeys(example.images[0] for example in examples)
        pixels = {key: family.pixels(dataset.open_image(key)) for key in keys}
        rows = []
        for example in examples:
            segment = family.encode(example.id, example.question, example.answer)
            image = pixels[example.images[0]]
            alone = family.collate([Group(example.images, (segment,))], [[image]])
            labels = torch.full_like(alone["input_ids"][0], -100)
            labels[alone["answer_rows"] + 1] = alone["labels"]
            rows.append((image["pixel_values"], alone["input_ids"][0], labels))
        pad = self._processor.tokenizer.pad_token_id

        def collate(chosen: list[Any]) -> dict[str, torch.Tensor]:
            ids = pad_sequence([row[1] for row in chosen], True, pad)
            return {
                "pixel_values": torch.stack([row[0] for row in chosen]),
                "input_ids": ids,
                "attention_mask": (ids != pad).long(),
                "labels": pad_sequence([row[2] for row in chosen], True, -100),
            }

        return tuned_by_peft(family.model, method, ("q_proj", "v_proj")), rows, collate

    def generator(
        self, dataset: Dataset, examples: Sequence[Example], batch: int
    ) -> tuple[Callable[[Any, int, int], Any], list[Any]]:
        model, rows, _ = self.peer("full", dataset, examples)
        model.eval()
        pad = self._processor.tokenizer.pad_token_id
        batches = []
        for start in range(0, len(rows), batch):
            chosen = rows[start : start + batch]
            prompts = [row[1][: int((row[2] == -100).sum())] for row in chosen]
            ids = pad_sequence(prompts, True, pad, padding_side="left")
            batches.append(
                {
                    "pixel_values": torch.stack([row[0] for row in chosen]),
                    "input_ids": ids,
                    "attention_mask": (ids != pad).long(),
                }
            )

        def generate(inputs: dict[str, torch.Tensor], beams: int, tokens: int) -> Any:
            return model.generate(**inputs, num_beams=beams, max_new_tokens=tokens, do_sample=False)  # type: ignore[operator]

        return generate, batches
