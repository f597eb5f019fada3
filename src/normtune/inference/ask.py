"""Answers questions about one image, or writes a report for one study, with or without an adapter."""

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
    """Answer questions about one image; its features are computed once.

    Args:
        model: a local directory, a hub name, or 'nano'.
        image: path of the image file.
        adapter: folder of a trained adapter; None: the base as it is.
        beams: width of the beam search; 1: greedy decoding.
        device: cpu or cuda; None: cuda if available.
        quantize: int8 or nf4 for the base; None: not quantised.

    Returns:
        One answer per question, in their order.
    """
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
    """Write a report for one study with one or more views. For research use, not for diagnosis.

    Args:
        images: paths of the views, in their order; the other arguments are those of `ask`.
        max_new_tokens: maximum length of the report in tokens.
    """
    family = load_model(model, adapter, device=device, quantize=quantize)
    pixels = [family.preprocess_image(open_image(image, name=image.name)) for image in images]
    segment = family.tokenize("report", "", None, report=True)
    group = Group(tuple(str(image) for image in images), (segment,))
    return family.generate_answers([group], [pixels], beams=beams, max_new_tokens=max_new_tokens)[0][0]
