"""Converts tensor names of LLaVA's checkpoints to those of transformers' `LlavaForConditionalGeneration`."""

from __future__ import annotations

import re
from collections.abc import Iterable

# transformers' names
EMBEDDING = "model.language_model.embed_tokens.weight"
HEAD = "lm_head.weight"
NORM = "model.language_model.norm.weight"
PROJECTOR = "model.multi_modal_projector"
TOWER = "model.vision_tower."

_RULES = (  # (original name, transformers' name); the first match counts
    (r"lm_head\.weight", HEAD),
    (r"model\.(embed_tokens\.weight|norm\.weight|layers\..+)", r"model.language_model.\1"),
    (r"model\.mm_projector\.0\.(weight|bias)", rf"{PROJECTOR}.linear_1.\1"),
    (r"model\.mm_projector\.2\.(weight|bias)", rf"{PROJECTOR}.linear_2.\1"),
    (r"model\.mm_projector\.(weight|bias)", rf"{PROJECTOR}.linear_1.\1"),  # the only layer in version 1.0
    (r"model\.vision_tower\.vision_tower\.(?:vision_model\.)?(.+)", rf"{TOWER}\1"),
)
# computed buffers (rotary frequencies; position ids 0, 1, 2, ...), and a vector that only tiled images use
_NO_WEIGHTS = re.compile(r"(.*\.)?(rotary_emb\.inv_freq|position_ids)|model\.image_newline")
# the text half of a complete CLIP, and its projections into the shared space
_TEXT_HALF = re.compile(r"text_model\..*|(text|visual)_projection\.weight|logit_scale")


def convert_name(name: str) -> str | None:
    """Transformers' name for a tensor of the original layout; None if the name is unknown."""
    for pattern, replacement in _RULES:
        if re.fullmatch(pattern, name):
            return re.sub(pattern, replacement, name)
    return None


def convert_tower_name(name: str) -> str | None:
    """Transformers' name for a tensor of a CLIP image encoder or a complete CLIP; None for the text half."""
    if _TEXT_HALF.fullmatch(name):
        return None
    return TOWER + name.removeprefix("vision_model.")


def has_no_weights(name: str) -> bool:
    """Whether a tensor can be dropped because it holds no weights of the model."""
    return _NO_WEIGHTS.fullmatch(name) is not None


def has_tower(names: Iterable[str]) -> bool:
    """Whether an original checkpoint contains an image encoder."""
    return any((convert_name(name) or "").startswith(TOWER) for name in names if not has_no_weights(name))
