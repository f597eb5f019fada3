"""A tiny random MISS with distinct logits and non-trivial gradients, and questions for it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from normtune.models.miss.config import MissConfig
from normtune.models.miss.model import MissForQuestionAnswering

VOCABULARY, PAD, END, START, ENCODE = 60, 0, 3, 58, 59
IMAGE = 32


def tiny_config(**changes: Any) -> MissConfig:
    vision = {
        "image_size": IMAGE,
        "patch_size": 8,
        "hidden_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 64,
    }
    encoder = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 40,
        "max_position_embeddings": 64,
    }
    return MissConfig(
        vision_dims=vision,
        encoder_dims=encoder,
        decoder_dims=encoder | {"hidden_size": 40, "num_hidden_layers": 3},
        vocab_size=VOCABULARY,
        bos_token_id=START,
        encode_token_id=ENCODE,
        eos_token_id=END,
        **changes,
    )


def randomize(model: nn.Module, seed: int = 0) -> None:
    """Draw weights that give distinct logits and non-trivial gradients."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, parameter[0].numel() ** -0.5)
            else:
                parameter += 0.1 * torch.randn_like(parameter)


def tiny_miss(seed: int = 0, **changes: Any) -> MissForQuestionAnswering:
    model = MissForQuestionAnswering(tiny_config(**changes)).eval()
    randomize(model, seed)
    return model


def random_pixels(images: int, seed: int = 1, size: tuple[int, int] = (IMAGE, IMAGE)) -> Tensor:
    return torch.randn(images, 3, *size, generator=torch.Generator().manual_seed(seed))


def pad_rows(rows: list[list[int]], value: int = PAD, extra: int = 0) -> Tensor:
    length = max(map(len, rows)) + extra
    return torch.tensor([row + [value] * (length - len(row)) for row in rows])


def question_batch(questions: list[list[int]], extra: int = 0) -> dict[str, Tensor]:
    """`input_ids` and `attention_mask` of questions, with `extra` padding tokens on the right."""
    return {
        "input_ids": pad_rows(questions, PAD, extra),
        "attention_mask": pad_rows([[1] * len(question) for question in questions], 0, extra),
    }


def answer_batch(answers: list[list[int]]) -> dict[str, Tensor]:
    """`decoder_input_ids` and `labels` of answers that end with END."""
    return {
        "decoder_input_ids": pad_rows([[START, *answer] for answer in answers]),
        "labels": pad_rows([[*answer, END] for answer in answers], -100),
    }


QUESTIONS = [
    [ENCODE, 5, 6, 7, END],
    [ENCODE, 8, END],
    [ENCODE, 9, 10, END],
    [ENCODE, 11, 12, 13, 14, END],
    [ENCODE, 15, END],
]
ANSWERS = [[20], [21, 22, 23], [24, 25], [26], [27, 28]]
