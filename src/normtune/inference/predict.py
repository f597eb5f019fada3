"""Predicts an answer for every example of a list, in batches of groups; each image is opened once.

A group is one image (or study) with several of its questions. Examples are ordered so that questions about
the same image follow each other, and the image encoder runs once per batch for all of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import chain, islice
from typing import TYPE_CHECKING, Any

from normtune.data.batches import batches_of_pairs
from normtune.data.examples import Examples
from normtune.data.groups import Group, Segment, group_by_image
from normtune.data.records import ChoiceResult, Dataset, Example, Prediction
from normtune.data.tasks import MAX_ANSWER_TOKENS
from normtune.errors import InputError
from normtune.metrics.choices import parse_choice

if TYPE_CHECKING:
    from normtune.models.family import Family
    from normtune.models.image_cache import ImageCache
    from normtune.models.types import Pixels


Progress = Callable[[int, int], None]  # (pairs done, pairs in all)


def answer_all(
    family: Family,
    dataset: Dataset,
    examples: Sequence[Example],
    *,
    batch_pairs: int = 64,
    cap: int | None = None,
    beams: int = 1,
    max_new_tokens: int = MAX_ANSWER_TOKENS,
    images: ImageCache | None = None,
    progress: Progress | None = None,
) -> list[Prediction]:
    """Generate the model's answer to every example.

    Args:
        batch_pairs: about how many questions are answered at a time.
        cap: maximum number of questions per image in a group; None: all.
        beams: width of the beam search; 1: greedy decoding.
        images: gives processed images, or encoder outputs from a cache; None: images are opened here.
        progress: called after each batch.

    Returns:
        One prediction per example, grouped by image. `score` is the mean log-probability of the answer's
        tokens. The prediction of a choice is the text of the option that the answer names, if it names one.

    Raises:
        InputError: an image cannot be read, or the device runs out of memory.
    """
    predictions = []
    for example_groups, pixels in _iterate_batches(
        images or _image_reader(family, dataset), examples, batch_pairs, cap
    ):
        groups = [
            Group(group[0].images, tuple(family.tokenize_example(example, None) for example in group))
            for group in example_groups
        ]
        with _OutOfMemoryAsError(batch_pairs):
            answers = family.generate_answers(groups, pixels, max_new_tokens=max_new_tokens, beams=beams)
        for group, group_answers in zip(example_groups, answers, strict=True):
            for example, answer in zip(group, group_answers, strict=True):
                text, choice = answer.text, None
                if example.options:
                    place = parse_choice(text, example.options)
                    choice = ChoiceResult({"generated": (place,)}, generated=text)
                    text = text if place is None else example.options[place]
                score = finite(answer.score)
                predictions.append(Prediction(example.id, text, score, answer.finish_reason, choice))
        if progress is not None:
            progress(len(predictions), len(examples))
    return predictions


def score_closed_candidates(
    family: Family,
    dataset: Dataset,
    examples: Sequence[Example],
    candidates: Sequence[str] = ("yes", "no"),
    *,
    batch_pairs: int = 64,
    cap: int | None = None,
    images: ImageCache | None = None,
    progress: Progress | None = None,
) -> list[Prediction]:
    """Choose the most probable of `candidates` for every example; a batch needs one forward pass.

    A candidate's probability is that of all its tokens and the end token: a product, not divided by its
    length. Ties go to the candidate that comes first.

    Args:
        batch_pairs: about how many questions with a candidate each are scored at a time.
        cap, images, progress: as for `answer_all`.

    Returns:
        One prediction per example, grouped by image. `score` is log(p / sum of p over the candidates) of the
        selected candidate.

    Raises:
        InputError: an image cannot be read, or the device runs out of memory.
    """
    predictions = []

    def tokenize(example: Example) -> list[Segment]:
        texts = ((f"{example.id}={word}", example.question, word) for word in candidates)
        return [family.tokenize(*text, history=example.history) for text in texts]

    scored = candidate_log_probs(
        family,
        dataset,
        examples,
        tokenize,
        len(candidates),
        batch_pairs=batch_pairs,
        cap=cap,
        images=images,
        progress=progress,
    )
    for example, log_probs in scored:
        shares = log_shares(log_probs)
        best = max(range(len(candidates)), key=shares.__getitem__)
        by_word = {word: math.exp(value) for word, value in zip(candidates, shares, strict=True)}
        predictions.append(Prediction(example.id, candidates[best], finite(shares[best]), shares=by_word))
    return predictions


def candidate_log_probs(
    family: Family,
    dataset: Dataset,
    examples: Sequence[Example],
    tokenize: Callable[[Example], Sequence[Segment]],
    candidates: int,
    *,
    batch_pairs: int,
    cap: int | None = None,
    images: ImageCache | None = None,
    progress: Progress | None = None,
) -> Iterator[tuple[Example, list[float]]]:
    """Compute the log-probability of each candidate answer of each example.

    The image and, as segments with one prompt, the question run once for all candidates.

    Args:
        tokenize: the segments of an example, one for each candidate.
        candidates: number of candidates of an example, about.
        batch_pairs: about how many candidates are scored at a time.
        cap, images, progress: as for `answer_all`.

    Yields:
        Each example, grouped by image, with its candidates' log-probabilities: the sums over their tokens.
    """
    import torch
    from accelerate.utils import send_to_device

    # each example has a segment per candidate, so that fewer examples make a batch of the same size
    pairs, done = max(1, batch_pairs // max(1, candidates)), 0
    for example_groups, pixels in _iterate_batches(images or _image_reader(family, dataset), examples, pairs, cap):
        tokenized = [[tokenize(example) for example in group] for group in example_groups]
        groups = [
            Group(members[0].images, tuple(chain.from_iterable(segments)))
            for members, segments in zip(example_groups, tokenized, strict=True)
        ]
        with _OutOfMemoryAsError(batch_pairs), torch.inference_mode():
            sums = family.log_probs(send_to_device(family.collate(groups, pixels), family.device)).double().tolist()
        values = iter(sums)
        for members, segments in zip(example_groups, tokenized, strict=True):
            for example, of_example in zip(members, segments, strict=True):
                yield example, list(islice(values, len(of_example)))
        done += sum(map(len, tokenized))
        if progress is not None:
            progress(done, len(examples))


def log_shares(log_probs: Sequence[float]) -> list[float]:
    """log(p / sum of p) of log-probabilities."""
    highest = max(log_probs)
    if not math.isfinite(highest):
        return [-math.inf] * len(log_probs)
    total = highest + math.log(sum(math.exp(value - highest) for value in log_probs))
    return [value - total for value in log_probs]


def finite(score: float) -> float | None:
    """Return the score, or None for -inf or nan, which JSON cannot hold."""
    return score if math.isfinite(score) else None


class _OutOfMemoryAsError:
    """Turns an out-of-memory error of the device into an `InputError` that names the option to lower."""

    def __init__(self, batch_pairs: int) -> None:
        self.batch_pairs = batch_pairs

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        import torch

        if isinstance(error, torch.OutOfMemoryError):
            raise InputError(
                f"the device ran out of memory with {self.batch_pairs} questions at once. Lower --batch."
            ) from error


def _iterate_batches(
    read_image: Callable[[str], Pixels], examples: Sequence[Example], pairs: int, cap: int | None
) -> Iterator[tuple[list[Examples], list[list[Pixels]]]]:
    """Yield batches: groups of examples, and the processed images of each group.

    Only the images of one batch are in memory; one that the next batch needs as well is not read again.
    """
    groups = group_by_image(examples, cap)
    images: dict[str, Pixels] = {}  # of the current batch, by key
    for indices in batches_of_pairs([len(group) for group in groups], pairs):
        batch = [groups[index] for index in indices]
        keys = dict.fromkeys(key for group in batch for key in group[0].images)
        images = {key: images[key] if key in images else read_image(key) for key in keys}
        yield batch, [[images[key] for key in group[0].images] for group in batch]


def _image_reader(family: Family, dataset: Dataset) -> Callable[[str], Pixels]:
    """Return a function that opens and processes the image of a key."""
    from normtune.models.image_cache import read_pixels

    return partial(read_pixels, family, dataset)
