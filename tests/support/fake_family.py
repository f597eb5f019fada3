"""A family without a model: it looks answers up and records its calls."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from PIL import Image

from normtune.data.choices import ChoiceFormat
from normtune.data.groups import Group, Segment
from normtune.data.records import Dataset, Example, History
from normtune.models.family import Family
from normtune.models.types import Answer, Pixels


class FakeFamily:
    """Answers segment `id` with `answers[id]`; log-probabilities come from `log_prob(id, candidate)`.

    Attributes:
        batches: the groups of each call of `generate_answers` and `collate`.
        settings: (max_new_tokens, beams) of each call of `generate_answers`.
        tokenized: (id, report) of each call of `tokenize`.
    """

    device = torch.device("cpu")
    dtype = torch.float32
    adapter = None

    def __init__(self, answers: dict[str, str], log_prob: Callable[[str, str], float] | None = None) -> None:
        self.answers = answers
        self.log_prob = log_prob
        self.batches: list[list[Group]] = []
        self.settings: list[tuple[int, int]] = []
        self.tokenized: list[tuple[str, bool]] = []

    uses_checkpoint_settings = True

    def preprocess_image(self, image: Image.Image) -> Pixels:
        return {"mean": torch.tensor(float(image.getpixel((0, 0))[0]))}  # type: ignore[index]

    def tokenize(
        self, id: str, question: str, answer: str | None, *, report: bool = False, history: History = ()
    ) -> Segment:
        self.tokenized.append((id, report))
        return Segment(id, tuple(question.encode()), () if answer is None else (*answer.encode(), 0))

    end_tokens = (0,)
    choices = ChoiceFormat()
    tokenize_example = Family.tokenize_example
    self_test = None
    self_test_record = Family.self_test_record
    prompt_template = "{question}"

    def tokenize_whole(self, id: str, question: str, answer: str | None, history: History = ()) -> Segment:
        return Segment(id, tuple(question.encode()), (*map(len, (answer or "").split()), 0))  # a token a word

    def max_reference_tokens(self, report: bool) -> int:
        return 512 if report else 256

    def generate_answers(
        self, groups: Sequence[Group], pixels: Sequence[Sequence[Pixels]], *, max_new_tokens: int = 16, beams: int = 1
    ) -> list[list[Answer]]:
        self.batches.append(list(groups))
        self.settings.append((max_new_tokens, beams))
        for group, images in zip(groups, pixels, strict=True):
            assert len(images) == len(group.images)
            for key, image in zip(group.images, images, strict=True):
                assert image["mean"] == int(key)
        return [[Answer(self.answers[s.id], -0.5) for s in group.segments] for group in groups]

    def generation_settings(self) -> dict[str, Any]:
        return {}

    def collate(self, groups: Sequence[Group], pixels: Sequence[Sequence[Pixels]]) -> dict[str, Any]:
        self.batches.append(list(groups))
        return {"ids": [(s.id, bytes(s.answer).decode().rstrip("\0")) for group in groups for s in group.segments]}

    def log_probs(self, batch: dict[str, Any]) -> torch.Tensor:
        assert self.log_prob is not None
        return torch.tensor([self.log_prob(id.rsplit("=", 1)[0], answer) for id, answer in batch["ids"]])


class CountingImages:
    """`Dataset.open_image` for the keys "0" to "255": a grey image of this level; `opened` lists the keys."""

    def __init__(self) -> None:
        self.opened: list[str] = []

    def __call__(self, key: str) -> Image.Image:
        self.opened.append(key)
        return Image.new("RGB", (2, 2), (int(key),) * 3)


def fake_dataset(examples: list[Example], images: Callable[[str], Image.Image] | None = None) -> Dataset:
    return Dataset("fake", examples, images or CountingImages(), licence="CC0")
