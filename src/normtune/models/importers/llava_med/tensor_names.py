"""Names of LLaVA's original checkpoints -> names of transformers' `LlavaForConditionalGeneration`."""

from __future__ import annotations

import re
from collections.abc import Iterable

EMBEDDING = "model.language_model.embed_tokens.weight"
HEAD = "lm_head.weight"
NORM = "model.language_model.norm.weight"
PROJECTOR = "model.multi_modal_projector"
TOWER = "model.vision_tower."

_RULES = (
    (r"lm_head\.weight", HEAD),
    (r"model\.(embed_tokens\.weight|norm\.weight|layers\..+)", r"model.language_model.\1"),
    (r"model\.mm_projector\.0\.(weight|bias)", rf"{PROJECTOR}.linear_1.\1"),
    (r"model\.mm_projector\.2\.(weight|bias)", rf"{PROJECTOR}.linear_2.\1"),
    (r"model\.mm_projector\.(weight|bias)", rf"{PROJECTOR}.linear_1.\1"),  # one layer: version 1.0
    (r"model\.vision_tower\.vision_tower\.(?:vision_model\.)?(.+)", rf"{TOWER}\1"),
)
# counted, not learnt: rotary frequencies, 0, 1, 2, ...; and what only images in tiles use
_HARMLESS = re.compile(r"(.*\.)?(rotary_emb\.inv_freq|position_ids)|model\.image_newline")
# the text half of a whole CLIP
_TEXT_HALF = re.compile(r"text_model\..*|(text|visual)_projection\.weight|logit_scale")


def new_name(name: str) -> str | None:
    """Transformers' name for a tensor of the original layout; None where no rule knows it."""
    for pattern, ours in _RULES:
        if re.fullmatch(pattern, name):
            return re.sub(pattern, ours, name)
    return None


def tower_name(name: str) -> str | None:
    """The same for a tensor of a CLIP image encoder, or of a whole CLIP; None for its text half."""
    if _TEXT_HALF.fullmatch(name):
        return None
    return TOWER + name.removeprefix("vision_model.")


def harmless(name: str) -> bool:
    """Whether a tensor can be left out, because no weights are in it."""
    return _HARMLESS.fullmatch(name) is not None


def holds_tower(names: Iterable[str]) -> bool:
    """Whether an original checkpoint has an image encoder inside."""
    return any((new_name(name) or "").startswith(TOWER) for name in names if not harmless(name))
