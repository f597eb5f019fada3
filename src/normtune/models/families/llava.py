"""LLaVA: CLIP's patch features, a two-layer projector and LLaMA or Mistral (Liu et al. 2023).

Source: arXiv 2310.03744. LLaVA-Med 1.5 (Li et al. 2023, arXiv 2306.00890) in transformers' layout is one of
these models.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from normtune.models.causal.family import CausalFamily
from normtune.models.causal.image_features import FEATURES
from normtune.models.types import Pixels

# Chat templates for checkpoints without one: LLaVA 1.5 uses Vicuna's prompts, LLaVA-Med 1.5 Mistral's.
_IMAGES_THEN_TEXT = (
    "{% for part in message['content'] if part['type'] == 'image' %}{{ '<image>\n' }}{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}"
)
_ANSWER = "{% for part in message['content'] %}{{ ' ' + part['text'] }}{% endfor %}{{ eos_token }}"
VICUNA_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'user' %}{{ 'USER: ' }}"
    + _IMAGES_THEN_TEXT
    + "{{ ' ' }}{% else %}{{ 'ASSISTANT:' }}"
    + _ANSWER
    + "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
MISTRAL_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'user' %}{{ '[INST] ' }}"
    + _IMAGES_THEN_TEXT
    + "{{ ' [/INST]' }}{% else %}"
    + _ANSWER
    + "{% endif %}{% endfor %}"
)
_TEMPLATES = {"mistral": MISTRAL_TEMPLATE, "llama": VICUNA_TEMPLATE}  # by the language model's type


class LlavaFamily(CausalFamily):
    """LLaVA 1.5 and LLaVA-Med 1.5."""

    def __init__(self, model: Any, processor: Any) -> None:
        if processor.chat_template is None:
            processor.chat_template = _TEMPLATES.get(model.config.get_text_config().model_type)
        super().__init__(model, processor)

    def image_text(self, pixels: Pixels) -> str:
        if FEATURES in pixels:  # an encoded image may have no pixels from which the number follows
            return self.processor.image_token * len(pixels[FEATURES])
        return super().image_text(pixels)

    def decode_answer(self, tokens: Sequence[int]) -> str:
        """Drop the end token: LLaVA-Med 1.0's is not a special token and would be decoded as text."""
        ended = bool(tokens) and tokens[-1] in self.end_tokens
        return super().decode_answer(tokens[:-1] if ended else tokens)
