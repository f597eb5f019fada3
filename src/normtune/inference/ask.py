"""One image, a few questions: the model's answers, with or without an adapter."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from normtune.adapters.storage import load_model
from normtune.data import tasks
from normtune.data.groups import Group
from normtune.data.images.files import open_image
from normtune.models.types import Answer


def ask(
    model: str,
    image: Path,
    questions: Sequence[str],
    *,
    adapter: Path | None = None,
    beams: int = 1,
    device: str | None = None,
    quantize: str | None = None,
) -> list[Answer]:
    """Answers to `questions`, in their order; the image is computed once."""
    family = load_model(model, adapter, device=device, quantize=quantize)
    pixels = [family.preprocess_image(open_image(image, name=image.name))]
    segments = tuple(family.tokenize(str(i), question, None) for i, question in enumerate(questions))
    return family.generate_answers([Group((str(image),), segments)], [pixels], beams=beams)[0]


def describe(
    model: str,
    images: Sequence[Path],
    *,
    adapter: Path | None = None,
    beams: int = 1,
    max_new_tokens: int = tasks.MAX_REPORT_TOKENS,
    device: str | None = None,
    quantize: str | None = None,
) -> Answer:
    """A report for one study of one or more views, in their order. Research use, not for diagnosis."""
    family = load_model(model, adapter, device=device, quantize=quantize)
    pixels = [family.preprocess_image(open_image(image, name=image.name)) for image in images]
    segment = family.tokenize("report", "", None, report=True)
    group = Group(tuple(str(image) for image in images), (segment,))
    return family.generate_answers([group], [pixels], beams=beams, max_new_tokens=max_new_tokens)[0][0]
