"""Predicts an answer for every example of a list, in batches of groups; each image is opened once.

A group is one image (or study) with several of its questions. Examples are ordered so that questions about
the same image follow each other, and the image encoder runs once per batch for all of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from normtune.data.batches import batches_of_pairs
from normtune.data.examples import Examples
from normtune.data.groups import Group, group_by_image
from normtune.data.records import Dataset, Example, Prediction
from normtune.data.tasks import MAX_ANSWER_TOKENS
from normtune.errors import InputError

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
        tokens.

    Raises:
        InputError: an image cannot be read, or the device runs out of memory.
    """
    predictions = []
    for example_groups, pixels in _iterate_batches(
        images or _image_reader(family, dataset), examples, batch_pairs, cap
    ):
        groups = [
            Group(
                group[0].images,
                tuple(
                    family.tokenize(e.id, e.question, None, report=e.kind == "report", history=e.history) for e in group
                ),
            )
            for group in example_groups
        ]
        with _OutOfMemoryAsError(batch_pairs):
            answers = family.generate_answers(groups, pixels, max_new_tokens=max_new_tokens, beams=beams)
        for group, group_answers in zip(example_groups, answers, strict=True):
            for example, answer in zip(group, group_answers, strict=True):
                predictions.append(Prediction(example.id, answer.text, _finite(answer.score), answer.finish_reason))
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
        chosen candidate.

    Raises:
        InputError: an image cannot be read, or the device runs out of memory.
    """
    import torch
    from accelerate.utils import send_to_device

    predictions = []
    # each example has a segment per candidate, so that fewer examples make a batch of the same size
    pairs = max(1, batch_pairs // max(1, len(candidates)))
    for example_groups, pixels in _iterate_batches(images or _image_reader(family, dataset), examples, pairs, cap):
        groups = [
            Group(
                group[0].images,
                tuple(
                    family.tokenize(f"{e.id}={word}", e.question, word, history=e.history)
                    for e in group
                    for word in candidates
                ),
            )
            for group in example_groups
        ]
        with _OutOfMemoryAsError(batch_pairs), torch.inference_mode():
            batch = send_to_device(family.collate(groups, pixels), family.device)
            sums = family.log_probs(batch).double().reshape(-1, len(candidates))  # [examples, candidates]
            shares = torch.log_softmax(sums, dim=1).cpu()
        for example, share in zip((e for group in example_groups for e in group), shares.tolist(), strict=True):
            best = max(range(len(candidates)), key=share.__getitem__)
            predictions.append(Prediction(example.id, candidates[best], _finite(share[best])))
        if progress is not None:
            progress(len(predictions), len(examples))
    return predictions


def _finite(score: float) -> float | None:
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
