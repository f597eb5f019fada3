"""Compares with the Stanford tokenizer on example sentences that it has tokenised."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from normtune.metrics.ptb_words import DROPPED, ptb_words

# The words of PTBTokenizer 3.4.1 (Stanford CoreNLP), without coco-caption's punctuation.
CASES = {
    "The lungs are clear.": "the lungs are clear",
    "No effusion.No pneumothorax": "no effusion.no pneumothorax",
    "and/or 1/2 3/4-inch L4/5": "and/or 1/2 3/4-inch l4/5",
    "x-ray of 2-3 mm, 5.5cm; 3.2 x 4 cm.": "x-ray of 2-3 mm 5.5 cm 3.2 x 4 cm",
    "1,000 .5 -5 +3 50% $5 #3": "1,000 .5 -5 +3 50 % $ 5 # 3",
    "(one) [two]": "-lrb- one -rrb- -lsb- two -rsb-",
    "Dr. Smith vs. Mr. J. Doe, 5 a.m. i.e. U.S.": "dr. smith vs. mr. j. doe 5 a.m. i.e. u.s.",
    "No. 5 but no.": "no. 5 but no",
    "don't can't patient's cannot": "do n't ca n't patient 's can not",
    "a -- b - c ... d.. e": "a b c d. e",
    '"quoted" words: a;b': "quoted words a b",
    "T2. XXXX. C7. xxxx-year-old": "t2 xxxx c7 xxxx-year-old",
    "6.9x4.7": "6.9 x4 .7",
    "": "",
}


@pytest.mark.parametrize(("text", "expected"), CASES.items())
def test_words_equal_those_of_the_stanford_tokenizer(text: str, expected: str) -> None:
    assert ptb_words(text) == expected.split()


@given(st.text(max_size=60))
def test_words_contain_no_blanks_or_removed_marks(text: str) -> None:
    words = ptb_words(text)
    assert all(word and not word.isspace() and word not in DROPPED for word in words)
