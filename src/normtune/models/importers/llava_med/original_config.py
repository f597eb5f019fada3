"""The `config.json` of LLaVA's original code -> what transformers' `LlavaConfig` needs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, MistralConfig

from normtune.errors import InputError
from normtune.runtime.files import read_json

_KINDS: dict[str, Literal["mistral", "llama"]] = {
    "LlavaMistralForCausalLM": "mistral",
    "LlavaLlamaForCausalLM": "llama",
}
_TYPES: dict[str, Literal["mistral", "llama"]] = {"llava_mistral": "mistral", "llava_llama": "llama"}
_TEXT = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "use_cache",
    "bos_token_id",
    "eos_token_id",
    "tie_word_embeddings",
    "rope_theta",
    "rope_scaling",
    "attention_dropout",
    "attention_bias",
    "mlp_bias",
    "sliding_window",
    "vocab_size",
)
_NEEDED = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "vocab_size",
    "mm_hidden_size",
)


@dataclass(frozen=True)
class Original:
    """What the original config says.

    Attributes:
        kind: of the language model.
        text: its config, by transformers' names.
        width: of the image features.
        tower: the image encoder's name.
        layer, strategy: which of its hidden states are taken, with its class token ("full") or without.
        layers: of the projector, 1 or 2.
        pad: images are padded to squares, not cropped.
        marked: an image stands between <im_start> and <im_end>.
    """

    kind: Literal["mistral", "llama"]
    text: dict[str, Any]
    width: int
    tower: str
    layer: int
    strategy: Literal["default", "full"]
    layers: Literal[1, 2]
    pad: bool
    marked: bool

    @property
    def version(self) -> Literal["1.5", "1.0"]:
        """Version 1.0 is LLaMA with a projector of one layer."""
        return "1.0" if self.kind == "llama" and self.layers == 1 else "1.5"


def read_original(directory: Path) -> Original:
    """Read and check `config.json`.

    Raises:
        InputError: it is not there, of another model, or asks for what transformers' LLaVA has not.
    """
    path = directory / "config.json"
    values = read_json(path)
    kind = _kind(values, path)
    lacking = [name for name in _NEEDED if not isinstance(values.get(name), int)]
    if lacking:
        raise InputError(f"{path} lacks {', '.join(lacking)}. Copy it anew.")
    projector = values.get("mm_projector_type", "linear")  # as the original code has it
    if projector not in ("linear", "mlp2x_gelu"):
        raise InputError(
            f"{path}: mm_projector_type is '{projector}'; only 'mlp2x_gelu' and 'linear' can be imported."
        )
    shape = values.get("image_aspect_ratio")
    if shape not in (None, "square", "pad"):
        raise InputError(
            f"{path}: image_aspect_ratio is '{shape}'; only 'pad' and 'square' can be imported "
            "(tiles of an image are LLaVA-NeXT's)."
        )
    feature = values.get("mm_vision_select_feature", "patch")
    if feature not in ("patch", "cls_patch"):
        raise InputError(
            f"{path}: mm_vision_select_feature is '{feature}', neither 'patch' nor 'cls_patch'. Correct it."
        )
    layer = values.get("mm_vision_select_layer", -1 if kind == "llama" and projector == "linear" else None)
    if not isinstance(layer, int):
        raise InputError(f"{path}: mm_vision_select_layer is {layer}, not a number. LLaVA-Med 1.5 has -2.")
    return Original(
        kind=kind,
        text={name: values[name] for name in _TEXT if name in values},
        width=values["mm_hidden_size"],
        tower=str(values.get("mm_vision_tower") or "none"),
        layer=layer,
        strategy="default" if feature == "patch" else "full",
        layers=1 if projector == "linear" else 2,
        pad=shape == "pad",
        marked=bool(values.get("mm_use_im_start_end", False)),
    )


def _kind(values: Any, path: Path) -> Literal["mistral", "llama"]:
    if not isinstance(values, dict):
        raise InputError(f"{path} is no model's config. Give the directory of LLaVA-Med's checkpoint.")
    names = [name for name in values.get("architectures") or () if name in _KINDS]
    if names:
        return _KINDS[names[0]]
    model_type = str(values.get("model_type"))
    if model_type in _TYPES:
        return _TYPES[model_type]
    if model_type == "llava" and "text_config" in values:
        raise InputError(f"{path} is in transformers' layout already: use its directory as a model.")
    raise InputError(
        f"{path} is of a model of type '{model_type}', not of LLaVA-Med's ({', '.join(_KINDS)}). "
        "Give the directory of LLaVA-Med's checkpoint."
    )


def llava_config(
    original: Original, vision: CLIPVisionConfig, *, rows: int, image_id: int, pad_id: int
) -> LlavaConfig:
    """The config of the imported model; `rows` is the size of its vocabulary.

    A projector of one layer W is one of two whose second is the identity, with no activation between them:
    the sums of the second are x + 0 + 0 + ..., so that the result is W's to the last bit.

    Raises:
        InputError: the image encoder's width is not the projector's.
    """
    if vision.hidden_size != original.width:
        raise InputError(
            f"the image encoder is {vision.hidden_size} wide, the checkpoint's mm_hidden_size is "
            f"{original.width}. Give --vision {original.tower}, with which it was trained."
        )
    values = {**original.text, "vocab_size": rows, "pad_token_id": pad_id}
    text: Any = MistralConfig(**values) if original.kind == "mistral" else LlamaConfig(**values)
    image, patch = vision.image_size, vision.patch_size
    assert isinstance(image, int) and isinstance(patch, int)
    return LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=image_id,
        image_seq_length=(image // patch) ** 2 + (original.strategy == "full"),
        projector_hidden_act="gelu" if original.layers == 2 else "linear",
        vision_feature_select_strategy=original.strategy,
        vision_feature_layer=original.layer,
        tie_word_embeddings=text.tie_word_embeddings,
        architectures=["LlavaForConditionalGeneration"],
    )
