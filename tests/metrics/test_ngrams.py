"""BLEU, ROUGE-L and CIDEr on cases computed by hand; tests/real compares them with pycocoevalcap."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from normtune.metrics.ngrams import bleu, bleu_statistics, cider, rouge_l

words = st.lists(st.sampled_from(["the", "lungs", "are", "clear", "no", "."]), max_size=9)


def test_bleu_by_hand() -> None:
    """3 of 4 words match ("lungs" counts once) and 1 of 3 bigrams ("the lungs"); 5 reference words."""
    counts = bleu_statistics(["the", "lungs", "lungs", "clear"], ["the", "lungs", "are", "all", "clear"])
    assert counts.tolist() == [3, 1, 0, 0, 4, 3, 2, 1, 4, 5]
    brevity = math.exp(1 - 5 / 4)
    assert bleu(counts[None], 1)[0] == pytest.approx(brevity * 3 / 4)
    assert bleu(counts[None], 2)[0] == pytest.approx(brevity * math.sqrt(3 / 4 * 1 / 3))
    assert bleu(counts[None], 4)[0] < 1e-3  # no smoothing except coco-caption's 1e-15


def test_corpus_bleu_is_computed_from_sums_not_as_a_mean() -> None:
    rows = np.stack([bleu_statistics(["a"], ["a"]), bleu_statistics(["b"] * 3, ["c"] * 3)])
    assert bleu(rows.sum(axis=0)[None], 1)[0] == pytest.approx(1 / 4)
    assert bleu(rows, 1).mean() == pytest.approx(1 / 2)


def test_a_longer_prediction_has_no_brevity_penalty() -> None:
    assert bleu(bleu_statistics(["a", "b"], ["a"])[None], 1)[0] == pytest.approx(1 / 2)


def test_rouge_l_by_hand() -> None:
    """Common subsequence "lungs clear": precision 2/3, recall 2/4, beta 1.2."""
    p, r = 2 / 3, 2 / 4
    expected = (1 + 1.44) * p * r / (r + 1.44 * p)
    assert rouge_l(["lungs", "now", "clear"], ["the", "lungs", "are", "clear"]) == pytest.approx(expected)
    assert rouge_l(["a"], ["b"]) == 0.0
    assert rouge_l([], []) == 1.0  # as coco-caption, for which "" is one empty word


def test_cider_by_hand() -> None:
    """ "a" is in both references and has weight 0. Only "b" counts: it matches in row 1, row 2 lacks it."""
    rows = [(["a", "b"], ["a", "b"]), (["a"], ["a", "c"])]
    cosine = 1.0  # unigrams: b against b; bigrams: "a b" against "a b"
    assert cider(rows, variant_d=False) == pytest.approx([10 * (cosine + cosine) / 4, 0.0])
    gap = math.exp(-(1**2) / (2 * 6**2))  # row 2 has one bigram less; its score of 0 stays 0
    assert cider(rows, variant_d=True) == pytest.approx([5.0, 0.0 * gap])


def test_cider_d_clips_matches_and_penalises_length() -> None:
    rows = [(["b", "b", "b"], ["b"]), (["c"], ["c"])]
    cosine_score, d_score = cider(rows, variant_d=False)[0], cider(rows, variant_d=True)[0]
    assert cosine_score == pytest.approx(10 / 4)  # the cosine of parallel vectors
    assert d_score == pytest.approx(10 / 4 / 3 * math.exp(-(2**2) / 72))  # 1 of 3 counts; 2 bigrams too many


def test_a_single_row_scores_zero_in_cider() -> None:
    assert cider([(["a", "b"], ["a", "b"])], variant_d=True) == [0.0]
    assert cider([], variant_d=True) == []


@given(words, words)
def test_scores_are_shares_and_one_for_equal_texts(prediction: list[str], reference: list[str]) -> None:
    for n in (1, 2, 3, 4):
        assert 0 <= bleu(bleu_statistics(prediction, reference)[None], n)[0] <= 1
    assert 0 <= rouge_l(prediction, reference) <= 1
    assert rouge_l(reference, reference) == pytest.approx(1.0)
