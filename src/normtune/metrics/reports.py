"""Scores of reports against references. Each way of counting has its own metric name.

=====================  =======================================================================================
name                   score
=====================  =======================================================================================
`bleu_1` ... `bleu_4`  coco-caption's BLEU: cumulative, of the whole corpus, unsmoothed
`sacrebleu`            sacrebleu's corpus BLEU-4 divided by 100 (13a words, case-sensitive, exp smoothing)
`rouge_l`              coco-caption's ROUGE-L: F with beta = 1.2, mean over rows
`rouge_l_f1`           rouge-score's rougeL F1 without stemming, mean over rows
`meteor_nltk`          nltk's METEOR with WordNet, if nltk finds `corpora/wordnet` in its data
`meteor_exact_stem`    otherwise: nltk's METEOR with exact and stem matches only, a lower score
`meteor15`             METEOR 1.5, if its Java program is given: what papers call "METEOR"
`cider_d`              CIDEr-D, 0 to 10: what coco-caption and most papers print as "CIDEr"
`cider`                CIDEr as first defined, without clipping and length penalty, 0 to 10
`bertscore_f1`         BERTScore's F1, if a local model is given
=====================  =======================================================================================

Each metric is computed after a named normalisation of both texts; its full name is `NAME/NORMALISATION`:

`none` Leaves the text unchanged. coco-caption's metrics and METEOR use the words of
    `normtune.metrics.ptb_words`.
`r2gen-iu`, `r2gen-mimic`
    What R2Gen does to IU X-ray and to MIMIC-CXR before it splits at blanks (Chen et al. 2020). List numbers
    1. to 5. are removed. Texts are converted to lower case and split into sentences at ". ". The characters
    `. , ? ; * ! % ^ & _ + ( ) : < = > @ [ ] { } " / \\ '` are removed (decimal points too). Sentences are
    joined by " . ". R2Gen computes its scores with references truncated to 60 or 100 words, in which rare
    words are replaced; that raises scores. Scores here use the whole references.

Each Chinese character is a word under every normalisation, as these texts have no blanks.

nltk's METEOR is another metric than METEOR 1.5 (`normtune.metrics.meteor`), with far higher scores.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from normtune.data.records import Example, Prediction
from normtune.metrics.answers import Metric, pair_with_predictions
from normtune.metrics.ngrams import bleu, bleu_statistics, cider, rouge_l
from normtune.metrics.normalisation import IDEOGRAPH, find_normalisation, separate_ideographs
from normtune.metrics.ptb_words import ptb_words
from normtune.metrics.statistics.intervals import Floats
from normtune.metrics.sum_metrics import SumMetric, cluster_rows, mean_metric, metric_intervals

Texts = Mapping[str, tuple[str, str]]  # row id -> (prediction, reference)

_ROUGE_WORD = re.compile(rf"[a-z0-9]+|{IDEOGRAPH}")
# Characters that R2Gen removes, and (list number, replacement) in its order.
_R2GEN_MARKS = re.compile(r"[.,?;*!%^&_+():-\[\]{}\"/\\']")
_R2GEN_NUMBERS = (("1. ", ""), *((f". {n}. ", ". ") for n in "2345"), *((f" {n}. ", ". ") for n in "2345"))


def _r2gen_iu(text: str) -> str:
    for _ in range(3):
        text = text.replace("..", ".")
    for number, replacement in _R2GEN_NUMBERS:
        text = text.replace(number, replacement)
    sentences = (_R2GEN_MARKS.sub("", sentence.strip()) for sentence in text.strip().lower().split(". "))
    return " ".join(f"{' . '.join(sentences)} .".split())


def _r2gen_mimic(text: str) -> str:
    text = text.replace("\n", " ")
    for doubled, times in (("__", 7), ("  ", 6), ("..", 8)):  # as often as R2Gen repeats the replacement
        for _ in range(times):
            text = text.replace(doubled, doubled[0])
    return _r2gen_iu(text)


NORMALISATIONS: dict[str, Callable[[str], str]] = {"none": str, "r2gen-iu": _r2gen_iu, "r2gen-mimic": _r2gen_mimic}


def normalise_report(text: str, name: str) -> str:
    """Normalise a report with one of `NORMALISATIONS`, which the top of this module describes.

    Raises:
        InputError: if there is no normalisation of that name.
    """
    return find_normalisation(name, NORMALISATIONS, of=" of reports")(text)


def normalisations_for(dataset: str) -> tuple[str, str]:
    """Return the normalisations for the reports of a dataset: `none`, and the one that R2Gen uses for it."""
    return "none", "r2gen-mimic" if "mimic" in dataset.lower() else "r2gen-iu"


def report_metrics(
    texts: Texts, *, normalisation: str = "none", bertscore: Path | str | None = None, meteor15: Path | None = None
) -> dict[str, SumMetric]:
    """Build every metric of the table above, as statistics of its rows that can be summed and paired.

    Args:
        texts: row id -> (prediction, reference).
        normalisation: applied to both texts.
        bertscore: local directory of the model for BERTScore; None omits BERTScore.
        meteor15: the path of `meteor-1.5.jar`; None omits METEOR 1.5.

    Returns:
        Metric name without the normalisation -> metric.

    Raises:
        InputError: if the normalisation is unknown, or the model cannot be loaded.
    """
    normalised = {
        id: (
            separate_ideographs(normalise_report(prediction, normalisation)),
            separate_ideographs(normalise_report(reference, normalisation)),
        )
        for id, (prediction, reference) in texts.items()
    }
    # R2Gen's normalisations leave words that are separated by blanks.
    split: Callable[[str], list[str]] = ptb_words if normalisation == "none" else str.split
    words = {id: (split(prediction), split(reference)) for id, (prediction, reference) in normalised.items()}
    counts = {id: bleu_statistics(*pair) for id, pair in words.items()}
    metrics = {f"bleu_{n}": SumMetric(counts, functools.partial(bleu, n=n)) for n in (1, 2, 3, 4)}
    metrics["sacrebleu"] = _sacrebleu(normalised)
    metrics["rouge_l"] = mean_metric({id: rouge_l(*pair) for id, pair in words.items()})
    metrics["rouge_l_f1"] = mean_metric(_rouge_score(normalised))
    name, meteor = _load_meteor()
    metrics[name] = mean_metric({id: meteor(*pair) for id, pair in words.items()})
    if meteor15 is not None:
        from normtune.metrics import meteor as meteor_program

        metrics["meteor15"] = meteor_program.meteor15(words, meteor15)
    for name, variant_d in (("cider_d", True), ("cider", False)):
        scores = cider(list(words.values()), variant_d=variant_d)
        metrics[name] = mean_metric(dict(zip(words, scores, strict=True)))
    if bertscore is not None:
        from normtune.metrics.bertscore import bertscore_f1

        f1 = bertscore_f1(list(normalised.values()), bertscore)
        metrics["bertscore_f1"] = mean_metric(dict(zip(normalised, f1, strict=True)))
    return metrics


def _sacrebleu(texts: Texts) -> SumMetric:
    """Build corpus BLEU from sacrebleu's statistics of each row and sacrebleu's score of their sums."""
    from sacrebleu.metrics import BLEU

    scorer = BLEU(effective_order=True)  # avoids sacrebleu's warning about scores of single rows
    rows = {}
    for id, (prediction, reference) in texts.items():
        row = scorer.sentence_score(prediction, [reference])
        rows[id] = np.array([*row.counts, *row.totals, row.sys_len, row.ref_len], dtype=np.float64)

    def from_sums(sums: Floats) -> Floats:  # [n, 10] -> [n]
        scores = []
        for row in sums.round().astype(int).tolist():
            scores.append(BLEU.compute_bleu(row[:4], row[4:8], row[8], row[9], smooth_method="exp").score)
        return np.array(scores) / 100

    return SumMetric(rows, from_sums)


def _rouge_score(texts: Texts) -> dict[str, float]:
    """Compute rougeL F1 of each row with the package rouge-score: row id -> F1.

    Its words are runs of a to z and 0 to 9, as in the package's default; here each Chinese character is one too.
    """
    from rouge_score.rouge_scorer import RougeScorer

    tokenizer = SimpleNamespace(tokenize=lambda text: _ROUGE_WORD.findall(text.lower()))
    scorer = RougeScorer(["rougeL"], tokenizer=tokenizer)
    return {
        id: float(scorer.score(reference, prediction)["rougeL"].fmeasure)
        for id, (prediction, reference) in texts.items()
    }


def _load_meteor() -> tuple[str, Callable[[Sequence[str], Sequence[str]], float]]:
    """Return the name of the METEOR that is available, and the function (prediction, reference) -> score."""
    from nltk.corpus import wordnet
    from nltk.translate.meteor_score import single_meteor_score

    try:
        wordnet.ensure_loaded()
        name, synonyms = "meteor_nltk", wordnet
    except LookupError:  # the data of WordNet are missing: words have no synonyms
        name, synonyms = "meteor_exact_stem", SimpleNamespace(synsets=lambda word: [])

    def score(prediction: Sequence[str], reference: Sequence[str]) -> float:
        return float(single_meteor_score(reference, prediction, wordnet=synonyms))

    return name, score


def text_pairs(examples: Sequence[Example], predictions: Mapping[str, str] | Sequence[Prediction]) -> Texts:
    """Join predictions and references by id: id -> (prediction, reference).

    Raises:
        InputError: if ids do not match one to one.
    """
    return {example.id: (text, example.answer) for example, text in pair_with_predictions(examples, predictions)}


def report_table(
    texts: Texts,
    *,
    normalisations: Sequence[str] = ("none", "r2gen-iu"),
    findings: bool = True,
    bertscore: Path | str | None = None,
    meteor15: Path | None = None,
) -> dict[str, SumMetric]:
    """Build every metric under every normalisation as `NAME/NORMALISATION`, and `findings_rules` label F1.

    Args:
        texts: row id -> (prediction, reference).
        normalisations: names of `NORMALISATIONS`.
        findings: includes the label F1 of `findings_rules`.
        bertscore: local directory of the model for BERTScore; None omits BERTScore.
        meteor15: the path of `meteor-1.5.jar`; None omits METEOR 1.5.

    Raises:
        InputError: as `report_metrics`.
    """
    table = {}
    for normalisation in normalisations:
        metrics = report_metrics(texts, normalisation=normalisation, bertscore=bertscore, meteor15=meteor15)
        table.update({f"{name}/{normalisation}": metric for name, metric in metrics.items()})
    if findings:
        from normtune.metrics.clinical import rules_metrics

        table.update(rules_metrics(texts))
    return table


def summarise_reports(table: Mapping[str, SumMetric], examples: Sequence[Example]) -> dict[str, Metric]:
    """Compute each metric over all rows, with its interval clustered by image or patient."""
    results = {}
    for name, interval in metric_intervals(table, cluster_rows(examples)).items():
        scored = [example.images for example in examples if example.id in table[name].row_statistics]
        results[name] = Metric(interval.value, interval.low, interval.high, len(scored), len(set(scored)))
    return results
