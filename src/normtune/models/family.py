"""The interface that every model family implements: preprocess, tokenise, collate, loss, generate.

Each family is one file in `models/families/`. `normtune.models.loading.load` chooses it by the `model_type`
of the checkpoint's config.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, Self

import torch
from PIL import Image
from torch import Tensor, nn

from normtune.data import tasks
from normtune.data.choices import ChoiceFormat
from normtune.data.groups import Group, Segment
from normtune.data.records import Example, History
from normtune.errors import InputError
from normtune.models.answer_loss import Head, answer_loss
from normtune.models.generation import Generated, OnTokens
from normtune.models.image_budget import limited_settings
from normtune.models.types import Answer, AnswerStates, Batch, FinishReason, Pixels, SelfTest

if TYPE_CHECKING:
    from normtune.models.frozen_trunk import FrozenTrunk


class TextRowSelector(Protocol):
    """Keeps track of the text rows of a batch that are still active while answers are generated."""

    def select(self, units: Tensor) -> None:
        """Keep only these text rows, in this order: [rows] long.

        A text row is the largest piece of a norm's input that belongs to a single group: a row of tokens, or
        a single token if all groups are in one row.
        """


class Family(ABC):
    """A model with its processor, and the operations that training and evaluation need.

    A training step: `preprocess_image` and `tokenize` each example, `collate` groups of them into a batch,
    then `loss`. Scoring uses `log_probs` in place of `loss`, and `generate_answers` makes its own batches.
    """

    model_class: ClassVar[Any]  # the class of transformers that reads their checkpoints
    # set while the norms of text parts hold several adapters (`normtune.adapters.multi`)
    active_text_rows: TextRowSelector | None = None
    # whether answers follow the checkpoint's generation_config.json; otherwise they are plain greedy or beam search
    uses_checkpoint_settings: bool = True
    # whether the tokens that `prefix_tokens` counts are computed once a group, not once a segment
    shares_prefix: ClassVar[bool] = True
    # whether the text rows of a batch are computed together; otherwise each question is computed alone
    computes_batches: bool = True
    self_test: SelfTest | None = None  # of grouping; only the generic family has one
    end_tokens: tuple[int, ...]  # the tokens that end an answer
    source: str = ""  # the directory or hub name that the model was loaded from
    quantize: str | None = None  # int8 or nf4: the model was quantised when it was loaded
    _adapter: Any = None
    prompt_limit: int | None = None  # tokens of a question; lower than the model's own limit
    choices: ChoiceFormat = ChoiceFormat()  # how questions with options are read and trained
    max_pixels: int | None = None  # of an image; None: the model's own limit (see `use_max_pixels`)
    _image_settings: dict[str, Any] | None = None  # of the image processor, before `use_max_pixels` changed them
    old_prompt_limit: ClassVar[int | None] = None  # of adapters that record no limits

    @property
    def prompt_template(self) -> str:
        """The prompt of a question about one image as text, with `{question}` in the place of the question."""
        return "{question}"

    def refuse_history(self, id: str, history: History) -> None:
        """Raise an `InputError` if there are earlier turns, for families that read one question."""
        if history:
            raise InputError(
                f"example {id}: it has earlier turns, but {type(self).__name__} reads one question without a "
                "conversation. Leave out the earlier turns (--history), or choose a model with a chat template."
            )

    def __init__(self, model: nn.Module, processor: Any) -> None:
        self.model = model
        self.processor = processor

    @property
    def adapter(self) -> Any:
        """The `TunedModel` that changes the model now; None: the model is the base."""
        return self._adapter if self._adapter is not None and self._adapter.active else None

    @adapter.setter
    def adapter(self, tuned: Any) -> None:
        self._adapter = tuned

    def self_test_record(self) -> dict[str, Any]:
        """`{"self_test": ...}` for files of results; empty for families that need no self-test."""
        return {} if self.self_test is None else {"self_test": asdict(self.self_test)}

    def __repr__(self) -> str:
        parameters = sum(parameter.numel() for parameter in self.model.parameters())
        adapter = f", adapter {self.adapter.recipe}" if self.adapter is not None else ""
        return f"<{type(self).__name__} {self.source}: {parameters:,} parameters on {self.device}{adapter}>"

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the base's weights; trained values are fp32 in any."""
        dtype: torch.dtype = self.model.dtype  # type: ignore[assignment]
        return dtype

    @classmethod
    def load(
        cls, source: str | Path, dtype: torch.dtype, device: str | torch.device = "cpu", *, quantization: Any = None
    ) -> Self:
        """Load model and processor, in eval mode.

        Args:
            source: a local directory or a hub name.
            dtype: the dtype of the weights.
            device: where the model is put.
            quantization: a quantisation config of transformers; linears are quantised while they are read.
        """
        options: dict[str, Any] = {}
        if quantization is not None:
            options = {"quantization_config": quantization, "device_map": {"": torch.device(device)}}
        model = cls.model_class.from_pretrained(str(source), dtype=dtype, **options)
        model = model.to(device) if quantization is None else model
        return cls(model.eval(), cls.load_processor(str(source), model.config.model_type))

    @classmethod
    @abstractmethod
    def load_processor(cls, source: str, model_type: str) -> Any:
        """Load the processor without the model."""

    @abstractmethod
    def preprocess_image(self, image: Image.Image) -> Pixels:
        """Resize and normalise one RGB image as the model expects it."""

    def encode_image(self, pixels: Pixels) -> Pixels:
        """Run the image encoder on one image; see `encode_images`."""
        return self.encode_images([pixels])[0]

    def encode_images(self, images: Sequence[Pixels]) -> list[Pixels]:
        """Run the image encoder on images in one pass; `collate` takes the results, on the CPU, in place of pixels.

        A run with a frozen image encoder does this once an image. Families that do not support it return the
        pixels unchanged.
        """
        return list(images)

    def frozen_trunk(self, trained: Collection[nn.Parameter]) -> FrozenTrunk | None:
        """The part of the model before everything that is trained.

        None if there is no such part, or if the family does not support it.
        """
        return None

    @abstractmethod
    def prefix_tokens(self, images: Sequence[Pixels]) -> int:
        """The number of tokens that a group of these images has besides its segments.

        No features are computed for it.
        """

    @abstractmethod
    def tokenize_whole(self, id: str, question: str, answer: str | None, history: History = ()) -> Segment:
        """Tokenise one question and its answer without any limit; the answer ends with the end token.

        Args:
            id: the example's id.
            question: the question; if it is empty, the report prompt is used.
            answer: the reference answer; None if the model is to write it.
            history: the earlier turns of the conversation; their tokens are the beginning of the segment's prompt.

        Raises:
            InputError: there is a history, but the family has no conversations of several turns.
        """

    def tokenize(
        self, id: str, question: str, answer: str | None, *, report: bool = False, history: History = ()
    ) -> Segment:
        """Tokenise one question, cut at the model's limits.

        A question that is too long keeps its last token, the end of the prompt. An answer that is too long loses
        its end token, so that the model does not learn to stop in the middle of a sentence.

        Args:
            id, question, answer, history: as for `tokenize_whole`.
            report: whether the answer is a report; reports and answers have different length limits.
        """
        whole = self.tokenize_whole(id, question, answer, history)
        longest, prompt = self.max_prompt_tokens, whole.prompt
        if longest is not None and len(prompt) > longest:
            prompt = (*prompt[: longest - 1], prompt[-1])
        return Segment(id, prompt, whole.answer[: self.max_reference_tokens(report)])

    def tokenize_example(self, example: Example, answer: str | None) -> Segment:
        """Tokenise the question of an example with its options, earlier turns and an answer; see `tokenize`."""
        question = self.choices.question(example)
        return self.tokenize(example.id, question, answer, report=example.kind == "report", history=example.history)

    def question_tokens_cut(self, segment: Segment, question: str, history: History = ()) -> int:
        """The number of tokens at a question's end that `tokenize` left out of its segment."""
        if len(segment.prompt) != self.max_prompt_tokens:
            return 0
        return len(self.tokenize_whole(segment.id, question, None, history).prompt) - len(segment.prompt)

    def use_limits(self, limits: Mapping[str, Any] | None) -> None:
        """Cut texts as an adapter's training did.

        Args:
            limits: the limits that the adapter's file records; None if it is older than these.
        """
        self.prompt_limit = self.old_prompt_limit if limits is None else limits.get("prompt")

    def use_training_texts(self, data: Mapping[str, Any] | None) -> None:
        """Read texts and images as an adapter's training did: with its limits and its prompt of options.

        Args:
            data: the field `data` of the adapter's file.
        """
        limits = (data or {}).get("limits")
        self.use_limits(limits)
        self.choices = ChoiceFormat(**(data or {}).get("choices", {}))
        if limits and limits.get("max_pixels") is not None:  # otherwise a limit that the family has stays
            self.use_max_pixels(limits["max_pixels"])

    def use_max_pixels(self, max_pixels: int | None) -> None:
        """Read at most this many pixels of an image, which takes fewer tokens; None: the limit of the model.

        Raises:
            InputError: see `normtune.models.image_budget.limited_settings`.
        """
        if max_pixels == self.max_pixels:
            return
        config, images = self.model.config, self.processor.image_processor
        model_type = str(config.model_type)  # type: ignore[union-attr]
        if self._image_settings is None:
            self._image_settings = limited_settings(images, model_type, None)
        for name, value in self._image_settings.items():  # the limit counts from the model's own settings
            setattr(images, name, value)
        settings = self._image_settings if max_pixels is None else limited_settings(images, model_type, max_pixels)
        for name, value in settings.items():
            setattr(images, name, value)
            if name in config.to_dict():  # type: ignore[operator,union-attr]  # the model reads the grids of tiles too
                setattr(config, name, value)
        self.max_pixels = max_pixels

    @contextmanager
    def pixel_limit(self, max_pixels: int | None) -> Iterator[None]:
        """Use a limit of pixels inside the block, and the present one afterwards; None changes nothing.

        Raises:
            InputError: see `use_max_pixels`.
        """
        before = self.max_pixels
        if max_pixels is not None:
            self.use_max_pixels(max_pixels)
        try:
            yield
        finally:
            self.use_max_pixels(before)

    @property
    def max_prompt_tokens(self) -> int | None:
        """The largest number of tokens in a question with its frame; None if the model sets no limit."""
        return None

    def max_reference_tokens(self, report: bool) -> int:
        """The largest number of tokens of a reference in training, with its end token."""
        limit = tasks.MAX_REPORT_REFERENCE_TOKENS if report else tasks.MAX_ANSWER_REFERENCE_TOKENS
        return min(limit, self.max_answer_tokens or limit)

    @abstractmethod
    def collate(self, groups: Sequence[Group], pixels: Sequence[Sequence[Pixels]]) -> Batch:
        """Make the tensors of a training or scoring step.

        Every segment sees its group's images and itself, never the group's other segments: loss and
        gradients equal those of the same segments in groups of one.

        Args:
            groups: images with their questions and answers.
            pixels: `pixels[g]` are the preprocessed (or encoded) images of group g.
        """

    @property
    @abstractmethod
    def head(self) -> Head:
        """The head: hidden states [N, width] -> logits [N, vocabulary]."""

    @property
    @abstractmethod
    def vocabulary(self) -> int:
        """The number of tokens in the vocabulary."""

    @property
    def max_answer_tokens(self) -> int | None:
        """The largest number of tokens in an answer; None if the model sets no limit."""
        return None

    @abstractmethod
    def answer_states(self, batch: Batch) -> AnswerStates:
        """Run the model up to its head: the states that predict the answer tokens."""

    def loss(self, batch: Batch, *, label_smoothing: float = 0.0) -> tuple[Tensor, Tensor]:
        """(sum of the answer tokens' cross-entropies, number of answer tokens), both scalar tensors.

        A sum, and not a mean, so that batches and processes can be weighted by their answer tokens.
        """
        states, labels, _ = self.answer_states(batch)
        loss_sum = answer_loss(self.head, states, labels, vocabulary=self.vocabulary, label_smoothing=label_smoothing)
        # filled on the device: a copy from the host would wait for it
        return loss_sum, torch.full((), len(labels), device=loss_sum.device)

    def log_probs(self, batch: Batch) -> Tensor:
        """The log-probability of each segment's answer, in the order given: [segments]."""
        states, labels, segments = self.answer_states(batch)
        losses = answer_loss(self.head, states, labels, vocabulary=self.vocabulary, reduction="none")  # [N]
        # sum over the tokens of each segment; a segment without an answer has 0
        return losses.new_zeros(batch["pairs"]).index_add(0, segments, -losses)

    def generate_answers(
        self,
        groups: Sequence[Group],
        pixels: Sequence[Sequence[Pixels]],
        *,
        max_new_tokens: int = 16,
        beams: int = 1,
        on_tokens: OnTokens | None = None,
    ) -> list[list[Answer]]:
        """Generate answers; `result[g][s]` is the answer to segment s of group g.

        The images of a group are computed once and shared by its segments.

        Args:
            groups: groups of segments without answers.
            pixels: `pixels[g]` are the preprocessed (or encoded) images of group g.
            max_new_tokens: the largest number of tokens in an answer, end token included.
            beams: 1 is greedy search.
            on_tokens: called with each step's tokens, segments being counted over all groups in the order
                given; with several beams it is never called.
        """
        tokens = self.generate_tokens(groups, pixels, max_new_tokens=max_new_tokens, beams=beams, on_tokens=on_tokens)
        answers = map(self._as_answer, tokens)
        return [[next(answers) for _ in group.segments] for group in groups]

    @abstractmethod
    def generate_tokens(
        self,
        groups: Sequence[Group],
        pixels: Sequence[Sequence[Pixels]],
        *,
        max_new_tokens: int,
        beams: int,
        on_tokens: OnTokens | None = None,
    ) -> list[Generated]:
        """The tokens of each answer, one a segment in the order given; arguments as for `generate_answers`."""

    def _as_answer(self, generated: Generated) -> Answer:
        reason: FinishReason = "stop" if generated.tokens[-1] in self.end_tokens else "length"
        return Answer(self.decode_answer(generated.tokens), generated.score, reason, generated.tokens)

    def generation_settings(self) -> dict[str, Any]:
        """The settings of the checkpoint's generation_config.json that change answers, by name."""
        return {}

    def decode_answer(self, tokens: Sequence[int]) -> str:
        """The text of an answer's tokens, as in the results of `generate_answers`."""
        text: str = self.processor.tokenizer.decode(tokens, skip_special_tokens=True)
        return text.strip()

    def save(self, directory: str | Path) -> None:
        """Write model and processor in the layout that `load` reads."""
        self.model.save_pretrained(directory)  # type: ignore[operator]
        self.processor.save_pretrained(directory)
