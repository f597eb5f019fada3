"""Weights by MISS's names, on their way from a checkpoint of another layout into a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from normtune.errors import InputError
from normtune.models.miss.config import MissConfig
from normtune.models.miss.model import MissForQuestionAnswering

EMBEDDING = "text_decoder.bert.embeddings.word_embeddings.weight"
HEAD = "text_decoder.cls.predictions.decoder.weight"  # tied to EMBEDDING
HEAD_BIAS = "text_decoder.cls.predictions.decoder.bias"
BIAS_ALIAS = "text_decoder.cls.predictions.bias"  # BERT's second name for HEAD_BIAS
POSITIONS = "visual_encoder.pos_embed"


@dataclass
class Weights:
    """What a checkpoint holds.

    Attributes:
        source: the file or directory, for messages.
        config: the sizes of its model.
        tensors: by MISS's names.
        names: MISS's name -> name in the checkpoint.
        dropped: names in the checkpoint that hold nothing for the model.
    """

    source: str
    config: MissConfig
    tensors: dict[str, Tensor]
    names: dict[str, str]
    dropped: tuple[str, ...]


def assemble(weights: Weights) -> MissForQuestionAnswering:
    """The model with its weights in place, all in the word embeddings' dtype, in eval mode.

    Tensors that the model has no place for are not used.

    Raises:
        InputError: a tensor is missing or of a wrong shape.
    """
    source, tensors = weights.source, weights.tensors
    with torch.device("meta"):
        model = MissForQuestionAnswering(weights.config)
    expected = model.state_dict()
    missing = [name for name in expected if name not in tensors]
    if missing:
        raise InputError(
            f"{source} lacks {len(missing)} of {len(expected)} tensors: {some(missing)}. "
            "Give a whole checkpoint of MISS or BLIP-VQA."
        )
    for name, tensor in expected.items():
        if tensors[name].shape != tensor.shape:
            raise InputError(
                f"{source}: {name} is of shape {list(tensors[name].shape)}, the other tensors ask for "
                f"{list(tensor.shape)}. Give a checkpoint of one model."
            )
    dtype = tensors[EMBEDDING].dtype
    model.load_state_dict({name: tensors[name].to(dtype) for name in expected}, assign=True)
    model.tie_weights()
    return model.eval()


def some(names: Sequence[str], shown: int = 3) -> str:
    """The first few names, and how many there are besides."""
    rest = len(names) - shown
    return ", ".join(names[:shown]) + (f" and {rest} more" if rest > 0 else "")
