"""Types that model families exchange with the rest of the package."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from torch import Tensor

from normtune.data.records import confidence

Pixels = dict[str, Tensor]  # one preprocessed or encoded image, without a batch axis; keys depend on the family
FinishReason = Literal["stop", "length"]
Batch = dict[str, Any]  # tensors on any device; keys depend on the family


@dataclass(frozen=True)
class Answer:
    """A generated answer."""

    text: str  # the decoded answer
    score: float  # the mean log-probability of its tokens, end token included
    # "stop" if the model ended it, "length" if it reached the largest number of tokens
    finish_reason: FinishReason = "stop"
    tokens: tuple[int, ...] = ()  # its tokens, including the end token if one was generated
    # tokens at the question's end that the model did not read, because it reads no longer questions
    question_tokens_cut: int = 0
    abstained: bool = False  # its confidence is below the threshold of the request; `text` is empty

    @property
    def confidence(self) -> float | None:
        """How sure the model is, from 0 to 1; None if it is unknown."""
        return confidence(self.score)

    def __str__(self) -> str:
        if self.abstained:
            return f"(abstained: confidence {self.confidence or 0:.2f})"
        return self.text


class AnswerStates(NamedTuple):
    """The head's input for a batch of N answer tokens, in the order of their segments."""

    states: Tensor  # [N, width], the hidden states that predict the tokens
    labels: Tensor  # [N] long, the tokens
    segments: Tensor  # [N] long, the segment of each token, counted over all groups in the order given


@dataclass(frozen=True)
class SelfTest:
    """The result of the self-test of grouping; see `normtune.models.causal.self_test`."""

    model_type: str  # transformers' name of the type of model
    passed: bool  # whether questions of one image may be grouped
    reason: str | None = None  # why it failed; None if it passed
    loss_error: float | None = None  # the largest relative error of a loss; None if it was not computed
    gradient_error: float | None = None  # the largest relative error of a gradient, by its norm

    def text(self) -> str:
        """One line for people."""
        start = f"model type '{self.model_type}' has no family of its own; the self-test of grouping "
        if self.passed:
            errors = f"errors: loss {self.loss_error:.0e}, gradients {self.gradient_error:.0e}; same answers"
            return f"{start}passed ({errors}): questions share their image."
        return f"{start}failed ({self.reason}): every question is computed alone, which is slower."
