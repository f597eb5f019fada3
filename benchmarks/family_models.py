"""Random models of the families that share one image in different ways, at a width that two cores can run.

An image has about 256 tokens; every language model has four layers. A family is added by one entry of `MODELS`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import transformers as hf
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers import models as token_models
from tokenizers.trainers import BpeTrainer
from transformers.models.glm4v.image_processing_pil_glm4v import Glm4vImageProcessorPil
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from normtune.models.family import Family
from normtune.models.loading import family_type
from normtune.models.processors import without_videos
from normtune.runtime.files import write_json

IMAGE_TOKENS = 256
TEXT = {
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
}
VISION = {"hidden_size": 192, "intermediate_size": 768, "patch_size": 14}
MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [8, 12, 12]}
QWEN_VISION = VISION | {"depth": 4, "num_heads": 3, "out_hidden_size": 256}
DELTA = {  # three gated DeltaNets for each attention, as in Qwen3.5
    "layer_types": ["linear_attention"] * 3 + ["full_attention"],
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
    "linear_num_key_heads": 4,
    "linear_num_value_heads": 8,
    "linear_conv_kernel_dim": 4,
}
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 352, "decoder_sparse_step": 1}
HALF_MROPE = MROPE | {"partial_rotary_factor": 0.5, "mrope_section": [4, 6, 6], "mrope_interleaved": True}
TOKENS = ["<pad>", "<end>", "<user>", "<image>", "<video>", "<image_start>", "<image_end>", "<video_start>"]
TEMPLATE = (
    "{% for message in messages %}<user>{{ message['role'] }}{% for part in message['content'] %}"
    "{{ '<image_start><image><image_end>' if part['type'] == 'image' else part['text'] }}{% endfor %}<end>{% endfor %}"
    "{% if add_generation_prompt %}<user>assistant{% endif %}"
)


def qwen(model_type: str, text: dict[str, Any], vision: dict[str, Any]) -> Callable[[Any], tuple[Any, Any]]:
    """Qwen-VL and GLM-4.1V: config and processor for a tokenizer."""

    def make(tokenizer: Any) -> tuple[Any, Any]:
        known = tokenizer.get_vocab()
        config = hf.AutoConfig.for_model(
            model_type,
            text_config=TEXT | {"vocab_size": len(tokenizer)} | text,
            vision_config=QWEN_VISION | vision,
            image_token_id=known["<image>"],
            video_token_id=known["<video>"],
            vision_start_token_id=known["<image_start>"],
            vision_end_token_id=known["<image_end>"],
            image_start_token_id=known["<image_start>"],
            image_end_token_id=known["<image_end>"],
        )
        images = Glm4vImageProcessorPil if model_type == "glm4v" else Qwen2VLImageProcessorPil
        edge = IMAGE_TOKENS * 28**2
        sizes = {"shortest_edge": edge // 2, "longest_edge": edge * (2 if model_type == "glm4v" else 1)}
        processor_class = hf.Glm4vProcessor if model_type == "glm4v" else hf.Qwen3VLProcessor
        image_processor = images(patch_size=14, merge_size=2, temporal_patch_size=2, size=sizes)
        return config, without_videos(processor_class)(image_processor, tokenizer, chat_template=TEMPLATE)

    return make


def llava_onevision(tokenizer: Any) -> tuple[Any, Any]:
    """The whole image and one tile of it, of 256 tokens each."""
    images = LlavaOnevisionImageProcessorPil(size={"height": 224, "width": 224}, image_grid_pinpoints=[[224, 224]])
    processor = without_videos(hf.LlavaOnevisionProcessor)(
        images, tokenizer, num_image_tokens=256, vision_feature_select_strategy="full", chat_template=TEMPLATE
    )
    vision = VISION | {"num_hidden_layers": 4, "num_attention_heads": 3, "image_size": 224, "vision_use_head": False}
    config = hf.LlavaOnevisionConfig(
        vision_config=vision | {"model_type": "siglip_vision_model"},
        text_config=TEXT | {"model_type": "qwen2", "vocab_size": len(tokenizer)},
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        video_token_index=tokenizer.convert_tokens_to_ids("<video>"),
        image_grid_pinpoints=[[224, 224]],
        vision_feature_layer=-1,
    )
    return config, processor


MODELS: dict[str, Callable[[Any], tuple[Any, Any]]] = {
    "qwen3_vl": qwen(
        "qwen3_vl",
        {"rope_parameters": MROPE | {"mrope_interleaved": True}},
        {"num_position_embeddings": 256, "deepstack_visual_indexes": [1, 2]},
    ),
    "qwen3_vl_moe": qwen(
        "qwen3_vl_moe",
        EXPERTS | {"rope_parameters": MROPE | {"mrope_interleaved": True}},
        {"num_position_embeddings": 256, "deepstack_visual_indexes": [1, 2]},
    ),
    "qwen3_5": qwen("qwen3_5", DELTA | {"rope_parameters": HALF_MROPE}, {"num_position_embeddings": 256}),
    "glm4v": qwen(
        "glm4v",
        {"rope_parameters": MROPE | {"partial_rotary_factor": 1.0}},
        {"intermediate_size": 768, "spatial_merge_size": 2, "image_size": 336},
    ),
    "llava_onevision": llava_onevision,
}


def tokenizer_of(texts: Sequence[str]) -> Any:
    """A BPE tokenizer trained on the data, so that token counts are near the real ones."""
    tokenizer = Tokenizer(token_models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=4000,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in TOKENS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<end>",
        pad_token="<pad>",
        extra_special_tokens={"image_token": "<image>", "video_token": "<video>"},
    )


def build_family(name: str, texts: Sequence[str]) -> Family:
    """A random model of `MODELS` as a family, in fp32."""
    config, processor = MODELS[name](tokenizer_of(texts))
    with TemporaryDirectory() as folder:
        write_json(Path(folder) / "config.json", config.to_dict())
        family = family_type(folder)
    torch.manual_seed(0)
    model = hf.AutoModelForImageTextToText.from_config(config).eval()
    model.generation_config.eos_token_id = processor.tokenizer.eos_token_id
    return family(model, processor)
