"""Greedy and beam search against transformers' `generate()`, and against the best of all answers."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any, Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from normtune.models import generation
from normtune.models.generation import Generated, Step, generate
from tests.support.base_models import CACHE_ARGUMENT
from tests.support.tolerance import approx

VOCABULARY = 11
Early = bool | Literal["never"]


@pytest.fixture(scope="module")
def llama() -> LlamaForCausalLM:
    """A tiny LLaMA with large logits, so that answers differ in length and beams cross."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, parameter.shape[1] ** -0.5)
        model.lm_head.weight.mul_(1.3)
    return model


PROMPTS = torch.randint(2, VOCABULARY, (32, 4), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def ours(model: LlamaForCausalLM, sizes: list[int] | None = None, **options: Any) -> list[Generated]:
    """`generate` over the model with its own cache; `sizes` collects the rows of each step."""
    cache = DynamicCache(config=model.config)
    first = model(PROMPTS, use_cache=True, **{CACHE_ARGUMENT: cache}).logits[:, -1]

    def step(tokens: Tensor, rows: Tensor | None) -> Tensor:
        if rows is not None:
            cache.reorder_cache(rows)
        if sizes is not None:
            sizes.append(len(tokens))
        return model(tokens[:, None], use_cache=True, **{CACHE_ARGUMENT: cache}).logits[:, -1]

    return generate(first, step, **options)


def theirs(
    model: LlamaForCausalLM, end: list[int], max_new_tokens: int, beams: int = 1, **options: Any
) -> tuple[list[tuple[int, ...]], list[float] | None]:
    """transformers' answers, cut after their end, and its scores (beams only)."""
    output = model.generate(
        PROMPTS,
        attention_mask=torch.ones_like(PROMPTS),
        do_sample=False,
        num_beams=beams,
        eos_token_id=end,
        pad_token_id=0,
        bos_token_id=None,
        max_new_tokens=max_new_tokens,
        return_dict_in_generate=True,
        output_scores=True,
        **options,
    )
    answers = []
    for row in output.sequences[:, PROMPTS.shape[1] :].tolist():
        length = next((i + 1 for i, token in enumerate(row) if token in end), len(row))
        answers.append(tuple(row[:length]))
    return answers, output.sequences_scores.tolist() if beams > 1 else None


@pytest.mark.parametrize("end", [[1], [1, 5]])
@pytest.mark.parametrize("max_new_tokens", [1, 7])
def test_greedy_answers_are_those_of_transformers(llama: LlamaForCausalLM, end: list[int], max_new_tokens: int) -> None:
    expected, _ = theirs(llama, end, max_new_tokens)
    generated = ours(llama, end=end, max_new_tokens=max_new_tokens)
    assert [answer.tokens for answer in generated] == expected
    if max_new_tokens > 1:
        assert len({len(answer) for answer in expected}) > 1, "answers of several lengths"


@pytest.mark.parametrize("early_stopping", [False, True, "never"])
@pytest.mark.parametrize("length_penalty", [-1.0, 0.0, 1.0, 2.5])
@pytest.mark.parametrize(("beams", "end"), [(2, [1, 5]), (3, [1]), (3, [1, 5]), (5, [2])])
def test_beam_answers_are_those_of_transformers(
    llama: LlamaForCausalLM, beams: int, end: list[int], length_penalty: float, early_stopping: Early
) -> None:
    options: dict[str, Any] = {"length_penalty": length_penalty, "early_stopping": early_stopping}
    expected, scores = theirs(llama, end, 7, beams, **options)
    generated = ours(llama, end=end, max_new_tokens=7, beams=beams, **options)
    assert [answer.tokens for answer in generated] == expected
    assert scores is not None
    for answer, score in zip(generated, scores, strict=True):
        # transformers' score is the summed log-probability / length ** penalty
        length = len(answer.tokens)
        assert answer.score * length / length**length_penalty == approx(score)


def test_the_early_stopping_variants_differ_here(llama: LlamaForCausalLM) -> None:
    """Otherwise their agreement with transformers, above, would prove little."""
    options: dict[str, Any] = {"end": [1, 5], "max_new_tokens": 7, "beams": 2, "length_penalty": 2.5}
    early: tuple[Early, ...] = (False, True, "never")
    answers = {tuple(a.tokens for a in ours(llama, early_stopping=variant, **options)) for variant in early}
    assert len(answers) == 3


@pytest.mark.parametrize("beams", [2, 3])
def test_one_new_token_is_the_likeliest(llama: LlamaForCausalLM, beams: int) -> None:
    expected, _ = theirs(llama, [1], 1, beams)
    generated = ours(llama, end=[1], max_new_tokens=1, beams=beams)
    assert [answer.tokens for answer in generated] == expected
    assert [answer.tokens for answer in generated] == [a.tokens for a in ours(llama, end=[1], max_new_tokens=1)]


@pytest.mark.parametrize("early_stopping", [False, True, "never"])
@pytest.mark.parametrize("beams", [1, 3])
def test_prompts_that_are_done_leave_the_batch(llama: LlamaForCausalLM, beams: int, early_stopping: Early) -> None:
    options: dict[str, Any] = {"end": [1, 5], "beams": beams, "early_stopping": early_stopping}
    short: list[int] = []
    ours(llama, short, max_new_tokens=8, **options)
    assert short == sorted(short, reverse=True)
    if early_stopping != "never":
        assert sum(short) < len(short) * len(PROMPTS) * beams


# --- tables of log-probabilities, one for each history ------------------------------------------------------

Table = Callable[[tuple[int, ...]], Tensor]


def table_of(seed: int, vocabulary: int) -> Table:
    """history (its first entry is the prompt's number) -> logits, a fixed random table."""
    cached: dict[tuple[int, ...], Tensor] = {}

    def logits(history: tuple[int, ...]) -> Tensor:
        if history not in cached:
            number = hash((seed, *history)) % (2**63)
            cached[history] = 2 * torch.randn(vocabulary, generator=torch.Generator().manual_seed(number))
        return cached[history]

    return logits


def stepping(table: Table, prompts: int) -> tuple[Tensor, Step]:
    """First logits, and a step that remembers the tokens of each row."""
    histories: list[tuple[int, ...]] = [(prompt,) for prompt in range(prompts)]

    def step(tokens: Tensor, rows: Tensor | None) -> Tensor:
        nonlocal histories
        sources = range(len(histories)) if rows is None else rows.tolist()
        histories = [(*histories[row], token) for row, token in zip(sources, tokens.tolist(), strict=True)]
        owners = [history[0] for history in histories]
        assert owners == sorted(owners), "rows of a prompt are adjacent, in the prompts' order"
        return torch.stack([table(history) for history in histories])

    return torch.stack([table(history) for history in histories]), step


def log_probability(table: Table, prompt: int, answer: tuple[int, ...]) -> float:
    reads = [(prompt, *answer[:i]) for i in range(len(answer))]
    return sum(float(table(h).log_softmax(-1)[t]) for h, t in zip(reads, answer, strict=True))


def all_answers(vocabulary: int, longest: int, end: int) -> list[tuple[int, ...]]:
    others = [token for token in range(vocabulary) if token != end]
    complete = [(*start, end) for length in range(longest) for start in itertools.product(others, repeat=length)]
    return complete + list(itertools.product(others, repeat=longest))


@settings(max_examples=40)
@given(
    st.integers(0, 10**6), st.integers(1, 3), st.sampled_from([0.0, 0.5, 1.0, 2.0]), st.sampled_from([False, "never"])
)
def test_enough_beams_find_the_best_of_all_answers(
    seed: int, longest: int, length_penalty: float, early_stopping: Early
) -> None:
    vocabulary, end, prompts = 3, 2, 3
    table = table_of(seed, vocabulary)
    first, step = stepping(table, prompts)
    generated = generate(
        first,
        step,
        end=[end],
        max_new_tokens=longest,
        beams=len(all_answers(vocabulary, longest, end)),
        length_penalty=length_penalty,
        early_stopping=early_stopping,
    )
    for prompt, answer in enumerate(generated):
        scored = {
            candidate: log_probability(table, prompt, candidate) / len(candidate) ** length_penalty
            for candidate in all_answers(vocabulary, longest, end)
        }
        assert scored[answer.tokens] == approx(max(scored.values()))
        mean = log_probability(table, prompt, answer.tokens) / len(answer.tokens)
        assert answer.score == approx(mean)


@settings(max_examples=40)
@given(
    st.integers(0, 10**6),
    st.integers(1, 4),
    st.integers(1, 4),
    st.integers(1, 6),
    st.sampled_from([[0], [0, 1]]),
    st.sampled_from([False, True, "never"]),
    st.floats(-1, 2),
)
def test_answers_end_once_and_are_scored_by_their_own_history(
    seed: int, prompts: int, beams: int, longest: int, end: list[int], early_stopping: Early, penalty: float
) -> None:
    table = table_of(seed, 6)
    first, step = stepping(table, prompts)
    answers = generate(
        first, step, end=end, max_new_tokens=longest, beams=beams, length_penalty=penalty, early_stopping=early_stopping
    )
    assert len(answers) == prompts
    for prompt, answer in enumerate(answers):
        assert 1 <= len(answer.tokens) <= longest
        assert not set(answer.tokens[:-1]) & set(end)
        assert len(answer.tokens) == longest or answer.tokens[-1] in end
        mean = log_probability(table, prompt, answer.tokens) / len(answer.tokens)
        assert answer.score == approx(mean)


def test_a_prompts_answer_does_not_depend_on_its_neighbours() -> None:
    table = table_of(3, 6)
    first, step = stepping(table, 4)
    answers = generate(first, step, end=[0], max_new_tokens=5, beams=3)
    for prompt in range(4):
        shifted: Table = lambda history, p=prompt: table((p, *history[1:]))  # type: ignore[misc]  # noqa: E731
        single_first, single_step = stepping(shifted, 1)
        (answer,) = generate(single_first, single_step, end=[0], max_new_tokens=5, beams=3)
        assert answer.tokens == answers[prompt].tokens


@pytest.mark.parametrize(("lag", "interval"), [(1, 32), (1, 3), (2, 2), (9, 1)])
def test_answers_do_not_depend_on_how_late_the_host_reads_tokens(
    monkeypatch: pytest.MonkeyPatch, lag: int, interval: int
) -> None:
    options: dict[str, Any] = {"end": [0, 1], "max_new_tokens": 8}
    expected = generate(*stepping(table_of(4, 5), 6), **options)
    assert len({len(answer.tokens) for answer in expected}) > 2
    monkeypatch.setattr(generation, "_pace", lambda device: (lag, interval))
    received: list[list[int]] = [[] for _ in range(6)]

    def on_tokens(prompts: Sequence[int], tokens: Sequence[int]) -> None:
        for prompt, token in zip(prompts, tokens, strict=True):
            received[prompt].append(token)

    answers = generate(*stepping(table_of(4, 5), 6), on_tokens=on_tokens, **options)
    assert answers == expected
    assert [tuple(tokens) for tokens in received] == [answer.tokens for answer in expected]


def test_tokens_are_passed_on_as_they_are_chosen() -> None:
    """Each before the next is computed, and none of prompts that are done; beams pass nothing on."""
    received: list[list[int]] = [[] for _ in range(6)]
    longest = 0

    def on_tokens(prompts: Sequence[int], tokens: Sequence[int]) -> None:
        nonlocal longest
        assert len(prompts) == len(tokens) and longest == steps
        longest += 1
        for prompt, token in zip(prompts, tokens, strict=True):
            received[prompt].append(token)

    first, plain = stepping(table_of(4, 5), 6)
    steps = 0

    def step(tokens: Tensor, rows: Tensor | None) -> Tensor:
        nonlocal steps
        steps += 1
        return plain(tokens, rows)

    options: dict[str, Any] = {"end": [0, 1], "max_new_tokens": 6}
    generated = generate(first, step, on_tokens=on_tokens, **options)
    assert [tuple(tokens) for tokens in received] == [answer.tokens for answer in generated]
    assert len({len(tokens) for tokens in received}) > 2
    first, plain = stepping(table_of(4, 5), 6)
    generate(first, plain, beams=2, on_tokens=lambda *_: pytest.fail("beams pass nothing on"), **options)


def test_a_whole_number_below_zero_is_a_length_penalty_too() -> None:
    first, step = stepping(table_of(1, 6), 2)
    generated = generate(first, step, end=[0], max_new_tokens=4, beams=2, length_penalty=-1)
    assert all(answer.score < 0 for answer in generated)


def test_half_precision_logits_are_scored_in_fp32() -> None:
    logits = torch.tensor([[1.0, 2.0, 0.5]], dtype=torch.bfloat16)
    (answer,) = generate(logits, lambda tokens, rows: logits, end=[1], max_new_tokens=3)
    assert answer.tokens == (1,)
    assert answer.score == approx(float(logits.float().log_softmax(-1)[0, 1]))
