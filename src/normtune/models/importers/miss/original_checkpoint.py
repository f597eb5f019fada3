"""Reads the original `.pth` files of MISS and BLIP, and infers a config from the shapes of their tensors."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from normtune.errors import InputError
from normtune.models.importers.miss.weights import BIAS_ALIAS, EMBEDDING, HEAD, HEAD_BIAS, POSITIONS, MissWeights
from normtune.models.miss.config import MissConfig, TextDims, VisionDims

HEAD_DIM = 64  # width of an attention head in BERT and ViT of every size
PARTS = {  # first word of a tensor's name -> part of the model
    "visual_encoder": "image encoder",
    "text_encoder": "question encoder",
    "text_decoder": "answer decoder",
}
# tensors that only pretraining needs: momentum copies, projections, matching head, queues, temperature
PRETRAINING = re.compile(r"\w+_m\..*|\w+_proj\..*|itm_head\..*|\w+_queue|queue_ptr|ptr_queue|temp")
POSITION_IDS = re.compile(r".*\.position_ids")  # a buffer with 0, 1, 2, ..., no weights


def read_original_weights(
    source: Path, *, vision_heads: int | None = None, text_heads: int | None = None
) -> MissWeights:
    """Read the weights of a `.pth`, and drop what only pretraining needs.

    Args:
        vision_heads, text_heads: attention heads; None: width / 64.

    Raises:
        InputError: not a checkpoint, a part is missing, or a tensor that shows a size is missing or has a
            wrong shape.
    """
    tensors = read_tensors(source)
    names = {name.removeprefix("module."): name for name in tensors}  # DistributedDataParallel's prefix
    dropped = [name for name in names if PRETRAINING.fullmatch(name) or POSITION_IDS.fullmatch(name)]
    if BIAS_ALIAS in names and HEAD_BIAS in names:
        dropped.append(BIAS_ALIAS)
    dropped_in_file = tuple(names.pop(name) for name in dropped)
    if BIAS_ALIAS in names:  # the file has the bias under its second name only
        names[HEAD_BIAS] = names.pop(BIAS_ALIAS)
    renamed = {name: tensors[file_name] for name, file_name in names.items()}
    config = infer_config(renamed, str(source), vision_heads=vision_heads, text_heads=text_heads)
    return MissWeights(str(source), config, renamed, names, dropped_in_file)


def read_tensors(source: Path) -> dict[str, Tensor]:
    """Read the tensors of a `.pth`: those under its key "model", or its top level if there is no such key.

    Raises:
        InputError: the file cannot be read, is not a checkpoint, or holds more than tensors and plain values.
    """
    try:
        content = torch.load(source, map_location="cpu", weights_only=True)
    except OSError as error:
        raise InputError(f"cannot read {source}: {error.strerror or error}. Check the path.") from error
    except Exception as error:  # a damaged pickle can raise anything
        raise InputError(
            f"{source} is not a checkpoint that opens safely: it is damaged, or holds more than tensors and "
            "plain values. Save only its weights (torch.save({'model': weights}, file)) or download it again."
        ) from error
    if isinstance(content, Mapping) and isinstance(content.get("model"), Mapping):
        content = content["model"]
    tensors = {}
    if isinstance(content, Mapping):
        tensors = {name: value for name, value in content.items() if isinstance(value, Tensor)}
    if not tensors:
        raise InputError(f"{source} holds no tensors under 'model' or at its top level. Give a checkpoint of MISS.")
    return tensors


def infer_config(
    tensors: Mapping[str, Tensor], source: str, *, vision_heads: int | None = None, text_heads: int | None = None
) -> MissConfig:
    """Infer the config of a model from the shapes of its tensors.

    Args:
        tensors: MISS's name -> tensor.
        vision_heads, text_heads: attention heads, which shapes do not show; None: width / 64.

    Raises:
        InputError: a part is missing, or a tensor that shows a size is missing or has a wrong shape.
    """
    parts = [part for part in PARTS if any(name.startswith(f"{part}.") for name in tensors)]
    if not parts:
        raise InputError(
            f"none of the {len(tensors)} tensors of {source} belongs to {', '.join(PARTS)}: it is no "
            "checkpoint of MISS or BLIP. Give one of those."
        )
    for part, meaning in PARTS.items():
        if part not in parts:
            raise InputError(
                f"{source} has no {meaning} ({part}.*), only {', '.join(parts)}: it cannot answer questions. "
                "Give a checkpoint that was trained for question answering."
            )

    def shape(name: str, *axes: int | None) -> tuple[int, ...]:
        """The shape of a tensor, checked against `axes`; None in `axes` allows any size."""
        if name not in tensors:
            raise InputError(f"{source} lacks {name}. Give a complete checkpoint of MISS or BLIP-VQA.")
        got = tuple(tensors[name].shape)
        if len(got) != len(axes) or any(b == 0 or a not in (None, b) for a, b in zip(axes, got, strict=True)):
            expected = ", ".join("any" if axis is None else str(axis) for axis in axes)
            raise InputError(f"{source}: {name} is of shape {list(got)}, not [{expected}]. Give a checkpoint of MISS.")
        return got

    def heads(given: int | None, width: int, part: str) -> int:
        """The number of attention heads: as given, else width / 64."""
        if given is None and width % HEAD_DIM:
            raise InputError(
                f"{source}: {part} is {width} wide, not a multiple of {HEAD_DIM}. Give its number of attention heads."
            )
        return given or width // HEAD_DIM

    def text(part: str, prefix: str) -> tuple[TextDims, int]:
        """(the dimensions of a text part, its vocabulary size)."""
        vocabulary, width = shape(f"{prefix}embeddings.word_embeddings.weight", None, None)
        dims = TextDims(
            hidden_size=width,
            num_hidden_layers=_count_layers(tensors, f"{prefix}encoder.layer."),
            num_attention_heads=heads(text_heads, width, part),
            intermediate_size=shape(f"{prefix}encoder.layer.0.intermediate.dense.weight", None, width)[0],
            max_position_embeddings=shape(f"{prefix}embeddings.position_embeddings.weight", None, width)[0],
        )
        return dims, vocabulary

    width = shape("visual_encoder.cls_token", 1, 1, None)[2]
    patch = shape("visual_encoder.patch_embed.proj.weight", width, 3, None, None)[2]
    patches = shape(POSITIONS, 1, None, width)[1] - 1  # without the class token
    side = math.isqrt(patches)
    if side * side != patches or not side:
        raise InputError(f"{source}: {POSITIONS} is for {patches} patches, not a square. Give a checkpoint of MISS.")
    vision = VisionDims(
        image_size=side * patch,
        patch_size=patch,
        hidden_size=width,
        num_hidden_layers=_count_layers(tensors, "visual_encoder.blocks."),
        num_attention_heads=heads(vision_heads, width, "visual_encoder"),
        intermediate_size=shape("visual_encoder.blocks.0.mlp.fc1.weight", None, width)[0],
    )
    encoder, vocabulary = text("text_encoder", "text_encoder.")
    decoder, _ = text("text_decoder", "text_decoder.bert.")
    return MissConfig(
        vision_dims=asdict(vision),
        encoder_dims=asdict(encoder),
        decoder_dims=asdict(decoder),
        vocab_size=vocabulary,
        bos_token_id=vocabulary - 2,  # [DEC]
        encode_token_id=vocabulary - 1,  # [ENC]
        tie_word_embeddings=HEAD not in tensors or torch.equal(tensors[HEAD], tensors[EMBEDDING]),
    )


def _count_layers(tensors: Mapping[str, Tensor], prefix: str) -> int:
    """The number of layers: one more than the highest index after `prefix`."""
    matches = (re.match(re.escape(prefix) + r"(\d+)\.", name) for name in tensors)
    return max((int(match[1]) + 1 for match in matches if match), default=0)
