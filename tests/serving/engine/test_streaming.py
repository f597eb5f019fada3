"""Streamed answers: each text extends the one before, and the last is the whole answer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders
from tokenizers import models as token_models
from transformers import BertTokenizer, PreTrainedTokenizerFast

from normtune.data.groups import Group
from normtune.models.family import Family
from normtune.models.loading import load
from normtune.models.types import Answer
from normtune.serving.engine.engine import Engine
from normtune.serving.engine.stable_text import before_stop, cut_at_stop, stable_text
from tests.serving.engine.test_engine import WAIT, answer_with, request
from tests.support.tiny_models import bpe_tokenizer, make_tiny

MAX_TOKENS = 12


def grows(texts: Sequence[str], whole: str) -> bool:
    """Return whether each text extends the one before, and the last is `whole`."""
    pairs = zip(["", *texts], [*texts, whole + "."], strict=True)
    return texts[-1] == whole and all(len(after) > len(before) and after.startswith(before) for before, after in pairs)


@pytest.mark.parametrize("kind", ["miss", "llava"])
def test_streamed_and_other_requests_share_a_batch(kind: str, base: Path, tmp_path: Path) -> None:
    family = load(str(base if kind == "miss" else make_tiny(kind, tmp_path)))
    sent_texts: dict[int, list[str]] = {number: [] for number in (0, 2, 4)}
    with Engine(family, max_batch=5, max_wait=WAIT) as engine:
        futures = [
            engine.submit(
                request(number, None, max_new_tokens=MAX_TOKENS),
                on_text=sent_texts[number].append if number in sent_texts else None,
            )
            for number in range(5)
        ]
        replies = [future.result(WAIT) for future in futures]
        assert engine.stats().batches == 1
    for number, reply in enumerate(replies):
        assert reply.text == answer_with(family, number, max_new_tokens=MAX_TOKENS).text
    assert all(grows(texts, replies[number].text) for number, texts in sent_texts.items())
    assert max(map(len, sent_texts.values())) > 3, "several pieces"


def test_an_answer_with_a_threshold_is_sent_whole_or_not_at_all(family: Family) -> None:
    confidence = answer_with(family, 0, max_new_tokens=MAX_TOKENS).confidence
    assert confidence is not None and 0 < confidence < 1
    for factor in (0.9, 1.1):
        texts: list[str] = []
        with Engine(family, max_wait=0) as engine:
            unsure = replace(request(0, None, max_new_tokens=MAX_TOKENS), abstain_below=min(1.0, factor * confidence))
            reply = engine.submit(unsure, on_text=texts.append).result(WAIT)
            assert engine.stats().abstained == int(reply.abstained) == int(factor > 1)
        assert texts == ([] if reply.abstained else [reply.text]) and bool(reply.text) != reply.abstained
        assert reply.score is not None


def test_a_request_cannot_be_cancelled_during_its_batch(family: Family) -> None:
    texts: list[str] = []
    with Engine(family, max_batch=2, max_wait=WAIT) as engine:

        def try_to_cancel(text: str) -> None:
            texts.append(text)
            assert not future.cancel()

        future = engine.submit(request(0, None, max_new_tokens=MAX_TOKENS), on_text=try_to_cancel)
        other = engine.submit(request(1, None, max_new_tokens=MAX_TOKENS))
        text = future.result(WAIT).text
        assert len(texts) > 1 and grows(texts, text) and other.result(WAIT).text
        assert engine.stats().cancelled == 0


def interrupted(family: Family, change: Callable[[int], int]) -> Callable[..., list[list[Answer]]]:
    """Return a `generate_answers` that runs out of memory after three tokens if a batch has several groups.

    Args:
        change: applied to the tokens that such a batch reports.
    """
    generate_answers = family.generate_answers

    def interrupted_answers(
        groups: Sequence[Group], pixels: Any, *, on_tokens: Any = None, **options: Any
    ) -> list[list[Answer]]:
        steps = 0

        def first_three(prompts: Sequence[int], tokens: Sequence[int]) -> None:
            nonlocal steps
            steps += 1
            if steps > 3:
                raise torch.OutOfMemoryError("too many")
            on_tokens(prompts, [change(token) for token in tokens])

        return generate_answers(groups, pixels, on_tokens=first_three if len(groups) > 1 else on_tokens, **options)

    return interrupted_answers


def test_a_batch_that_is_retried_in_halves_sends_no_text_twice(family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(family, "generate_answers", interrupted(family, lambda token: token))
    sent_texts: list[list[str]] = [[], []]
    with Engine(family, max_batch=2, max_wait=WAIT) as engine:
        futures = [
            engine.submit(request(number, None, max_new_tokens=MAX_TOKENS), on_text=texts.append)
            for number, texts in enumerate(sent_texts)
        ]
        replies = [future.result(WAIT) for future in futures]
        assert engine.stats().batches == 2
    assert all(grows(texts, reply.text) for texts, reply in zip(sent_texts, replies, strict=True))


def test_an_answer_that_contradicts_the_sent_text_fails(family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sent text cannot be taken back, so the client must not receive a reply that differs from it."""
    tokenizer = family.processor.tokenizer
    monkeypatch.setattr(family, "generate_answers", interrupted(family, lambda token: tokenizer.vocab["!"]))
    with Engine(family, max_batch=2, max_wait=WAIT) as engine:
        streamed = engine.submit(request(0, None, max_new_tokens=MAX_TOKENS), on_text=lambda text: None)
        not_streamed = engine.submit(request(1, None, max_new_tokens=MAX_TOKENS))
        with pytest.raises(RuntimeError, match="the answer changed"):
            streamed.result(WAIT)
        text = not_streamed.result(WAIT).text
    monkeypatch.undo()
    assert text == answer_with(family, 1, max_new_tokens=MAX_TOKENS).text


def test_a_stop_text_cuts_the_answer_whole_and_streamed(family: Family) -> None:
    """The stop texts begin and end within tokens; the text after them is never sent."""
    answer = answer_with(family, 0, max_new_tokens=MAX_TOKENS)
    middle = len(answer.text) // 2
    stops = [answer.text[middle : middle + size] for size in (1, 4, 9)] + [answer.text, "not in the answer"]
    sent_texts: list[list[str]] = [[] for _ in stops]
    with Engine(family, max_batch=len(stops), max_wait=WAIT) as engine:
        futures = [
            engine.submit(request(0, None, max_new_tokens=MAX_TOKENS, stop=("\0", stop)), on_text=texts.append)
            for stop, texts in zip(stops, sent_texts, strict=True)
        ]
        replies = [future.result(WAIT) for future in futures]
        assert engine.stats().batches == 1
    for stop, texts, reply in zip(stops, sent_texts, replies, strict=True):
        before, separator, _ = answer.text.partition(stop)
        assert reply.text == before and grows(texts or [""], before) if before else not texts
        assert (reply.score is None) == bool(separator)
        if separator:
            assert reply.finish_reason == "stop" and 1 <= reply.completion_tokens <= len(answer.tokens)
            assert stop in family.decode_answer(answer.tokens[: reply.completion_tokens])
        else:
            assert reply.completion_tokens == len(answer.tokens)


@settings(max_examples=300)
@given(st.text("ab", max_size=9), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3))
@example("abc", ["bc", "abcd"])
def test_a_stream_never_sends_text_that_a_stop_text_removes(text: str, stop: list[str]) -> None:
    cuts = [cut_at_stop(text[:size], stop) for size in range(len(text) + 1)]
    first = next((cut for cut in cuts if cut is not None), None)
    assert cut_at_stop(text, stop) == first, "the stop text that is complete first counts"
    whole = text if first is None else first
    assert all(sequence not in whole for sequence in stop)
    sent = [before_stop(text[:size], stop) for size in range(len(text) + 1)]
    assert all(after.startswith(before) for before, after in pairwise(sent)) and whole.startswith(sent[-1])


# --- stable_text --------------------------------------------------------------------------------------------


@cache
def family_with_tokenizer(kind: str) -> Any:
    """Return a stand-in for a family that has all that `stable_text` uses, with a tokenizer of that kind."""
    tokenizer: Any
    if kind == "bytes":  # as Qwen's
        tokenizer = bpe_tokenizer(["<end>"], sentencepiece=False, eos_token="<end>")
    elif kind == "sentencepiece":  # as LLaMA's: characters outside the vocabulary become bytes
        pieces = ["<unk>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *"▁abé."]
        model = token_models.BPE(
            {piece: number for number, piece in enumerate(pieces)}, [], byte_fallback=True, unk_token="<unk>"
        )
        inner = Tokenizer(model)
        inner.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", eos_token="</s>")
    else:  # as BERT's, with transformers' clean-up of blanks or without
        words = "x do n ##n t ##t ' ##' . ? n't 's ve v e ##ve ##e é 心"
        pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words.split()]
        vocab = {piece: number for number, piece in enumerate(pieces)}
        tokenizer = BertTokenizer(vocab=vocab, clean_up_tokenization_spaces=kind == "cleaned")
    family = SimpleNamespace(processor=SimpleNamespace(tokenizer=tokenizer))
    family.decode_answer = lambda tokens: Family.decode_answer(family, tokens)
    return family


KINDS = ("bytes", "sentencepiece", "wordpiece", "cleaned")


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=150)
@given(data=st.data())
def test_stable_text_is_a_prefix_of_all_continuations(kind: str, data: st.DataObject) -> None:
    family = family_with_tokenizer(kind)
    tokens = data.draw(st.lists(st.integers(0, len(family.processor.tokenizer) - 1), max_size=14))
    whole, before = family.decode_answer(tokens), ""
    for count in range(len(tokens) + 1):
        text = stable_text(family, tokens[:count])
        assert text.startswith(before) and whole.startswith(text)
        before = text


@settings(max_examples=100)
@given(st.text("aé.€ 心🩻", max_size=12), st.sampled_from(["bytes", "sentencepiece"]))
@example("a🩻a", "bytes")
@example("a🩻a", "sentencepiece")
def test_stable_text_has_no_partial_characters(text: str, kind: str) -> None:
    family = family_with_tokenizer(kind)
    tokens = family.processor.tokenizer(text, add_special_tokens=False).input_ids
    texts = [stable_text(family, tokens[:count]) for count in range(len(tokens) + 1)]
    assert all("\ufffd" not in prefix and text.strip().startswith(prefix) for prefix in texts)
    assert family.decode_answer(tokens) == text.strip()


def test_bytes_are_held_back_until_the_run_ends() -> None:
    """One more byte can make a decoder replace the whole run of bytes."""
    family = family_with_tokenizer("sentencepiece")
    vocab = family.processor.tokenizer.get_vocab()
    run = [vocab[f"<0x{byte:02X}>"] for byte in "€".encode()]
    assert family.decode_answer(run) == "€" and stable_text(family, [vocab["a"], *run]) == "a"
    assert stable_text(family, [*run, vocab["a"]]) == "€a"
    assert stable_text(family, [*run, run[0], vocab["a"]]) == "\ufffd" * 4 + "a"


def test_blanks_that_the_clean_up_may_remove_are_held_back() -> None:
    family = family_with_tokenizer("cleaned")
    vocab = family.processor.tokenizer.vocab
    tokens = [vocab[piece] for piece in ("x", "do", "n", "'", "t", "x", "x", "x")]
    texts = [stable_text(family, tokens[:count]) for count in range(1, len(tokens) + 1)]
    assert family.decode_answer(tokens[:5]) == "x don't" and "x do n" not in texts
    assert texts[-1] == "x don'" and family.decode_answer(tokens) == "x don't x x x"
