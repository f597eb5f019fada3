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


def bpe_tokenizer(special: list[str], *, sentencepiece: bool, **named: Any) -> Any:
    """A small BPE tokenizer trained on TEXT: byte-level as in Qwen, or sentencepiece-like as in LLaMA.

    `named` are the tokenizer's named special tokens (bos_token, pad_token, image_token ...).
    """
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(
        token_models.BPE(byte_fallback=sentencepiece, unk_token="<unk>" if sentencepiece else None)
    )
    alphabet: list[str] = []
    if sentencepiece:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
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
    if start := named.get("bos_token"):
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{start} $A", special_tokens=[(start, tokenizer.token_to_id(start))]
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
    return llava("mistral", None)


TINY: dict[str, Callable[[], tuple[Any, Any]]] = {
    "llava": llava,
    "llava_med": llava_med,
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
