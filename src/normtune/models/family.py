"""What every model family answers: how images and questions enter, what the loss is, how it answers.

A family is one file in this folder. `normtune.models.loading.load` picks it by the `model_type` of the config.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import torch
from PIL import Image
from torch import Tensor, nn

from normtune.data.groups import Group, Segment
from normtune.models.answer_loss import Head, answer_log_probs, answer_loss
from normtune.models.generation import Generated, OnTokens
from normtune.models.types import Answer, AnswerStates, Batch, Pixels

if TYPE_CHECKING:
    from normtune.models.frozen_trunk import FrozenTrunk


class UnitSelector(Protocol):
    """Keeps track of which text rows of a batch are still active while answers are generated."""

    def select(self, units: Tensor) -> None:
        """Keep only these units, in this order: [units] long."""


class Family(ABC):
    """A model with its processor, seen through the five verbs that training and evaluation need."""

    model_types: ClassVar[tuple[str, ...]]  # the config.model_type values that this family loads
    active_text_rows: UnitSelector | None = (
        None  # set where the text norms hold several adapters (adapters.multi)
    )
    shares_prefix: ClassVar[bool] = True  # whether `prefix_tokens` stand once a group, not once a segment

    def __init__(self, model: nn.Module, processor: Any) -> None:
        self.model = model
        self.processor = processor

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @classmethod
    @abstractmethod
    def load(
        cls,
        source: str | Path,
        dtype: torch.dtype,
        device: str | torch.device = "cpu",
        *,
        quantization: Any = None,
    ) -> Family:
        """Load model and processor from a local directory or a hub name, in eval mode.

        `quantization` is transformers' config of it; linears are quantised while they are read.
        """

    @classmethod
    @abstractmethod
    def load_processor(cls, source: str, model_type: str) -> Any:
        """The processor alone."""

    @abstractmethod
    def preprocess_image(self, image: Image.Image) -> Pixels:
        """Process one RGB image."""

    def encode_image(self, pixels: Pixels) -> Pixels:
        """What the image encoder makes of one image, for `collate` to take in place of its pixels.

        Held by a run whose image encoder is frozen, and computed once. A family that cannot gives the pixels.
        """
        return pixels

    def frozen_trunk(self, trained: Collection[nn.Parameter]) -> FrozenTrunk | None:
        """What lies below everything that is trained; None where nothing does or a family cannot tell."""
        return None

    @abstractmethod
    def prefix_tokens(self, images: Sequence[Pixels]) -> int:
        """How many tokens a group of these images computes besides its segments; no features are computed."""

    @abstractmethod
    def tokenize(self, id: str, question: str, answer: str | None, *, report: bool = False) -> Segment:
        """Tokenise one question; with `answer=None` the segment ends where the model is to write.

        With `report=True` the answer is a report: its own length limit, and `question` may be empty (the
        family's report prompt is used).
        """

    @abstractmethod
    def collate(self, groups: Sequence[Group], pixels: Sequence[Sequence[Pixels]]) -> Batch:
        """Tensors for a training or scoring step; `pixels[g]` are the processed images of group g.

        Every segment sees its group's images and itself, never its siblings: loss and gradients equal
        those of the same segments in groups of one.
        """

    @property
    @abstractmethod
    def head(self) -> Head:
        """States [N, width] -> logits [N, vocabulary]."""

    @property
    @abstractmethod
    def vocabulary(self) -> int:
        """How many tokens there are."""

    @property
    def max_answer_tokens(self) -> int | None:
        """How many tokens an answer can have; None where the model sets no bound."""
        return None

    @abstractmethod
    def answer_states(self, batch: Batch) -> AnswerStates:
        """The model up to its head."""

    @abstractmethod
    def text_segments(self, batch: Batch) -> Tensor:
        """[units] long: a segment of each unit of text that norms are given, in their order.

        A unit is what belongs to one group alone: a row of tokens, or a token where one row holds all groups.
        """

    def loss(self, batch: Batch, *, label_smoothing: float = 0.0) -> tuple[Tensor, Tensor]:
        """(sum of the answer tokens' cross-entropies, number of answer tokens), both scalar tensors."""
        states, labels, _ = self.answer_states(batch)
        summed = answer_loss(
            self.head, states, labels, vocabulary=self.vocabulary, label_smoothing=label_smoothing
        )
        return summed, torch.tensor(len(labels), device=summed.device)

    def log_probs(self, batch: Batch) -> Tensor:
        """Sum of the answer tokens' log-probabilities, one a segment in the order given: [segments]."""
        states, labels, segments = self.answer_states(batch)
        each = answer_log_probs(self.head, states, labels, vocabulary=self.vocabulary)
        return each.new_zeros(batch["pairs"]).index_add(0, segments, each)

    @abstractmethod
    def generate_answers(
        self,
        groups: Sequence[Group],
        pixels: Sequence[Sequence[Pixels]],
        *,
        max_new_tokens: int = 16,
        beams: int = 1,
        on_tokens: OnTokens | None = None,
    ) -> list[list[Answer]]:
        """Answers for groups whose segments have no answer; `result[g][s]` is for segment s of group g.

        The images of a group are computed once and shared by its segments. `texts`, where it is set, follows
        the rows that go on. `on_tokens` is told of tokens as they are chosen, segments being counted over all
        groups in the order given; with several beams it is told nothing.
        """

    def decode_answer(self, tokens: Sequence[int]) -> str:
        """The text of an answer's tokens, as `answer` gives it."""
        text: str = self.processor.tokenizer.decode(tokens, skip_special_tokens=True)
        return text.strip()

    def _as_answers(self, groups: Sequence[Group], written: Iterable[Generated]) -> list[list[Answer]]:
        """What was written, one a segment in the order of the groups, as answers."""
        each = (Answer(self.decode_answer(one.tokens), one.score) for one in written)
        return [[next(each) for _ in group.segments] for group in groups]

    def save(self, directory: str | Path) -> None:
        """Write model and processor in the layout that `load` reads."""
        self.model.save_pretrained(directory)  # type: ignore[operator]
        self.processor.save_pretrained(directory)
