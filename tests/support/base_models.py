"""Tiny bases for the tests of adapters: MISS and LLaVA, with random weights that give distinct logits."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor, nn
from transformers import LlamaModel

from normtune.methods.adapt import TunedModel
from normtune.models.miss.config import MissConfig
from normtune.models.miss.model import MissForQuestionAnswering
from tests.support.tiny_models import make_tiny

KINDS = ("miss", "llava")
# name of the cache argument and output in transformers: "cache" since 5.24, "past_key_values" before
CACHE_ARGUMENT = "cache" if "cache" in inspect.signature(LlamaModel.forward).parameters else "past_key_values"
MISS_WIDTH = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}


def tiny_miss() -> MissForQuestionAnswering:
    config = MissConfig(
        vision_dims={**MISS_WIDTH, "image_size": 16, "patch_size": 8},
        encoder_dims={**MISS_WIDTH, "max_position_embeddings": 16},
        decoder_dims={**MISS_WIDTH, "max_position_embeddings": 16},
        vocab_size=40,
        bos_token_id=38,
        eos_token_id=2,
        encode_token_id=39,
    )
    torch.manual_seed(0)
    model = MissForQuestionAnswering(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    return model.eval()


@cache
def _base(kind: str) -> nn.Module:
    if kind == "miss":
        return tiny_miss()
    from transformers import AutoModelForImageTextToText

    with TemporaryDirectory() as directory:
        make_tiny("llava", directory)
        return AutoModelForImageTextToText.from_pretrained(directory).eval()


def tiny_base(kind: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A copy of the tiny base, in eval mode."""
    return copy.deepcopy(_base(kind)).to(dtype)


def save_base(kind: str, directory: Path, dtype: torch.dtype = torch.float32) -> Path:
    """Write a checkpoint of the tiny base, with a file besides config and weights."""
    tiny_base(kind, dtype).save_pretrained(directory)
    (directory / "vocab.txt").write_text("a\nb\n")
    return directory


@torch.no_grad()
def compute_logits(model: nn.Module) -> Tensor:
    """The logits of two fixed image-question pairs."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(5, 36, (2, 5), generator=generator)
    dtype = next(model.parameters()).dtype
    if model.config.model_type == "miss":
        pixels = torch.rand((2, 3, 16, 16), generator=generator).to(dtype)
        return model(input_ids=ids, pixel_values=pixels, decoder_input_ids=ids[:, :3]).logits
    pixels = torch.rand((2, 3, 32, 32), generator=generator).to(dtype)
    image = torch.full((2, 16), model.config.image_token_index)
    mask = torch.ones((2, 21), dtype=torch.long)
    return model(input_ids=torch.cat([image, ids], 1), pixel_values=pixels, attention_mask=mask).logits


def perturb_trained(tuned: TunedModel, seed: int = 5) -> None:
    """Add noise to every trained value, in place of training."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in tuned.trained.values():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)


def input_error(call: Callable[[], object]) -> str:
    """The message of the `InputError` that `call` raises; it must be one line."""
    from normtune.errors import InputError

    try:
        call()
    except InputError as error:
        assert "\n" not in str(error)
        return str(error)
    raise AssertionError("no InputError")
