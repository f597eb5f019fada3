"""The family of MISS and BLIP-VQA: a vision tower, a question encoder and an answer decoder.

An image is encoded once. Each question attends to it in the encoder, and the decoder reads the states of the
question only, so no grouping mask is needed here: `image_index` assigns an image to each question.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from itertools import chain
from typing import Any

import torch
from accelerate.utils import send_to_device
from PIL import Image
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import BlipImageProcessorPil, BlipProcessor

from normtune.data import tasks
from normtune.data.groups import Group, Segment
from normtune.data.records import History
from normtune.errors import InputError
from normtune.models.answer_loss import Head
from normtune.models.family import Family
from normtune.models.frozen_trunk import FrozenTrunk, TrunkStates, parameter_ids
from normtune.models.generation import Generated
from normtune.models.miss.config import MissConfig
from normtune.models.miss.model import MissForQuestionAnswering
from normtune.models.miss.tokenizer import ENCODE
from normtune.models.types import AnswerStates, Batch, Pixels

NO_LABEL = -100  # the label of positions without a token to predict, as in transformers


class MissFamily(Family):
    """MISS in our own implementation. Answers end with [SEP]; only the decoder's input begins with [DEC]."""

    model_class = MissForQuestionAnswering
    old_prompt_limit = 35  # Chen et al. 2024
    model: MissForQuestionAnswering

    @classmethod
    def load_processor(cls, source: str, model_type: str) -> Any:
        return BlipProcessor.from_pretrained(source)

    def __init__(self, model: MissForQuestionAnswering, processor: Any) -> None:
        super().__init__(model, processor)
        self.end_tokens = (model.config.eos_token_id,)

    @property
    def config(self) -> MissConfig:
        return self.model.config

    def preprocess_image(self, image: Image.Image) -> Pixels:
        """Resize one image to the model's square: `pixel_values` [3, size, size]."""
        prepared = self.processor.image_processor(image, return_tensors="pt")
        return {"pixel_values": prepared["pixel_values"][0]}

    @torch.no_grad()
    def encode_images(self, images: Sequence[Pixels]) -> list[Pixels]:
        """Run the vision tower: `image_states` [1 + patches, width] of each image."""
        pixels = torch.stack([image["pixel_values"] for image in images]).to(self.device)
        # a view would keep the states of all images in memory
        return [{"image_states": states.clone()} for states in self.model.visual_encoder(pixels).cpu()]

    def prefix_tokens(self, images: Sequence[Pixels]) -> int:
        """The number of image states: 1 + patches an image."""
        return len(images) * self.model.visual_encoder.pos_embed.shape[1]

    @property
    def prompt_template(self) -> str:
        return f"{ENCODE} {{question}} [SEP]"

    def tokenize_whole(self, id: str, question: str, answer: str | None, history: History = ()) -> Segment:
        """Tokenise to [ENC] question [SEP] and answer [SEP]; an empty question is replaced by the report prompt."""
        self.refuse_history(id, history)
        end = self.config.eos_token_id
        prompt = (self.config.encode_token_id, *self._tokens(question or tasks.REPORT_PROMPT), end)
        return Segment(id, prompt, () if answer is None else (*self._tokens(answer), end))

    @property
    def max_prompt_tokens(self) -> int:
        """The question encoder's positions, or `prompt_limit` if it is set."""
        positions: int = self.config.text("encoder").max_position_embeddings
        return min(positions, self.prompt_limit or positions)

    def max_reference_tokens(self, report: bool) -> int:
        """See `Family.max_reference_tokens`; answers to questions may fill all positions."""
        return super().max_reference_tokens(report) if report else self.max_answer_tokens

    def _tokens(self, text: str) -> list[int]:
        # split_special_tokens: a "[SEP]" in a text is plain text, not the end token
        tokens: list[int] = self.processor.tokenizer(
            text, add_special_tokens=False, split_special_tokens=True
        ).input_ids
        return tokens

    def collate(self, groups: Sequence[Group], pixels: Sequence[Sequence[Pixels]]) -> Batch:
        """See `Family.collate`.

        Returns:
            The arguments of the model's `forward`, and further keys:

            - pixel_values [images, 3, size, size], or image_states from `encode_image`; each image once;
            - input_ids, attention_mask [segments, longest question] of the questions;
            - image_index, a list: the image (or study) of each question;
            - view_index, a list for each study: its images, -1 for none; only with several a study;
            - decoder_input_ids, labels [segments, longest answer] of the answers;
            - logit_rows, the rows of the flattened decoder states that have a label;
            - pairs, the number of segments.
        """
        segments = [segment for group in groups for segment in group.segments]
        return self._questions(groups, pixels) | self._answers(segments)

    def _answers(self, segments: Sequence[Segment]) -> Batch:
        """The decoder's inputs and labels: the answers, the inputs shifted right by the start token."""
        start = self.config.bos_token_id
        inputs = [torch.tensor((start, *segment.answer[:-1])) for segment in segments]
        answers = [torch.tensor(segment.answer) for segment in segments]
        labels = pad_sequence(answers, True, NO_LABEL)
        return {
            "decoder_input_ids": pad_sequence(inputs, True, self.config.pad_token_id),
            "labels": labels,
            "logit_rows": (labels.flatten() != NO_LABEL).nonzero()[:, 0],
            "pairs": len(segments),
        }

    def _questions(self, groups: Sequence[Group], pixels: Sequence[Sequence[Pixels]]) -> Batch:
        """The inputs of vision tower and encoder, without the answers."""
        segments = [segment for group in groups for segment in group.segments]
        # the same object in several groups is encoded once
        distinct = {id(image): image for image in chain.from_iterable(pixels)}
        group_views = [tuple(id(image) for image in images) for images in pixels]
        study = {views: number for number, views in enumerate(dict.fromkeys(group_views))}
        images = list(distinct.values())
        batch: Batch = {
            **{name: torch.stack([image[name] for image in images]) for name in images[0]},
            **self._prompts(segments),
            # lists stay on the host, where the encoder counts the questions of each image
            "image_index": [
                study[views] for views, group in zip(group_views, groups, strict=True) for _ in group.segments
            ],
        }
        most = max(map(len, study))  # views of a study
        if most > 1:
            image_number = {image_id: number for number, image_id in enumerate(distinct)}
            batch["view_index"] = [[image_number[i] for i in views] + [-1] * (most - len(views)) for views in study]
        return batch

    def _prompts(self, segments: Sequence[Segment]) -> Batch:
        """The questions' tokens, padded on the right; without padding the mask is None."""
        lengths = torch.tensor([len(segment.prompt) for segment in segments])
        ids = pad_sequence([torch.tensor(s.prompt) for s in segments], True, self.config.pad_token_id)
        padded = bool((lengths != lengths[0]).any())
        mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long() if padded else None
        return {"input_ids": ids, "attention_mask": mask}

    def frozen_trunk(self, trained: Collection[nn.Parameter]) -> FrozenTrunk | None:
        """Vision tower and encoder, if only the decoder is trained."""
        decoder = parameter_ids(self.model.text_decoder)
        return MissTrunk(self) if all(id(parameter) in decoder for parameter in trained) else None

    @property
    def head(self) -> Head:
        return self.model.text_decoder.cls

    @property
    def vocabulary(self) -> int:
        return self.config.vocab_size

    @property
    def max_answer_tokens(self) -> int:
        """See `Family.max_answer_tokens`; the start token uses the first position."""
        return self.config.text("decoder").max_position_embeddings - 1

    def answer_states(self, batch: Batch) -> AnswerStates:
        """See `Family.answer_states`."""
        inputs: dict[str, Any] = {
            name: value for name, value in batch.items() if name not in ("labels", "pairs", "logit_rows")
        }
        states = self.model.answer_states(**inputs).flatten(0, 1)
        rows, labels = batch["logit_rows"], batch["labels"]
        selected = states.index_select(0, rows), labels.flatten().index_select(0, rows)
        return AnswerStates(*selected, rows // labels.shape[1])  # a row of labels is a segment

    @torch.inference_mode()
    def generate_tokens(
        self, groups: Sequence[Group], pixels: Sequence[Sequence[Pixels]], *, max_new_tokens: int, **options: Any
    ) -> list[Generated]:
        """See `Family.generate_tokens`; all questions of all groups are one batch."""
        positions = self.config.text("decoder").max_position_embeddings
        if max_new_tokens >= positions:
            raise InputError(f"answers of {max_new_tokens} tokens exceed this model's {positions}. Lower the limit.")
        batch: Batch = {
            name: value.to(self.device) if isinstance(value, Tensor) else value
            for name, value in self._questions(groups, pixels).items()
        }
        on_select = None if self.active_text_rows is None else self.active_text_rows.select
        return self.model.generate(max_new_tokens=max_new_tokens, on_select=on_select, **options, **batch)


class MissTrunk(FrozenTrunk):
    """The vision tower and the question encoder; only the decoder comes after them."""

    description = "question states, which the decoder reads"
    excluded_modules = ("text_decoder",)

    def __init__(self, family: MissFamily) -> None:
        self.family = family

    def tokens_of(self, segment: Segment) -> tuple[int, ...]:
        """The prompt only: answers enter the decoder."""
        return segment.prompt

    @torch.no_grad()
    def states(self, group: Group, images: Sequence[Pixels]) -> TrunkStates:
        batch = send_to_device(self.family._questions([group], [images]), self.family.device)
        encoded = self.family.model.encode_questions(**batch).cpu()  # [segments, longest question, width]
        rows = [states[: len(segment.prompt)] for segment, states in zip(group.segments, encoded, strict=True)]
        # no images and no prefix: the decoder reads the questions' states only
        return TrunkStates((), encoded.new_zeros(0, encoded.shape[-1]), tuple(rows))

    def collate(self, groups: Sequence[Group], states: Sequence[TrunkStates]) -> Batch:
        segments = [segment for group in groups for segment in group.segments]
        rows = [question for group_states in states for question in group_states.segments]
        return {
            **self.family._prompts(segments),
            **self.family._answers(segments),
            "question_states": pad_sequence(rows, True),
        }


def miss_processor(tokenizer: Any, image_size: int, *, divide_twice: bool = False) -> BlipProcessor:
    """The processor of a MISS model: bicubic resize to a square, /255, then BLIP's mean and deviation.

    With `divide_twice` images are prepared as in MISS's released code: divided by 255 twice and not
    normalised, for checkpoints that were trained with such images.
    """
    size = {"height": image_size, "width": image_size}
    if divide_twice:
        images = BlipImageProcessorPil(size=size, rescale_factor=1 / 255**2, do_normalize=False)
    else:
        images = BlipImageProcessorPil(size=size)
    assert tokenizer.convert_tokens_to_ids(ENCODE) != tokenizer.unk_token_id, "a tokenizer with [ENC]"
    return BlipProcessor(images, tokenizer)
