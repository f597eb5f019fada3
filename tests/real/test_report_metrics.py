"""Compares report metrics with their reference implementations on real texts. No text is printed."""

from __future__ import annotations

import functools
import itertools
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from normtune.metrics.clinical import finding_table, label_metrics
from normtune.metrics.finding_rules import FINDINGS, extract_findings
from normtune.metrics.ngrams import cider
from normtune.metrics.ptb_words import ptb_words
from normtune.metrics.reports import Texts, normalise_report, report_metrics
from normtune.metrics.sum_metrics import SumMetric
from tests.support.tolerance import approx

# Both sides compute in float64, with sums over up to a million n-grams and values up to 10 (CIDEr).
EXACT: dict[str, Any] = {"dtype": torch.float64, "terms": 1_000_000, "magnitude": 10.0}

LABELS = Path(__file__).with_name("openi_findings.json")
SIZE = 250  # pairs of each source
NORMALISATIONS = ("none", "r2gen-iu", "r2gen-mimic")
Table = dict[str, SumMetric]


def openi(root: Path) -> dict[str, str]:
    splits = json.loads((root / "annotation.json").read_text(encoding="utf-8"))
    return {row["id"]: row["report"] for rows in splits.values() for row in rows}


def medpix(root: Path) -> dict[str, str]:
    lines = (root / "test.jsonl").read_text(encoding="utf-8").splitlines()
    lines += (root / "dev.jsonl").read_text(encoding="utf-8").splitlines()
    return {row["id"]: row["report"] for row in map(json.loads, lines)}


def edited(text: str, draw: random.Random) -> str:
    """Edit a text: words are dropped, repeated, converted to upper case or inserted."""
    words = text.split()
    for _ in range(draw.randint(0, 6)):
        at = draw.randrange(len(words))
        words[at : at + 1] = draw.choice([[], [words[at]] * 2, [words[at].upper()], ["mass", words[at]]])
        words = words or ["normal"]
    return " ".join(words)


def pairs_of(reports: dict[str, str], seed: int) -> Texts:
    """Build pairs of texts: half of them an edited report and the report, half of them two reports."""
    draw = random.Random(seed)
    ids = draw.sample(sorted(reports), SIZE)
    others = draw.sample(ids, SIZE)
    pairs = {
        id: (edited(reports[id if draw.random() < 0.5 else other], draw), reports[id])
        for id, other in zip(ids, others, strict=True)
    }
    return {**pairs, ids[0]: ("", reports[ids[0]]), ids[1]: ("normal", reports[ids[1]])}


@pytest.fixture(scope="module", params=["openi", "medpix"])
def texts(request: pytest.FixtureRequest) -> Texts:
    root = request.getfixturevalue(f"{request.param}_root")
    return pairs_of({"openi": openi, "medpix": medpix}[request.param](root), 1)


@pytest.fixture(scope="module", params=NORMALISATIONS)
def normalisation(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def metrics(texts: Texts, normalisation: str) -> Table:
    return report_metrics(texts, normalisation=normalisation)


def join_words(text: str, normalisation: str) -> str:
    return " ".join(ptb_words(text)) if normalisation == "none" else normalise_report(text, normalisation)


def coco(texts: Texts, normalisation: str) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """Build references and predictions in the form that pycocoevalcap needs."""
    return (
        {id: [join_words(reference, normalisation)] for id, (_, reference) in texts.items()},
        {id: [join_words(prediction, normalisation)] for id, (prediction, _) in texts.items()},
    )


def test_bleu_rouge_and_cider_d_equal_coco_captions(texts: Texts, normalisation: str, metrics: Table) -> None:
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    references, predictions = coco(texts, normalisation)
    corpus, rows = Bleu(4).compute_score(references, predictions, verbose=0)
    for n in range(4):
        metric = metrics[f"bleu_{n + 1}"]
        assert metric.overall() == approx(corpus[n], **EXACT)
        assert metric.by_row() == approx(dict(zip(texts, rows[n], strict=True)), **EXACT)
    for name, scorer in (("rouge_l", Rouge()), ("cider_d", Cider())):
        mean, scores = scorer.compute_score(references, predictions)
        assert metrics[name].overall() == approx(mean, **EXACT)
        assert metrics[name].by_row() == approx(dict(zip(texts, scores, strict=True)), **EXACT)
    assert 0.1 < corpus[3] < 0.9  # the pairs are neither all equal nor all different


def test_cider_without_clipping_equals_its_definition_in_matrices(texts: Texts) -> None:
    rows = [
        (normalise_report(prediction, "r2gen-iu").split(), normalise_report(reference, "r2gen-iu").split())
        for prediction, reference in texts.values()
    ]
    total = np.zeros(len(rows))
    for n in (1, 2, 3, 4):
        ngrams = [[[tuple(words[i : i + n]) for i in range(len(words) - n + 1)] for words in row] for row in rows]
        index = {g: i for i, g in enumerate(dict.fromkeys(g for row in ngrams for side in row for g in side))}
        counts = np.zeros((2, len(rows), len(index)))
        for at, row in enumerate(ngrams):
            for side, grams in enumerate(row):
                np.add.at(counts[side, at], [index[g] for g in grams], 1)
        rarity = np.log(len(rows) / np.maximum(1, (counts[1] > 0).sum(axis=0)))
        weighed = counts * rarity
        norms = np.linalg.norm(weighed, axis=2).prod(axis=0)
        total += np.divide((weighed[0] * weighed[1]).sum(axis=1), norms, out=np.zeros(len(rows)), where=norms > 0)
    assert cider(rows, variant_d=False) == approx(10 * total / 4, **EXACT)


def test_sacrebleu_and_rouge_equal_their_packages(texts: Texts, normalisation: str, metrics: Table) -> None:
    import sacrebleu
    from rouge_score.rouge_scorer import RougeScorer

    predictions, references = (
        [normalise_report(text, normalisation) for text in side] for side in zip(*texts.values(), strict=True)
    )
    assert metrics["sacrebleu"].overall() == approx(
        sacrebleu.corpus_bleu(predictions, [references]).score / 100, **EXACT
    )
    scorer = RougeScorer(["rougeL"])
    rouge = [scorer.score(b, a)["rougeL"].fmeasure for a, b in zip(predictions, references, strict=True)]
    assert list(metrics["rouge_l_f1"].by_row().values()) == approx(rouge, **EXACT)


def test_meteor_equals_nltk(texts: Texts, normalisation: str, metrics: Table) -> None:
    from nltk.corpus import wordnet
    from nltk.translate import meteor_score as nltk_meteor

    score: Callable[[list[list[str]], list[str]], float]
    if "meteor_nltk" in metrics:
        name, score = "meteor_nltk", functools.partial(nltk_meteor.meteor_score, wordnet=wordnet)
    else:  # without WordNet: an independent implementation of the first two of nltk's three stages
        name, score = "meteor_exact_stem", exact_and_stem
    expected = {
        id: score([join_words(reference, normalisation).split()], join_words(prediction, normalisation).split())
        for id, (prediction, reference) in texts.items()
    }
    assert metrics[name].by_row() == approx(expected, **EXACT)


def exact_and_stem(references: list[list[str]], prediction: list[str]) -> float:
    from nltk.stem import PorterStemmer

    stem = functools.cache(PorterStemmer().stem)
    reference = [word.lower() for word in references[0]]
    prediction = [word.lower() for word in prediction]
    matches: list[tuple[int, int]] = []
    for form in (str, stem):
        predicted, expected = [form(word) for word in prediction], [form(word) for word in reference]
        for i in reversed(range(len(prediction))):
            taken = {b for _, b in matches}
            same = [j for j, word in enumerate(expected) if word == predicted[i] and j not in taken]
            if same and all(i != a for a, _ in matches):
                matches.append((i, same[-1]))
    if not matches:
        return 0.0
    matches.sort()
    chunks = 1 + sum(b != (a[0] + 1, a[1] + 1) for a, b in itertools.pairwise(matches))
    precision, recall = len(matches) / len(prediction), len(matches) / len(reference)
    mean = precision * recall / (0.9 * precision + 0.1 * recall)
    return mean * (1 - 0.5 * (chunks / len(matches)) ** 3)


def test_words_equal_those_of_the_stanford_tokenizer(openi_root: Path, medpix_root: Path) -> None:
    if shutil.which("java") is None:
        pytest.skip("no java, which the Stanford tokenizer needs")
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    reports = {**openi(openi_root), **medpix(medpix_root)}
    expected = PTBTokenizer().tokenize({id: [{"caption": text}] for id, text in reports.items()})
    same = [ptb_words(text) == expected[id][0].split() for id, text in reports.items()]
    assert len(same) > 3000 and np.mean(same) > 0.999


def test_findings_by_rules_agree_with_labels_written_by_hand(openi_root: Path) -> None:
    reports = openi(openi_root)
    by_hand = json.loads(LABELS.read_text(encoding="utf-8"))["labels"]
    assert len(by_hand) == 100
    references = {id: {name: labels.get(name, "absent") for name in FINDINGS} for id, labels in by_hand.items()}
    predictions = {id: {**extract_findings(reports[id]), "No Finding": "absent"} for id in by_hand}
    table = finding_table(predictions, references)
    assert sum(row["references"] for row in table.values()) == 62
    for name in ("Lung Opacity", "Cardiomegaly", "Atelectasis"):
        assert min(table[name]["precision"], table[name]["recall"]) > 0.95, name
    micro = label_metrics(predictions, references, "rules")["rules_f1_micro_14"].overall()
    assert round(micro, 2) == 0.96
