"""Tiny random checkpoints in the real layouts: config, weights, tokenizer, image processor, chat template."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers import models as token_models
from tokenizers.trainers import BpeTrainer

TEXT = [
    "USER: What is the modality of this image? ASSISTANT: MRI, CT or X-Ray",
    "Is there a fracture of the left rib? no yes No Yes. Assistant: User:",
    "Which organ is abnormal in this image? lung liver heart brain kidney",
    "[INST] Describe the findings. [/INST] The heart is normal in size.",
    "<user> model system You are a helpful assistant.\n\n\nuser\nmodel\nassistant\n",
] * 3

LLAVA_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] != 'system' %}{{ message['role'].upper() + ': '}}"
    "{% endif %}{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}"
    "{{ '<image>\n' }}{% endfor %}{% if message['role'] != 'assistant' %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{{ content['text'] + ' '}}{% endfor %}{% else %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{{ content['text'] + ' '}}{% endfor %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
QWEN_TEMPLATE = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}<|im_start|>system\n"
    "You are a helpful assistant.<|im_end|>\n{% endif %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}<|im_end|>\n{% else %}"
    "{% for content in message['content'] %}{% if content['type'] == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% elif 'text' in content %}{{ content['text'] }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
GEMMA_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}"
    "{{ '<start_of_turn>' + role + '\n' }}{% if message['content'] is string %}"
    "{{ message['content'] | trim }}{% else %}{% for item in message['content'] %}"
    "{% if item['type'] == 'image' %}{{ '<start_of_image>' }}{% elif item['type'] == 'text' %}"
    "{{ item['text'] | trim }}{% endif %}{% endfor %}{% endif %}{{ '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
IDEFICS_TEMPLATE = (
    "<|im_start|>{% for message in messages %}{{ message['role'] | capitalize }}"
    "{% if message['content'][0]['type'] == 'image' %}{{ ':' }}{% else %}{{ ': ' }}{% endif %}"
    "{% for line in message['content'] %}{% if line['type'] == 'text' %}{{ line['text'] }}"
    "{% elif line['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}<end_of_utterance>\n"
    "{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
INTERN_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for content in message['content'] %}{% if content['type'] == 'image' %}{{ '<IMG_CONTEXT>\n' }}"
    "{% elif content['type'] == 'text' %}{{ content['text'] }}{% endif %}{% endfor %}{% endif %}"
    "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def bpe_tokenizer(
    special: list[str], *, sentencepiece: bool, prepend: bool = True, start: bool = True, **named: Any
) -> Any:
    """A small BPE tokenizer trained on TEXT: byte-level as in Qwen, or sentencepiece-like as in LLaMA.

    Without `prepend` no blank is put before a text, as in Gemma; without `start` no first token.
    `named` are the tokenizer's named special tokens (bos_token, pad_token, image_token ...).
    """
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(
        token_models.BPE(byte_fallback=sentencepiece, unk_token="<unk>" if sentencepiece else None)
    )
    alphabet: list[str] = []
    if sentencepiece:
        blank = normalizers.Replace(" ", "▁")
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), blank]) if prepend else blank
        tokenizer.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        )
        pieces = special + [f"<0x{byte:02X}>" for byte in range(256)]
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        pieces = special
    trainer = BpeTrainer(
        vocab_size=len(pieces) + len(alphabet) + 160,
        special_tokens=[AddedToken(piece, special=True, normalized=False) for piece in pieces],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    if sentencepiece:  # learn words, then tokenise whole chunks, as LLaMA does
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
        tokenizer.train_from_iterator(TEXT, trainer)
        tokenizer.pre_tokenizer = None  # type: ignore[assignment]
    else:
        tokenizer.train_from_iterator(TEXT, trainer)
    if start and (first := named.get("bos_token")):
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{first} $A", special_tokens=[(first, tokenizer.token_to_id(first))]
        )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **named)


TEXT_SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
}
VISION_SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
}
IMAGE_SIZE = {"height": 32, "width": 32}


def llava(text_type: str = "llama", template: str | None = LLAVA_TEMPLATE) -> tuple[Any, Any]:
    from transformers import CLIPVisionConfig, LlavaConfig, LlavaProcessor
    from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

    tokenizer = bpe_tokenizer(
        ["<unk>", "<s>", "</s>", "<image>", "<pad>"],
        sentencepiece=True,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>",
    )
    image_processor = LlavaImageProcessorPil(
        size={"shortest_edge": 32}, crop_size=IMAGE_SIZE, do_pad=text_type == "mistral"
    )
    processor = LlavaProcessor(
        image_processor,
        tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=template,
    )
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**VISION_SIZES, projection_dim=32),
        text_config={"model_type": text_type, "vocab_size": len(tokenizer), **TEXT_SIZES, **ids(tokenizer)},
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )
    return config, processor


def ids(tokenizer: Any) -> dict[str, int | None]:
    return {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}


def llava_med() -> tuple[Any, Any]:
    """Without a chat template, as the checkpoint is; with a window, as the first Mistral had one."""
    config, processor = llava("mistral", None)
    config.text_config.sliding_window = 24
    return config, processor


GEMMA_TOKENS = [
    "<pad>",
    "<eos>",
    "<bos>",
    "<unk>",
    "<start_of_turn>",
    "<end_of_turn>",
    "<start_of_image>",
    "<end_of_image>",
    "<image_soft_token>",
]
IDEFICS_TOKENS = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<fake_token_around_image>",
    "<image>",
    "<end_of_utterance>",
    "<global-img>",
]
QWEN_TOKENS = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
]


def qwen_tokenizer() -> Any:
    return bpe_tokenizer(QWEN_TOKENS, sentencepiece=False, eos_token="<|im_end|>", pad_token="<|endoftext|>")


def qwen_parts(processor_class: Any, patch_size: int) -> tuple[Any, dict[str, Any]]:
    """Processor, and what the configs of all Qwen-VL models share."""
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    class ImageOnly(processor_class):  # type: ignore[misc]
        @classmethod
        def get_attributes(cls) -> list[str]:
            return ["image_processor", "tokenizer"]

    ImageOnly.__name__ = processor_class.__name__
    tokenizer = qwen_tokenizer()
    factor = 2 * patch_size
    images = Qwen2VLImageProcessorPil(
        patch_size=patch_size,
        merge_size=2,
        temporal_patch_size=2,
        size={"shortest_edge": 4 * factor**2, "longest_edge": 12 * factor**2},
    )
    text = {**TEXT_SIZES, "vocab_size": len(tokenizer), **ids(tokenizer)}
    text["rope_parameters"] = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
    known = tokenizer.get_vocab()
    shared = {
        "text_config": text,
        "image_token_id": known["<|image_pad|>"],
        "video_token_id": known["<|video_pad|>"],
        "vision_start_token_id": known["<|vision_start|>"],
        "vision_end_token_id": known["<|vision_end|>"],
    }
    return ImageOnly(images, tokenizer, chat_template=QWEN_TEMPLATE), shared


def qwen2_vl() -> tuple[Any, Any]:
    from transformers import Qwen2VLConfig, Qwen2VLProcessor

    processor, shared = qwen_parts(Qwen2VLProcessor, 8)
    vision = {"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 2, "patch_size": 8}
    return Qwen2VLConfig(vision_config=vision, **shared), processor


def qwen2_5_vl() -> tuple[Any, Any]:
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLProcessor

    processor, shared = qwen_parts(Qwen2_5_VLProcessor, 8)
    vision = {
        "depth": 2,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_heads": 2,
        "patch_size": 8,
        "out_hidden_size": 32,
        "window_size": 32,
        "fullatt_block_indexes": [1],
    }
    return Qwen2_5_VLConfig(vision_config=vision, **shared), processor


def qwen3_vl() -> tuple[Any, Any]:
    from transformers import Qwen3VLConfig, Qwen3VLProcessor

    processor, shared = qwen_parts(Qwen3VLProcessor, 8)
    shared["text_config"]["rope_parameters"]["mrope_interleaved"] = True
    vision = {
        "depth": 3,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_heads": 2,
        "patch_size": 8,
        "out_hidden_size": 32,
        "num_position_embeddings": 16,
        "deepstack_visual_indexes": [0, 1],
    }
    return Qwen3VLConfig(vision_config=vision, **shared), processor


def gemma3() -> tuple[Any, Any]:
    """A window of ten positions, shorter than an image of sixteen tokens; one layer of each kind."""
    from transformers import Gemma3Config, Gemma3Processor
    from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil

    tokenizer = bpe_tokenizer(
        GEMMA_TOKENS,
        sentencepiece=True,
        prepend=False,
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        pad_token="<pad>",
        extra_special_tokens={
            "boi_token": "<start_of_image>",
            "eoi_token": "<end_of_image>",
            "image_token": "<image_soft_token>",
        },
    )
    processor = Gemma3Processor(
        Gemma3ImageProcessorPil(size=IMAGE_SIZE), tokenizer, chat_template=GEMMA_TEMPLATE, image_seq_length=16
    )
    text = {
        **TEXT_SIZES,
        **ids(tokenizer),
        "vocab_size": len(tokenizer),
        "num_hidden_layers": 2,
        "query_pre_attn_scalar": 8,
        "sliding_window": 10,
        "layer_types": ["sliding_attention", "full_attention"],
    }
    config = Gemma3Config(
        text_config=text,
        vision_config={**VISION_SIZES, "model_type": "siglip_vision_model", "vision_use_head": False},
        mm_tokens_per_image=16,
        boi_token_index=tokenizer.boi_token_id,
        eoi_token_index=tokenizer.eoi_token_id,
        image_token_index=tokenizer.image_token_id,
    )
    return config, processor


def idefics3(model_type: str = "idefics3") -> tuple[Any, Any]:
    from transformers import AutoConfig, Idefics3Processor
    from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
    from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

    tiles = [f"<row_{row}_col_{col}>" for row in (1, 2, 3) for col in (1, 2, 3)]
    tokenizer = bpe_tokenizer(
        [*IDEFICS_TOKENS, *tiles],
        sentencepiece=False,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
    )
    image_class = SmolVLMImageProcessorPil if model_type == "smolvlm" else Idefics3ImageProcessorPil
    images = image_class(size={"longest_edge": 64}, max_image_size={"longest_edge": 32})
    processor = Idefics3Processor(images, tokenizer, image_seq_len=4, chat_template=IDEFICS_TEMPLATE)
    config = AutoConfig.for_model(
        model_type,
        text_config={
            "model_type": "llama",
            **TEXT_SIZES,
            **ids(tokenizer),
            "vocab_size": len(tokenizer),
        },
        vision_config=VISION_SIZES,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        scale_factor=2,
        pad_token_id=tokenizer.pad_token_id,
    )
    return config, processor


def smolvlm() -> tuple[Any, Any]:
    return idefics3("smolvlm")


def internvl() -> tuple[Any, Any]:
    from transformers import InternVLConfig, InternVLProcessor
    from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

    class ImageOnly(InternVLProcessor):
        @classmethod
        def get_attributes(cls) -> list[str]:
            return ["image_processor", "tokenizer"]

    ImageOnly.__name__ = InternVLProcessor.__name__
    tokenizer = bpe_tokenizer(
        ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<img>", "</img>", "<IMG_CONTEXT>", "<video>"],
        sentencepiece=False,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens={
            "start_image_token": "<img>",
            "end_image_token": "</img>",
            "context_image_token": "<IMG_CONTEXT>",
            "video_token": "<video>",
        },
    )
    images = GotOcr2ImageProcessorPil(size=IMAGE_SIZE, crop_to_patches=True, min_patches=1, max_patches=3)
    processor = ImageOnly(images, tokenizer, image_seq_length=4, chat_template=INTERN_TEMPLATE)
    config = InternVLConfig(
        vision_config={**VISION_SIZES, "image_size": [32, 32], "patch_size": [8, 8]},
        text_config={
            "model_type": "qwen2",
            **TEXT_SIZES,
            **ids(tokenizer),
            "vocab_size": len(tokenizer),
        },
        image_token_id=tokenizer.context_image_token_id,
        image_seq_length=4,
    )
    return config, processor


def paligemma() -> tuple[Any, Any]:
    from transformers import PaliGemmaConfig, PaliGemmaProcessor
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

    tokenizer = bpe_tokenizer(
        ["<pad>", "<eos>", "<bos>", "<unk>", "<image>"],
        sentencepiece=True,
        prepend=False,
        start=False,
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        pad_token="<pad>",
        extra_special_tokens={"image_token": "<image>"},
    )
    processor = PaliGemmaProcessor(SiglipImageProcessorPil(size=IMAGE_SIZE, image_seq_length=16), tokenizer)
    vision = {**VISION_SIZES, "model_type": "siglip_vision_model", "vision_use_head": False}
    config = PaliGemmaConfig(
        vision_config={**vision, "projection_dim": 32},
        text_config={
            "model_type": "gemma",
            **TEXT_SIZES,
            **ids(tokenizer),
            "vocab_size": len(tokenizer),
        },
        image_token_index=tokenizer.image_token_id,
        projection_dim=32,
    )
    return config, processor


TINY: dict[str, Callable[[], tuple[Any, Any]]] = {
    "llava": llava,
    "llava_med": llava_med,
    "qwen2_vl": qwen2_vl,
    "qwen2_5_vl": qwen2_5_vl,
    "qwen3_vl": qwen3_vl,
    "gemma3": gemma3,
    "idefics3": idefics3,
    "smolvlm": smolvlm,
    "internvl": internvl,
    "paligemma": paligemma,
}


def make_tiny(family: str, directory: Path | str, seed: int = 0) -> Path:
    """Write a tiny random checkpoint of `family` (a key of TINY) to `directory`, ready for `Family.load`."""
    from transformers import AutoModelForImageTextToText

    config, processor = TINY[family]()
    torch.manual_seed(seed)
    model = AutoModelForImageTextToText.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():  # spread enough for distinct logits and non-trivial gradients
            if parameter.ndim > 1:
                parameter.normal_(0, parameter[0].numel() ** -0.5)
            else:
                parameter += 0.1 * torch.randn_like(parameter)
    model.generation_config.eos_token_id = stop_id(processor)
    model.generation_config.pad_token_id = processor.tokenizer.pad_token_id
    model.save_pretrained(directory)
    processor.save_pretrained(directory)
    return Path(directory)


def stop_id(processor: Any) -> int:
    """The token that ends an answer in the family's chat template."""
    known = processor.tokenizer.get_vocab()
    ends = ("<|im_end|>", "<end_of_turn>", "<end_of_utterance>")
    return next((known[end] for end in ends if end in known), processor.tokenizer.eos_token_id)
