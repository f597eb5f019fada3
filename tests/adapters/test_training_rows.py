"""An adapter records digests of its training rows, and an evaluation says how many of its rows are among them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from normtune.adapters.training_rows import Overlap, hash_rows, overlap
from normtune.data.records import Dataset
from normtune.data.registry import open_dataset
from normtune.evaluation.compare import compare
from normtune.evaluation.config import EvaluateConfig
from normtune.evaluation.evaluate import evaluate_config
from normtune.runtime.files import read_json, write_json
from normtune.training.config import TrainConfig
from normtune.training.train import train
from tests.support.base_models import input_error


def write_rows(root: Path, rows: list[tuple[int, str, str]], prefix: str = "") -> Path:
    """A jsonl folder; each row is a grey value, the only colour of its picture, a question and an answer."""
    root.mkdir(parents=True)
    lines: list[dict[str, Any]] = []
    for grey, question, answer in rows:
        Image.new("RGB", (24, 24), (grey, grey, 7)).save(root / f"{prefix}{grey}.png")
        lines.append({"image": f"{prefix}{grey}.png", "question": question, "answer": answer})
    (root / "train.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return root


def open_rows(root: Path) -> Dataset:
    return open_dataset("jsonl", root)


ROWS = [(10, "Is it large?", "yes"), (10, "Where is it?", "left"), (20, "Is it large?", "no")]


def test_the_digest_covers_rows_pictures_and_their_order_but_no_names(tmp_path: Path) -> None:
    def digest(name: str, rows: list[tuple[int, str, str]], prefix: str = "") -> str:
        dataset = open_rows(write_rows(tmp_path / name, rows, prefix))
        return hash_rows(dataset, dataset.examples).digest

    same = digest("a", ROWS)
    assert digest("renamed", ROWS, prefix="scan-") == same
    changed = [
        ROWS[::-1],
        ROWS[:2],
        [(11, *ROWS[0][1:]), *ROWS[1:]],
        [(10, "Is it large?", "Yes"), *ROWS[1:]],
        [(10, "Is it  large?", "yes"), *ROWS[1:]],
    ]
    digests = {same, *(digest(f"changed-{number}", rows) for number, rows in enumerate(changed))}
    assert len(digests) == 1 + len(changed)


@pytest.fixture(scope="module")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("overlap")
    root = write_rows(folder / "trained", ROWS)
    train(TrainConfig(model=str(base), data="jsonl", root=root, out=folder / "ln", max_steps=1, device="cpu"))
    return folder / "ln"


def test_rows_and_pictures_of_the_training_are_counted(adapter: Path, tmp_path: Path) -> None:
    """Names of files, case and blanks do not count; a new question about a trained picture is a new row."""
    rows = [(10, "is it LARGE? ", "Yes"), (20, "Where is it?", "left"), (30, "Is it large?", "yes")]
    dataset = open_rows(write_rows(tmp_path / "test", rows, prefix="other-"))
    counts = overlap(adapter, dataset, dataset.examples)
    assert counts == Overlap(rows=1, rows_evaluated=3, pictures=2, pictures_evaluated=3)
    assert str(counts) == "1 of 3 rows and 2 of 3 pictures were in the training data of the adapter"
    stored = (adapter / "training_rows.json").read_text()
    assert "large" not in stored and len(read_json(adapter / "training_rows.json")["rows"]) == 3


def test_an_evaluation_and_a_comparison_report_trained_rows(adapter: Path, base: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"model": str(base), "data": "jsonl", "root": adapter.parent / "trained"}
    options |= {"split": "train", "device": "cpu", "max_new_tokens": 2}
    tuned = evaluate_config(EvaluateConfig(**options, adapter=adapter, out=tmp_path / "ln"))
    evaluate_config(EvaluateConfig(**options, out=tmp_path / "frozen"))
    sentence = "3 of 3 rows and 2 of 2 pictures were in the training data of the adapter"
    assert sentence in str(tuned)
    counts = {"rows": 3, "rows_evaluated": 3, "pictures": 2, "pictures_evaluated": 2}
    assert read_json(tmp_path / "ln" / "metrics.json")["trained_rows"] == counts
    assert "trained_rows" not in read_json(tmp_path / "frozen" / "metrics.json")
    comparison = compare([tmp_path / "frozen", tmp_path / "ln"])
    assert f"ln: {sentence}." in str(comparison) and f"ln: {sentence}." in comparison.markdown()
    assert comparison.to_dict()["trained_rows"] == {"frozen": None, "ln": counts}


def test_an_adapter_without_a_record_has_no_counts(adapter: Path, tmp_path: Path) -> None:
    dataset = open_rows(write_rows(tmp_path / "test", ROWS))
    path = adapter / "training_rows.json"
    stored = read_json(path)
    path.unlink()
    assert overlap(adapter, dataset, dataset.examples) is None
    write_json(path, {**stored, "digest": "of another adapter"})
    assert "does not belong to the adapter" in input_error(lambda: overlap(adapter, dataset, dataset.examples))
    write_json(path, stored)


def test_counts_are_read_without_torch() -> None:
    code = (
        "import sys, normtune.adapters.training_rows; print([m for m in ('torch', 'transformers') if m in sys.modules])"
    )
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert process.stdout.strip() == "[]"
