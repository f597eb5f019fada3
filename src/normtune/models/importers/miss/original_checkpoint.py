"""MISS's own `.pth` files, and BLIP's: reading them, their names, and the sizes that their tensors show."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from normtune.errors import InputError
from normtune.models.importers.miss.weights import BIAS_ALIAS, EMBEDDING, HEAD, HEAD_BIAS, POSITIONS, Weights
from normtune.models.miss.config import MissConfig, TextDims, VisionDims

HEAD_DIM = 64  # of BERT and ViT at every size
PARTS = {
    "visual_encoder": "image encoder",
    "text_encoder": "question encoder",
    "text_decoder": "answer decoder",
}
# what pretraining keeps beside the model: momentum copies, projections, matching head, queues, temperature
PRETRAINING = re.compile(r"\w+_m\..*|\w+_proj\..*|itm_head\..*|\w+_queue|queue_ptr|ptr_queue|temp")
POSITION_IDS = re.compile(r".*\.position_ids")  # 0, 1, 2, ..., no weights


def original_weights(
    source: Path, *, vision_heads: int | None = None, text_heads: int | None = None
) -> Weights:
    """The weights of a `.pth`; heads are width / 64 where they are not given.

    Raises:
        InputError: not a checkpoint, a part is missing, or a tensor that shows a size is missing or
            misshapen.
    """
    held = read_tensors(source)
    names = {name.removeprefix("module."): name for name in held}  # DistributedDataParallel's prefix
    dropped = [name for name in names if PRETRAINING.fullmatch(name) or POSITION_IDS.fullmatch(name)]
    if BIAS_ALIAS in names and HEAD_BIAS in names:
        dropped.append(BIAS_ALIAS)
    dropped_in_file = tuple(names.pop(name) for name in dropped)
    if BIAS_ALIAS in names:
        names[HEAD_BIAS] = names.pop(BIAS_ALIAS)
    tensors = {name: held[theirs] for name, theirs in names.items()}
    config = infer_config(tensors, str(source), vision_heads=vision_heads, text_heads=text_heads)
    return Weights(str(source), config, tensors, names, dropped_in_file)


def read_tensors(source: Path) -> dict[str, Tensor]:
    """The tensors of a `.pth`: those under its "model", or its own where it has no such entry.

    Raises:
        InputError: the file cannot be read, is no checkpoint, or holds things other than tensors and plain
            values.
    """
    try:
        content = torch.load(source, map_location="cpu", weights_only=True)
    except OSError as error:
        raise InputError(f"cannot read {source}: {error.strerror or error}. Check the path.") from error
    except Exception as error:  # a damaged pickle can raise anything
        raise InputError(
            f"{source} is not a checkpoint that opens safely: it is damaged, or holds more than tensors and "
            "plain values. Save its weights alone (torch.save({'model': weights}, file)) or fetch it again."
        ) from error
    if isinstance(content, Mapping) and isinstance(content.get("model"), Mapping):
        content = content["model"]
    tensors = {}
    if isinstance(content, Mapping):
        tensors = {name: value for name, value in content.items() if isinstance(value, Tensor)}
    if not tensors:
        raise InputError(f"{source} holds no tensors under 'model' or at its top. Give a checkpoint of MISS.")
    return tensors


def infer_config(
    tensors: Mapping[str, Tensor],
    source: str,
    *,
    vision_heads: int | None = None,
    text_heads: int | None = None,
) -> MissConfig:
    """The sizes of the model that `tensors` (by MISS's names) belong to.

    Raises:
        InputError: a part is missing, or a tensor that shows its size is missing or of a wrong shape.
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
        """The sizes of a tensor; `axes` are those it must have, None where any will do."""
        if name not in tensors:
            raise InputError(f"{source} lacks {name}. Give a whole checkpoint of MISS or BLIP-VQA.")
        got = tuple(tensors[name].shape)
        if len(got) != len(axes) or any(b == 0 or a not in (None, b) for a, b in zip(axes, got, strict=True)):
            wanted = ", ".join("any" if axis is None else str(axis) for axis in axes)
            raise InputError(
                f"{source}: {name} is of shape {list(got)}, not [{wanted}]. Give a checkpoint of MISS."
            )
        return got

    def heads(given: int | None, width: int, part: str) -> int:
        if given is None and width % HEAD_DIM:
            raise InputError(
                f"{source}: {part} is {width} wide, not a multiple of {HEAD_DIM}. "
                "Say how many attention heads it has."
            )
        return given or width // HEAD_DIM

    def text(part: str, prefix: str) -> tuple[TextDims, int]:
        vocabulary, width = shape(f"{prefix}embeddings.word_embeddings.weight", None, None)
        dims = TextDims(
            hidden_size=width,
            num_hidden_layers=_layers(tensors, f"{prefix}encoder.layer."),
            num_attention_heads=heads(text_heads, width, part),
            intermediate_size=shape(f"{prefix}encoder.layer.0.intermediate.dense.weight", None, width)[0],
            max_position_embeddings=shape(f"{prefix}embeddings.position_embeddings.weight", None, width)[0],
        )
        return dims, vocabulary

    width = shape("visual_encoder.cls_token", 1, 1, None)[2]
    patch = shape("visual_encoder.patch_embed.proj.weight", width, 3, None, None)[2]
    patches = shape(POSITIONS, 1, None, width)[1] - 1
    side = math.isqrt(patches)
    if side * side != patches or not side:
        raise InputError(
            f"{source}: {POSITIONS} is for {patches} patches, not a square. Give a checkpoint of MISS."
        )
    vision = VisionDims(
        image_size=side * patch,
        patch_size=patch,
        hidden_size=width,
        num_hidden_layers=_layers(tensors, "visual_encoder.blocks."),
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
        bos_token_id=vocabulary - 2,
        encode_token_id=vocabulary - 1,
        tie_word_embeddings=HEAD not in tensors or torch.equal(tensors[HEAD], tensors[EMBEDDING]),
    )


def _layers(tensors: Mapping[str, Tensor], prefix: str) -> int:
    """One more than the highest layer's number."""
    found = (re.match(re.escape(prefix) + r"(\d+)\.", name) for name in tensors)
    return max((int(match[1]) + 1 for match in found if match), default=0)
