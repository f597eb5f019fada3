"""Any vision-language model of transformers that has no file here.

A conversation is what the model's own processor and chat template make of it. Questions of one image share its forward
pass only if `normtune.models.causal.self_test` has shown on a small copy of the model that this changes nothing.
Otherwise every question is one forward pass of transformers' model and every answer one call of its `generate`: slower,
but without assumptions about the model's masks, positions, layers or caches.
"""

from __future__ import annotations

import copy
import inspect
import re
from collections.abc import Collection, Sequence
from itertools import count
from typing import Any, NoReturn

import torch
from accelerate.utils import send_to_device
from PIL import Image
from torch import Tensor, nn
from transformers import AutoConfig
from transformers.generation.streamers import BaseStreamer
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING

from normtune.data.groups import Group, Segment
from normtune.errors import InputError
from normtune.models.answer_loss import Head
from normtune.models.causal.checkpoint_settings import SETTINGS, end_tokens
from normtune.models.causal.family import CausalFamily
from normtune.models.causal.image_features import FEATURES, flatten_features
from normtune.models.causal.prompts import TokenIds, template_options
from normtune.models.causal.self_test import run_self_test
from normtune.models.family import Family
from normtune.models.generation import Generated, OnTokens
from normtune.models.processors import load_processor
from normtune.models.types import AnswerStates, Batch, Pixels, SelfTest

TEXT = "text"  # key of an image's text, as bytes
TOKENS = "tokens_"  # prefix of the keys of values that a processor gives for each token, such as token_type_ids
CONVERSATIONS = "conversations"  # key of a batch without grouping
PROBE = Image.new("RGB", (64, 48), (128, 128, 128))


class GenericFamily(CausalFamily):
    """A model of a type that no other family loads.

    Args:
        grouped: whether questions of one image share its forward pass; None: the self-test decides.

    Attributes:
        self_test: its result.

    Raises:
        InputError: the model or its processor is of a kind that even single questions need code for.
    """

    def __init__(self, model: nn.Module, processor: Any, *, grouped: bool | None = None) -> None:
        self.config = model.config
        if getattr(self.config, "is_encoder_decoder", False):
            self._refuse("an encoder-decoder")
        for name in ("image_token", "chat_template"):
            if getattr(processor, name, None) is None:
                self._refuse(f"no {name.replace('_', ' ')}")
        self.image_text_end: tuple[str, str] = processor.image_token, ""
        self.processor, self.end_tokens = processor, end_tokens(model, processor.tokenizer)
        text = bytes(self._process(PROBE)[0][TEXT].tolist()).decode()
        special = {*processor.tokenizer.all_special_tokens, processor.image_token}
        special |= {token.content for token in processor.tokenizer.added_tokens_decoder.values() if token.special}
        tokens = [*re.finditer("|".join(map(re.escape, sorted(special, key=len, reverse=True))), text)]
        if not tokens:
            self._refuse("no special token in the text of an image")
        self.image_text_end = tokens[-1][0], text[tokens[-1].end() :]
        if grouped is None:
            self.self_test: SelfTest | None = run_self_test(type(self), model, processor)
            grouped = self.self_test.passed
        if grouped:
            super().__init__(model, processor)
        else:
            Family.__init__(self, model, processor)
            tokenizer = processor.tokenizer
            self.pad_id = self.end_tokens[0] if tokenizer.pad_token_id is None else tokenizer.pad_token_id
            self.prompts = self.prompt_format()
        self.grouped = self.shares_prefix = self.computes_batches = grouped  # type: ignore[misc]

    def _refuse(self, reason: str) -> NoReturn:
        raise InputError(
            f"model type '{self.config.model_type}' needs a family of its own, since it has {reason}. "
            "See CONTRIBUTING.md, 'Add a model family'."
        )

    @classmethod
    def load_processor(cls, source: str, model_type: str) -> Any:
        # a video processor needs torchvision, and is not used
        return load_processor(source, PROCESSOR_MAPPING.get(type(AutoConfig.for_model(model_type)), None), None)

    # --- one image, as the processor writes it ---------------------------------------------------------------

    @property
    def image_end(self) -> tuple[str, str]:
        return self.image_text_end

    def preprocess_image(self, image: Image.Image) -> Pixels:
        """What the processor makes of one image with a question, with the batch axis, and the text of the image.

        Raises:
            InputError: the processor's tokens are other ones than those of `prompts`.
        """
        pixels, ids = self._process(image)
        prefix = self.prompts.prefix([self.image_text(pixels)])
        if ids != prefix + self.prompts.segment("?", "?", None)[0]:
            raise InputError(
                f"the processor of model type '{self.config.model_type}' tokenises a conversation in another way than "
                "its chat template and its tokenizer, so that it needs a family of its own."
            )
        for name, values in pixels.items():
            if name.startswith(TOKENS) and not (values[:, len(prefix) :] == values[:, -1:]).all():
                raise InputError(f"the processor's {name.removeprefix(TOKENS)} differ within the text of a question.")
        return pixels

    def _process(self, image: Image.Image) -> tuple[Pixels, TokenIds]:
        """Let the processor write a conversation; returns the image's values and the tokens."""
        processor = copy.copy(self.processor)
        processor.tokenizer = recorder = _Recorder(processor.tokenizer)
        messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "?"}]}]
        text: str = self.processor.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True, **template_options(self.processor)
        )
        before, _, after = text.partition(processor.image_token)
        first = self.processor.tokenizer.bos_token
        made = processor(
            images=[image],
            text=[text],
            return_tensors="pt",
            add_special_tokens=not (first is not None and text.startswith(first)),
        )
        whole = recorder.text
        if not (whole.startswith(before) and whole.endswith(after) and len(whole) >= len(before) + len(after)):
            raise InputError(
                f"the processor of model type '{self.config.model_type}' changes the text around an image, so that it "
                "needs a family of its own."
            )
        ids = tuple(made.pop("input_ids")[0].tolist())
        made.pop("attention_mask", None)
        written = whole[len(before) : len(whole) - len(after)]
        pixels = {TEXT: torch.tensor([*written.encode()], dtype=torch.uint8)}
        for name, value in made.items():
            if isinstance(value, Tensor) and name not in getattr(self.processor, "unused_input_names", ()):
                pixels[(TOKENS if tuple(value.shape[:2]) == (1, len(ids)) else "") + name] = value
        return pixels, ids

    def image_text(self, pixels: Pixels) -> str:
        return bytes(pixels[TEXT].tolist()).decode()

    def image_inputs(self, images: Sequence[Pixels]) -> dict[str, Any]:
        """The values of each image by its number: images are encoded one by one."""
        return {str(number): _values(image) for number, image in enumerate(images)}

    def features(self, images: dict[str, Any]) -> dict[str, Tensor]:
        encode = self.model.base_model.get_image_features
        accepted = inspect.signature(encode).parameters
        parts = []
        for image in images.values():
            inputs = {name: self._as_input(value) for name, value in image.items() if name in accepted}
            output = encode(**inputs, return_dict=True)
            parts.append(flatten_features(getattr(output, "pooler_output", output)))
        return {FEATURES: torch.cat(parts)}

    def _as_input(self, value: Tensor) -> Tensor:
        return value.to(self.dtype) if value.is_floating_point() else value

    @property
    def decoder(self) -> Any:
        return self.model.get_decoder()

    @property
    def head(self) -> Head:
        """The head; without grouping the states are logits already."""
        head: Head = self.model.get_output_embeddings() if self.grouped else nn.Identity()
        return head

    def encode_images(self, images: Sequence[Pixels]) -> list[Pixels]:
        return super().encode_images(images) if self.grouped else list(images)

    def frozen_trunk(self, trained: Collection[nn.Parameter]) -> None:
        """None: the self-test does not skip layers."""

    # --- questions, each of them alone if they are not grouped -------------------------------------------------

    def group_prefixes(
        self, groups: Sequence[Group], pixels: Sequence[Sequence[Pixels]]
    ) -> tuple[Sequence[Group], list[TokenIds], Sequence[Sequence[Pixels]]]:
        if any(len(images) != 1 for images in pixels):
            raise InputError(
                f"model type '{self.config.model_type}' has no family of its own, and without one a question is about "
                "one image. Use data with one image a question, or add a family (CONTRIBUTING.md)."
            )
        return super().group_prefixes(groups, pixels)

    def collate(self, groups: Sequence[Group], pixels: Sequence[Sequence[Pixels]]) -> Batch:
        """See `CausalFamily.collate`; without grouping, `images` and `conversations` are the model's arguments."""
        if self.grouped:
            return super().collate(groups, pixels)
        _, prefixes, _ = self.group_prefixes(groups, pixels)
        conversations = []
        for number, group in enumerate(groups):
            conversations += [
                (number, self._conversation(prefixes[number], segment, pixels[number][0]), len(segment.answer))
                for segment in group.segments
            ]
        answers = [segment.answer for group in groups for segment in group.segments]
        return {
            "images": {str(number): _values(images[0]) for number, images in enumerate(pixels)},
            # keys: number of the question, its group, tokens of its answer
            CONVERSATIONS: {f"{number}.{group}.{length}": c for number, (group, c, length) in enumerate(conversations)},
            "labels": torch.tensor([token for answer in answers for token in answer], dtype=torch.long),
            "segment_index": torch.tensor([i for i, answer in enumerate(answers) for _ in answer], dtype=torch.long),
            "pairs": len(answers),
        }

    def _conversation(self, prefix: TokenIds, segment: Segment, image: Pixels) -> dict[str, Tensor]:
        """The arguments of the model that depend on the tokens, with the batch axis."""
        ids = torch.tensor([prefix + segment.prompt + segment.answer])
        tokens = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        for name, values in image.items():
            if name.startswith(TOKENS):  # the text after the image has one value
                text = values[:, -1:].expand(-1, ids.shape[1] - len(prefix), *values.shape[2:])
                tokens[name.removeprefix(TOKENS)] = torch.cat((values[:, : len(prefix)], text), 1)
        return tokens

    def _inputs(self, image: dict[str, Tensor], conversation: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: self._as_input(value) for name, value in (image | conversation).items()}

    def answer_states(self, batch: Batch) -> AnswerStates:
        """See `Family.answer_states`; without grouping, a forward pass of transformers' model for each question."""
        if self.grouped:
            return super().answer_states(batch)
        forward = inspect.signature(self.model.forward).parameters
        logits = []
        for key, conversation in batch[CONVERSATIONS].items():
            _, group, length = map(int, key.split("."))
            # the position before a token predicts it; the last token of an answer predicts nothing
            keep = {"logits_to_keep": length + 1} if "logits_to_keep" in forward else {}
            inputs = self._inputs(batch["images"][str(group)], conversation)
            if length:
                logits.append(self.model(**inputs, use_cache=False, **keep).logits[0, -length - 1 : -1])
        return AnswerStates(torch.cat(logits), batch["labels"], batch["segment_index"])

    @torch.inference_mode()
    def generate_tokens(
        self, groups: Sequence[Group], pixels: Sequence[Sequence[Pixels]], **options: Any
    ) -> list[Generated]:
        """See `Family.generate_tokens`; without grouping, by transformers' `generate`, an answer at a time."""
        if self.grouped:  # steps that are captured on CUDA are no part of the self-test
            return super().generate_tokens(groups, pixels, **options, cuda_graphs=False)
        beams, on_tokens = options.pop("beams"), options.pop("on_tokens", None)
        _, prefixes, _ = self.group_prefixes(groups, pixels)
        options |= {"do_sample": False, "num_beams": beams, "eos_token_id": [*self.end_tokens]}
        options |= {} if self.uses_checkpoint_settings else SETTINGS
        answers: list[Generated] = []
        for group, prefix, images in zip(groups, prefixes, pixels, strict=True):
            image = send_to_device(_values(images[0]), self.device)
            for segment in group.segments:
                tokens = send_to_device(self._conversation(prefix, segment, images[0]), self.device)
                streamer = _Streamer(on_tokens, len(answers)) if on_tokens is not None and beams == 1 else None
                written = self.model.generate(
                    **self._inputs(image, tokens),
                    **options,
                    pad_token_id=self.pad_id,
                    streamer=streamer,
                    output_scores=True,
                    return_dict_in_generate=True,
                )
                answers.append(self._generated(written, tokens["input_ids"].shape[1], beams))
        return answers

    def _generated(self, written: Any, prompt: int, beams: int) -> Generated:
        """An answer up to its end, and the mean log-probability of its tokens."""
        tokens = written.sequences[0, prompt:].tolist()
        length = next((n for n, token in zip(count(1), tokens, strict=False) if token in self.end_tokens), len(tokens))
        scores = self.model.compute_transition_scores(
            written.sequences, written.scores, getattr(written, "beam_indices", None), normalize_logits=beams == 1
        )
        return Generated(tuple(tokens[:length]), float(scores[0, :length].mean()))


def _values(image: Pixels) -> dict[str, Tensor]:
    """The values of an image that do not belong to a token."""
    return {name: value for name, value in image.items() if name != TEXT and not name.startswith(TOKENS)}


class _Recorder:
    """A tokenizer that remembers the text that it was called with."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer, self.text = tokenizer, ""

    def __getattr__(self, name: str) -> Any:
        return getattr(self.tokenizer, name)

    def __call__(self, text: Any, *args: Any, **options: Any) -> Any:
        (self.text,) = [text] if isinstance(text, str) else text
        return self.tokenizer(text, *args, **options)


class _Streamer(BaseStreamer):
    """Hands each token of an answer on, as `OnTokens` takes it."""

    def __init__(self, on_tokens: OnTokens, answer: int) -> None:
        self.on_tokens, self.answer, self.reads_prompt = on_tokens, answer, True

    def put(self, value: Tensor) -> None:
        if not self.reads_prompt:  # `generate` begins with the prompt
            self.on_tokens([self.answer], value.tolist())
        self.reads_prompt = False

    def end(self) -> None:
        pass
