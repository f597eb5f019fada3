"""Converted weights under MISS's names, and the model that is built from them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from normtune.errors import InputError
from normtune.models.checkpoints.reader import first_names
from normtune.models.miss.config import MissConfig
from normtune.models.miss.model import MissForQuestionAnswering

# names of tensors in MISS that need special treatment
EMBEDDING = "text_decoder.bert.embeddings.word_embeddings.weight"
HEAD = "text_decoder.cls.predictions.decoder.weight"  # tied to EMBEDDING
HEAD_BIAS = "text_decoder.cls.predictions.decoder.bias"
BIAS_ALIAS = "text_decoder.cls.predictions.bias"  # BERT's second name for HEAD_BIAS, the same tensor
POSITIONS = "visual_encoder.pos_embed"


@dataclass
class MissWeights:
    """The weights of a checkpoint, converted to MISS's names."""

    source: str  # the file or directory, for messages
    config: MissConfig  # the config of the model that they belong to
    tensors: dict[str, Tensor]  # MISS's name -> tensor
    names: dict[str, str]  # MISS's name -> name in the checkpoint
    dropped: tuple[str, ...]  # names in the checkpoint that the model does not need


def build_model(weights: MissWeights) -> MissForQuestionAnswering:
    """Build the model from its weights, all in the dtype of the word embeddings, in eval mode.

    Tensors that the model does not have are ignored.

    Raises:
        InputError: a tensor is missing or has the wrong shape.
    """
    source, tensors = weights.source, weights.tensors
    with torch.device("meta"):
        model = MissForQuestionAnswering(weights.config)
    expected = model.state_dict()
    missing = [name for name in expected if name not in tensors]
    if missing:
        raise InputError(
            f"{source} lacks {len(missing)} of {len(expected)} tensors: {first_names(missing)}. "
            "Give a complete checkpoint of MISS or BLIP-VQA."
        )
    for name, tensor in expected.items():
        if tensors[name].shape != tensor.shape:
            raise InputError(
                f"{source}: {name} is of shape {list(tensors[name].shape)}, the other tensors require "
                f"{list(tensor.shape)}. Give a checkpoint of one model."
            )
    dtype = tensors[EMBEDDING].dtype
    model.load_state_dict({name: tensors[name].to(dtype) for name in expected}, assign=True)
    model.tie_weights()
    return model.eval()
