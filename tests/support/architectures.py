"""Well-known vision-language models at their real sizes, from public configs, on the meta device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers as hf
from torch import nn

from normtune.models.miss.config import MissConfig
from normtune.models.miss.model import MissForQuestionAnswering

CLIP_L_336 = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
    "projection_dim": 768,
}
SIGLIP_SO400M = {
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "patch_size": 14,
    "vision_use_head": False,
}


def language(
    vocabulary: int, width: int, feed_forward: int, layers: int, heads: int, key_heads: int, **others: Any
) -> dict[str, Any]:
    """The config of a language model."""
    sizes = {"vocab_size": vocabulary, "hidden_size": width, "intermediate_size": feed_forward}
    return {
        **sizes,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": key_heads,
        **others,
    }


def miss_base() -> nn.Module:
    return MissForQuestionAnswering(MissConfig())


def blip_vqa() -> nn.Module:
    config = hf.BlipConfig(vision_config={"image_size": 480}, text_config={})
    return hf.BlipForQuestionAnswering(config)


def llava_med() -> nn.Module:
    """LLaVA-Med v1.5 in transformers' layout, with the vocabulary padded to 32064."""
    text = language(32064, 4096, 14336, 32, 32, 8, model_type="mistral", rms_norm_eps=1e-05, sliding_window=None)
    config = hf.LlavaConfig(vision_config={"model_type": "clip_vision_model", **CLIP_L_336}, text_config=text)
    return hf.LlavaForConditionalGeneration(config)


def llava_15() -> nn.Module:
    text = {"model_type": "llama", "vocab_size": 32064, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5}
    config = hf.LlavaConfig(vision_config={"model_type": "clip_vision_model", **CLIP_L_336}, text_config=text)
    return hf.LlavaForConditionalGeneration(config)


def llava_med_10() -> nn.Module:
    """LLaVA-Med v1.0 in its imported form: the second layer of the projector is the identity."""
    vision = {"model_type": "clip_vision_model", **CLIP_L_336, "image_size": 224}
    text = {"model_type": "llama", "vocab_size": 32004, "rms_norm_eps": 1e-6}
    config = hf.LlavaConfig(vision_config=vision, text_config=text, projector_hidden_act="linear")
    return hf.LlavaForConditionalGeneration(config)


def llava_16() -> nn.Module:
    """llava-v1.6-mistral-7b: LLaVA-Med v1.5's dimensions with the parameter `image_newline`."""
    config = llava_med().config
    config = hf.LlavaNextConfig(vision_config=config.vision_config, text_config=config.text_config)
    return hf.LlavaNextForConditionalGeneration(config)


def qwen2_vl_2b() -> nn.Module:
    text = language(151936, 1536, 8960, 28, 12, 2)
    vision = {"depth": 32, "embed_dim": 1280, "hidden_size": 1536, "num_heads": 16, "mlp_ratio": 4}
    return hf.Qwen2VLForConditionalGeneration(
        hf.Qwen2VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=True)
    )


def qwen25_vl_7b() -> nn.Module:
    text = language(152064, 3584, 18944, 28, 28, 4)
    vision = {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "out_hidden_size": 3584}
    return hf.Qwen2_5_VLForConditionalGeneration(
        hf.Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=False)
    )


def qwen3_vl_4b() -> nn.Module:
    text = language(151936, 2560, 9728, 36, 32, 8, head_dim=128)
    vision = {
        "depth": 24,
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_heads": 16,
        "out_hidden_size": 2560,
        "deepstack_visual_indexes": [5, 11, 17],
    }
    return hf.Qwen3VLForConditionalGeneration(
        hf.Qwen3VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=True)
    )


def gemma3_4b() -> nn.Module:
    """Gemma 3 4B; MedGemma 4B has the same shape."""
    text = language(262208, 2560, 10240, 34, 8, 4, head_dim=256)
    return hf.Gemma3ForConditionalGeneration(
        hf.Gemma3Config(text_config=text, vision_config={**SIGLIP_SO400M, "image_size": 896})
    )


def paligemma_3b() -> nn.Module:
    text = language(257216, 2048, 16384, 18, 8, 1, model_type="gemma", head_dim=256)
    vision = {"model_type": "siglip_vision_model", **SIGLIP_SO400M, "image_size": 224}
    return hf.PaliGemmaForConditionalGeneration(
        hf.PaliGemmaConfig(text_config=text, vision_config=vision, projection_dim=2048, hidden_size=2048)
    )


def paligemma2_3b() -> nn.Module:
    text = {"model_type": "gemma2", "vocab_size": 257216, "query_pre_attn_scalar": 256}
    vision = {"model_type": "siglip_vision_model", **SIGLIP_SO400M, "image_size": 224}
    return hf.PaliGemmaForConditionalGeneration(
        hf.PaliGemmaConfig(text_config=text, vision_config=vision, projection_dim=2304, hidden_size=2304)
    )


def smolvlm_500m() -> nn.Module:
    text = language(49280, 960, 2560, 32, 15, 5, model_type="llama", pad_token_id=2)
    vision = {
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "image_size": 512,
        "patch_size": 16,
    }
    return hf.SmolVLMForConditionalGeneration(
        hf.SmolVLMConfig(text_config=text, vision_config=vision, scale_factor=4, tie_word_embeddings=False)
    )


def internvl3_1b() -> nn.Module:
    text = language(151674, 896, 4864, 24, 14, 2, model_type="qwen2")
    vision = {"image_size": [448, 448], "patch_size": [14, 14]}
    return hf.InternVLForConditionalGeneration(
        hf.InternVLConfig(text_config=text, vision_config=vision, tie_word_embeddings=True)
    )


_BUILDERS = (
    *(miss_base, blip_vqa, llava_med, llava_15, llava_med_10, llava_16, qwen2_vl_2b, qwen25_vl_7b, qwen3_vl_4b),
    *(gemma3_4b, paligemma_3b, paligemma2_3b, smolvlm_500m, internvl3_1b),
)
ARCHITECTURES: dict[str, Callable[[], nn.Module]] = {build.__name__: build for build in _BUILDERS}


def build_on_meta(name: str) -> Any:
    """Build the model with this name on the meta device."""
    with torch.device("meta"):
        return ARCHITECTURES[name]()
