"""Random models of real shapes, built for Normtune and for stock transformers with PEFT.

`Shape` is the interface; `shape_llava` and `shape_miss` implement it, and `shapes` lists them by name.
"""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from peft import LNTuningConfig, LoraConfig, get_peft_model
from torch import nn

from normtune.data.groups import Group
from normtune.data.records import Dataset, Example
from normtune.models.family import Family
from normtune.models.norm_kinds import norms
from normtune.models.types import Pixels

PEERS = ("LN_TUNING", "LoRA r8 q,v", "LoRA r8 all-linear", "full")
NO_END_BIAS = -1.0e4  # bias of the end token's logit, so that no answer ends before its last allowed token

AnswerTokens = tuple[int, ...]  # the tokens of one answer


class Shape(ABC):
    """The dimensions of a model. Every `build_...` method returns a new model with random weights.

    Attributes:
        name: name of the shape on the command line and in the record.
        peers: the methods of PEFT that Normtune is compared with.
        words: the words of the data, sorted.
    """

    name: str
    peers: Sequence[str] = PEERS

    def __init__(self) -> None:
        self.words: list[str] = []

    def learn_words(self, texts: Sequence[str]) -> None:
        """Build the vocabulary from the words of the data, so that token counts are near the real ones."""
        words = {
            word for text in texts for word in "".join(char if char.isalnum() else " " for char in text.lower()).split()
        }
        self.words = sorted(words)

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """The dimensions, for the JSON record."""

    @abstractmethod
    def build_family(self) -> Family:
        """The model as Normtune's family."""

    @abstractmethod
    def build_pair(self) -> tuple[Family, nn.Module]:
        """(Normtune's family, transformers' model) with the same weights; their answers never end early."""

    @abstractmethod
    def build_peft(self, method: str) -> nn.Module:
        """Transformers' model with `method` of PEFT applied to it."""

    @abstractmethod
    def build_row(self, family: Family, example: Example, pixels: Pixels) -> Any:
        """One question, its answer and its own copy of the image's pixels, tokenised for transformers."""

    @abstractmethod
    def collate(self, rows: Sequence[Any]) -> dict[str, Any]:
        """The arguments of the model's `forward`: rows padded to one length, with labels."""

    @abstractmethod
    def question_batch(self, rows: Sequence[Any]) -> dict[str, Any]:
        """The arguments of the model's `generate`: the questions of rows, without their answers."""

    @abstractmethod
    def question_length(self, row: Any) -> int:
        """The number of tokens of a row's question."""

    @abstractmethod
    def answer_with_transformers(
        self, model: nn.Module, inputs: dict[str, Any], beams: int, tokens: int
    ) -> list[AnswerTokens]:
        """The answers of transformers' `generate`, one per row of `inputs`."""

    @abstractmethod
    def answer_with_normtune(
        self, family: Any, groups: Sequence[Group], pixels: Sequence[Sequence[Pixels]], beams: int, tokens: int
    ) -> list[AnswerTokens]:
        """The answers of Normtune's family, one per segment in the order of the groups."""

    def build_rows(self, family: Family, dataset: Dataset, examples: Sequence[Example]) -> list[Any]:
        """One row per example; each image is preprocessed once."""
        keys = dict.fromkeys(example.images[0] for example in examples)
        pixels = {key: family.preprocess_image(dataset.open_image(key)) for key in keys}
        return [self.build_row(family, example, pixels[example.images[0]]) for example in examples]

    def build_peer(
        self, method: str, dataset: Dataset, examples: Sequence[Example]
    ) -> tuple[nn.Module, list[Any], Any]:
        """(transformers' model under PEFT, one row per question, the function that collates rows)."""
        return self.build_peft(method), self.build_rows(self.build_family(), dataset, examples), self.collate


def apply_peft(model: nn.Module, method: str, queries_values: Sequence[str]) -> nn.Module:
    """Apply `method` to `model` as a user of PEFT does."""
    if method == "full":
        return model
    targets: Any = list(queries_values) if "q,v" in method else "all-linear"
    config: Any = LoraConfig(r=8, lora_alpha=16, target_modules=targets)
    if method == "LN_TUNING":
        config = LNTuningConfig(target_modules=list(norms(model)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT warns about every kind of norm that it trains
        return get_peft_model(model, config)  # type: ignore[arg-type]
