"""Words as coco-caption counts them, without Java.

coco-caption cuts a caption with Stanford's PTBTokenizer (3.4.1, lower case) and then drops 15 punctuation
tokens. This is a small set of rules that gives the same words on radiology reports, where the long tail of
that tokenizer (URLs, smileys, SGML, fractions of two words) hardly occurs; docs/metrics.md says how often
the two differ. Two oddities are kept, since published figures have them: parentheses become the *words*
"-lrb-" and "-rrb-", and full stops between letters do not end a word ("effusion.No" is one).
"""

from __future__ import annotations

import re

DROPPED = frozenset(["''", "'", "``", "`", ".", "?", "!", ",", ":", "-", "--", "...", ";"])
_BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}
_ABBREVIATIONS = (
    "dr|mr|mrs|ms|prof|sr|jr|st|vs|etc|e\\.g|i\\.e|al|ex|rt|lt|jan|feb|mar|apr|jun|jul|aug|sep|sept|oct|nov"
    "|dec|mon|tue|tues|wed|thu|thurs|fri|ct|dept|inc|corp|ltd|co|bros|gen|col|sgt|gov|rep|sen|rev|hon"
    "|maj|capt|ave|blvd|rd|ph\\.d|cf"
)
_WORD = r"[^\W\d_]"
_PLAIN = {"\u2018": "'", "\u2019": "'", "\u201c": '"', "\u201d": '"', "\u2013": "--", "\u2014": "--"}
_TOKEN = re.compile(
    rf"""
      https?://\S+
    | <\/?[a-z][a-z0-9]*\s*\/?>                                # a tag
    | (?:{_ABBREVIATIONS})\.(?!\w)
    | (?:nos?|figs?|pp?|art)\.(?=\s*\d)                        # "no. 5"
    | (?:{_WORD}\.)+{_WORD}\.(?!\w) | {_WORD}\.(?![\w])        # "a.m.", "J."
    | {_WORD}+(?=n't\b) | n't\b | '(?:s|m|d|re|ve|ll)\b        # "do n't", "patient 's"
    | can(?=not\b) | gon(?=na\b)
    | [+-]?(?:\d+(?:[.,:]\d+)+|\.\d+)(?![\d/-])         # 5.5 (a unit after it is a word of its own)
    | [^\W_](?:[\w@]|[/?*](?=[^\W_])|\.(?=[^\W\d_])|-(?=\w)|'(?=\w)(?!(?:s|m|d|re|ve|ll|t)\b))*   # a word
    | [+-](?=\d)\d[\w/-]*
    | \d[\w/-]*
    | \.{{2,}} | -+ | '' | ``
    | \S
    """,
    re.VERBOSE,
)


def ptb_words(text: str) -> list[str]:
    """The words of `text` as coco-caption scores them: lower case, punctuation dropped."""
    for sign, plain in _PLAIN.items():
        text = text.replace(sign, plain)
    found = _TOKEN.findall(text.lower())
    return [_BRACKETS.get(word, word) for word in found if word not in DROPPED and not _mark(word)]


def _mark(word: str) -> bool:
    return word == '"' or not word.strip("-") or not word.strip(".")
