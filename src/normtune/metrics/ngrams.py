"""BLEU, ROUGE-L and CIDEr as coco-caption computes them, from tokenised texts with one reference per row.

The formulas are implemented here, and tested to equal pycocoevalcap, for two reasons: confidence intervals
need the statistics of each row, and that package brings 100 MB of Java archives and a BLEU under a licence
that forbids commercial use.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import numpy as np

from normtune.metrics.statistics.intervals import Floats

MAX_ORDER = 4  # the longest n-gram, in words
_SMALL, _TINY = 1e-9, 1e-15  # coco-caption adds these to denominators and to numerators
_BETA = 1.2  # weight of recall relative to precision in ROUGE-L
_SIGMA = 6.0  # standard deviation of CIDEr-D's Gaussian length penalty, in bigrams

Words = Sequence[str]
NgramCounts = list[Counter[tuple[str, ...]]]  # index n - 1 has the n-grams with their counts


def count_ngrams(words: Words) -> NgramCounts:
    """Count the n-grams of `words`, for n from 1 to 4."""
    return [Counter(zip(*(words[at:] for at in range(n)), strict=False)) for n in range(1, MAX_ORDER + 1)]


def bleu_statistics(prediction: Words, reference: Words) -> Floats:
    """Count what BLEU needs of one row.

    Returns:
        [10]: the matched n-grams for n = 1 to 4 (clipped by the reference's count), the n-grams of the
        prediction for n = 1 to 4, the number of words of the prediction, and the number of words of the
        reference.
    """
    # `a & b` takes the smaller of the two counts of each n-gram: BLEU's clipping.
    counts = zip(count_ngrams(prediction), count_ngrams(reference), strict=True)
    matched = [(a & b).total() for a, b in counts]
    total = [max(0, len(prediction) - n) for n in range(MAX_ORDER)]
    return np.array([*matched, *total, len(prediction), len(reference)], dtype=np.float64)


def bleu(sums: Floats, n: int) -> Floats:
    """Compute cumulative BLEU-n (Papineni et al. 2002) from summed statistics.

    BLEU-n is the geometric mean of the precisions of 1-grams to n-grams, times the brevity penalty. There is
    no smoothing except coco-caption's tiny constants: if some order has no match, the score is almost 0.

    Args:
        sums: sums of `bleu_statistics` over rows, [sets, 10].
        n: longest n-gram that counts, 1 to 4.

    Returns:
        [sets], in [0, 1].
    """
    precisions = (sums[:, :n] + _TINY) / (sums[:, MAX_ORDER : MAX_ORDER + n] + _SMALL)  # [sets, n]
    ratio = (sums[:, 8] + _TINY) / (sums[:, 9] + _SMALL)  # words of predictions / words of references
    brevity = np.exp(np.minimum(0.0, 1 - 1 / ratio))  # 1 if the predictions are as long as the references
    scores: Floats = precisions.prod(axis=1) ** (1 / n) * brevity
    return scores


def rouge_l(prediction: Words, reference: Words) -> float:
    """Compute ROUGE-L of one row (Lin 2004, section 3.1) with beta = 1.2.

    It is the F-score of the longest common subsequence (LCS), with P = LCS / words of the prediction and
    R = LCS / words of the reference: (1 + beta^2) P R / (R + beta^2 P).
    """
    # coco-caption splits "" into one empty word.
    prediction, reference = prediction or [""], reference or [""]
    common = _common_subsequence(prediction, reference)
    if not common:
        return 0.0
    precision, recall = common / len(prediction), common / len(reference)
    return (1 + _BETA**2) * precision * recall / (recall + _BETA**2 * precision)


def _common_subsequence(first: Words, second: Words) -> int:
    """Compute the length of the longest common subsequence, one row of the table at a time."""
    lengths = [0] * (len(second) + 1)  # lengths[j] is for the words of `first` so far and second[:j]
    for word in first:
        diagonal = 0  # the entry for one word less of both texts
        for at, other in enumerate(second, 1):
            previous = lengths[at]  # the entry for one word less of `first`
            lengths[at] = diagonal + 1 if word == other else max(previous, lengths[at - 1])
            diagonal = previous
    return lengths[-1]


def cider(pairs: Sequence[tuple[Words, Words]], *, variant_d: bool) -> list[float]:
    """Compute CIDEr (Vedantam et al. 2015) of every row, from 0 to 10.

    Each n-gram is weighted by how rare it is among the references (tf-idf). The score is ten times the mean
    over n = 1 to 4 of the cosine similarity of the two weighted vectors.

    Args:
        pairs: (prediction, reference) of all rows. The weights come from all references, so the score of a
            row depends on the other rows, and a single row scores 0.
        variant_d: computes CIDEr-D, which clips matches and penalises a different length; coco-caption prints
            it as "CIDEr". False computes the cosine only. Neither variant stems the words.
    """
    references = [count_ngrams(words) for _, words in pairs]
    reference_count = Counter(gram for row in references for counts in row for gram in counts)
    rarity = {gram: math.log(len(pairs)) - math.log(rows) for gram, rows in reference_count.items()}
    rarity_of_unknown = math.log(len(pairs)) if pairs else 0.0  # the rarity of an n-gram that no reference has

    def weigh(counts: Counter[tuple[str, ...]]) -> dict[tuple[str, ...], float]:
        return {gram: times * rarity.get(gram, rarity_of_unknown) for gram, times in counts.items()}

    scores = []
    for (words, _), reference in zip(pairs, references, strict=True):
        total = 0.0
        prediction = count_ngrams(words)
        gap = prediction[1].total() - reference[1].total()  # in bigrams, as coco-caption counts length
        penalty = math.exp(-(gap**2) / (2 * _SIGMA**2)) if variant_d else 1.0
        # The weighted vectors of n = 1 to 4.
        for predicted, expected in zip(map(weigh, prediction), map(weigh, reference), strict=True):
            norms = _norm(predicted) * _norm(expected)
            dot = sum(
                (min(weight, expected[gram]) if variant_d else weight) * expected[gram]
                for gram, weight in predicted.items()
                if gram in expected
            )
            total += penalty * (dot / norms if norms else dot)
        scores.append(10 * total / MAX_ORDER)
    return scores


def _norm(vector: dict[tuple[str, ...], float]) -> float:
    return math.sqrt(sum(weight**2 for weight in vector.values()))
