"""Converts the `config.json` of LLaVA's original code to transformers' `LlavaConfig`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, MistralConfig

from normtune.errors import InputError
from normtune.runtime.files import read_json

Kind = Literal["mistral", "llama"]  # architecture of the language model
# the kind, by the config's "architectures", or else by its "model_type"
_KINDS: dict[str, Kind] = {"LlavaMistralForCausalLM": "mistral", "LlavaLlamaForCausalLM": "llama"}
_KINDS |= {"llava_mistral": "mistral", "llava_llama": "llama"}
_TEXT_FIELDS = (  # of the language model; they have the same names in transformers
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
    "hidden_act", "max_position_embeddings", "initializer_range", "rms_norm_eps", "use_cache", "bos_token_id",
    "eos_token_id", "tie_word_embeddings", "rope_theta", "rope_scaling", "attention_dropout", "attention_bias",
    "mlp_bias", "sliding_window", "vocab_size",
)  # fmt: skip
_REQUIRED_FIELDS = (  # integers without which the model cannot be built
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size", "mm_hidden_size",
)  # fmt: skip


@dataclass(frozen=True)
class OriginalConfig:
    """The fields of the original config that the import needs."""

    kind: Kind  # the architecture of the language model
    text_config: dict[str, Any]  # the language model's config, under transformers' names
    vision_width: int  # width of the image features
    tower_name: str  # name of the image encoder ("vision tower" in LLaVA)
    feature_layer: int  # the layer of the image encoder that gives the image features, usually -2
    feature_strategy: Literal["default", "full"]  # "full" with the class token, "default" without it
    projector_layers: Literal[1, 2]  # linear layers between image encoder and language model
    pad_images: bool  # whether images are padded to squares; otherwise they are cropped
    image_markers: bool  # whether an image is written between <im_start> and <im_end>

    @property
    def version(self) -> Literal["1.5", "1.0"]:
        """The version of LLaVA-Med: 1.0 is LLaMA with a projector of one layer."""
        return "1.0" if self.kind == "llama" and self.projector_layers == 1 else "1.5"


def read_original_config(directory: Path) -> OriginalConfig:
    """Read and check `config.json`.

    Raises:
        InputError: the file is missing, belongs to another model, or has options that transformers' LLaVA
            does not support.
    """
    path = directory / "config.json"
    values = read_json(path)
    kind = _language_kind(values, path)
    missing = [name for name in _REQUIRED_FIELDS if not isinstance(values.get(name), int)]
    if missing:
        raise InputError(f"{path} lacks {', '.join(missing)}. Copy it again.")
    projector = values.get("mm_projector_type", "linear")  # the original code's default
    if projector not in ("linear", "mlp2x_gelu"):
        raise InputError(f"{path}: mm_projector_type is '{projector}'; only 'mlp2x_gelu' and 'linear' can be imported.")
    aspect_ratio = values.get("image_aspect_ratio")
    if aspect_ratio not in (None, "square", "pad"):
        raise InputError(
            f"{path}: image_aspect_ratio is '{aspect_ratio}'; only 'pad' and 'square' can be imported "
            "(tiles of an image belong to LLaVA-NeXT)."
        )
    feature = values.get("mm_vision_select_feature", "patch")
    if feature not in ("patch", "cls_patch"):
        raise InputError(
            f"{path}: mm_vision_select_feature is '{feature}', neither 'patch' nor 'cls_patch'. Correct it."
        )
    # version 1.0 may lack the field: its code then reads the last layer
    layer = values.get("mm_vision_select_layer", -1 if kind == "llama" and projector == "linear" else None)
    if not isinstance(layer, int):
        raise InputError(f"{path}: mm_vision_select_layer is {layer}, not a number. LLaVA-Med 1.5 has -2.")
    return OriginalConfig(
        kind=kind,
        text_config={name: values[name] for name in _TEXT_FIELDS if name in values},
        vision_width=values["mm_hidden_size"],
        tower_name=str(values.get("mm_vision_tower") or "none"),
        feature_layer=layer,
        feature_strategy="default" if feature == "patch" else "full",
        projector_layers=1 if projector == "linear" else 2,
        pad_images=aspect_ratio == "pad",
        image_markers=bool(values.get("mm_use_im_start_end", False)),
    )


def _language_kind(values: Any, path: Path) -> Kind:
    """The architecture of the language model."""
    if not isinstance(values, dict):
        raise InputError(f"{path} is no model's config. Give the directory of LLaVA-Med's checkpoint.")
    model_type = str(values.get("model_type"))
    for name in (*(values.get("architectures") or ()), model_type):
        if name in _KINDS:
            return _KINDS[name]
    if model_type == "llava" and "text_config" in values:
        raise InputError(f"{path} is in transformers' layout already: use its directory as a model.")
    raise InputError(
        f"{path} is of a model of type '{model_type}', not of LLaVA-Med's "
        f"({', '.join(list(_KINDS)[:2])}). Give the directory of LLaVA-Med's checkpoint."
    )


def build_llava_config(
    original: OriginalConfig, vision: CLIPVisionConfig, *, vocab_size: int, image_id: int, pad_id: int
) -> LlavaConfig:
    """Build the config of the imported model.

    Transformers' projector always has two layers. A projector of one layer is written as that layer and an
    identity without an activation between them. The identity computes x + 0 + 0 + ..., so that the result
    equals the single layer's to the last bit.

    Args:
        vocab_size: rows of the imported embedding, see `read_vocabulary`.
        image_id: the image token, of which a prompt holds one per image feature.

    Raises:
        InputError: the image encoder is not as wide as the projector expects.
    """
    if vision.hidden_size != original.vision_width:
        raise InputError(
            f"the image encoder is {vision.hidden_size} wide, the checkpoint's mm_hidden_size is "
            f"{original.vision_width}. Give --vision {original.tower_name}, with which it was trained."
        )
    values = {**original.text_config, "vocab_size": vocab_size, "pad_token_id": pad_id}
    text: Any = MistralConfig(**values) if original.kind == "mistral" else LlamaConfig(**values)
    image, patch = vision.image_size, vision.patch_size
    assert isinstance(image, int) and isinstance(patch, int)
    return LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=image_id,
        # patches, and the class token if it is kept
        image_seq_length=(image // patch) ** 2 + (original.feature_strategy == "full"),
        projector_hidden_act="gelu" if original.projector_layers == 2 else "linear",
        vision_feature_select_strategy=original.feature_strategy,
        vision_feature_layer=original.feature_layer,
        tie_word_embeddings=text.tie_word_embeddings,
        architectures=["LlavaForConditionalGeneration"],
    )
