"""The base in the package is small, complete, and trained."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from normtune.data.registry import open_dataset
from normtune.evaluation.baselines import QuestionOnly
from normtune.evaluation.config import EvaluateConfig
from normtune.evaluation.evaluate import evaluate
from normtune.metrics.answers import score_vqa
from normtune.models.loading import load
from normtune.runtime.files import read_json

CONFIG = EvaluateConfig(model="nano", data="phantom-a:150", out=None)
NANO = Path(str(files("normtune.models").joinpath("nano")))


def test_nano_takes_at_most_12_megabytes() -> None:
    assert sum(path.stat().st_size for path in NANO.rglob("*") if path.is_file()) <= 12_000_000


def test_nano_answers_hospital_a_better_than_a_question_only_baseline() -> None:
    dataset = open_dataset("phantom-a:150")
    test = dataset.split("test")
    blind = score_vqa(test, QuestionOnly.fit(dataset.split("train")).predict(test))["global_exact"]
    accuracy = evaluate(load("nano"), test, CONFIG).metrics["global_exact"]
    assert accuracy.low > blind.high


def test_the_record_of_its_training_agrees_with_its_weights() -> None:
    """The committed scores are of 100 test images; the interval of 30 of them contains them."""
    record = read_json(NANO / "training.json")
    dataset = open_dataset("phantom-a:150")
    accuracy = evaluate(load("nano"), dataset.test, CONFIG).metrics["global_exact"]
    assert accuracy.low <= record["test"]["hospital a"]["global_exact"]["value"] <= accuracy.high


def test_its_tokenizer_knows_the_words_of_hospital_b() -> None:
    """Tuning norms cannot make the embedding of a word that was never trained."""
    family = load("nano")
    unknown = family.processor.tokenizer.unk_token_id
    for example in open_dataset("phantom-b:20").examples:
        segment = family.tokenize(example.id, example.question, example.answer)
        assert unknown not in segment.prompt + segment.answer
        assert not any(
            piece.startswith("##") for piece in family.processor.tokenizer.convert_ids_to_tokens(segment.answer)
        )
