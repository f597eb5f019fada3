"""Greedy and beam search over any decoder.

A family provides the logits of the first new token and a step function that computes the next ones;
`generate` returns the answers. The beam search has exactly the semantics of transformers'
`GenerationMixin._beam_search` (number of candidates, length penalty, early stopping), so that answers are
comparable with published ones. There is one difference, which changes no result: prompts that are done leave
the batch.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Step = Callable[[Tensor, Tensor | None], Tensor]
"""`step(tokens [rows], cache_rows [rows] or None) -> logits [rows, vocabulary]`.

Row r continues from row `cache_rows[r]` of the previous call and reads its cache; None means that every row
continues from itself. The rows before the first call are the prompts. Rows of one prompt are adjacent,
`beams` each, in the prompts' order; prompts that are done have no rows, or leave the batch later.

Example: with two prompts and three beams the first call has 6 rows and cache_rows [0, 0, 0, 1, 1, 1]. If in
the next step beam 0 of prompt 0 is continued twice, cache_rows is [0, 0, 1, 3, 4, 5]; if prompt 0 is done
then, it is [3, 4, 5].
"""

OnTokens = Callable[[Sequence[int], Sequence[int]], None]
"""`on_tokens(prompts, tokens)` is called with the next token of each prompt that is not done, including end
tokens; prompts are counted from 0."""

Process = Callable[[Sequence[int], Tensor, Tensor], Tensor]
"""`process(prompts, tokens [rows, new tokens so far], scores [rows, vocabulary]) -> scores` changes the scores of
the next tokens; `prompts[r]` is the prompt of row r. Scores are logits in greedy search and log-probabilities in
beam search, as for the logits processors of transformers."""

# on CUDA batches keep their shape for this number of steps, so that a captured step can be replayed
FIXED_STEPS = 32
NEVER = -1.0e9  # added to a score that must not win, as in transformers


@dataclass(frozen=True)
class Generated:
    """One answer."""

    tokens: tuple[int, ...]  # its tokens, including the end token if one was generated
    score: float  # their mean log-probability


def generate(
    logits: Tensor,
    step: Step,
    *,
    end: Sequence[int],
    max_new_tokens: int,
    beams: int = 1,
    length_penalty: float = 1.0,
    early_stopping: bool | Literal["never"] = False,
    on_tokens: OnTokens | None = None,
    process: Process | None = None,
) -> list[Generated]:
    """Continue prompts until an end token or `max_new_tokens`.

    Args:
        logits: the logits of the first new token, one row a prompt: [prompts, vocabulary].
        step: computes the logits of the next token; see `Step`.
        end: the tokens that end an answer.
        max_new_tokens: the largest number of new tokens a prompt.
        beams: 1 is greedy search.
        length_penalty: a finished beam's score is its summed log-probability / length ** length_penalty.
        early_stopping: as in transformers: True stops a prompt once it has `beams` finished answers, False
            when its best running beam cannot win at its present length, "never" when it cannot win at any
            length.
        on_tokens: called with each step's tokens. Not called with several beams, since the best beam is known
            only at the end.
        process: changes the scores of the next tokens; scores of answers are then those that it gives.
    """
    assert beams >= 1 and max_new_tokens >= 1, "at least one beam and one token"
    if beams == 1:
        return greedy(logits, step, end=end, max_new_tokens=max_new_tokens, on_tokens=on_tokens, process=process)
    return beam_search(
        logits,
        step,
        end=end,
        max_new_tokens=max_new_tokens,
        beams=beams,
        length_penalty=length_penalty,
        early_stopping=early_stopping,
        process=process,
    )


def greedy(
    logits: Tensor,
    step: Step,
    *,
    end: Sequence[int],
    max_new_tokens: int,
    on_tokens: OnTokens | None = None,
    process: Process | None = None,
) -> list[Generated]:
    """Take the most likely token at every step; arguments as for `generate`.

    Nothing here makes the host wait for a step that it has just launched. What follows an answer's end is
    discarded, so that the answers do not depend on how late the host learns of it.
    """
    ends, lag, interval = frozenset(end), *_pace(logits.device)
    prompts = list(range(len(logits)))  # the prompt of each row of the batch
    answers: list[list[int]] = [[] for _ in prompts]
    totals = [0.0 for _ in prompts]  # summed log-probabilities
    done = [False for _ in prompts]
    tokens = torch.empty(len(prompts), 0, dtype=torch.long, device=logits.device)  # written so far
    copies = _HostCopies(max_new_tokens, len(prompts), logits.device)
    for position in range(max_new_tokens):
        wide = logits.float()
        if process is not None:
            wide = process(prompts, tokens, wide)
        token = wide.argmax(-1)
        # log_softmax of the chosen token only, without a tensor of the vocabulary's size
        copies.add(prompts, token, wide.gather(-1, token[:, None])[:, 0] - wide.logsumexp(-1))
        last = position + 1 == max_new_tokens
        for rows in copies.arrived(0 if last else lag):
            going = [row for row in rows if not done[row[0]]]
            for prompt, token_id, log_prob in going:
                answers[prompt].append(token_id)
                totals[prompt] += log_prob
                done[prompt] = token_id in ends
            if on_tokens is not None and going:
                on_tokens([prompt for prompt, _, _ in going], [token_id for _, token_id, _ in going])
        if last or all(done):
            break
        cache_rows = None
        if process is not None:
            tokens = torch.cat((tokens, token[:, None]), 1)
        remaining = [row for row, prompt in enumerate(prompts) if not done[prompt]]
        if len(remaining) < len(prompts) and (position + 1) % interval == 0:
            cache_rows = torch.tensor(remaining, device=logits.device)
            prompts, token = [prompts[row] for row in remaining], token[cache_rows]
            tokens = tokens[cache_rows]
        logits = step(token, cache_rows)
    return _generated(answers, totals)


def _pace(device: torch.device) -> tuple[int, int]:
    """How closely the host follows the device in greedy search.

    Returns:
        (how many steps may be under way when the host reads a token; every how many steps the rows of prompts
        that are done leave the batch). A step on CUDA is bound by launches, so the host runs ahead by one
        step and batches keep their shape. A CPU saves work with every row.
    """
    return (1, FIXED_STEPS) if device.type == "cuda" else (0, 1)


class _HostCopies:
    """The chosen tokens of each step and their log-probabilities, copied to the host in the background."""

    def __init__(self, steps: int, rows: int, device: torch.device) -> None:
        self.device, self.cuda = device, device.type == "cuda"  # copies are asynchronous into pinned memory only
        self.tokens = torch.empty(steps, rows, dtype=torch.long, pin_memory=self.cuda)
        self.log_probs = torch.empty(steps, rows, pin_memory=self.cuda)
        self.steps = 0
        self.pending: deque[tuple[int, list[int], torch.cuda.Event | None]] = deque()

    def add(self, prompts: list[int], token: Tensor, log_prob: Tensor) -> None:
        """Begin to copy the token [rows] and log-probability [rows] of a step's prompts."""
        self.tokens[self.steps, : len(prompts)].copy_(token, non_blocking=True)
        self.log_probs[self.steps, : len(prompts)].copy_(log_prob, non_blocking=True)
        event = torch.cuda.Event() if self.cuda else None
        if event is not None:
            event.record(torch.cuda.current_stream(self.device))
        self.pending.append((self.steps, prompts, event))
        self.steps += 1

    def arrived(self, lag: int) -> Iterator[list[tuple[int, int, float]]]:
        """Yield the (prompt, token, log-probability) of each row, step by step, except for the last `lag`."""
        while len(self.pending) > lag:
            step, prompts, event = self.pending.popleft()
            if event is not None:
                event.synchronize()
            tokens, log_probs = (values[step, : len(prompts)].tolist() for values in (self.tokens, self.log_probs))
            yield list(zip(prompts, tokens, log_probs, strict=True))


def beam_search(
    logits: Tensor,
    step: Step,
    *,
    end: Sequence[int],
    max_new_tokens: int,
    beams: int,
    length_penalty: float = 1.0,
    early_stopping: bool | Literal["never"] = False,
    process: Process | None = None,
) -> list[Generated]:
    """Find the best of `beams` running answers a prompt; arguments as for `generate`."""
    device, prompts, vocabulary = logits.device, logits.shape[0], logits.shape[1]
    ends = torch.tensor(list(end), device=device)
    # enough candidates that `beams` remain even if every beam's best ones are end tokens
    candidates = max(2, 1 + len(end)) * beams
    among_best = torch.arange(candidates, device=device) < beams  # candidates are sorted by score

    best = torch.full((prompts, max_new_tokens), -1, device=device)  # results, updated in every step
    best_score = torch.zeros(prompts, device=device)
    active = torch.arange(prompts, device=device)  # the prompts that are not done
    # the following tensors have one row for each active prompt
    running = torch.full((prompts, beams, max_new_tokens), -1, device=device)
    running_score = torch.full((prompts, beams), NEVER, device=device)
    running_score[:, 0] = 0.0  # only the first beam counts in the first step, since all beams are the same
    finished = running.clone()
    finished_score = torch.full((prompts, beams), NEVER, device=device)
    is_finished = torch.zeros((prompts, beams), dtype=torch.bool, device=device)
    improvable = torch.ones((prompts, 1), dtype=torch.bool, device=device)

    width = 1  # rows a prompt in the cache: one before the first step, then `beams`
    for position in range(max_new_tokens):
        count = len(active)
        # scores of all continuations of all beams: [count, width, vocabulary]
        log_probs = logits.float().log_softmax(-1)
        if process is not None:
            owners = active.repeat_interleave(width).tolist()
            log_probs = process(owners, running[:, :width, :position].flatten(0, 1), log_probs)
        log_probs = log_probs.view(count, width, vocabulary) + running_score[:, :, None]
        score, flat = log_probs.view(count, -1).topk(candidates)  # [prompts, candidates]
        parent, token = flat // vocabulary, flat % vocabulary  # beam and token of each candidate
        continued = _take(running, parent)  # [prompts, candidates, max_new_tokens]
        continued[:, :, position] = token
        stops = torch.isin(token, ends)
        if position + 1 == max_new_tokens:
            stops = torch.ones_like(stops)

        # running beams: the best that have not ended
        running_all = score + stops * NEVER
        order = running_all.topk(beams).indices
        running, running_score = _take(continued, order), running_all.gather(1, order)
        next_token, parent = token.gather(1, order), parent.gather(1, order)

        # finished answers: those that ended among the best `beams` candidates join, if they score higher
        joins = stops & among_best
        penalised = score / (position + 1) ** length_penalty
        if early_stopping is True:
            penalised = penalised + is_finished.all(1, keepdim=True) * NEVER
        penalised = penalised + ~improvable * NEVER + ~joins * NEVER
        finished_score, order = torch.cat((finished_score, penalised), 1).topk(beams)
        finished = _take(torch.cat((finished, continued), 1), order)
        is_finished = torch.cat((is_finished, joins), 1).gather(1, order)
        best[active], best_score[active] = finished[:, 0], finished_score[:, 0]

        # which prompts can still improve: a running beam's best possible score beats a finished answer
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
        if not bool(going.all()):
            active, running, running_score = active[going], running[going], running_score[going]
            finished, finished_score, is_finished = finished[going], finished_score[going], is_finished[going]
            improvable, next_token, cache_rows = improvable[going], next_token[going], cache_rows[going]
        width = beams
        logits = step(next_token.flatten(), cache_rows.flatten())
    lengths = (best >= 0).sum(1)
    # undo the length penalty: `Generated.score` is a mean log-probability
    totals = (best_score * lengths ** float(length_penalty)).tolist()
    answers = [[token for token in row if token >= 0] for row in best.tolist()]  # without the fill value
    return _generated(answers, totals)


def _generated(answers: Sequence[list[int]], totals: Sequence[float]) -> list[Generated]:
    """Answers from their tokens and summed log-probabilities."""
    return [Generated(tuple(row), total / len(row)) for row, total in zip(answers, totals, strict=True)]


def _take(beams: Tensor, index: Tensor) -> Tensor:
    """Select beams of each prompt: beams [prompts, n, length], index [prompts, m] -> [prompts, m, length]."""
    return beams.take_along_dim(index[:, :, None], 1)
