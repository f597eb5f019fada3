"""The token limits of a model on a dataset: how long an answer may be, and what they cut of the data."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from normtune.data import tasks
from normtune.data.examples import Example, Examples
from normtune.data.options import DataOptions
from normtune.data.preflight import Preflight, check, preflight, usable_rows
from normtune.data.records import Dataset, Split
from normtune.data.registry import PHANTOMS
from normtune.data.token_limits import TextLimits
from normtune.errors import InputError
from normtune.metrics.answers import is_exact
from normtune.runtime import distributed
from normtune.runtime.progress import progress_bar

if TYPE_CHECKING:
    from normtune.models.family import Family

_MARGIN = 8  # tokens that an answer may be longer than every training reference
_TRIED = 200  # number of references that are tokenised, the longest in characters


def answer_limit(family: Family, examples: Split) -> int:
    """The default limit of a generated answer: the longest training reference and a margin.

    It depends on the data and the tokenizer alone, so that it is the same for every recipe that is compared. It is
    at least 16 tokens (128 for reports), and at most what a reference may have in training.

    Args:
        family: tokenises the references.
        examples: the examples to answer, all questions or all reports. The training split of their dataset counts;
            without one, they do.
    """
    report = examples[0].kind == "report"
    rows = examples.dataset.examples
    of_task = rows.flags("kind", lambda kind: (kind == "report") == report)
    training = rows.where(of_task & rows.flags("split", "train".__eq__)) or examples
    longest = 0
    for text in _longest_answers(training):
        try:
            longest = max(longest, len(family.tokenize_whole("", "?", text).answer))
        except InputError:  # such a row is counted by the preflight
            continue
    least = tasks.MAX_REPORT_TOKENS if report else tasks.MAX_ANSWER_TOKENS
    return min(max(least, longest + _MARGIN), max(least, family.max_reference_tokens(report)))


def _longest_answers(examples: Examples) -> list[str]:
    """The `_TRIED` longest answers, each once."""
    lengths = examples.numbers("answer", len, np.int32)
    _, first = np.unique(examples.hashes("answer"), return_index=True)
    shortest = np.sort(lengths[first])[-_TRIED:][0]
    answers = [example.answer for example in examples.take(first[lengths[first] >= shortest])]
    return sorted(answers, key=lambda text: (-len(text), text))[:_TRIED]


def text_limits(
    family: Family,
    name: str,
    *,
    report: bool,
    max_answer: int | None = None,
    training: bool = False,
    normalisation: str = "vqa",
) -> TextLimits:
    """How `family` reads the rows of a dataset, for `normtune.data.preflight`.

    Args:
        family: tokenises the rows; it needs no weights.
        name: name of the model in messages.
        report: whether the rows are reports.
        max_answer: tokens that are generated; None if nothing is.
        training: whether references are cut as in training.
        normalisation: under which the score ceiling compares texts.
    """

    def tokenize(example: Example) -> tuple[Sequence[int], Sequence[int]]:
        texts = family.choices.question(example), family.choices.answer(example)
        segment = family.tokenize_whole(example.id, *texts, example.history)
        return segment.prompt, segment.answer

    def is_right(prediction: str, reference: str) -> bool:
        # of reports, it counts those that are whole: tokenizers change case and blanks
        return is_exact(prediction, reference, "vqa" if report else normalisation)

    def image_tokens(size: tuple[int, int]) -> int:
        return family.prefix_tokens([family.preprocess_image(Image.new("RGB", size))])

    return TextLimits(
        model=name,
        tokenize=tokenize,
        decode=family.decode_answer,
        is_right=is_right,
        max_prompt=family.max_prompt_tokens,
        max_reference=family.max_reference_tokens(report) if training else None,
        max_answer=max_answer,
        expected=family.choices.answer,
        max_pixels=family.max_pixels,
        image_tokens=image_tokens,
    )


def inspect_data(dataset: Dataset, model: str | None = None, *, text_only: bool = False) -> Preflight:
    """Count what all splits of a dataset hold and what would be lost of them, as `normtune data` prints it.

    Args:
        model: the model that sets the limits of the texts; None: tokens are not counted.
        text_only: do not open the pictures.

    Raises:
        InputError: the model does not exist.
    """
    limits = None
    if model is not None:
        from normtune.models.loading import load_without_weights

        family, report = load_without_weights(model), dataset.examples[0].kind == "report"
        longest = answer_limit(family, Split(dataset, dataset.examples))
        limits = text_limits(family, model, report=report, max_answer=longest, training=True)
    with _picture_progress() as tick:
        return preflight(
            dataset, limits=limits, open_pictures=not (text_only or dataset.name in PHANTOMS), progress=tick
        )


def check_run(
    options: DataOptions,
    examples: Split,
    model: str | Family | None,
    *,
    adapter: Path | None = None,
    training: bool = False,
    max_answer: int | None = None,
    normalisation: str = "vqa",
) -> tuple[Split, Preflight]:
    """Check the rows of a run before weights are loaded.

    In a distributed run the main process opens the pictures; all processes return the same.

    Args:
        options: `skip_bad` and `strict` decide what happens to bad rows; pictures are not opened with `text_only`;
            questions with options are written as `choice_prompt` says.
        examples: the rows of the run.
        model: the base, by name or loaded; None without one: nothing is tokenised, and no picture opened.
        adapter: an adapter on the base; its recorded limits apply.
        training: whether references are trained on; otherwise answers are generated.
        max_answer: tokens that are generated; by default `answer_limit`.
        normalisation: under which the score ceiling compares answers.

    Raises:
        InputError: see `normtune.data.preflight.check`.
    """

    dataset = examples.dataset

    def attempt() -> Preflight | InputError:
        with ExitStack() as stack:
            return check_in(stack)

    def check_in(stack: ExitStack) -> Preflight | InputError:
        limits = None
        if model is not None:
            from normtune.adapters.storage import read_adapter_info
            from normtune.models.loading import load_without_weights

            family = load_without_weights(model) if isinstance(model, str) else model
            max_pixels = getattr(options, "max_pixels", None)
            if adapter is not None:
                family.use_training_texts(read_adapter_info(adapter).data)
            family.choices = family.choices.with_options(options)
            stack.enter_context(family.pixel_limit(max_pixels))
            report = examples[0].kind == "report"
            limits = text_limits(
                family,
                model if isinstance(model, str) else model.source,
                report=report,
                max_answer=max_answer or answer_limit(family, examples),
                training=training,
                normalisation=normalisation,
            )
        with _picture_progress() as tick:
            try:
                return check(
                    dataset,
                    examples,
                    limits,
                    strict=options.strict,
                    skip_bad=options.skip_bad,
                    open_pictures=not (model is None or options.text_only or dataset.name in PHANTOMS),
                    progress=tick,
                )[1]
            except InputError as error:
                return error

    outcome = distributed.broadcast_from_first(attempt)
    if isinstance(outcome, InputError):
        raise outcome
    if distributed.is_main_process() and outcome.losses:
        losses = ", ".join(f"{rows} x {loss}" for loss, rows in outcome.losses.items())
        print(f"preflight: {losses} (preflight.json)", file=sys.stderr)
    return usable_rows(examples, outcome), outcome


def _picture_progress() -> AbstractContextManager[Callable[[int, int], None] | None]:
    return progress_bar("Pictures", quiet=not sys.stderr.isatty())
