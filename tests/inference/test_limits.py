from __future__ import annotations

import json
from pathlib import Path

import pytest

from normtune.data.records import Dataset, Example, Split
from normtune.data.registry import open_dataset
from normtune.errors import InputError
from normtune.evaluation.config import EvaluateConfig
from normtune.evaluation.evaluate import evaluate_config
from normtune.inference.limits import answer_limit, inspect_data
from normtune.models.loading import load, load_without_weights
from normtune.training.config import TrainConfig
from normtune.training.train import train
from tests.support.dataset_samples import write_image, write_jsonl

LONG = "the left lung is large and the right lung is small and the heart is normal and there is no fluid"


def rows(root: Path, *answers: str, question: str = "is it large ?") -> Path:
    cells = []
    for number, answer in enumerate(answers):
        write_image(root / f"{number}.png", number)
        cells.append({"image": f"{number}.png", "question": question, "answer": answer})
    write_jsonl(root / "train.jsonl", *cells)
    write_jsonl(root / "test.jsonl", *cells)
    return root


def split(*answers: str) -> Split:
    examples = [Example(str(n), ("a",), "?", answer, "open", "train") for n, answer in enumerate(answers)]
    dataset = Dataset("made", examples, lambda key: pytest.fail("no picture is needed"))
    return Split(dataset, examples)


def test_the_answer_limit_holds_the_longest_training_reference() -> None:
    family = load_without_weights("nano")
    short, long = split("yes"), split("yes", LONG)
    tokens = len(family.tokenize_whole("", "?", LONG).answer)
    assert answer_limit(family, short) == 16
    assert answer_limit(family, Split(long.dataset, short)) == tokens + 8 > 16
    assert answer_limit(family, split("lung " * 500)) == family.max_answer_tokens
    # without a training split, the rows that are answered count
    assert answer_limit(family, Split(Dataset("made", [], long.dataset.open_image), long)) == tokens + 8


def test_training_and_evaluation_record_the_same_limits(tmp_path: Path) -> None:
    root = rows(tmp_path, "yes", LONG)
    options = {"model": "nano", "data": "jsonl", "root": root, "device": "cpu"}
    train(TrainConfig(**options, out=tmp_path / "adapter", tune="ln", max_steps=1))
    limits = json.loads((tmp_path / "adapter/adapter.json").read_text())["data"]["limits"]
    assert limits["prompt"] == 192 and limits["reference"] == 191
    result = evaluate_config(EvaluateConfig(**options, out=tmp_path / "run", adapter=tmp_path / "adapter")).record
    assert result["settings"]["max_new_tokens"] == limits["answer"] > 16
    assert result["preflight"]["limits"]["answers"]["cut"] == 0
    written = json.loads((tmp_path / "run/preflight.json").read_text())
    assert written["rows"] == result["preflight"]["rows"]
    short = evaluate_config(EvaluateConfig(**options, out=tmp_path / "short", max_new_tokens=4)).record
    assert short["preflight"]["losses"] == {"answer is cut": 1}
    assert short["preflight"]["limits"]["score_ceiling"]["all"] == 0.5


def test_a_question_is_cut_at_the_models_positions_and_at_35_for_old_adapters() -> None:
    family = load("nano")
    question = "is the left lung large and " * 60
    assert len(family.tokenize("1", question, None).prompt) == 192
    family.use_limits(None)  # an adapter of 0.1 records none
    old = family.tokenize("1", question, None).prompt
    assert len(old) == 35 and old[-1] == family.tokenize_whole("1", question, None).prompt[-1]
    family.use_limits({"prompt": 192})
    assert len(family.tokenize("1", question, None).prompt) == 192


@pytest.mark.parametrize("command", ["train", "evaluate"])
def test_a_damaged_picture_stops_a_run_before_it_starts_or_is_left_out(tmp_path: Path, command: str) -> None:
    root = rows(tmp_path / "data", "yes", "no", "yes")
    damaged = root / "1.png"
    damaged.write_bytes(damaged.read_bytes()[:40])
    options = {"model": "nano", "data": "jsonl", "root": root, "device": "cpu", "out": tmp_path / "out"}

    def run(**changes: bool) -> None:
        if command == "train":
            train(TrainConfig(**options, tune="ln", max_steps=1, **changes))
        else:
            evaluate_config(EvaluateConfig(**options, **changes))

    with pytest.raises(InputError, match=r"1 of 3 rows cannot be used\. .*1\.png: "):
        run()
    with pytest.raises(InputError, match="--strict: picture cannot be decoded 1"):
        run(strict=True, skip_bad=True)
    run(skip_bad=True)
    counts = json.loads((tmp_path / "out/preflight.json").read_text())
    assert counts["rows"]["used"] == 2 and counts["losses"] == {"picture cannot be decoded": 1}


def test_normtune_data_counts_all_splits_with_the_limits_of_a_model(tmp_path: Path) -> None:
    counts = inspect_data(open_dataset("jsonl", rows(tmp_path, "yes", "lung " * 400)), "nano")
    assert counts.rows["used"] == 4
    assert counts.losses == {"reference is cut in training": 2, "answer is cut": 2}
    with pytest.raises(InputError, match="--strict: reference is cut in training 2, answer is cut 2"):
        counts.require_no_loss()
