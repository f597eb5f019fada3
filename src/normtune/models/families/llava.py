"""LLaVA: CLIP's patch features, a two-layer projector and LLaMA or Mistral (Liu et al. 2023).

Source: arXiv 2310.03744. LLaVA-Med 1.5 (Li et al. 2023, arXiv 2306.00890) in transformers' layout is one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from normtune.models.causal.family import FEATURES, CausalFamily
from normtune.models.types import Pixels

# for checkpoints without a chat template: LLaVA 1.5 has Vicuna's prompts, LLaVA-Med 1.5 Mistral's
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
_TEMPLATES = {"mistral": MISTRAL_TEMPLATE, "llama": VICUNA_TEMPLATE}


class LlavaFamily(CausalFamily):
    """LLaVA 1.5 and LLaVA-Med 1.5."""

    model_types = ("llava",)

    def __init__(self, model: Any, processor: Any) -> None:
        if processor.chat_template is None:
            processor.chat_template = _TEMPLATES.get(model.config.get_text_config().model_type)
        super().__init__(model, processor)

    def image_text(self, pixels: Pixels) -> str:
        if FEATURES in pixels:
            return self.processor.image_token * len(pixels[FEATURES])
        return super().image_text(pixels)

    def decode_answer(self, tokens: Sequence[int]) -> str:
        """LLaVA-Med 1.0's answers end with a separator, which is no special token and is not decoded."""
        ended = bool(tokens) and tokens[-1] in self.ends
        return super().decode_answer(tokens[:-1] if ended else tokens)
