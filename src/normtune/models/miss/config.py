"""The configuration of a MISS model; by default MISS-base."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from typing import Any, ClassVar, TypeVar

from transformers import PretrainedConfig

from normtune.errors import InputError, did_you_mean


@dataclass(frozen=True)
class VisionDims:
    """Dimensions of a vision transformer (Dosovitskiy et al. 2021); by default ViT-B/16 at 480 pixels."""

    image_size: int = 480
    patch_size: int = 16
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-6
    drop_path_rate: float = 0.1


@dataclass(frozen=True)
class TextDims:
    """Dimensions of a BERT with cross-attention in every layer; by default BERT-base."""

    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    max_position_embeddings: int = 512
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-12
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1


Dims = TypeVar("Dims", VisionDims, TextDims)


def validate_dims(kind: type[Dims], dims: Dims | dict[str, Any], name: str) -> Dims:
    """Check dimensions, and fill in defaults.

    Args:
        kind: `VisionDims` or `TextDims`.
        dims: an object of this class, or a dict with any of its fields.
        name: the field of the config, for messages.

    Raises:
        InputError: a key is unknown, the width is not a multiple of the number of heads, or the image size is
            not a multiple of the patch size.
    """
    if isinstance(dims, dict):
        known = [item.name for item in fields(kind)]
        for key in dims:
            if key not in known:
                raise InputError(f"{name}.{key}: unknown{did_you_mean(key, known) or '.'} Known: {', '.join(known)}.")
        dims = kind(**dims)
    if dims.hidden_size % dims.num_attention_heads:
        raise InputError(
            f"{name}: hidden_size {dims.hidden_size} is not a multiple of "
            f"num_attention_heads {dims.num_attention_heads}. Change one of them."
        )
    if isinstance(dims, VisionDims) and dims.image_size % dims.patch_size:
        raise InputError(
            f"{name}: image_size {dims.image_size} is not a multiple of patch_size {dims.patch_size}. "
            "Change one of them."
        )
    return dims


class MissConfig(PretrainedConfig):
    """Configuration of `MissForQuestionAnswering`.

    `vision_dims`, `encoder_dims` and `decoder_dims` accept a dict with any of the fields of `VisionDims` or
    `TextDims`, or an object of these classes. They are stored as complete dicts; `vision()` and `text()`
    return them as objects.
    """

    model_type: ClassVar[str] = "miss"

    vision_dims: Any = field(default_factory=dict)
    encoder_dims: Any = field(default_factory=dict)
    decoder_dims: Any = field(default_factory=dict)
    vocab_size: int = 30524
    pad_token_id: int = 0
    bos_token_id: int = 30522  # [DEC], the first token of an answer
    eos_token_id: int = 102  # [SEP], its last
    encode_token_id: int = 30523  # [ENC], the first token of a question
    initializer_range: float = 0.02
    tie_word_embeddings: bool = True

    def __post_init__(self, **kwargs: Any) -> None:
        self.vision_dims = asdict(validate_dims(VisionDims, self.vision_dims, "vision_dims"))
        self.encoder_dims = asdict(validate_dims(TextDims, self.encoder_dims, "encoder_dims"))
        self.decoder_dims = asdict(validate_dims(TextDims, self.decoder_dims, "decoder_dims"))
        super().__post_init__(**kwargs)

    def vision(self) -> VisionDims:
        """The dimensions of the image encoder."""
        return VisionDims(**self.vision_dims)

    def text(self, part: str) -> TextDims:
        """The dimensions of a text part: "encoder" or "decoder"."""
        return TextDims(**{"encoder": self.encoder_dims, "decoder": self.decoder_dims}[part])
