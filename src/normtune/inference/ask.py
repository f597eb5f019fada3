"""Answers questions about one image, or writes a report for one study."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from normtune.data import tasks
from normtune.data.groups import Group
from normtune.data.images.files import open_image
from normtune.errors import InputError
from normtune.models.family import Family
from normtune.models.types import Answer

if TYPE_CHECKING:
    from PIL.Image import Image


def ask(
    family: Family,
    images: Sequence[Path | str | Image],
    questions: Sequence[str],
    *,
    beams: int = 1,
    max_new_tokens: int = tasks.MAX_ANSWER_TOKENS,
    report: bool = False,
) -> list[Answer]:
    """Answer questions about one image or one study with several views; its features are computed once.

    Args:
        family: the model, in evaluation mode.
        images: image files or opened images, in their order.
        questions: the questions.
        beams: width of the beam search; 1: greedy decoding.
        max_new_tokens: maximum length of an answer in tokens.
        report: whether the answers are reports; an empty question is then the report prompt.

    Returns:
        One answer per question, in their order, with the number of tokens that the model did not read of it.

    Raises:
        InputError: there is no image, or one cannot be read.
    """
    if not images:
        raise InputError("there is no image to ask about. Give an image file, or an opened image.")
    pixels = [family.preprocess_image(open_image(image)) for image in images]
    segments = tuple(family.tokenize(str(i), text, None, report=report) for i, text in enumerate(questions))
    group = Group(tuple(str(i) for i in range(len(images))), segments)
    answers = family.generate_answers([group], [pixels], beams=beams, max_new_tokens=max_new_tokens)[0]
    cuts = (family.question_tokens_cut(segment, text) for segment, text in zip(segments, questions, strict=True))
    return [replace(answer, question_tokens_cut=cut) for answer, cut in zip(answers, cuts, strict=True)]
