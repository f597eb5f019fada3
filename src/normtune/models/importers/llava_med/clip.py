"""CLIP's image encoder (Radford et al. 2021, arXiv 2103.00020): apart, or inside a LLaVA-Med checkpoint."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from transformers import CLIPVisionConfig

from normtune.errors import InputError
from normtune.models.checkpoints.reader import OriginalCheckpoint
from normtune.models.importers.llava_med.hub import local_directory
from normtune.models.importers.llava_med.tensor_names import TOWER, harmless, tower_name
from normtune.runtime.files import read_json

HEAD_DIM = 64  # of every CLIP of OpenAI's
_FIELDS = (
    "hidden_size",
    "intermediate_size",
    "projection_dim",
    "num_hidden_layers",
    "num_attention_heads",
    "num_channels",
    "image_size",
    "patch_size",
    "hidden_act",
    "layer_norm_eps",
    "attention_dropout",
    "initializer_range",
    "initializer_factor",
)


@dataclass(frozen=True)
class Tower:
    """An image encoder apart from the checkpoint.

    Attributes:
        name: as it was given.
        config: its sizes.
        shards: its tensors; `names` are those of the image encoder, ours -> theirs.
        dropped: tensors that are not of the image encoder, or hold no weights.
        preparation: its `preprocessor_config.json`, or nothing.
    """

    name: str
    config: CLIPVisionConfig
    shards: OriginalCheckpoint
    names: dict[str, str]
    dropped: tuple[str, ...]
    preparation: dict[str, Any]


def open_tower(name: str) -> Tower:
    """A CLIP image encoder, or a whole CLIP, by its directory or hub name.

    Raises:
        InputError: there is none.
    """
    directory = local_directory(name)
    values = read_json(directory / "config.json")
    kind = values.get("model_type") if isinstance(values, dict) else None
    if kind == "clip":
        values = values.get("vision_config") or {}
    elif kind != "clip_vision_model":
        raise InputError(
            f"{name} holds a model of type '{kind}', not a CLIP. Give the image encoder that the checkpoint "
            "was trained with."
        )
    shards = OriginalCheckpoint(directory)
    names: dict[str, str] = {}
    dropped = []
    for theirs in shards.entries:
        ours = None if harmless(theirs) else tower_name(theirs)
        if ours is None:
            dropped.append(theirs)
        else:
            names[ours] = theirs
    config = CLIPVisionConfig(**{field: values[field] for field in _FIELDS if field in values})
    preparation = directory / "preprocessor_config.json"
    found = read_json(preparation) if preparation.is_file() else {}
    return Tower(name, config, shards, names, tuple(dropped), found if isinstance(found, dict) else {})


def inferred_config(
    shapes: Mapping[str, tuple[int, ...]], source: str, *, heads: int | None = None
) -> CLIPVisionConfig:
    """The sizes of the image encoder whose tensors (by transformers' names) are of `shapes`.

    What tensors don't show is OpenAI's: heads of 64, quick GELU, epsilon 1e-5.

    Raises:
        InputError: a tensor that shows a size is missing or of a wrong shape.
    """

    def shape(name: str, axes: int) -> tuple[int, ...]:
        found = shapes.get(TOWER + name)
        if found is None or len(found) != axes or 0 in found:
            what = "lacks" if found is None else f"has, of shape {list(found)},"
            raise InputError(
                f"the image encoder in {source} {what} {name}, so its sizes are unknown. Give --vision."
            )
        return found

    width, _, patch, _ = shape("embeddings.patch_embedding.weight", 4)
    patches = shape("embeddings.position_embedding.weight", 2)[0] - 1
    side = math.isqrt(max(patches, 0))
    if not side or side * side != patches:
        raise InputError(
            f"the image encoder in {source} is for {patches} patches, not a square. Give --vision."
        )
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
