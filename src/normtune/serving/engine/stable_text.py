"""The part of a half-written answer that no further token can change, and where a stop text ends an answer."""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Sequence
from typing import Any

from normtune.models.family import Family
from normtune.models.types import Answer, FinishReason

# A token that is a single byte, as SentencePiece tokenizers write characters outside their vocabulary.
_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")
# What decoders write for bytes that are not (or not yet) a valid character.
_REPLACEMENT_CHARACTER = "\ufffd"
# The last four non-blank characters: transformers' clean-up may still remove a blank among them.
_CLEANED_END = re.compile(r"(\s*\S){0,4}\s*\Z")


def stable_text(family: Family, tokens: Sequence[int]) -> str:
    """Return the longest known prefix that all answers starting with `tokens` share.

    A stream may send this text at once: no later token changes it. All tokens are decoded again at every
    call, because the blank before a token and the meaning of a byte depend on the tokens before it.
    Three things are held back:

    - single-byte tokens at the end, until a token of another kind follows: a decoder reads a run of bytes
      as characters only if the whole run is well-formed;
    - incomplete characters, and trailing blanks, which are stripped if the answer ends there;
    - the last four letters, if the tokenizer removes blanks before punctuation (" n't", " ."): whether a
      blank stays depends on at most that many letters.
    """
    tokenizer: Any = family.processor.tokenizer
    text = family.decode_answer(tokens[: _count_before_bytes(tokenizer, tokens)]).rstrip(_REPLACEMENT_CHARACTER)
    if tokenizer.clean_up_tokenization_spaces:
        text = _CLEANED_END.sub("", text, count=1)
    return text.rstrip()


def cut_at_stop(text: str, stop: Sequence[str]) -> str | None:
    """Return the text before the stop text that is complete first; None if it contains none.

    If two are complete at the same character, the longer one counts.
    """
    spans = [(start + len(sequence), start) for sequence in stop if (start := text.find(sequence)) >= 0]
    return text[: min(spans)[1]] if spans else None


def finish_answer(family: Family, answer: Answer, stop: Sequence[str]) -> tuple[str, int, FinishReason]:
    """Cut an answer at its first stop text: its text, number of tokens (with the stop text) and finish reason."""
    if (text := cut_at_stop(answer.text, stop)) is not None:

        def is_cut(count: int) -> bool:
            return cut_at_stop(family.decode_answer(answer.tokens[:count]), stop) is not None

        return text, bisect_left(range(len(answer.tokens)), True, key=is_cut), "stop"
    return answer.text, len(answer.tokens), answer.finish_reason


def before_stop(text: str, stop: Sequence[str]) -> str:
    """Return the part of a text that no stop text can remove, whatever follows: for a stream."""
    cut = cut_at_stop(text, stop)
    if cut is not None:
        return cut
    begun = [size for sequence in stop for size in range(1, len(sequence)) if text.endswith(sequence[:size])]
    return text[: len(text) - max(begun, default=0)]


def _count_before_bytes(tokenizer: Any, tokens: Sequence[int]) -> int:
    """Return how many tokens precede the single-byte tokens at the end.

    Special tokens are not part of the text, so they do not interrupt a run of bytes.
    """
    special = frozenset(tokenizer.all_special_ids)
    count = len(tokens)
    for index in reversed(range(len(tokens))):
        if tokens[index] in special:
            continue
        if not _BYTE.fullmatch(tokenizer.convert_ids_to_tokens(tokens[index]) or ""):
            break
        count = index
    return count
