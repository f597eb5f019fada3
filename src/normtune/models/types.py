"""Types that model families exchange with the rest of the package."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from torch import Tensor

Pixels = dict[str, Tensor]  # one preprocessed or encoded image, without a batch axis; keys depend on the family
FinishReason = Literal["stop", "length"]
Batch = dict[str, Any]  # tensors on any device; keys depend on the family


@dataclass(frozen=True)
class Answer:
    """A generated answer.

    Attributes:
        text: the decoded answer.
        score: the mean log-probability of its tokens, end token included.
        finish_reason: "stop" if the model ended it, "length" if it reached the largest number of tokens.
        tokens: its tokens, including the end token if one was generated.
        question_tokens_cut: tokens at the question's end that the model did not read, because it reads no longer
            questions.
    """

    text: str
    score: float
    finish_reason: FinishReason = "stop"
    tokens: tuple[int, ...] = ()
    question_tokens_cut: int = 0

    def __str__(self) -> str:
        return self.text


class AnswerStates(NamedTuple):
    """The head's input for a batch of N answer tokens, in the order of their segments.

    Attributes:
        states: [N, width], the hidden states that predict the tokens.
        labels: [N] long, the tokens.
        segments: [N] long, the segment of each token, counted over all groups in the order given.
    """

    states: Tensor
    labels: Tensor
    segments: Tensor
