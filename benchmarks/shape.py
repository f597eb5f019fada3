"""A random model of a real shape, as Normtune and as stock transformers with PEFT hold it."""

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
from normtune.models.parts import norms
from normtune.models.types import Pixels

PEERS = ("LN_TUNING", "LoRA r8 q,v", "LoRA r8 all-linear", "full")
NEVER = -1.0e4  # bias of the end token: no answer ends before its last token

Written = tuple[int, ...]  # the tokens of one answer


class Shape(ABC):
    """One model's dimensions; `family`, `tuned` and `twins` build it anew, with random weights."""

    name: str
    peers: Sequence[str] = PEERS

    def __init__(self) -> None:
        self.words: list[str] = []

    def learn_words(self, texts: Sequence[str]) -> None:
        """The vocabulary: the words of the data, so that lengths in tokens are near the real ones."""
        found = {
            w for text in texts for w in "".join(c if c.isalnum() else " " for c in text.lower()).split()
        }
        self.words = sorted(found)

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """The dimensions, for the record."""

    @abstractmethod
    def family(self) -> Family:
        """Normtune's model."""

    @abstractmethod
    def twins(self) -> tuple[Family, nn.Module]:
        """Normtune's model and transformers', of the same weights, whose answers never end by themselves."""

    @abstractmethod
    def tuned(self, method: str) -> nn.Module:
        """Transformers' model under PEFT."""

    @abstractmethod
    def row(self, family: Family, example: Example, pixels: Pixels) -> Any:
        """One question with its answer and its own copy of the image."""

    @abstractmethod
    def collate(self, rows: Sequence[Any]) -> dict[str, Any]:
        """Rows padded to one length, as the model's `forward` takes them."""

    @abstractmethod
    def asked(self, rows: Sequence[Any]) -> dict[str, Any]:
        """The questions of rows alone, as the model's `generate` takes them."""

    @abstractmethod
    def question_tokens(self, row: Any) -> int:
        """The length of a row's question."""

    @abstractmethod
    def generated(self, model: nn.Module, inputs: dict[str, Any], beams: int, tokens: int) -> list[Written]:
        """What transformers' `generate` answers."""

    @abstractmethod
    def written(
        self,
        family: Any,
        groups: Sequence[Group],
        pixels: Sequence[Sequence[Pixels]],
        beams: int,
        tokens: int,
    ) -> list[Written]:
        """What Normtune's model answers, one a segment in the order given."""

    def rows(self, family: Family, dataset: Dataset, examples: Sequence[Example]) -> list[Any]:
        """Every example as a row; an image is processed once."""
        keys = dict.fromkeys(example.images[0] for example in examples)
        pixels = {key: family.preprocess_image(dataset.open_image(key)) for key in keys}
        return [self.row(family, example, pixels[example.images[0]]) for example in examples]

    def peer(
        self, method: str, dataset: Dataset, examples: Sequence[Example]
    ) -> tuple[nn.Module, list[Any], Any]:
        """Transformers' model under PEFT, one row a question, and the collator that pads them."""
        return self.tuned(method), self.rows(self.family(), dataset, examples), self.collate


def tuned_by_peft(model: nn.Module, method: str, queries_values: Sequence[str]) -> nn.Module:
    """`model` as a user of PEFT sets it up."""
    if method == "full":
        return model
    targets: Any = list(queries_values) if "q,v" in method else "all-linear"
    config: Any = LoraConfig(r=8, lora_alpha=16, target_modules=targets)
    if method == "LN_TUNING":
        config = LNTuningConfig(target_modules=list(norms(model)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT warns of every kind of norm that it is told to train
        return get_peft_model(model, config)  # type: ignore[arg-type]
