"""Scores of reports against references; every way of counting has a name of its own.

=====================  =======================================================================================
name                   score
=====================  =======================================================================================
`bleu_1` ... `bleu_4`  coco-caption's BLEU: cumulative, of the whole corpus, unsmoothed
`sacrebleu`            sacrebleu's corpus BLEU-4 (13a words, case kept, exponential smoothing) over 100
`rouge_l`              coco-caption's ROUGE-L: F with beta = 1.2, mean over rows
`rouge_l_f1`           rouge-score's rougeL F1 without stemming, mean over rows
`meteor_nltk`          nltk's METEOR with WordNet, where nltk finds `corpora/wordnet` among its data
`meteor_exact_stem`    otherwise: nltk's METEOR with exact and stem matches alone, a lower score
`cider_d`              CIDEr-D, 0 to 10: what coco-caption and most papers print as "CIDEr"
`cider`                CIDEr as first defined, without clipping and length penalty, 0 to 10
`bertscore_f1`         BERTScore's F1, where a local model is given
=====================  =======================================================================================

Each is computed under a named normalisation of both texts and is then called `NAME/NORMALISATION`:

`none`
    The text as it is. coco-caption's metrics and METEOR take the words of `normtune.metrics.ptb_words`.
`r2gen-iu`, `r2gen-mimic`
    What R2Gen does to IU X-ray and to MIMIC-CXR before it cuts at blanks (Chen et al. 2020): list numbers 1.
    to 5. go, lower case, ". " ends a sentence, `. , ? ; * ! % ^ & _ + ( ) : < = > @ [ ] { } " / \\ '` go
    (decimal points too), sentences are joined by " . ". R2Gen's own scores are of references cut at 60 or 100
    words with rare words replaced, which flatters; these are of whole references.

coco-caption's METEOR 1.5 is another metric than nltk's, needs Java, and is not computed here.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from normtune.data.records import Example, Prediction
from normtune.metrics.answers import Metric, pair_with_predictions
from normtune.metrics.ngrams import bleu, bleu_statistics, cider, rouge_l
from normtune.metrics.normalisation import named
from normtune.metrics.ptb_words import ptb_words
from normtune.metrics.statistics import RESAMPLES, Floats
from normtune.metrics.sum_metrics import SumMetric, intervals, mean_metric

Texts = Mapping[str, tuple[str, str]]  # row id -> prediction, reference

_R2GEN_MARKS = re.compile(r"[.,?;*!%^&_+():-\[\]{}\"/\\']")
_R2GEN_NUMBERS = (("1. ", ""), *((f". {n}. ", ". ") for n in "2345"), *((f" {n}. ", ". ") for n in "2345"))


def _none(text: str) -> str:
    return text


def _r2gen_iu(text: str) -> str:
    for _ in range(3):
        text = text.replace("..", ".")
    for number, instead in _R2GEN_NUMBERS:
        text = text.replace(number, instead)
    sentences = (_R2GEN_MARKS.sub("", sentence.strip()) for sentence in text.strip().lower().split(". "))
    return " ".join(f"{' . '.join(sentences)} .".split())


def _r2gen_mimic(text: str) -> str:
    text = text.replace("\n", " ")
    for twice, times in (("__", 7), ("  ", 6), ("..", 8)):
        for _ in range(times):
            text = text.replace(twice, twice[0])
    return _r2gen_iu(text)


NORMALISATIONS: dict[str, Callable[[str], str]] = {
    "none": _none,
    "r2gen-iu": _r2gen_iu,
    "r2gen-mimic": _r2gen_mimic,
}


def normalise_report(text: str, how: str) -> str:
    """`text` under one of `NORMALISATIONS`, each described at the top of this module.

    Raises:
        InputError: there is no normalisation of that name.
    """
    return named(how, NORMALISATIONS, of=" of reports")(text)


def normalisations_for(dataset: str) -> tuple[str, str]:
    """What reports of a dataset are scored under: as they are, and as R2Gen cleans that dataset."""
    return "none", "r2gen-mimic" if "mimic" in dataset.lower() else "r2gen-iu"


def report_metrics(
    texts: Texts, *, normalisation: str = "none", bertscore: Path | str | None = None
) -> dict[str, SumMetric]:
    """Every metric above by its bare name, as statistics of rows that can be resampled and paired.

    Args:
        texts: row id -> (prediction, reference).
        normalisation: of both texts.
        bertscore: local directory of the model for BERTScore; none leaves it out.

    Raises:
        InputError: there is no such normalisation, or the model cannot be loaded.
    """
    cleaned = {
        id: (normalise_report(said, normalisation), normalise_report(meant, normalisation))
        for id, (said, meant) in texts.items()
    }
    cut: Callable[[str], list[str]] = ptb_words if normalisation == "none" else str.split
    words = {id: (cut(said), cut(meant)) for id, (said, meant) in cleaned.items()}
    counts = {id: bleu_statistics(said, meant) for id, (said, meant) in words.items()}
    metrics = {f"bleu_{n}": SumMetric(counts, functools.partial(bleu, n=n)) for n in (1, 2, 3, 4)}
    metrics["sacrebleu"] = _sacrebleu(cleaned)
    metrics["rouge_l"] = mean_metric({id: rouge_l(said, meant) for id, (said, meant) in words.items()})
    metrics["rouge_l_f1"] = mean_metric(_rouge_score(cleaned))
    name, meteor = _meteor()
    metrics[name] = mean_metric({id: meteor(said, meant) for id, (said, meant) in words.items()})
    for name, d in (("cider_d", True), ("cider", False)):
        metrics[name] = mean_metric(dict(zip(words, cider(list(words.values()), d=d), strict=True)))
    if bertscore is not None:
        from normtune.metrics.bertscore import bertscore_f1

        metrics["bertscore_f1"] = mean_metric(
            dict(zip(cleaned, bertscore_f1(list(cleaned.values()), bertscore), strict=True))
        )
    return metrics


def _sacrebleu(texts: Texts) -> SumMetric:
    """sacrebleu's own statistics of each row, and its own score of their sums."""
    from sacrebleu.metrics import BLEU

    scorer = BLEU(effective_order=True)  # only so that it does not warn about scoring one row
    rows = {}
    for id, (said, meant) in texts.items():
        row = scorer.sentence_score(said, [meant])
        rows[id] = np.array([*row.counts, *row.totals, row.sys_len, row.ref_len], dtype=np.float64)

    def value(sums: Floats) -> Floats:
        found = []
        for row in sums.round().astype(int).tolist():
            found.append(BLEU.compute_bleu(row[:4], row[4:8], row[8], row[9], smooth_method="exp").score)
        return np.array(found) / 100

    return SumMetric(rows, value)


def _rouge_score(texts: Texts) -> dict[str, float]:
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"], use_stemmer=False)
    return {id: float(scorer.score(meant, said)["rougeL"].fmeasure) for id, (said, meant) in texts.items()}


class _NoWordNet:
    """Stands in for WordNet in nltk's METEOR: no word has a synonym."""

    def synsets(self, word: str) -> list[Any]:
        return []


def _meteor() -> tuple[str, Callable[[Sequence[str], Sequence[str]], float]]:
    """The name of the METEOR that can be computed here, and the function (said, meant) -> score."""
    from nltk.corpus import wordnet
    from nltk.translate.meteor_score import single_meteor_score

    try:
        wordnet.ensure_loaded()
        name, synonyms = "meteor_nltk", wordnet
    except LookupError:
        name, synonyms = "meteor_exact_stem", _NoWordNet()

    def score(said: Sequence[str], meant: Sequence[str]) -> float:
        return float(single_meteor_score(meant, said, wordnet=synonyms))

    return name, score


def text_pairs(examples: Sequence[Example], predictions: Mapping[str, str] | Sequence[Prediction]) -> Texts:
    """id -> (prediction, reference), joined by id.

    Raises:
        InputError: ids do not match one to one.
    """
    return {
        example.id: (text, example.answer) for example, text in pair_with_predictions(examples, predictions)
    }


def report_table(
    texts: Texts,
    *,
    normalisations: Sequence[str] = ("none", "r2gen-iu"),
    findings: bool = True,
    bertscore: Path | str | None = None,
) -> dict[str, SumMetric]:
    """Every metric under every normalisation as `NAME/NORMALISATION`, and the label F1 of `findings_rules`.

    Raises:
        InputError: as `report_metrics`.
    """
    table = {}
    for how in normalisations:
        found = report_metrics(texts, normalisation=how, bertscore=bertscore)
        table.update({f"{name}/{how}": metric for name, metric in found.items()})
    if findings:
        from normtune.metrics.clinical import rules_metrics

        table.update(rules_metrics(texts))
    return table


def summarise(
    table: Mapping[str, SumMetric], examples: Sequence[Example], *, resamples: int = RESAMPLES
) -> dict[str, Metric]:
    """Each metric's value with the interval from resampling the images of `examples`."""
    cluster = {example.id: example.images for example in examples}
    rows, images = len(cluster), len(set(cluster.values()))
    found = intervals(table, cluster, resamples=resamples)
    return {name: Metric(each.value, each.low, each.high, rows, images) for name, each in found.items()}


def score_report(
    examples: Sequence[Example],
    predictions: Mapping[str, str] | Sequence[Prediction],
    *,
    normalisations: Sequence[str] = ("none", "r2gen-iu"),
    bertscore: Path | str | None = None,
    resamples: int = RESAMPLES,
) -> dict[str, Metric]:
    """Every metric of this module and `findings_rules` for one set of predictions, joined by id.

    Args:
        examples: the rows of a split, references included.
        predictions: id -> report, or `Prediction`s in any order.
        normalisations: each metric is computed under all of them.
        bertscore: local directory of the model for BERTScore; none leaves it out.
        resamples: draws of the bootstrap.

    Raises:
        InputError: ids do not match one to one, no such normalisation, or the model cannot be loaded.
    """
    table = report_table(
        text_pairs(examples, predictions), normalisations=normalisations, bertscore=bertscore
    )
    return summarise(table, examples, resamples=resamples)
