"""Converts transformers' BLIP-VQA (Li et al. 2022, arXiv 2201.12086) to MISS, which has the same network."""

from __future__ import annotations

import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

from transformers import AutoConfig, BlipConfig, BlipForQuestionAnswering

from normtune.errors import InputError
from normtune.models.checkpoints.reader import first_names
from normtune.models.importers.miss.weights import BIAS_ALIAS, POSITIONS, MissWeights
from normtune.models.miss.config import MissConfig, TextDims, VisionDims

# (transformers' name of a tensor of the image encoder, timm's name, which MISS uses); the tensors of the text
# encoder and decoder have the same names in both
BLIP_NAMES = (
    (r"vision_model\.embeddings\.class_embedding$", "visual_encoder.cls_token"),
    (r"vision_model\.embeddings\.position_embedding$", POSITIONS),
    (r"vision_model\.embeddings\.patch_embedding\.", "visual_encoder.patch_embed.proj."),
    (r"vision_model\.encoder\.layers\.(\d+)\.self_attn\.qkv\.", r"visual_encoder.blocks.\1.attn.qkv."),
    (r"vision_model\.encoder\.layers\.(\d+)\.self_attn\.projection\.", r"visual_encoder.blocks.\1.attn.proj."),
    (r"vision_model\.encoder\.layers\.(\d+)\.layer_norm", r"visual_encoder.blocks.\1.norm"),
    (r"vision_model\.encoder\.layers\.(\d+)\.mlp\.", r"visual_encoder.blocks.\1.mlp."),
    (r"vision_model\.post_layernorm\.", "visual_encoder.norm."),
)


def read_blip_weights(source: BlipForQuestionAnswering | str | Path) -> MissWeights:
    """Copy the weights of a BLIP-VQA model; `build_model` makes a MISS of them.

    On unpadded questions the logits equal BLIP's. Padding does not change MISS's logits, whereas the decoder
    of transformers' BLIP attends to the padding. [ENC], which transformers' processor omits, is assumed to
    follow [DEC] in the vocabulary, as in BLIP's own tokenizer.

    Args:
        source: the model, its directory or its hub name.

    Raises:
        InputError: the model cannot be loaded, or MISS does not support its sizes.
    """
    blip = source if isinstance(source, BlipForQuestionAnswering) else _load(source)
    state = blip.state_dict()
    dropped = tuple(name for name in state if name == BIAS_ALIAS)
    names = {convert_blip_name(name): name for name in state if name not in dropped}
    return MissWeights(
        source="the BLIP model" if blip is source else str(source),
        config=convert_blip_config(blip.config),
        tensors={name: state[blip_name].detach().clone() for name, blip_name in names.items()},
        names=names,
        dropped=dropped,
    )


def convert_blip_name(name: str) -> str:
    """MISS's name for a tensor of `BlipForQuestionAnswering`."""
    for pattern, replacement in BLIP_NAMES:
        if re.match(pattern, name):
            return re.sub(pattern, replacement, name)
    return name


def convert_blip_config(config: BlipConfig) -> MissConfig:
    """Convert the config of a BLIP-VQA model (sizes, epsilon of the norms, dropout) to MISS's config.

    Raises:
        InputError: images or patches are not square, or image and text states differ in width.
    """
    vision: Any = config.vision_config
    text: Any = config.text_config
    sides: dict[str, Any] = {}
    for name in ("image_size", "patch_size"):
        side = getattr(vision, name)
        values = {side} if isinstance(side, int) else set(side)
        if len(values) != 1:
            raise InputError(f"vision_config.{name} {side}: MISS supports squares only. Choose another BLIP.")
        sides[name] = values.pop()
    if vision.hidden_size != text.hidden_size:
        raise InputError(
            f"vision_config.hidden_size is {vision.hidden_size}, text_config.hidden_size {text.hidden_size}: "
            "BLIP's answer decoder needs question and image states of one width. Choose a BLIP of one width."
        )
    common = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "hidden_act")
    vision_dims = VisionDims(
        **{name: getattr(vision, name) for name in common},
        **sides,
        layer_norm_eps=vision.layer_norm_eps,
        drop_path_rate=0.0,
    )
    text_dims = TextDims(
        **{name: getattr(text, name) for name in common},
        max_position_embeddings=text.max_position_embeddings,
        layer_norm_eps=text.layer_norm_eps,
        hidden_dropout_prob=text.hidden_dropout_prob,
        attention_probs_dropout_prob=text.attention_probs_dropout_prob,
    )
    return MissConfig(
        vision_dims=asdict(vision_dims),
        encoder_dims=asdict(text_dims),
        decoder_dims=asdict(text_dims),
        vocab_size=text.vocab_size,
        pad_token_id=text.pad_token_id,
        bos_token_id=text.bos_token_id,
        eos_token_id=text.sep_token_id,
        encode_token_id=text.bos_token_id + 1,  # [ENC] follows [DEC] in BLIP's own vocabulary
    )


def _load(source: str | Path) -> BlipForQuestionAnswering:
    loading_info: dict[str, Any] = {}
    model: Any = None
    try:
        config = AutoConfig.from_pretrained(source)
        if config.model_type == "blip":
            model, loading_info = BlipForQuestionAnswering.from_pretrained(source, output_loading_info=True)  # type: ignore[misc]
    except (OSError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0].rstrip(".")
        raise InputError(f"cannot read a BLIP model from {source}: {reason}. Check the path.") from error
    if model is None:
        raise InputError(
            f"{source} holds a model of type '{config.model_type}', not 'blip'. Give a BLIP-VQA directory."
        )
    if loading_info["missing_keys"]:  # of a BLIP for another task
        missing = first_names(sorted(loading_info["missing_keys"]))
        raise InputError(f"{source} lacks {missing}: it is no BLIP that answers questions. Give a BLIP-VQA directory.")
    return model
