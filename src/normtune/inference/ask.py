"""Answers questions about one image, or writes a report for one study."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from normtune.data import tasks
from normtune.data.groups import Group
from normtune.data.images.files import open_image
from normtune.data.records import Dataset, Example, Examples, is_abstained
from normtune.errors import InputError
from normtune.inference.choices import answer_choices
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
    options: Sequence[str] = (),
    abstain_below: float | None = None,
) -> list[Answer]:
    """Answer questions about one image or one study with several views; its features are computed once.

    Args:
        images: image files or opened images, in their order.
        beams: width of the beam search; 1: greedy decoding.
        max_new_tokens: maximum length of an answer in tokens.
        report: whether the answers are reports; an empty question is then the report prompt.
        options: what every question is to be answered with; the answer is then the text of the option with the most
            likely letter, and its `score` log(p / sum of p over the letters).
        abstain_below: an answer with a lower confidence is abstained, without its text.

    Returns:
        One answer per question, in their order, with the number of tokens that the model did not read of it.

    Raises:
        InputError: there is no image, one cannot be read, or the threshold is not a confidence.
    """
    if not images:
        raise InputError("there is no image to ask about. Give an image file, or an opened image.")
    if abstain_below is not None and not 0 <= abstain_below <= 1:
        raise InputError(f"abstain_below is a confidence from 0 to 1, got {abstain_below:g}.")
    if options:
        answers = _choose(family, images, questions, options)
    else:
        answers = _generate(family, images, questions, beams=beams, max_new_tokens=max_new_tokens, report=report)
    return [
        replace(answer, text="", tokens=(), abstained=True) if is_abstained(answer.score, abstain_below) else answer
        for answer in answers
    ]


def _generate(
    family: Family,
    images: Sequence[Path | str | Image],
    questions: Sequence[str],
    *,
    beams: int,
    max_new_tokens: int,
    report: bool,
) -> list[Answer]:
    """The generated answer to each question."""
    pixels = [family.preprocess_image(open_image(image)) for image in images]
    segments = tuple(family.tokenize(str(i), text, None, report=report) for i, text in enumerate(questions))
    group = Group(tuple(str(i) for i in range(len(images))), segments)
    answers = family.generate_answers([group], [pixels], beams=beams, max_new_tokens=max_new_tokens)[0]
    cuts = (family.question_tokens_cut(segment, text) for segment, text in zip(segments, questions, strict=True))
    return [replace(answer, question_tokens_cut=cut) for answer, cut in zip(answers, cuts, strict=True)]


def _choose(
    family: Family, images: Sequence[Path | str | Image], questions: Sequence[str], options: Sequence[str]
) -> list[Answer]:
    """The most likely option of each question."""
    opened = {str(i): open_image(image) for i, image in enumerate(images)}
    if not all(questions):
        raise InputError("a question with options is empty. Write the question.")
    examples = [
        # any option may be the reference: it is not used
        Example(str(i), tuple(opened), question, options[0], "choice", "", options=tuple(options))
        for i, question in enumerate(questions)
    ]
    predictions = answer_choices(family, Dataset("images", Examples(examples), opened.__getitem__), examples)
    by_id = {prediction.id: prediction for prediction in predictions}
    answers = []
    for example in examples:
        segment, text = family.tokenize_example(example, None), family.choices.question(example)
        score = by_id[example.id].score
        answers.append(
            Answer(
                by_id[example.id].text,
                -math.inf if score is None else score,
                question_tokens_cut=family.question_tokens_cut(segment, text),
            )
        )
    return answers
