"""Report metrics beside their reference implementations, on real texts: no text is ever printed."""

from __future__ import annotations

import functools
import itertools
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from normtune.metrics.clinical import finding_table, label_metrics
from normtune.metrics.finding_rules import FINDINGS, findings
from normtune.metrics.ngrams import cider
from normtune.metrics.ptb_words import ptb_words
from normtune.metrics.reports import Texts, normalise_report, report_metrics
from normtune.metrics.sum_metrics import SumMetric

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
    """The text with words dropped, doubled, swapped or in capitals."""
    words = text.split()
    for _ in range(draw.randint(0, 6)):
        at = draw.randrange(len(words))
        words[at : at + 1] = draw.choice([[], [words[at]] * 2, [words[at].upper()], ["mass", words[at]]])
        words = words or ["normal"]
    return " ".join(words)


def pairs_of(reports: dict[str, str], seed: int) -> Texts:
    """A half of the pairs an edited report and the report, a half two reports."""
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
def how(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def found(texts: Texts, how: str) -> Table:
    return report_metrics(texts, normalisation=how)


def cut(text: str, how: str) -> str:
    return " ".join(ptb_words(text)) if how == "none" else normalise_report(text, how)


def coco(texts: Texts, how: str) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """References and predictions as pycocoevalcap takes them."""
    return (
        {id: [cut(meant, how)] for id, (_, meant) in texts.items()},
        {id: [cut(said, how)] for id, (said, _) in texts.items()},
    )


def test_bleu_rouge_and_cider_d_equal_coco_captions(texts: Texts, how: str, found: Table) -> None:
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    references, predictions = coco(texts, how)
    corpus, rows = Bleu(4).compute_score(references, predictions, verbose=0)
    for n in range(4):
        metric = found[f"bleu_{n + 1}"]
        assert metric.overall() == pytest.approx(corpus[n], abs=1e-12)
        assert metric.by_row() == pytest.approx(dict(zip(texts, rows[n], strict=True)), abs=1e-9)
    for name, scorer in (("rouge_l", Rouge()), ("cider_d", Cider())):
        mean, scores = scorer.compute_score(references, predictions)
        assert found[name].overall() == pytest.approx(mean, abs=1e-12)
        assert found[name].by_row() == pytest.approx(dict(zip(texts, scores, strict=True)), abs=1e-9)
    assert 0.1 < corpus[3] < 0.9  # the pairs are neither all alike nor all apart


def test_cider_without_clipping_equals_its_definition_in_matrices(texts: Texts) -> None:
    rows = [
        (normalise_report(said, "r2gen-iu").split(), normalise_report(meant, "r2gen-iu").split())
        for said, meant in texts.values()
    ]
    total = np.zeros(len(rows))
    for n in (1, 2, 3, 4):
        cut_up = [
            [[tuple(words[i : i + n]) for i in range(len(words) - n + 1)] for words in row] for row in rows
        ]
        known = {g: i for i, g in enumerate(dict.fromkeys(g for row in cut_up for side in row for g in side))}
        counts = np.zeros((2, len(rows), len(known)))
        for at, row in enumerate(cut_up):
            for side, held in enumerate(row):
                np.add.at(counts[side, at], [known[g] for g in held], 1)
        rarity = np.log(len(rows) / np.maximum(1, (counts[1] > 0).sum(axis=0)))
        weighed = counts * rarity
        norms = np.linalg.norm(weighed, axis=2).prod(axis=0)
        total += np.divide(
            (weighed[0] * weighed[1]).sum(axis=1), norms, out=np.zeros(len(rows)), where=norms > 0
        )
    assert cider(rows, d=False) == pytest.approx(10 * total / 4, abs=1e-9)


def test_sacrebleu_and_rouge_score_give_the_same(texts: Texts, how: str, found: Table) -> None:
    import sacrebleu
    from rouge_score.rouge_scorer import RougeScorer

    said, meant = (
        [normalise_report(text, how) for text in side] for side in zip(*texts.values(), strict=True)
    )
    assert found["sacrebleu"].overall() == pytest.approx(
        sacrebleu.corpus_bleu(said, [meant]).score / 100, abs=1e-12
    )
    scorer = RougeScorer(["rougeL"])
    rouge = [scorer.score(b, a)["rougeL"].fmeasure for a, b in zip(said, meant, strict=True)]
    assert list(found["rouge_l_f1"].by_row().values()) == pytest.approx(rouge, abs=1e-12)


def test_meteor_equals_nltks(texts: Texts, how: str, found: Table) -> None:
    from nltk.corpus import wordnet
    from nltk.translate import meteor_score as nltk_meteor

    score: Callable[[list[list[str]], list[str]], float]
    if "meteor_nltk" in found:
        name, score = "meteor_nltk", functools.partial(nltk_meteor.meteor_score, wordnet=wordnet)
    else:  # nltk's public matchers for the first two of its three stages, put together again
        name, score = "meteor_exact_stem", exact_and_stem
    expected = {
        id: score([cut(meant, how).split()], cut(said, how).split()) for id, (said, meant) in texts.items()
    }
    assert found[name].by_row() == pytest.approx(expected, abs=1e-12)


def exact_and_stem(references: list[list[str]], said: list[str]) -> float:
    from nltk.stem import PorterStemmer

    stem = functools.cache(PorterStemmer().stem)
    meant = [word.lower() for word in references[0]]
    said = [word.lower() for word in said]
    matches: list[tuple[int, int]] = []
    for form in (str, stem):
        ours, theirs = [form(word) for word in said], [form(word) for word in meant]
        for i in reversed(range(len(said))):
            taken = {b for _, b in matches}
            same = [j for j, word in enumerate(theirs) if word == ours[i] and j not in taken]
            if same and all(i != a for a, _ in matches):
                matches.append((i, same[-1]))
    if not matches:
        return 0.0
    matches.sort()
    chunks = 1 + sum(b != (a[0] + 1, a[1] + 1) for a, b in itertools.pairwise(matches))
    precision, recall = len(matches) / len(said), len(matches) / len(meant)
    mean = precision * recall / (0.9 * precision + 0.1 * recall)
    return mean * (1 - 0.5 * (chunks / len(matches)) ** 3)


def test_words_equal_those_of_the_stanford_tokenizer(openi_root: Path, medpix_root: Path) -> None:
    if shutil.which("java") is None:
        pytest.skip("no java, which the Stanford tokenizer needs")
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    reports = {**openi(openi_root), **medpix(medpix_root)}
    theirs = PTBTokenizer().tokenize({id: [{"caption": text}] for id, text in reports.items()})
    same = [ptb_words(text) == theirs[id][0].split() for id, text in reports.items()]
    assert len(same) > 3000 and np.mean(same) > 0.999


def test_findings_by_rules_agree_with_labels_by_hand(openi_root: Path) -> None:
    reports = openi(openi_root)
    by_hand = json.loads(LABELS.read_text(encoding="utf-8"))["labels"]
    assert len(by_hand) == 100
    meant = {id: {name: labels.get(name, "absent") for name in FINDINGS} for id, labels in by_hand.items()}
    said = {id: {**findings(reports[id]), "No Finding": "absent"} for id in by_hand}
    table = finding_table(said, meant)
    assert sum(row["references"] for row in table.values()) == 62
    for name in ("Lung Opacity", "Cardiomegaly", "Atelectasis"):
        assert min(table[name]["precision"], table[name]["recall"]) > 0.95, name
    micro = label_metrics(said, meant, "rules")["rules_f1_micro_14"].overall()
    assert micro == pytest.approx(0.959, abs=0.01)
