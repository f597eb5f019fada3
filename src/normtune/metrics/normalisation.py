"""Named normalisations of answers, and the tokeniser that splits an answer into words.

`none`
    Leaves the text unchanged.
`vqa`
    The normalisation of the VQA evaluation (Antol et al. 2015; vqaEval.py). Its steps are:

    1. Line breaks and tabs become blanks.
    2. Each punctuation mark is removed if it touches a blank anywhere in the text, or if the text has a comma
       between digits. Otherwise it becomes a blank.
    3. Full stops are removed unless a digit follows.
    4. The text is converted to lower case.
    5. The words none, zero ... ten become digits, and a, an, the are removed.
    6. Contractions without their apostrophe get it back ("dont" -> "don't").

    Note that "None" becomes "0", and that an answer "A" becomes the empty string: see `normalise_pair`.
`unicode`
    `vqa` after Unicode's compatibility form (NFKC) and with straight quotes: accents in one or two characters,
    ligatures, full-width letters and curly apostrophes make no difference.
`llava-med`
    The normalisation of LLaVA-Med's evaluation (Li et al. 2023; eval_metrics/glossary.py): lower case first,
    then steps 2 to 6 of `vqa`, then all remaining commas are removed.

The normalisations of reports are in `normtune.metrics.reports`.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Mapping

from normtune.errors import InputError, did_you_mean

# The constants below are those of vqaEval.py.
_PUNCTUATION = ';/[]"{}()=+\\_->@`<,?!'
_COMMA_IN_NUMBER = re.compile(r"\d,\d")
_FULL_STOP = re.compile(r"\.(?!\d)")
# + < > =; a minus before a number or after a word ("HER2-"); separators within numbers ("1,5", "3-4", "1/2")
_SIGNS = re.compile(r"[+<>=]|(?<!\w)-(?=\d)|(?<=\w)-(?![\w-])|(?<=\()-(?=\))|(?<=\d)[,/-](?=\d)")
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
# Spelling without one apostrophe -> correct spelling. Each contraction is listed once for each of its
# apostrophes, as in the published table.
_CONTRACTIONS = {
    word[:at] + word[at + 1 :]: word for word in _CONTRACTED.split() for at, sign in enumerate(word) if sign == "'"
} | {"somebody'd": "somebodyd"}  # the published table swaps the two sides of this entry
IDEOGRAPH = r"[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff]"  # Chinese characters and Japanese kana
_STRAIGHT = str.maketrans("\u2018\u2019\u02bc\u201c\u201d\u2010\u2011\u2013", "'''\"\"---")
# A token is one Chinese character, or a run of other characters without white space.
_TOKEN = re.compile(rf"{IDEOGRAPH}|(?:(?!{IDEOGRAPH})\S)+")


def _vqa_words(text: str) -> str:
    """Apply steps 2 to 6 of the `vqa` normalisation."""
    original = text  # every mark looks at the text before any mark was removed, as the published code does
    has_comma_in_number = _COMMA_IN_NUMBER.search(original) is not None
    for mark in _PUNCTUATION:
        is_removed = has_comma_in_number or f"{mark} " in original or f" {mark}" in original
        text = text.replace(mark, "" if is_removed else " ")
    text = _FULL_STOP.sub("", text, count=32)  # the published code removes at most 32 full stops
    words = (_NUMBERS.get(word, word) for word in text.lower().split())
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def _vqa(text: str) -> str:
    return _vqa_words(text.replace("\n", " ").replace("\t", " ").strip())


NORMALISATIONS: dict[str, Callable[[str], str]] = {
    "none": str,  # the text itself
    "vqa": _vqa,
    "unicode": lambda text: _vqa(unicodedata.normalize("NFKC", text).translate(_STRAIGHT)),
    "llava-med": lambda text: _vqa_words(text.lower()).replace(",", ""),
}


def normalise(text: str, name: str = "vqa") -> str:
    """Normalise an answer with one of `NORMALISATIONS`, which the top of this module describes.

    Raises:
        InputError: if there is no normalisation of that name.
    """
    return find_normalisation(name, NORMALISATIONS)(text)


def normalise_pair(prediction: str, reference: str, name: str = "vqa") -> tuple[str, str]:
    """Normalise a prediction and its reference for a comparison.

    Where nothing is left of the reference, as of the option "A", which `vqa` takes for an article, both texts are
    only lower-cased and freed of punctuation: otherwise every answer that says nothing would be right.

    Raises:
        InputError: if there is no normalisation of that name.
    """
    texts = normalise(prediction, name), normalise(reference, name)
    if texts[1] or not reference.strip():
        return texts
    plain = [" ".join(re.findall(r"\w+", text.lower())) for text in (prediction, reference)]
    return (plain[0], plain[1]) if plain[1] else (prediction.strip(), reference.strip())


def differ_in_signs(prediction: str, reference: str) -> bool:
    """Whether the signs of two texts differ, such as "HER2-" and "HER2+", "5 mm" and "<5 mm", or "15" and "1,5".

    `vqa`, `unicode` and `llava-med` drop these signs. Hyphens between words are not signs ("X-ray").
    """
    return _SIGNS.findall(prediction) != _SIGNS.findall(reference)


def find_normalisation(name: str, known: Mapping[str, Callable[[str], str]], of: str = "") -> Callable[[str], str]:
    """Return the normalisation of that name.

    Args:
        name: name of the normalisation.
        known: name -> function.
        of: what the normalisation is for, inserted in the error message (" of reports").

    Raises:
        InputError: if `known` has no such name.
    """
    if name not in known:
        raise InputError(
            f"unknown normalisation '{name}'{of}{did_you_mean(name, known) or '.'} Choose one of: {', '.join(known)}."
        )
    return known[name]


def separate_ideographs(text: str) -> str:
    """Put blanks around each Chinese character, so that words are split there as well."""
    return re.sub(IDEOGRAPH, r" \g<0> ", text)


def tokens(text: str) -> list[str]:
    """Split a normalised answer into words. Each Chinese character is one token."""
    return _TOKEN.findall(text)
