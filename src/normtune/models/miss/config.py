"""The dimensions of a MISS model; the defaults are MISS-base's."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from typing import Any, ClassVar, TypeVar

from transformers import PretrainedConfig

from normtune.errors import InputError, did_you_mean


@dataclass(frozen=True)
class VisionDims:
    """A vision transformer (Dosovitskiy et al. 2021); ViT-B/16 at 480 pixels by default."""

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
    """A BERT with cross-attention in every layer; BERT-base by default."""

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


def checked_dims(kind: type[Dims], given: Dims | dict[str, Any], name: str) -> Dims:
    """`given`, filled up with defaults.

    Raises:
        InputError: an unknown key, or a width that is not a multiple of the heads or a size of the patch.
    """
    if isinstance(given, dict):
        known = [item.name for item in fields(kind)]
        for key in given:
            if key not in known:
                raise InputError(
                    f"{name}.{key}: unknown{did_you_mean(key, known) or '.'} Known: {', '.join(known)}."
                )
        given = kind(**given)
    if given.hidden_size % given.num_attention_heads:
        raise InputError(
            f"{name}: hidden_size {given.hidden_size} is not a multiple of "
            f"num_attention_heads {given.num_attention_heads}. Change one of them."
        )
    if isinstance(given, VisionDims) and given.image_size % given.patch_size:
        raise InputError(
            f"{name}: image_size {given.image_size} is not a multiple of patch_size {given.patch_size}. "
            "Change one of them."
        )
    return given


class MissConfig(PretrainedConfig):
    """Configuration of `MissForQuestionAnswering`.

    `vision_dims`, `encoder_dims` and `decoder_dims` take a dict (any of the fields of `VisionDims` and
    `TextDims`) or those classes themselves; they are kept as complete dicts; `vision()` and `text()` give
    them typed.
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
        self.vision_dims = asdict(checked_dims(VisionDims, self.vision_dims, "vision_dims"))
        self.encoder_dims = asdict(checked_dims(TextDims, self.encoder_dims, "encoder_dims"))
        self.decoder_dims = asdict(checked_dims(TextDims, self.decoder_dims, "decoder_dims"))
        super().__post_init__(**kwargs)

    def vision(self) -> VisionDims:
        """The image encoder's dimensions."""
        return VisionDims(**self.vision_dims)

    def text(self, part: str) -> TextDims:
        """The dimensions of the text `part`: "encoder" or "decoder"."""
        return TextDims(**{"encoder": self.encoder_dims, "decoder": self.decoder_dims}[part])
