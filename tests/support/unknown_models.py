"""Tiny checkpoints of model types that no family names, for the generic family."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING

from tests.support.tiny_models import (
    IMAGE_SIZE,
    TEXT_SIZES,
    VISION_SIZES,
    bpe_tokenizer,
    glm_parts,
    qwen_linear_parts,
    special_token_ids,
    write_checkpoint,
)

AYA_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|START_OF_TURN_TOKEN|>{{ message['role'] }}"
    "{% for content in message['content'] %}{% if content['type'] == 'image' %}<image>{% else %}"
    "{{ content['text'] }}{% endif %}{% endfor %}<|END_OF_TURN_TOKEN|>{% endfor %}"
    "{% if add_generation_prompt %}<|START_OF_TURN_TOKEN|>assistant{% endif %}"
)


def aya_vision() -> tuple[Any, Any]:
    """An image is cut into tiles with texts between them; of two layers one has a window. It can be grouped."""
    from transformers import AyaVisionConfig, AyaVisionProcessor
    from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

    special = ["<PAD>", "<UNK>", "<BOS_TOKEN>", "<EOS_TOKEN>", "<|START_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>"]
    special += ["<|START_OF_IMG|>", "<|END_OF_IMG|>", "<|IMG_PATCH|>", "<|IMG_LINE_BREAK|>", "<image>", "TILE_GLOBAL"]
    special += ["TILE", *(f"TILE_{number}" for number in range(1, 4))]
    tokenizer = bpe_tokenizer(
        special,
        sentencepiece=False,
        bos_token="<BOS_TOKEN>",
        eos_token="<|END_OF_TURN_TOKEN|>",
        pad_token="<PAD>",
        unk_token="<UNK>",
    )
    images = GotOcr2ImageProcessorPil(size=IMAGE_SIZE, crop_to_patches=True, min_patches=1, max_patches=3)
    processor = AyaVisionProcessor(
        images, tokenizer, patch_size=8, img_size=32, downsample_factor=2, chat_template=AYA_TEMPLATE
    )
    text = {**TEXT_SIZES, **special_token_ids(tokenizer), "vocab_size": len(tokenizer), "model_type": "cohere2"}
    text |= {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 12}
    config = AyaVisionConfig(
        text_config=text,
        vision_config={**VISION_SIZES, "model_type": "siglip_vision_model", "vision_use_head": False},
        downsample_factor=2,
        image_token_index=tokenizer.convert_tokens_to_ids("<|IMG_PATCH|>"),
    )
    return config, processor


def glm46v() -> tuple[Any, Any]:
    """Its rotary positions have three axes, which the generic family does not know. It cannot be grouped."""
    from transformers import Glm46VConfig, Glm46VProcessor
    from transformers.models.glm46v.image_processing_pil_glm46v import Glm46VImageProcessorPil

    processor, shared = glm_parts(Glm46VProcessor, Glm46VImageProcessorPil)
    shared["vision_config"]["model_type"] = "glm4v_vision"
    return Glm46VConfig(**shared), processor


def qwen4_exp() -> tuple[Any, Any]:
    """Gated DeltaNets, and attentions with an indexer, which is a kind of layer that nothing here knows."""
    from transformers import Qwen4ExpConfig

    processor, shared = qwen_linear_parts()
    shared["text_config"] |= {
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 16,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "hc_lowrank": 8,
        "ngram_vocab_size_base": 100,
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 8,
        "indexer_compress_ratio": 2,
    }
    return Qwen4ExpConfig(**shared), processor


ALL = {"aya_vision": aya_vision, "glm46v": glm46v, "qwen4_exp": qwen4_exp}
UNKNOWN: dict[str, Callable[[], tuple[Any, Any]]] = {
    name: make
    for name, make in ALL.items()
    if name in CONFIG_MAPPING  # of the installed transformers
}


def make_unknown(name: str, directory: Path | str) -> Path:
    """Write a tiny random checkpoint of a key of `UNKNOWN`."""
    return write_checkpoint(*UNKNOWN[name](), directory)
