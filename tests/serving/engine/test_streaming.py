"""Answers are told as they are written: each text goes on from the one before, and the last is the answer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
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
from normtune.serving.engine.stable_text import stable_text
from tests.serving.engine.test_engine import WAIT, alone, request
from tests.support.tiny_models import bpe_tokenizer, make_tiny

LONG = 12  # tokens


def grows(texts: Sequence[str], whole: str) -> bool:
    """Whether each text goes on from the one before, up to the whole."""
    pairs = zip(["", *texts], [*texts, whole + "."], strict=True)
    return texts[-1] == whole and all(
        len(after) > len(before) and after.startswith(before) for before, after in pairs
    )


@pytest.mark.parametrize("kind", ["miss", "llava"])
def test_texts_grow_to_the_answers_beside_requests_to_which_nobody_listens(
    kind: str, base: Path, tmp_path: Path
) -> None:
    family = load(str(base if kind == "miss" else make_tiny(kind, tmp_path)))
    told: dict[int, list[str]] = {number: [] for number in (0, 2, 4)}
    with Engine(family, max_batch=5, max_wait=WAIT) as engine:
        futures = [
            engine.submit(
                request(number, None, max_new_tokens=LONG),
                on_text=told[number].append if number in told else None,
            )
            for number in range(5)
        ]
        replies = [future.result(WAIT) for future in futures]
        assert engine.stats().batches == 1
    for number, reply in enumerate(replies):
        assert reply.text == alone(family, number, max_new_tokens=LONG).text
    assert all(grows(texts, replies[number].text) for number, texts in told.items())
    assert max(map(len, told.values())) > 3, "several pieces"


def test_a_request_of_a_client_that_left_during_its_batch_is_written_to_its_end(family: Family) -> None:
    texts: list[str] = []
    with Engine(family, max_batch=2, max_wait=WAIT) as engine:

        def leaving(text: str) -> None:
            texts.append(text)
            assert not future.cancel()

        future = engine.submit(request(0, None, max_new_tokens=LONG), on_text=leaving)
        other = engine.submit(request(1, None, max_new_tokens=LONG))
        whole = future.result(WAIT).text
        assert len(texts) > 1 and grows(texts, whole) and other.result(WAIT).text
        assert engine.stats().cancelled == 0


def interrupted(family: Family, change: Callable[[int], int]) -> Callable[..., list[list[Answer]]]:
    """`family.answer` where batches of several groups run out of memory after three tokens.

    `change` is what becomes of the tokens that are told in such a batch.
    """
    plain = family.generate_answers

    def answer(
        groups: Sequence[Group], pixels: Any, *, on_tokens: Any = None, **options: Any
    ) -> list[list[Answer]]:
        steps = 0

        def first_three(prompts: Sequence[int], tokens: Sequence[int]) -> None:
            nonlocal steps
            steps += 1
            if steps > 3:
                raise torch.OutOfMemoryError("too many")
            on_tokens(prompts, [change(token) for token in tokens])

        return plain(groups, pixels, on_tokens=first_three if len(groups) > 1 else on_tokens, **options)

    return answer


def test_a_batch_that_is_tried_again_in_halves_tells_nothing_twice(
    family: Family, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(family, "generate_answers", interrupted(family, lambda token: token))
    told: list[list[str]] = [[], []]
    with Engine(family, max_batch=2, max_wait=WAIT) as engine:
        futures = [
            engine.submit(request(number, None, max_new_tokens=LONG), on_text=texts.append)
            for number, texts in enumerate(told)
        ]
        replies = [future.result(WAIT) for future in futures]
        assert engine.stats().batches == 2
    assert all(grows(texts, reply.text) for texts, reply in zip(told, replies, strict=True))


def test_an_answer_that_comes_out_otherwise_than_it_was_told_is_no_answer(
    family: Family, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing can be taken back, and a text that nobody wrote must not stand."""
    pieces = family.processor.tokenizer
    monkeypatch.setattr(family, "generate_answers", interrupted(family, lambda token: pieces.vocab["!"]))
    with Engine(family, max_batch=2, max_wait=WAIT) as engine:
        heard = engine.submit(request(0, None, max_new_tokens=LONG), on_text=lambda text: None)
        unheard = engine.submit(request(1, None, max_new_tokens=LONG))
        with pytest.raises(RuntimeError, match="came out otherwise"):
            heard.result(WAIT)
        text = unheard.result(WAIT).text
    monkeypatch.undo()
    assert text == alone(family, 1, max_new_tokens=LONG).text


# --- what of a text is settled ------------------------------------------------------------------------------


@cache
def spoken_by(kind: str) -> Any:
    """What `settled` needs of a family, with a tokenizer of that kind."""
    tokenizer: Any
    if kind == "bytes":  # as Qwen's
        tokenizer = bpe_tokenizer(["<end>"], sentencepiece=False, eos_token="<end>")
    elif kind == "sentencepiece":  # as LLaMA's: characters that it lacks are written as bytes
        pieces = ["<unk>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *"▁abé."]
        model = token_models.BPE(
            {piece: number for number, piece in enumerate(pieces)}, [], byte_fallback=True, unk_token="<unk>"
        )
        inner = Tokenizer(model)
        inner.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        )
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", eos_token="</s>")
    else:  # as BERT's, with transformers' clean-up of blanks or without
        words = "x do n ##n t ##t ' ##' . ? n't 's ve v e ##ve ##e é 心"
        pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words.split()]
        vocab = {piece: number for number, piece in enumerate(pieces)}
        tokenizer = BertTokenizer(vocab=vocab, clean_up_tokenization_spaces=kind == "cleaned")
    found = SimpleNamespace(processor=SimpleNamespace(tokenizer=tokenizer))
    found.decode_answer = lambda tokens: Family.decode_answer(found, tokens)
    return found


KINDS = ("bytes", "sentencepiece", "wordpiece", "cleaned")


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_whatever_tokens_come_next_what_is_told_stays(kind: str, data: st.DataObject) -> None:
    family = spoken_by(kind)
    tokens = data.draw(st.lists(st.integers(0, len(family.processor.tokenizer) - 1), max_size=14))
    whole, before = family.decode_answer(tokens), ""
    for count in range(len(tokens) + 1):
        text = stable_text(family, tokens[:count])
        assert text.startswith(before) and whole.startswith(text)
        before = text


@settings(max_examples=100, deadline=None)
@given(st.text("aé.€ 心🩻", max_size=12), st.sampled_from(["bytes", "sentencepiece"]))
@example("a🩻a", "bytes")
@example("a🩻a", "sentencepiece")
def test_no_character_is_told_in_parts(text: str, kind: str) -> None:
    family = spoken_by(kind)
    tokens = family.processor.tokenizer(text, add_special_tokens=False).input_ids
    told = [stable_text(family, tokens[:count]) for count in range(len(tokens) + 1)]
    assert all("\ufffd" not in one and text.strip().startswith(one) for one in told)
    assert family.decode_answer(tokens) == text.strip()


def test_bytes_that_turn_out_to_be_no_character_were_not_told_as_one() -> None:
    """One byte more, and a decoder takes back the whole run."""
    family = spoken_by("sentencepiece")
    vocab = family.processor.tokenizer.get_vocab()
    run = [vocab[f"<0x{byte:02X}>"] for byte in "€".encode()]
    assert family.decode_answer(run) == "€" and stable_text(family, [vocab["a"], *run]) == "a"
    assert stable_text(family, [*run, vocab["a"]]) == "€a"
    assert stable_text(family, [*run, run[0], vocab["a"]]) == "\ufffd" * 4 + "a"


def test_blanks_that_a_clean_up_may_take_away_are_not_told() -> None:
    family = spoken_by("cleaned")
    vocab = family.processor.tokenizer.vocab
    tokens = [vocab[piece] for piece in ("x", "do", "n", "'", "t", "x", "x", "x")]
    told = [stable_text(family, tokens[:count]) for count in range(1, len(tokens) + 1)]
    assert family.decode_answer(tokens[:5]) == "x don't" and "x do n" not in told
    assert told[-1] == "x don'" and family.decode_answer(tokens) == "x don't x x x"
