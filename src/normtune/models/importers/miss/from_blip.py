"""transformers' BLIP-VQA (Li et al. 2022, arXiv 2201.12086) -> weights by MISS's names: the same model."""

from __future__ import annotations

import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

from transformers import AutoConfig, BlipConfig, BlipForQuestionAnswering

from normtune.errors import InputError
from normtune.models.importers.miss.weights import BIAS_ALIAS, POSITIONS, Weights, some
from normtune.models.miss.config import MissConfig, TextDims, VisionDims

# transformers' names of the image encoder -> timm's, as MISS has them; the text parts' names are the same
BLIP_NAMES = (
    (r"vision_model\.embeddings\.class_embedding$", "visual_encoder.cls_token"),
    (r"vision_model\.embeddings\.position_embedding$", POSITIONS),
    (r"vision_model\.embeddings\.patch_embedding\.", "visual_encoder.patch_embed.proj."),
    (r"vision_model\.encoder\.layers\.(\d+)\.self_attn\.qkv\.", r"visual_encoder.blocks.\1.attn.qkv."),
    (
        r"vision_model\.encoder\.layers\.(\d+)\.self_attn\.projection\.",
        r"visual_encoder.blocks.\1.attn.proj.",
    ),
    (r"vision_model\.encoder\.layers\.(\d+)\.layer_norm", r"visual_encoder.blocks.\1.norm"),
    (r"vision_model\.encoder\.layers\.(\d+)\.mlp\.", r"visual_encoder.blocks.\1.mlp."),
    (r"vision_model\.post_layernorm\.", "visual_encoder.norm."),
)


def blip_weights(source: BlipForQuestionAnswering | str | Path) -> Weights:
    """Copies of the weights of a model, or of a directory or hub name that holds one.

    Raises:
        InputError: no such model, or one of a shape that MISS has not.
    """
    blip = source if isinstance(source, BlipForQuestionAnswering) else _load(source)
    held = blip.state_dict()
    dropped = tuple(name for name in held if name == BIAS_ALIAS)
    names = {blip_name(name): name for name in held if name not in dropped}
    return Weights(
        source="the BLIP model" if blip is source else str(source),
        config=config_of_blip(blip.config),
        tensors={name: held[theirs].detach().clone() for name, theirs in names.items()},
        names=names,
        dropped=dropped,
    )


def blip_name(name: str) -> str:
    """MISS's name for a tensor of `BlipForQuestionAnswering`."""
    for pattern, ours in BLIP_NAMES:
        if re.match(pattern, name):
            return re.sub(pattern, ours, name)
    return name


def config_of_blip(config: BlipConfig) -> MissConfig:
    """The sizes of a BLIP-VQA model, and its norms' epsilon, as MISS's config.

    Raises:
        InputError: images or patches are not square, or image and text differ in width.
    """
    vision: Any = config.vision_config
    text: Any = config.text_config
    sides: dict[str, Any] = {}
    for name in ("image_size", "patch_size"):
        side = getattr(vision, name)
        values = {side} if isinstance(side, int) else set(side)
        if len(values) != 1:
            raise InputError(f"vision_config.{name} {side}: MISS takes squares only. Choose another BLIP.")
        sides[name] = values.pop()
    if vision.hidden_size != text.hidden_size:
        raise InputError(
            f"vision_config.hidden_size is {vision.hidden_size}, text_config.hidden_size {text.hidden_size}: "
            "BLIP's answer decoder reads questions at the image's width. Choose a BLIP model with one width."
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
        encode_token_id=text.bos_token_id + 1,
    )


def _load(source: str | Path) -> BlipForQuestionAnswering:
    loading: dict[str, Any] = {}
    model: Any = None
    try:
        config = AutoConfig.from_pretrained(source)
        if config.model_type == "blip":
            model, loading = BlipForQuestionAnswering.from_pretrained(source, output_loading_info=True)  # type: ignore[misc]
    except (OSError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0].rstrip(".")
        raise InputError(f"cannot read a BLIP model from {source}: {reason}. Check the path.") from error
    if model is None:
        raise InputError(
            f"{source} holds a model of type '{config.model_type}', not 'blip'. Give a BLIP-VQA directory."
        )
    if loading["missing_keys"]:
        lacking = some(sorted(loading["missing_keys"]))
        raise InputError(
            f"{source} lacks {lacking}: it is no BLIP that answers questions. Give a BLIP-VQA directory."
        )
    return model
