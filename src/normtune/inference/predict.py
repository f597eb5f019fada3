"""Examples and their images -> answers: batches of groups, each image opened once."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from normtune.data.batches import batches_of_pairs
from normtune.data.groups import Group, group_by_image
from normtune.data.records import Dataset, Example, Prediction
from normtune.data.tasks import MAX_ANSWER_TOKENS
from normtune.errors import InputError

if TYPE_CHECKING:
    from normtune.models.family import Family
    from normtune.models.image_cache import ImageCache
    from normtune.models.types import Pixels


Progress = Callable[[int, int], None]  # pairs done, pairs in all


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
    """The model's own answer to every example; `score` is the mean log-probability of its tokens.

    Raises:
        InputError: an image cannot be read, or memory runs out.
    """
    predictions = []
    for members, pixels in _batches(images or _opener(family, dataset), examples, batch_pairs, cap):
        groups = [
            Group(
                group[0].images,
                tuple(family.tokenize(e.id, e.question, None, report=e.kind == "report") for e in group),
            )
            for group in members
        ]
        with _memory_for(batch_pairs):
            answers = family.generate_answers(groups, pixels, max_new_tokens=max_new_tokens, beams=beams)
        for group, group_answers in zip(members, answers, strict=True):
            for example, answer in zip(group, group_answers, strict=True):
                predictions.append(Prediction(example.id, answer.text, _finite(answer.score)))
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
    """The most probable of `candidates` for every example, all scored in one forward pass a batch.

    A candidate's probability is that of its tokens with the end token, not divided by their number. `score`
    is the log of the chosen one's share among the candidates. Ties go to the candidate named first.

    Raises:
        InputError: an image cannot be read, or memory runs out.
    """
    import torch
    from accelerate.utils import send_to_device

    predictions = []
    pairs = max(1, batch_pairs // max(1, len(candidates)))
    for members, pixels in _batches(images or _opener(family, dataset), examples, pairs, cap):
        groups = [
            Group(
                group[0].images,
                tuple(
                    family.tokenize(f"{e.id}={word}", e.question, word) for e in group for word in candidates
                ),
            )
            for group in members
        ]
        with _memory_for(batch_pairs), torch.inference_mode():
            batch = send_to_device(family.collate(groups, pixels), family.device)
            sums = family.log_probs(batch).double().reshape(-1, len(candidates))  # [examples, candidates]
            shares = torch.log_softmax(sums, dim=1).cpu()
        for example, share in zip((e for group in members for e in group), shares.tolist(), strict=True):
            best = max(range(len(candidates)), key=share.__getitem__)
            predictions.append(Prediction(example.id, candidates[best], _finite(share[best])))
        if progress is not None:
            progress(len(predictions), len(examples))
    return predictions


def _finite(score: float) -> float | None:
    return score if math.isfinite(score) else None


class _memory_for:
    """Turns running out of memory on the device into an error that says what to lower."""

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


def _batches(
    opened: Callable[[str], Pixels], examples: Sequence[Example], pairs: int, cap: int | None
) -> Iterator[tuple[list[list[Example]], list[list[Pixels]]]]:
    """Groups of examples with the processed images of each; an image shared with the batch before is kept."""
    groups = group_by_image(examples, cap)
    held: dict[str, Pixels] = {}
    for batch in batches_of_pairs([len(group) for group in groups], pairs):
        members = [groups[index] for index in batch]
        keys = dict.fromkeys(key for group in members for key in group[0].images)
        held = {key: held[key] if key in held else opened(key) for key in keys}
        yield members, [[held[key] for key in group[0].images] for group in members]


def _opener(family: Family, dataset: Dataset) -> Callable[[str], Pixels]:
    from normtune.models.image_cache import read_pixels

    return partial(read_pixels, family, dataset)
