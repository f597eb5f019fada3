"""Random models of real shapes for the GPU benchmark, their questions, and stock PEFT as users set it up.

Weights are drawn on the device in bf16 and questions are token ids, so that no file and no network is needed.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from gpu_normtune import (
    Group,
    Segment,
    TrainingStep,
    build_family,
    collate,
    model_config,
    norm_names,
    optimizer_step,
    to_device,
)
from gpu_timing import free_memory, synchronize
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

KINDS = ("llava", "gemma3")
QUESTIONS_PER_IMAGE = 11  # as SLAKE's training split has
IGNORED = -100  # label of a token outside the answer
FIRST_WORD = 20  # lower token ids are special
PATCH = 14  # pixels at the side of an image patch, of both vision towers
TINY = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
TINY_TEXT = TINY | {"num_key_value_heads": 2, "head_dim": 16, "vocab_size": 512}
TINY_IMAGE = 56  # pixels
MEDGEMMA_VISION: dict[str, Any] = {
    "model_type": "siglip_vision_model",
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "image_size": 896,
    "patch_size": PATCH,
    "vision_use_head": False,
}
MEDGEMMA_TEXT: dict[str, Any] = {
    "model_type": "gemma3_text",
    "hidden_size": 2560,
    "intermediate_size": 10240,
    "num_hidden_layers": 34,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "vocab_size": 262208,
    "sliding_window": 1024,
}
MEDGEMMA_IMAGE_TOKENS = 256


@dataclass(frozen=True)
class Shape:
    """A model's config, and how images and questions become its tokens.

    Attributes:
        kind: "llava" (LLaVA-Med 7B) or "gemma3" (MedGemma 4B).
        image_prefix: the tokens of one image, before its questions.
        image_size: pixels at the side of an image.
    """

    kind: str
    config: Any
    image_token: int
    image_prefix: tuple[int, ...]
    image_size: int
    questions_per_image: int = QUESTIONS_PER_IMAGE

    @property
    def end_token(self) -> int:
        """An id past the vocabulary, so that no answer ends early and both sides generate the same number."""
        size: int = self.config.get_text_config().vocab_size
        return size

    def build(self, device: torch.device) -> Any:
        """The model of transformers with random weights, in bf16."""
        classes: dict[str, Any] = {
            "llava": transformers.LlavaForConditionalGeneration,
            "gemma3": transformers.Gemma3ForConditionalGeneration,
        }
        torch.manual_seed(0)
        with device:
            model = classes[self.kind]._from_config(self.config, dtype=torch.bfloat16, attn_implementation="sdpa")
        return model.eval()

    def question(self, number: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """(tokens of a question, tokens of its answer), about as long as SLAKE's: 16 to 24, and 3 to 5."""
        words = self.config.get_text_config().vocab_size - FIRST_WORD
        prompt = (FIRST_WORD + (131 * number + 17 * place) % words for place in range(16 + number % 9))
        answer = (FIRST_WORD + (7 * number + 3 * place) % words for place in range(3 + number % 3))
        return tuple(prompt), tuple(answer)

    def pixels(self, image: int) -> Tensor:
        """The pixels of an image: [3, size, size] fp32 on the CPU."""
        generator = torch.Generator().manual_seed(image)
        return torch.randn(3, self.image_size, self.image_size, generator=generator)

    def groups(
        self, questions_of_image: Sequence[int], *, answers: bool = True
    ) -> tuple[list[Group], list[list[dict[str, Tensor]]]]:
        """(groups, pixels) as Normtune takes them: one image with `questions_of_image[i]` questions each."""
        groups, pixels, number = [], [], 0
        for image, count in enumerate(questions_of_image):
            segments = []
            for _ in range(count):
                prompt, answer = self.question(number)
                segments.append(Segment(str(number), prompt, answer if answers else ()))
                number += 1
            groups.append(Group((str(image),), tuple(segments)))
            pixels.append([{"pixel_values": self.pixels(image)}])
        return groups, pixels

    def rows(
        self,
        pairs: int,
        device: torch.device,
        *,
        answers: bool = True,
        questions_of_image: Sequence[int] | None = None,
        dtype: torch.dtype = torch.bfloat16,
    ) -> dict[str, Tensor]:
        """The same questions as stock transformers takes them: each a row with its own copy of the image.

        Args:
            questions_of_image: as in `groups`; None: `questions_per_image` for each image.
            dtype: of the pixels.

        Returns:
            input_ids, attention_mask [pairs, seq] long, padded on the right for training and on the left for
            generation; pixel_values [pairs, 3, size, size]; labels [pairs, seq] long with `answers`.
        """
        ids, labels = [], []
        for number in range(pairs):
            prompt, answer = self.question(number)
            learnt = answer if answers else ()
            ids.append(torch.tensor([*self.image_prefix, *prompt, *learnt]))
            labels.append(torch.tensor([IGNORED] * (len(self.image_prefix) + len(prompt)) + [*learnt]))
        side = "right" if answers else "left"
        counts = questions_of_image or [self.questions_per_image] * -(-pairs // self.questions_per_image)
        images = [self.pixels(image) for image, count in enumerate(counts) for _ in range(count)][:pairs]
        batch = {
            "input_ids": pad_sequence(ids, True, 0, side),
            "attention_mask": pad_sequence([torch.ones_like(row) for row in ids], True, 0, side),
            "pixel_values": torch.stack(images).to(dtype),
        }
        if self.kind == "gemma3":
            batch["token_type_ids"] = (batch["input_ids"] == self.image_token).long()
        if answers:
            batch["labels"] = pad_sequence(labels, True, IGNORED, side)
        rows: dict[str, Tensor] = to_device(batch, device)
        return rows


def model_shape(kind: str, tiny: bool) -> Shape:
    """LLaVA-Med 7B or MedGemma 4B, or the same architecture at a width of 64 with two layers."""
    return _llava_shape(tiny) if kind == "llava" else _medgemma_shape(tiny)


def _llava_shape(tiny: bool) -> Shape:
    values = model_config("llava-med-7b") | {"image_token_index": 5}  # an id that no question has
    if tiny:
        values["vision_config"] |= TINY | {"image_size": TINY_IMAGE}
        values["text_config"] |= TINY_TEXT
    config = transformers.AutoConfig.for_model(**values)
    size = values["vision_config"]["image_size"]
    prefix = (1, *[5] * (size // PATCH) ** 2, 7)
    return Shape("llava", config, 5, prefix, size)


def _medgemma_shape(tiny: bool) -> Shape:
    vision, text, image_tokens = dict(MEDGEMMA_VISION), dict(MEDGEMMA_TEXT), MEDGEMMA_IMAGE_TOKENS
    if tiny:
        vision |= TINY | {"image_size": TINY_IMAGE}
        text |= TINY_TEXT | {"sliding_window": 24}
        image_tokens = 4
    image, first, last = 6, 8, 9
    config = transformers.Gemma3Config(
        vision_config=vision,
        text_config=text,
        mm_tokens_per_image=image_tokens,
        image_token_index=image,
        boi_token_index=first,
        eoi_token_index=last,
    )
    config.image_token_id = image
    prefix = (2, first, *[image] * image_tokens, last)
    return Shape("gemma3", config, image, prefix, vision["image_size"])


class Workbench:
    """The device and the one model on it: with two of real shape a step would not fit in memory.

    Attributes:
        pairs_per_image: questions of one image in a batch.
        build_s: seconds for building the current model.
    """

    def __init__(self, device: torch.device, tiny: bool) -> None:
        self.device, self.tiny = device, tiny
        self.pairs_per_image = 3 if tiny else QUESTIONS_PER_IMAGE
        self.build_s = 0.0
        self._models: dict[str, tuple[Shape, Any]] = {}

    def model(self, kind: str) -> tuple[Shape, Any]:
        """(shape, family) of this kind, built unless it is the current one."""
        if kind not in self._models:
            self.free()
            shape = model_shape(kind, self.tiny)
            began = time.perf_counter()
            model = shape.build(self.device)
            synchronize()
            self.build_s = round(time.perf_counter() - began, 2)
            self._models[kind] = shape, build_family(kind, model, shape.image_prefix, shape.end_token)
        return self._models[kind]

    def batch(self, kind: str, questions_of_image: Sequence[int]) -> dict[str, Any]:
        """A grouped training batch on the device."""
        shape, family = self.model(kind)
        return collate(family, *shape.groups(questions_of_image), self.device)

    def free(self) -> None:
        """Drop the model: the next part builds a new one."""
        self._models.clear()
        free_memory()


# --- stock PEFT ---------------------------------------------------------------------------------------------

NOTEBOOK = "LoRA r16 all-linear, lm_head, embed_tokens"  # of Google's MedGemma fine-tuning notebook
PEERS = ("LN_TUNING", "LoRA r16 q,v", "LoRA r16 all-linear")


def peft_model(model: nn.Module, method: str) -> Any:
    """`model` under PEFT: a method of `PEERS`, or `NOTEBOOK`."""
    from peft import LNTuningConfig, LoraConfig, get_peft_model

    config: Any
    if method == "LN_TUNING":
        config = LNTuningConfig(target_modules=norm_names(model))
    elif method == NOTEBOOK:
        config = LoraConfig(
            r=16,
            lora_alpha=16,
            lora_dropout=0.05,
            bias="none",
            target_modules="all-linear",
            task_type="CAUSAL_LM",
            modules_to_save=["lm_head", "embed_tokens"],
        )
    else:
        targets: Any = ["q_proj", "v_proj"] if "q,v" in method else "all-linear"
        config = LoraConfig(r=16, lora_alpha=16, target_modules=targets)
    return get_peft_model(model, config)  # type: ignore[arg-type]


def peft_step(model: Any, batch: dict[str, Tensor], learning_rate: float = 1e-4) -> TrainingStep:
    """A training step of the parameters that PEFT made trainable in `model`."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return TrainingStep(optimizer_step(lambda: model(**batch).loss, parameters, learning_rate), parameters)


def pack_nf4(model: nn.Module, names: Sequence[str]) -> None:
    """Replace linears by bitsandbytes' 4-bit ones, packed on the device they are on."""
    import bitsandbytes

    for name in names:
        linear: Any = model.get_submodule(name)
        packed = bitsandbytes.nn.Linear4bit(
            linear.in_features,
            linear.out_features,
            linear.bias is not None,
            compute_dtype=torch.bfloat16,
            compress_statistics=True,
            quant_type="nf4",
            device="meta",
        )
        packed.weight = bitsandbytes.nn.Params4bit(
            linear.weight.data, requires_grad=False, compress_statistics=True, quant_type="nf4"
        )
        packed.bias = linear.bias
        device = linear.weight.device
        linear.weight = None  # its memory is free as soon as the packed copy exists
        parent, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(parent), attribute, packed.to(device))
    free_memory()
