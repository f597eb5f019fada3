"""`--tracker` with the real packages and without a network; each test is skipped where its package is not installed."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import pytest

from normtune.data.registry import open_dataset
from normtune.training.config import TrainConfig
from normtune.training.result import TrainResult
from normtune.training.train import train

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the trackers' own dependencies
DATA = "phantom-b:6"


def run(base: Path, out: Path, tracker: str) -> TrainResult:
    """A run of two epochs with two validations."""
    options: dict[str, Any] = {"epochs": 2, "batch": 16, "device": "cpu", "validate_every": "epoch"}
    config = TrainConfig(
        model=str(base), data=DATA, tune="ln", out=out, tracker=tracker, validation_split="train", **options
    )
    return train(config)


def expected_values(result: TrainResult) -> dict[str, dict[int, float]]:
    """Name of a logged value, as transformers writes it -> step -> value."""
    return {
        "train/loss": dict(result.losses),
        "eval/validation_loss": {point.step: point.validation_loss for point in result.curve},
        "eval/global_exact": {point.step: point.metrics["global_exact"] for point in result.curve},
    }


def check_no_rows(*directories: Path) -> None:
    """No file of a tracker contains a question or an answer of several words."""
    written = b"".join(
        path.read_bytes() for directory in directories for path in directory.rglob("*") if path.is_file()
    )
    assert written
    for example in open_dataset(DATA).examples:
        assert example.question.encode() not in written
        assert " " not in example.answer or example.answer.encode() not in written


def test_tensorboard_logs_losses_and_validations(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    monkeypatch.delenv("TENSORBOARD_LOGGING_DIR", raising=False)
    result = run(base, tmp_path / "out", "tensorboard")
    (folder,) = (tmp_path / "out" / "runs").iterdir()
    events = accumulator.EventAccumulator(str(folder)).Reload()
    for name, values in expected_values(result).items():
        logged = {event.step: event.value for event in events.Scalars(name)}
        assert logged == {step: pytest.approx(value) for step, value in values.items()}, name
    check_no_rows(tmp_path / "out" / "runs")


def wandb_records(path: Path) -> list[Any]:
    """The records of an offline run: a header of 7 bytes, then LevelDB's log format in blocks of 32 KiB."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, records, parts = path.read_bytes(), [], b""
    position = 7
    while position + 7 <= len(data):
        left = 32_768 - position % 32_768
        if left < 7:  # too short for a header: padding
            position += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, position)
        parts += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # a whole record, or the last part of one
            records.append(Record.FromString(parts))
            parts = b""
    return records


def test_wandb_logs_losses_and_validations_offline(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb")
    for name, value in {"WANDB_MODE": "offline", "WANDB_DIR": str(tmp_path), "WANDB_SILENT": "true"}.items():
        monkeypatch.setenv(name, value)
    result = run(base, tmp_path / "out", "wandb")
    wandb.finish()
    (path,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    rows = [
        {item.key or "/".join(item.nested_key): float(item.value_json) for item in record.history.item
         if item.value_json.lstrip("-")[:1].isdigit()}
        for record in wandb_records(path)
        if record.HasField("history")
    ]  # fmt: skip
    for name, values in expected_values(result).items():
        logged = {int(row["train/global_step"]): row[name] for row in rows if name in row}
        assert logged == {step: pytest.approx(value) for step, value in values.items()}, name
    check_no_rows(tmp_path / "wandb")


def test_mlflow_logs_losses_and_validations_offline(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mlflow = pytest.importorskip("mlflow")
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    monkeypatch.chdir(tmp_path)
    result = run(base, tmp_path / "out", "mlflow")
    client = mlflow.MlflowClient(uri)
    (tracked,) = client.search_runs(["0"])
    assert tracked.info.status == "FINISHED"
    for name, values in expected_values(result).items():
        # transformers sends its own names to MLflow: loss, eval_validation_loss
        history = client.get_metric_history(tracked.info.run_id, name.removeprefix("train/").replace("eval/", "eval_"))
        logged = {metric.step: metric.value for metric in history}
        assert logged == {step: pytest.approx(value) for step, value in values.items()}, name
    (tmp_path / "database").mkdir()
    (tmp_path / "mlflow.db").rename(tmp_path / "database" / "mlflow.db")
    check_no_rows(tmp_path / "database")
