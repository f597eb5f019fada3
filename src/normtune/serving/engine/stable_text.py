"""The text of an answer while it is written: only what no further token can change."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from normtune.models.family import Family

_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")  # a token that is one byte, of sentencepiece's tokenizers
_BROKEN = "\ufffd"  # what decoders write for bytes that are no character, or not a whole one yet
_REWRITTEN = re.compile(r"(\s*\S){0,4}\s*\Z")  # where transformers' clean-up of blanks may change its mind


def stable_text(family: Family, tokens: Sequence[int]) -> str:
    """The beginning of an answer whose first tokens are these that every way of going on has in common.

    All tokens are decoded anew, as the family decodes an answer: whether a token stands with a blank before
    it, and what its bytes are, depends on those before. Held back are

    - tokens that are single bytes, until another follows: decoders read a run of them as characters only if
      all of it is well-formed;
    - characters that are not whole, and blanks, which are stripped where the answer ends;
    - where the tokenizer takes blanks away before signs (" n't", " ."), the last four letters: whether a
      blank stays depends on at most so many.
    """
    tokenizer: Any = family.processor.tokenizer
    text = family.decode_answer(tokens[: _before_bytes(tokenizer, tokens)]).rstrip(_BROKEN)
    if tokenizer.clean_up_tokenization_spaces:
        text = _REWRITTEN.sub("", text, count=1)
    return text.rstrip()


def _before_bytes(tokenizer: Any, tokens: Sequence[int]) -> int:
    """How many tokens stand before the bytes at the end; special tokens, which are left out, end no run."""
    special = frozenset(tokenizer.all_special_ids)
    found = len(tokens)
    for place in reversed(range(len(tokens))):
        if tokens[place] in special:
            continue
        if not _BYTE.fullmatch(tokenizer.convert_ids_to_tokens(tokens[place]) or ""):
            break
        found = place
    return found
