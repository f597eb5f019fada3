"""BLEU, ROUGE-L and CIDEr as coco-caption computes them, from words, with one reference a row.

Written out here, and tested equal to pycocoevalcap, because intervals need each row's statistics, and that
package brings 100 MB of Java archives and a BLEU whose licence forbids commercial use.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import numpy as np

from normtune.metrics.statistics import Floats

ORDER = 4  # longest n-gram
_SMALL, _TINY = 1e-9, 1e-15  # what coco-caption adds to divisors and dividends
_BETA = 1.2  # weight of recall in ROUGE-L
_SIGMA = 6.0  # of CIDEr-D's length penalty, in bigrams

Words = Sequence[str]
Grams = list[Counter[tuple[str, ...]]]  # at n - 1 the n-grams


def grams(words: Words) -> Grams:
    """How often each n-gram stands in `words`, for n from 1 to 4."""
    return [Counter(zip(*(words[at:] for at in range(n)), strict=False)) for n in range(1, ORDER + 1)]


def bleu_statistics(said: Words, meant: Words) -> Floats:
    """Of one row: n-grams matched (clipped), n-grams said, n = 1 to 4 each, words said and meant: [10]."""
    matched = [(a & b).total() for a, b in zip(grams(said), grams(meant), strict=True)]
    total = [max(0, len(said) - n) for n in range(ORDER)]
    return np.array([*matched, *total, len(said), len(meant)], dtype=np.float64)


def bleu(sums: Floats, n: int) -> Floats:
    """Cumulative BLEU-n (Papineni et al. 2002) from summed statistics, [m, 10] -> [m], in [0, 1].

    Without smoothing but for coco-caption's tiny constants: with no match of some order it is next to 0.
    """
    precisions = (sums[:, :n] + _TINY) / (sums[:, ORDER : ORDER + n] + _SMALL)
    ratio = (sums[:, 8] + _TINY) / (sums[:, 9] + _SMALL)  # words said to words meant
    brevity = np.exp(np.minimum(0.0, 1 - 1 / ratio))
    found: Floats = precisions.prod(axis=1) ** (1 / n) * brevity
    return found


def rouge_l(said: Words, meant: Words) -> float:
    """ROUGE-L of one row (Lin 2004): F of the longest common subsequence with beta = 1.2."""
    said, meant = said or [""], meant or [""]  # coco-caption splits "" into one empty word
    common = _common_subsequence(said, meant)
    if not common:
        return 0.0
    precision, recall = common / len(said), common / len(meant)
    return (1 + _BETA**2) * precision * recall / (recall + _BETA**2 * precision)


def _common_subsequence(first: Words, second: Words) -> int:
    """Length of the longest common subsequence."""
    lengths = [0] * (len(second) + 1)
    for word in first:
        diagonal = 0
        for at, other in enumerate(second, 1):
            above = lengths[at]
            lengths[at] = diagonal + 1 if word == other else max(above, lengths[at - 1])
            diagonal = above
    return lengths[-1]


def cider(pairs: Sequence[tuple[Words, Words]], *, d: bool) -> list[float]:
    """CIDEr (Vedantam et al. 2015) of every (said, meant), 0 to 10; n-grams weigh by their rarity in `meant`.

    Args:
        pairs: all rows: the weights come from all their references, so a row's score depends on the others,
            and a single row scores 0.
        d: CIDEr-D, with matches clipped and a penalty for another length: what coco-caption prints as
            "CIDEr". Otherwise the cosine alone. Words are not stemmed in either.
    """
    meant = [grams(words) for _, words in pairs]
    held = Counter(gram for row in meant for counts in row for gram in counts)
    rarity = {gram: math.log(len(pairs)) - math.log(rows) for gram, rows in held.items()}
    unseen = math.log(len(pairs)) if pairs else 0.0

    def weighed(counts: Counter[tuple[str, ...]]) -> dict[tuple[str, ...], float]:
        return {gram: times * rarity.get(gram, unseen) for gram, times in counts.items()}

    scores = []
    for (said, _), reference in zip(pairs, meant, strict=True):
        total = 0.0
        hypothesis = grams(said)
        gap = hypothesis[1].total() - reference[1].total()  # in bigrams, as coco-caption counts length
        penalty = math.exp(-(gap**2) / (2 * _SIGMA**2)) if d else 1.0
        for ours, theirs in zip(map(weighed, hypothesis), map(weighed, reference), strict=True):
            norms = _norm(ours) * _norm(theirs)
            dot = sum(
                (min(weight, theirs[gram]) if d else weight) * theirs[gram]
                for gram, weight in ours.items()
                if gram in theirs
            )
            total += penalty * (dot / norms if norms else dot)
        scores.append(10 * total / ORDER)
    return scores


def _norm(vector: dict[tuple[str, ...], float]) -> float:
    return math.sqrt(sum(weight**2 for weight in vector.values()))
