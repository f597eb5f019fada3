"""Named normalisations of answers, and how an answer is cut into tokens.

`none`
    The text as it is.
`vqa`
    What the VQA evaluation does to an answer (Antol et al. 2015; vqaEval.py): line breaks and tabs become
    blanks; each punctuation mark is dropped where it touches a blank or where the text has a comma between
    digits, else it becomes a blank; full stops go unless a digit follows; lower case; none, zero ... ten
    become digits; a, an, the go; contractions get the one apostrophe they lack ("dont" -> "don't").
    Mind that "None" becomes "0" and a lone "A" becomes the empty string.
`llava-med`
    What LLaVA-Med's evaluation does (Li et al. 2023; eval_metrics/glossary.py): lower case first, then as
    `vqa` without its handling of line breaks, then the commas that are left go.
`report` normalisations stand in `normtune.metrics.reports`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

from normtune.errors import InputError, did_you_mean

_PUNCTUATION = ';/[]"{}()=+\\_->@`<,?!'
_COMMA_IN_NUMBER = re.compile(r"\d,\d")
_FULL_STOP = re.compile(r"\.(?!\d)")
_NUMBERS = {"none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5"}
_NUMBERS |= {"six": "6", "seven": "7", "eight": "8", "nine": "9", "ten": "10"}
_ARTICLES = {"a", "an", "the"}
_CONTRACTED = """
    ain't aren't can't couldn't didn't doesn't don't hadn't hasn't haven't isn't mightn't mustn't needn't
    oughtn't shan't shouldn't wasn't weren't won't wouldn't could've might've must've not've should've
    they've we've what've where've who've would've you've couldn't've hadn't've he'd've it'd've
    mightn't've she'd've shouldn't've somebody'd've someone'd've something'd've there'd've they'd've
    we'd've who'd've wouldn't've y'all'd've you'd've he'd how'd it'd someone'd something'd there'd they'd
    where'd who'd you'd how'll it'll somebody'll someone'll something'll they'll what'll who'll why'll
    y'all'll you'll there're they're what're why're you're he's how's somebody's someone's that's there's
    what's when's where's who's why's ma'am o'clock 'ow's'at 'twas y'all
"""
# Each is reached from the spellings that lack exactly one of its apostrophes, as in the published table.
_CONTRACTIONS = {
    word[:at] + word[at + 1 :]: word
    for word in _CONTRACTED.split()
    for at, sign in enumerate(word)
    if sign == "'"
} | {"somebody'd": "somebodyd"}  # the table has this one the wrong way round
_IDEOGRAPH = r"[\u3400-\u4dbf\u4e00-\u9fff]"
_TOKEN = re.compile(rf"{_IDEOGRAPH}|(?:(?!{_IDEOGRAPH})\S)+")


def _vqa_words(text: str) -> str:
    marked = text
    in_number = _COMMA_IN_NUMBER.search(marked) is not None
    for mark in _PUNCTUATION:
        dropped = in_number or f"{mark} " in marked or f" {mark}" in marked
        text = text.replace(mark, "" if dropped else " ")
    text = _FULL_STOP.sub("", text, count=32)  # the published code drops 32 at most
    words = (_NUMBERS.get(word, word) for word in text.lower().split())
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def _none(text: str) -> str:
    return text


def _vqa(text: str) -> str:
    return _vqa_words(text.replace("\n", " ").replace("\t", " ").strip())


def _llava_med(text: str) -> str:
    return _vqa_words(text.lower()).replace(",", "")


NORMALISATIONS: dict[str, Callable[[str], str]] = {"none": _none, "vqa": _vqa, "llava-med": _llava_med}


def normalise(text: str, how: str = "vqa") -> str:
    """`text` under one of `NORMALISATIONS`, each described at the top of this module.

    Raises:
        InputError: there is no normalisation of that name.
    """
    return named(how, NORMALISATIONS)(text)


def named(how: str, known: Mapping[str, Callable[[str], str]], of: str = "") -> Callable[[str], str]:
    """The normalisation of that name; `of` says in the error what it is for.

    Raises:
        InputError: there is none.
    """
    if how not in known:
        raise InputError(
            f"unknown normalisation '{how}'{of}{did_you_mean(how, known) or '.'} "
            f"Choose one of: {', '.join(known)}."
        )
    return known[how]


def tokens(text: str) -> list[str]:
    """The words of a normalised answer; a Chinese character is a token of its own."""
    return _TOKEN.findall(text)
