"""Greedy and beam search over any decoder: a family gives the first logits and a step, and gets answers.

The beam search keeps the semantics of transformers' `GenerationMixin._beam_search` to the letter (candidates
kept, length penalty, early stopping), so that answers compare with published ones. It differs in one thing
that changes no result: prompts that are done leave the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Step = Callable[[Tensor, Tensor | None], Tensor]
"""`step(tokens [rows], cache_rows [rows] or None) -> logits [rows, vocabulary]`.

`cache_rows[r]` is the row of the previous call whose cache row r goes on from; None means that rows are as
they were. The rows before the first call are the prompts. Rows of one prompt are adjacent, `beams` each, in
the prompts' order; with `compact` prompts that are done are left out.
"""

OnTokens = Callable[[Sequence[int], Sequence[int]], None]
"""`on_tokens(prompts, tokens)`: the next token of each prompt that is not done, end tokens included; prompts
are counted from 0."""

NEVER = -1.0e9  # what transformers adds to a score that must not win


@dataclass(frozen=True)
class Generated:
    """The tokens of one answer, end token included where one was written, and their mean log-probability."""

    tokens: tuple[int, ...]
    score: float


def generate(
    logits: Tensor,
    step: Step,
    *,
    end: Sequence[int],
    max_new_tokens: int,
    beams: int = 1,
    length_penalty: float = 1.0,
    early_stopping: bool | Literal["never"] = False,
    compact: bool = True,
    on_tokens: OnTokens | None = None,
) -> list[Generated]:
    """Continue prompts until an end token or `max_new_tokens`.

    Args:
        logits: of the first new token, one row a prompt: [prompts, vocabulary].
        step: computes the logits of the next token; see `Step`.
        end: the tokens that end an answer.
        beams: 1 is greedy.
        length_penalty: a finished beam's score is its summed log-probability / length ** length_penalty.
        early_stopping: as in transformers: True stops a prompt once it has `beams` finished answers, False
            where the best running beam cannot win at its present length, "never" where it cannot win at any
            length.
        compact: drop prompts that are done from the batch; switch it off where something outside the step
            depends on the rows' number.
        on_tokens: told of tokens as they are chosen. Beams tell nothing: which of them wins shows at the end.
    """
    assert beams >= 1 and max_new_tokens >= 1, "at least one beam and one token"
    if beams == 1:
        return greedy(
            logits, step, end=end, max_new_tokens=max_new_tokens, compact=compact, on_tokens=on_tokens
        )
    return beam_search(
        logits,
        step,
        end=end,
        max_new_tokens=max_new_tokens,
        beams=beams,
        length_penalty=length_penalty,
        early_stopping=early_stopping,
        compact=compact,
    )


def greedy(
    logits: Tensor,
    step: Step,
    *,
    end: Sequence[int],
    max_new_tokens: int,
    compact: bool = True,
    on_tokens: OnTokens | None = None,
) -> list[Generated]:
    """The likeliest token at every step; arguments as for `generate`."""
    device, prompts = logits.device, logits.shape[0]
    ends = torch.tensor(list(end), device=device)
    tokens = torch.full((prompts, max_new_tokens), -1, device=device)
    total = torch.zeros(prompts, device=device)
    alive = torch.arange(prompts, device=device)  # the prompts that are not done
    rows = alive  # where they stand in the batch
    for position in range(max_new_tokens):
        own = logits[rows] if len(rows) < len(logits) else logits
        own = own.float()
        token = own.argmax(-1)
        tokens[alive, position] = token
        total[alive] += own.gather(-1, token[:, None])[:, 0] - own.logsumexp(-1)
        if on_tokens is not None:
            on_tokens(alive.tolist(), token.tolist())
        going = (~torch.isin(token, ends)).nonzero()[:, 0]
        if len(going) == 0 or position + 1 == max_new_tokens:
            break
        kept = None
        present = logits.shape[0]
        alive, rows, token = alive[going], rows[going], token[going]
        if compact and len(rows) < present:
            kept, rows = rows, torch.arange(len(rows), device=device)
        elif len(rows) < present:
            token = ends.new_full((present,), int(ends[0])).index_copy(0, rows, token)
        logits = step(token, kept)
    return _answers(tokens, total.tolist())


def beam_search(
    logits: Tensor,
    step: Step,
    *,
    end: Sequence[int],
    max_new_tokens: int,
    beams: int,
    length_penalty: float = 1.0,
    early_stopping: bool | Literal["never"] = False,
    compact: bool = True,
) -> list[Generated]:
    """The best of `beams` running answers a prompt; arguments as for `generate`."""
    device, prompts, vocabulary = logits.device, logits.shape[0], logits.shape[1]
    ends = torch.tensor(list(end), device=device)
    candidates = max(2, 1 + len(end)) * beams
    among_best = torch.arange(candidates, device=device) < beams

    best = torch.full((prompts, max_new_tokens), -1, device=device)  # results, filled as prompts are done
    best_score = torch.zeros(prompts, device=device)
    alive = torch.arange(prompts, device=device)
    running = torch.full((prompts, beams, max_new_tokens), -1, device=device)
    running_score = torch.full((prompts, beams), NEVER, device=device)
    running_score[:, 0] = 0.0  # only the first beam counts in the first step: they are all alike
    finished = running.clone()
    finished_score = torch.full((prompts, beams), NEVER, device=device)
    is_finished = torch.zeros((prompts, beams), dtype=torch.bool, device=device)
    improvable = torch.ones((prompts, 1), dtype=torch.bool, device=device)

    width = 1  # rows a prompt in the cache
    for position in range(max_new_tokens):
        count = len(alive)
        log_probs = logits.float().log_softmax(-1).view(count, width, vocabulary) + running_score[:, :, None]
        score, flat = log_probs.view(count, -1).topk(candidates)  # [prompts, candidates]
        parent, token = flat // vocabulary, flat % vocabulary
        grown = _take(running, parent)
        grown[:, :, position] = token
        stops = torch.isin(token, ends)
        if position + 1 == max_new_tokens:
            stops = torch.ones_like(stops)

        # running beams: the best that have not ended
        running_all = score + stops * NEVER
        order = running_all.topk(beams).indices
        running, running_score = _take(grown, order), running_all.gather(1, order)
        next_token, parent = token.gather(1, order), parent.gather(1, order)

        # finished answers: those that ended among the best `beams` candidates join, if they score higher
        joins = stops & among_best
        penalised = score / (position + 1) ** length_penalty
        if early_stopping is True:
            penalised = penalised + is_finished.all(1, keepdim=True) * NEVER
        penalised = penalised + ~improvable * NEVER + ~joins * NEVER
        finished_score, order = torch.cat((finished_score, penalised), 1).topk(beams)
        finished = _take(torch.cat((finished, grown), 1), order)
        is_finished = torch.cat((is_finished, joins), 1).gather(1, order)
        best[alive], best_score[alive] = finished[:, 0], finished_score[:, 0]

        # which prompts can still improve
        optimistic = early_stopping == "never" and length_penalty > 0.0
        length = max_new_tokens if optimistic else position + 1
        hope = running_score[:, :1] / length**length_penalty
        worst = torch.where(is_finished, finished_score.min(1, keepdim=True).values, NEVER)
        improvable = improvable & (hope > worst).any(1, keepdim=True)
        going = improvable[:, 0]
        if early_stopping is True:
            going = going & ~is_finished.all(1)
        if position + 1 == max_new_tokens or not bool(going.any()):
            break
        # in the first step all beams come from the prompt's only row
        cache_rows = torch.arange(count, device=device)[:, None] * width + parent.clamp(max=width - 1)
        if compact and not bool(going.all()):
            alive, running, running_score = alive[going], running[going], running_score[going]
            finished, finished_score, is_finished = finished[going], finished_score[going], is_finished[going]
            improvable, next_token, cache_rows = improvable[going], next_token[going], cache_rows[going]
        width = beams
        logits = step(next_token.flatten(), cache_rows.flatten())
    lengths = (best >= 0).sum(1)
    return _answers(best, (best_score * lengths ** float(length_penalty)).tolist())


def _take(beams: Tensor, index: Tensor) -> Tensor:
    """beams [prompts, n, length], index [prompts, m] -> [prompts, m, length]."""
    return beams.take_along_dim(index[:, :, None], 1)


def _answers(tokens: Tensor, totals: list[float]) -> list[Generated]:
    """Cut the filling (-1) off; `totals` are summed log-probabilities."""
    rows = [tuple(token for token in row if token >= 0) for row in tokens.tolist()]
    return [Generated(row, total / len(row)) for row, total in zip(rows, totals, strict=True)]
