"""Tiny checkpoints of model types that no family names, for the generic family."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING

from tests.support.tiny_models import (
    GLM_TEMPLATE,
    IMAGE_SIZE,
    TEXT_SIZES,
    VISION_SIZES,
    bpe_tokenizer,
    qwen_parts,
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

    class ImageOnly(Glm46VProcessor):
        @classmethod
        def get_attributes(cls) -> list[str]:
            return ["image_processor", "tokenizer"]

    ImageOnly.__name__ = Glm46VProcessor.__name__
    special = ["<|endoftext|>", "<|user|>", "<|assistant|>", "[gMASK]", "<sop>", "<|image|>", "<|video|>"]
    special += ["<|begin_of_image|>", "<|end_of_image|>", "<|begin_of_video|>", "<|end_of_video|>"]
    tokenizer = bpe_tokenizer(special, sentencepiece=False, eos_token="<|endoftext|>", pad_token="<|endoftext|>")
    images = Glm46VImageProcessorPil(
        patch_size=8, merge_size=2, temporal_patch_size=2, size={"shortest_edge": 1024, "longest_edge": 6144}
    )
    text = {**TEXT_SIZES, "vocab_size": len(tokenizer), **special_token_ids(tokenizer), "model_type": "glm4v_text"}
    del text["head_dim"]
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2], "partial_rotary_factor": 1.0}
    vision = {**VISION_SIZES, "depth": 2, "num_heads": 2, "spatial_merge_size": 2, "out_hidden_size": 32}
    known = tokenizer.get_vocab()
    config = Glm46VConfig(
        text_config=text | {"rope_parameters": rope},
        vision_config=vision | {"model_type": "glm4v_vision"},
        image_token_id=known["<|image|>"],
        video_token_id=known["<|video|>"],
        image_start_token_id=known["<|begin_of_image|>"],
        image_end_token_id=known["<|end_of_image|>"],
        video_start_token_id=known["<|begin_of_video|>"],
        video_end_token_id=known["<|end_of_video|>"],
    )
    return config, ImageOnly(images, tokenizer, chat_template=GLM_TEMPLATE)


def qwen4_exp() -> tuple[Any, Any]:
    """Gated DeltaNets, and attentions with an indexer, which is a kind of layer that nothing here knows."""
    from transformers import Qwen3VLProcessor, Qwen4ExpConfig

    processor, shared = qwen_parts(Qwen3VLProcessor, 8)
    text = shared["text_config"]
    text |= {
        "num_hidden_layers": 3,
        "layer_types": ["linear_attention", "full_attention", "linear_attention"],
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_conv_kernel_dim": 4,
        "head_dim": 16,
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
    text["rope_parameters"] |= {"mrope_interleaved": True, "partial_rotary_factor": 0.5}
    vision = {"depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "patch_size": 8}
    vision |= {"out_hidden_size": 32, "num_position_embeddings": 16}
    return Qwen4ExpConfig(vision_config=vision, **shared), processor


ALL = {"aya_vision": aya_vision, "glm46v": glm46v, "qwen4_exp": qwen4_exp}
UNKNOWN: dict[str, Callable[[], tuple[Any, Any]]] = {
    name: make
    for name, make in ALL.items()
    if name in CONFIG_MAPPING  # of the installed transformers
}


def make_unknown(name: str, directory: Path | str) -> Path:
    """Write a tiny random checkpoint of a key of `UNKNOWN`."""
    return write_checkpoint(*UNKNOWN[name](), directory)
