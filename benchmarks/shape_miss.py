"""MISS's shape at a small width: 480 pixels, 900 patches; the peer is transformers' BLIP."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from shape import Shape, tuned_by_peft
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers import BlipConfig, BlipForQuestionAnswering

from normtune.data.records import Dataset, Example
from normtune.models.miss.config import MissConfig
from normtune.models.miss.family import MissFamily, miss_processor
from normtune.models.miss.model import MissForQuestionAnswering
from normtune.models.miss.tokenizer import ENCODE, bert_tokenizer


class MissShape(Shape):
    """MISS at 480 pixels: 900 patches, its layers and width scaled down; the peer is transformers' BLIP."""

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
        """What MISS's and BLIP's three parts have in common."""
        return {
            "hidden_size": self.width,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "intermediate_size": 4 * self.width,
        }

    def _tokenizer(self) -> Any:
        signs = [chr(code) for code in range(33, 127) if not chr(code).isupper()]
        pieces = [
            "[PAD]",
            "[UNK]",
            "[CLS]",
            "[SEP]",
            "[MASK]",
            *signs,
            *(f"##{s}" for s in signs),
            *self.words,
        ]
        return bert_tokenizer({piece: index for index, piece in enumerate(dict.fromkeys(pieces))})

    def family(self) -> MissFamily:
        tokenizer = self._tokenizer()
        width = self._dims()
        config = MissConfig(
            vision_dims={**width, "image_size": self.image_size, "patch_size": 16},
            encoder_dims=width,
            decoder_dims=width,
            vocab_size=len(tokenizer),
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.sep_token_id,
            encode_token_id=tokenizer.convert_tokens_to_ids(ENCODE),
        )
        return MissFamily(MissForQuestionAnswering(config), miss_processor(tokenizer, self.image_size))

    def peer(
        self, method: str, dataset: Dataset, examples: Sequence[Example]
    ) -> tuple[nn.Module, list[Any], Any]:
        family = self.family()
        width = self._dims()
        vision = {**width, "image_size": self.image_size, "patch_size": 16}
        text = {
            **width,
            "encoder_hidden_size": self.width,
            "vocab_size": family.config.vocab_size,
            "bos_token_id": family.config.bos_token_id,
            "sep_token_id": family.config.eos_token_id,
            "pad_token_id": 0,
        }
        model = BlipForQuestionAnswering(BlipConfig(vision_config=vision, text_config=text))
        pixels = {
            key: family.pixels(dataset.open_image(key))["pixel_values"]
            for key in dict.fromkeys(e.images[0] for e in examples)
        }
        rows = []
        for example in examples:
            segment = family.encode(example.id, example.question, example.answer)
            answer = torch.tensor((family.config.bos_token_id, *segment.answer))
            rows.append((pixels[example.images[0]], torch.tensor(segment.prompt), answer))

        def collate(chosen: list[Any]) -> dict[str, torch.Tensor]:
            questions = [row[1] for row in chosen]
            answers = [row[2] for row in chosen]
            ids = pad_sequence(questions, True, 0)
            entered = pad_sequence(answers, True, 0)
            return {
                "pixel_values": torch.stack([row[0] for row in chosen]),
                "input_ids": ids,
                "attention_mask": (ids != 0).long(),
                "decoder_input_ids": entered,
                "decoder_attention_mask": (entered != 0).long(),
                "labels": pad_sequence(answers, True, -100),
            }

        return tuned_by_peft(model, method, ("query", "value", "qkv")), rows, collate

    def generator(
        self, dataset: Dataset, examples: Sequence[Example], batch: int
    ) -> tuple[Callable[[Any, int, int], Any], list[Any]]:
        model, rows, collate = self.peer("full", dataset, examples)
        model.eval()

        def generate(inputs: dict[str, torch.Tensor], beams: int, tokens: int) -> Any:
            asked = {name: inputs[name] for name in ("input_ids", "pixel_values", "attention_mask")}
            return model.generate(**asked, num_beams=beams, max_new_tokens=tokens, do_sample=False)  # type: ignore[operator]

        return generate, [collate(rows[start : start + batch]) for start in range(0, len(rows), batch)]
