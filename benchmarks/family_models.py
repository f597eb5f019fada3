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
from transformers.models.gemma4.image_processing_pil_gemma4 import Gemma4ImageProcessorPil
from transformers.models.glm4v.image_processing_pil_glm4v import Glm4vImageProcessorPil
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil
from transformers.models.mllama.image_processing_pil_mllama import MllamaImageProcessorPil
from transformers.models.pixtral.image_processing_pil_pixtral import PixtralImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from normtune.models.families.gemma4 import Gemma4Processor
from normtune.models.families.lfm2_vl import Lfm2VlImageProcessor
from normtune.models.families.mistral3 import PixtralProcessor
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
TOKENS += ["[IMG]", "[IMG_BREAK]", "[IMG_END]", "<|image_start|>", "<|image_end|>", "<|img_thumbnail|>"]
WHOLE_IMAGE = "<image_start><image><image_end>"
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


def mistral3(tokenizer: Any) -> tuple[Any, Any]:
    """A Pixtral tower at 448 pixels: 16 rows of 16 tokens, each with a token at its end."""
    images = PixtralImageProcessorPil(size={"longest_edge": 448}, patch_size=14)
    processor = PixtralProcessor(
        images, tokenizer, patch_size=14, spatial_merge_size=2, chat_template=TEMPLATE.replace(WHOLE_IMAGE, "[IMG]")
    )
    vision = VISION | {"num_hidden_layers": 4, "num_attention_heads": 3, "head_dim": 64, "image_size": 448}
    config = hf.Mistral3Config(
        text_config=TEXT | {"model_type": "mistral", "vocab_size": len(tokenizer), "sliding_window": None},
        vision_config=vision | {"model_type": "pixtral"},
        image_token_index=processor.image_token_id,
        spatial_merge_size=2,
        tie_word_embeddings=False,
    )
    return config, processor


def gemma4(tokenizer: Any) -> tuple[Any, Any]:
    """Half of the layers have a window; the last two read the keys of earlier ones, as in E2B."""
    known = tokenizer.get_vocab()
    layers = {"layer_types": ["sliding_attention", "full_attention"] * 2, "sliding_window": 512, "global_head_dim": 64}
    config = hf.Gemma4Config(
        text_config=TEXT | layers | {
            "vocab_size": len(tokenizer), "vocab_size_per_layer_input": len(tokenizer), "num_kv_shared_layers": 2,
            "use_double_wide_mlp": True, "hidden_size_per_layer_input": 32, "final_logit_softcapping": 30.0,
        },
        vision_config=VISION | {
            "num_hidden_layers": 4, "num_attention_heads": 3, "num_key_value_heads": 3, "head_dim": 64,
            "pooling_kernel_size": 3, "position_embedding_size": 1024,
        },
        audio_config=None,
        image_token_id=known["<image>"],
        video_token_id=known["<video>"],
        audio_token_id=known["<pad>"],
        boi_token_id=known["<image_start>"],
        eoi_token_id=known["<image_end>"],
    )  # fmt: skip
    images = Gemma4ImageProcessorPil(patch_size=14, pooling_kernel_size=3, max_soft_tokens=280)
    return config, Gemma4Processor(images, tokenizer, chat_template=TEMPLATE.replace(WHOLE_IMAGE, "<image>"))


def lfm2_vl(tokenizer: Any) -> tuple[Any, Any]:
    """Three short convolutions for each attention; 256 tokens of one tile."""
    images = Lfm2VlImageProcessor(encoder_patch_size=14, tile_size=448, min_image_tokens=64, max_image_tokens=256)
    text = {name: value for name, value in TEXT.items() if name != "head_dim"}
    config = hf.Lfm2VlConfig(
        text_config=text | {
            "model_type": "lfm2", "vocab_size": len(tokenizer), "layer_types": ["conv"] * 3 + ["full_attention"],
            "conv_L_cache": 3, "block_auto_adjust_ff_dim": False,
        },
        vision_config=VISION | {
            "model_type": "siglip2_vision_model", "num_hidden_layers": 4, "num_attention_heads": 3, "num_patches": 1024,
            "vision_use_head": False,
        },
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        downsample_factor=2,
        projector_hidden_size=256,
    )  # fmt: skip
    return config, hf.Lfm2VlProcessor(images, tokenizer, chat_template=TEMPLATE.replace(WHOLE_IMAGE, "<image>"))


def mllama(tokenizer: Any) -> tuple[Any, Any]:
    """One tile of 256 patches; cross-attention in the second of four layers."""
    images = MllamaImageProcessorPil(size={"height": 224, "width": 224}, max_image_tiles=1)
    text = {name: value for name, value in TEXT.items() if name != "head_dim"}
    config = hf.MllamaConfig(
        text_config=text | {
            "vocab_size": len(tokenizer), "cross_attention_layers": [1], "pad_token_id": tokenizer.pad_token_id,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        },
        vision_config={
            "hidden_size": 192, "intermediate_size": 768, "num_hidden_layers": 4, "num_global_layers": 1,
            "attention_heads": 3, "image_size": 224, "patch_size": 14, "intermediate_layers_indices": [0],
            "vision_output_dim": 384, "max_num_tiles": 1, "supported_aspect_ratios": [[1, 1]],
        },
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
    )  # fmt: skip
    return config, hf.MllamaProcessor(images, tokenizer, chat_template=TEMPLATE.replace(WHOLE_IMAGE, "<image>"))


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
    "mistral3": mistral3,
    "gemma4": gemma4,
    "lfm2_vl": lfm2_vl,
    "mllama": mllama,
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
        bos_token="<user>",
        extra_special_tokens={
            "image_token": "<image>",
            "video_token": "<video>",
            "boi_token": "<image_start>",
            "eoi_token": "<image_end>",
        },
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
