"""A random model of a real shape, as Normtune and as stock transformers with PEFT hold it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

from peft import LNTuningConfig, LoraConfig, get_peft_model
from PIL import Image
from torch import nn

from normtune.anatomy import norms
from normtune.data.records import Dataset, Example
from normtune.models.family import Family

PEERS = ("LN_TUNING", "LoRA r8 q,v", "LoRA r8 all-linear", "full")


class Shape(ABC):
    """One model's dimensions; `family` and `peer` build it anew, with random weights."""

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

    def remember(self, dataset: Dataset, examples: Sequence[Example]) -> Callable[[str], Image.Image]:
        """Opens images from memory."""
        held = {key: dataset.open_image(key) for key in dict.fromkeys(e.images[0] for e in examples)}
        return held.__getitem__

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """The dimensions, for the record."""

    @abstractmethod
    def family(self) -> Family:
        """Normtune's model."""

    @abstractmethod
    def peer(
        self, method: str, dataset: Dataset, examples: Sequence[Example]
    ) -> tuple[nn.Module, list[Any], Any]:
        """Transformers' model under PEFT, one row a question, and the collator that pads them."""

    @abstractmethod
    def generator(
        self, dataset: Dataset, examples: Sequence[Example], batch: int
    ) -> tuple[Callable[[Any, int, int], Any], list[Any]]:
        """`generate(batch, beams, tokens)` of transformers' model, and the batches of its questions."""


def tuned_by_peft(model: nn.Module, method: str, queries_values: Sequence[str]) -> nn.Module:
    """`model` as a user of PEFT sets it up."""
    if method == "full":
        return model
    if method == "LN_TUNING":
        return get_peft_model(model, LNTuningConfig(target_modules=list(norms(model))))  # type: ignore[arg-type]
    targets: Any = list(queries_values) if "q,v" in method else "all-linear"
    return get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules=targets))  # type: ignore[arg-type]
