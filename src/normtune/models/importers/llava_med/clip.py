"""LLaVA-Med's CLIP image encoder (Radford et al. 2021, arXiv 2103.00020): separate, or in the checkpoint."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from transformers import CLIPVisionConfig

from normtune.errors import InputError
from normtune.models.checkpoints.reader import OriginalCheckpoint, find_or_download
from normtune.models.importers.llava_med.tensor_names import TOWER, convert_tower_name, has_no_weights
from normtune.runtime.files import read_json

HEAD_DIM = 64  # width of an attention head in every CLIP of OpenAI's
_CONFIG_FIELDS = (  # taken over into `CLIPVisionConfig`
    "hidden_size", "intermediate_size", "projection_dim", "num_hidden_layers", "num_attention_heads", "num_channels",
    "image_size", "patch_size", "hidden_act", "layer_norm_eps", "attention_dropout", "initializer_range",
    "initializer_factor",
)  # fmt: skip


@dataclass(frozen=True)
class VisionTower:
    """An image encoder that is stored separately from the LLaVA-Med checkpoint."""

    name: str  # its directory or hub name, as the user gave it
    config: CLIPVisionConfig
    checkpoint: OriginalCheckpoint  # its files
    names: dict[str, str]  # name in the imported model -> name in `checkpoint`, for the tensors of the image encoder
    dropped: tuple[str, ...]  # names in `checkpoint` that belong to CLIP's text half or hold no weights
    preprocessor_config: dict[str, Any]  # its `preprocessor_config.json`; empty if there is none


def open_vision_tower(name: str) -> VisionTower:
    """Open a CLIP image encoder, or the image encoder of a complete CLIP.

    Raises:
        InputError: it is missing, damaged or not a CLIP.
    """
    directory = find_or_download(name)
    values = read_json(directory / "config.json")
    model_type = values.get("model_type") if isinstance(values, dict) else None
    if model_type == "clip":
        values = values.get("vision_config") or {}
    elif model_type != "clip_vision_model":
        raise InputError(
            f"{name} holds a model of type '{model_type}', not a CLIP. Give the image encoder that the "
            "checkpoint was trained with."
        )
    checkpoint = OriginalCheckpoint(directory)
    names: dict[str, str] = {}
    dropped = []
    for clip_name in checkpoint.entries:
        model_name = None if has_no_weights(clip_name) else convert_tower_name(clip_name)
        if model_name is None:
            dropped.append(clip_name)
        else:
            names[model_name] = clip_name
    config = CLIPVisionConfig(**{field: values[field] for field in _CONFIG_FIELDS if field in values})
    path = directory / "preprocessor_config.json"
    content = read_json(path) if path.is_file() else {}
    preprocessor_config = content if isinstance(content, dict) else {}
    return VisionTower(name, config, checkpoint, names, tuple(dropped), preprocessor_config)


def infer_vision_config(
    shapes: Mapping[str, tuple[int, ...]], source: str, *, heads: int | None = None
) -> CLIPVisionConfig:
    """Infer the config of an image encoder from the shapes of its tensors.

    What shapes do not show is taken from OpenAI's CLIP: heads of width 64, quick GELU, epsilon 1e-5.

    Args:
        shapes: transformers' name -> shape.
        heads: attention heads; None: width / 64.

    Raises:
        InputError: a tensor that shows a size is missing or has a wrong shape.
    """

    def shape(name: str, axes: int) -> tuple[int, ...]:
        sizes = shapes.get(TOWER + name)
        if sizes is None or len(sizes) != axes or 0 in sizes:
            what = "lacks" if sizes is None else f"has, of shape {list(sizes)},"
            raise InputError(f"the image encoder in {source} {what} {name}, so its sizes are unknown. Give --vision.")
        return sizes

    width, _, patch, _ = shape("embeddings.patch_embedding.weight", 4)
    patches = shape("embeddings.position_embedding.weight", 2)[0] - 1  # without the class token
    side = math.isqrt(max(patches, 0))
    if not side or side * side != patches:
        raise InputError(f"the image encoder in {source} is for {patches} patches, not a square. Give --vision.")
    if heads is None and width % HEAD_DIM:
        raise InputError(
            f"the image encoder in {source} is {width} wide, not a multiple of {HEAD_DIM}. Give --vision, or "
            "--vision-heads."
        )
    layers = {name.removeprefix(f"{TOWER}encoder.layers.").partition(".")[0] for name in shapes}
    return CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=shape("encoder.layers.0.mlp.fc1.weight", 2)[0],
        num_hidden_layers=sum(layer.isdigit() for layer in layers),
        num_attention_heads=heads or width // HEAD_DIM,
        image_size=side * patch,
        patch_size=patch,
    )
