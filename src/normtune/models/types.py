"""Types that model families exchange with the rest of the package."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

Pixels = dict[str, Tensor]  # one image, processed, without a batch axis; keys are the family's own
Batch = dict[str, Any]  # tensors on any device; keys are the family's own


@dataclass(frozen=True)
class Answer:
    """A generated answer and the mean log-probability of its tokens, end token included."""

    text: str
    score: float


class AnswerStates(NamedTuple):
    """What the head is given of a batch, for N answer tokens in the order of their segments.

    Attributes:
        states: [N, width], the hidden states that predict them.
        labels: [N] long.
        segments: [N] long, the segment of each, counted over all groups in the order given.
    """

    states: Tensor
    labels: Tensor
    segments: Tensor
