"""Tokenises texts into the words that coco-caption counts, without Java.

coco-caption tokenises a caption with Stanford's PTBTokenizer (version 3.4.1, lower case) and then removes 15
punctuation tokens. The rules in this file give the same words on radiology reports, where the rare cases of
that tokeniser (URLs, smileys, SGML, fractions of two words) hardly occur. docs/metrics.md reports how often
the two differ. Two oddities are reproduced because published figures contain them: parentheses become the
*words* "-lrb-" and "-rrb-", and full stops between letters do not end a word ("effusion.No" is one word).
"""

from __future__ import annotations

import re

# Punctuation tokens that coco-caption removes.
DROPPED = frozenset(['"', "''", "'", "``", "`", ".", "?", "!", ",", ":", "-", "--", "...", ";"])
_BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}
# Words that keep their full stop.
_ABBREVIATIONS = (
    "dr|mr|mrs|ms|prof|sr|jr|st|vs|etc|e\\.g|i\\.e|al|ex|rt|lt|jan|feb|mar|apr|jun|jul|aug|sep|sept|oct|nov"
    "|dec|mon|tue|tues|wed|thu|thurs|fri|ct|dept|inc|corp|ltd|co|bros|gen|col|sgt|gov|rep|sen|rev|hon"
    "|maj|capt|ave|blvd|rd|ph\\.d|cf"
)
_LETTER = r"[^\W\d_]"
# Typographic marks are replaced by ASCII before tokenisation.
_PLAIN = {"\u2018": "'", "\u2019": "'", "\u201c": '"', "\u201d": '"', "\u2013": "--", "\u2014": "--"}
_TOKEN = re.compile(
    rf"""
      https?://\S+
    | <\/?[a-z][a-z0-9]*\s*\/?>                                # a tag
    | (?:{_ABBREVIATIONS})\.(?!\w)
    | (?:nos?|figs?|pp?|art)\.(?=\s*\d)                        # "no. 5"
    | (?:{_LETTER}\.)+{_LETTER}\.(?!\w) | {_LETTER}\.(?![\w])       # "a.m.", "J."
    | {_LETTER}+(?=n't\b) | n't\b | '(?:s|m|d|re|ve|ll)\b        # "do n't", "patient 's"
    | can(?=not\b) | gon(?=na\b)
    | [+-]?(?:\d+(?:[.,:]\d+)+|\.\d+)(?![\d/-])         # 5.5 (a unit after it becomes a separate word)
    | [^\W_](?:[\w@]|[/?*](?=[^\W_])|\.(?=[^\W\d_])|-(?=\w)|'(?=\w)(?!(?:s|m|d|re|ve|ll|t)\b))*   # a word
    | [+-](?=\d)\d[\w/-]*
    | \d[\w/-]*
    | \.{{2,}} | -+ | '' | ``
    | \S
    """,
    re.VERBOSE,
)


def ptb_words(text: str) -> list[str]:
    """Split `text` into the words that coco-caption scores: lower case, without punctuation."""
    for sign, plain in _PLAIN.items():
        text = text.replace(sign, plain)
    words = _TOKEN.findall(text.lower())
    # a word is left out if it is in DROPPED, or only dashes, or only full stops
    return [_BRACKETS.get(w, w) for w in words if w not in DROPPED and w.strip("-") and w.strip(".")]
