"""Several processes give the results of one: DDP and FSDP2 over gloo, kills, other numbers of processes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from normtune.data.batches import examples_of_rank
from normtune.data.registry import open_dataset
from normtune.errors import InputError
from normtune.evaluation.config import EvaluateConfig
from normtune.evaluation.evaluate import evaluate_config
from normtune.runtime.files import read_json
from normtune.training.checkpoints import Checkpoint
from normtune.training.config import TrainConfig
from normtune.training.identity import check_identity, option_identity
from normtune.training.train import last_checkpoint, train
from tests.support.tiny_models import make_tiny
from tests.support.tolerance import MODEL_TERMS, approx, assert_close

DATA = "phantom-b:6"
ROOT = Path(__file__).parents[2]
TORCHRUN = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
FSDP2 = ["accelerate.commands.launch", "--use_fsdp", "--fsdp_version", "2", "--num_processes", "2"]
FSDP2 += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
FSDP2 += ["--main_process_port", "0"]
OPTIONS: dict[str, Any] = {"data": DATA, "epochs": 2, "cap": 2, "device": "cpu", "save_every": 2}


def options(model: Path, out: Path, batch: int = 16, **more: Any) -> dict[str, Any]:
    return {"model": str(model), "out": str(out), "batch": batch, "tune": "ln"} | OPTIONS | more


def command(values: dict[str, Any]) -> list[str]:
    options = [(f"--{name.replace('_', '-')}", str(value)) for name, value in values.items() if name != "model"]
    return [values["model"], *(word for option in options for word in option)]


def start(launcher: Sequence[str], *words: str) -> subprocess.Popen[str]:
    line = [sys.executable, "-m", *launcher, "-m", *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(line, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def work(launcher: Sequence[str], folder: Path, *jobs: tuple[str, Any]) -> tuple[int, str]:
    """Run jobs under a launcher; return its exit status and what it wrote to stderr."""
    (folder / "jobs.json").write_text(json.dumps(jobs))
    process = start(launcher, "tests.support.distributed_worker", str(folder / "jobs.json"))
    _, stderr = process.communicate(timeout=200)
    return process.returncode, stderr


def assert_same_adapter(out: Path, other: Path, dtype: torch.dtype = torch.float32) -> None:
    """Check that two runs have the same loss at every step, and the same trained values."""
    first, second = (dict(read_json(path / "adapter.json")["metrics"]["training"]["loss"]) for path in (out, other))
    assert first.keys() == second.keys() and len(first) == 10
    terms = 1 if dtype == torch.bfloat16 else len(first) * MODEL_TERMS  # bf16 matmuls add in fp32
    assert first == approx(second, dtype=dtype, terms=terms)
    tensors, others = (load_file(path / "adapter.safetensors") for path in (out, other))
    assert tensors.keys() == others.keys()
    for name, tensor in tensors.items():
        assert_close(tensor, others[name], dtype=dtype, terms=terms, msg=name)
    pairs = {read_json(path / "train_result.json")["pairs"] for path in (out, other)}
    assert pairs == {2 * len(open_dataset(DATA).split("train"))}


class Stop(Exception):
    """Ends a run just after its first checkpoint."""


class Stopping(TrainerCallback):
    def on_save(self, *args: Any, **kwargs: Any) -> None:
        raise Stop


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("processes")


@pytest.fixture(scope="module")
def llava(folder: Path) -> Path:
    return make_tiny("llava", folder / "llava-base")


@pytest.fixture(scope="module")
def single(base: Path, folder: Path) -> Path:
    """The run of one process, with which those of several processes are compared."""
    train(TrainConfig(**options(base, folder / "single")))
    return folder / "single"


@pytest.fixture(scope="module")
def killed(base: Path, folder: Path) -> tuple[Path, str]:
    """A run of two processes, one of which was killed after a checkpoint; its folder and its stderr."""
    out = folder / "killed"
    process = start(TORCHRUN, "normtune", "train", *command(options(base, out, batch=8)))
    victims: list[psutil.Process] = []
    deadline = time.monotonic() + 120
    while last_checkpoint(out) is None and process.poll() is None and time.monotonic() < deadline:
        if not victims:
            children = psutil.Process(process.pid).children()
            victims = [child for child in children if child.environ().get("RANK") == "1"]
        time.sleep(0.01)
    victims[0].kill()
    _, stderr = process.communicate(timeout=120)
    assert process.returncode != 0 and last_checkpoint(out) is not None
    assert not (out / "adapter.json").exists()
    shutil.copytree(out / "checkpoints", folder / "fewer" / "checkpoints")
    return out, stderr


def test_killed_process_is_reported_in_one_line(killed: tuple[Path, str]) -> None:
    lines = [line for line in killed[1].splitlines() if line.startswith(("normtune:", "[rank"))]
    assert all("another process of the run has ended" in line for line in lines) and len(lines) <= 1


def test_two_processes_resume_after_a_kill(base: Path, single: Path, killed: tuple[Path, str]) -> None:
    out = killed[0]
    process = start(TORCHRUN, "normtune", "train", *command(options(base, out, batch=8)), "--json")
    printed, stderr = process.communicate(timeout=200)
    assert process.returncode == 0, stderr
    assert json.loads(printed)["steps"] == 10, "only one process prints"
    assert_same_adapter(out, single)
    assert not (out / "checkpoints").exists()


def test_one_process_resumes_a_run_of_two(base: Path, single: Path, folder: Path, killed: tuple[Path, str]) -> None:
    """The same command: a step keeps its 16 pairs, which were 8 for each of two processes."""
    train(TrainConfig(**options(base, folder / "fewer", batch=8)))
    assert_same_adapter(folder / "fewer", single)


def test_fsdp2_gives_the_result_of_one_process(base: Path, llava: Path, single: Path, folder: Path) -> None:
    half = {"dtype": "bfloat16", "memory": "balanced"}
    train(TrainConfig(**options(llava, folder / "llava", tune="language=ln+lora(r=2),vision=ln")))
    train(TrainConfig(**options(llava, folder / "half", **half)))
    validates = {"validate_every": "4", "validation_split": "train", "validation_limit": 9, "metric_for_best": "loss"}
    train(TrainConfig(**options(llava, folder / "validated", **validates)))
    with pytest.raises(Stop):
        train(TrainConfig(**options(base, folder / "resumed")), progress=Stopping())
    assert last_checkpoint(folder / "resumed") is not None
    status, stderr = work(
        FSDP2,
        folder,
        ("train", options(llava, folder / "sharded", batch=8, tune="language=ln+lora(r=2),vision=ln")),
        ("train", options(llava, folder / "sharded-half", batch=8, **half)),
        ("train", options(base, folder / "resumed", batch=8)),
        ("train", options(llava, folder / "sharded-validated", batch=8, **validates)),
    )
    assert status == 0, stderr
    assert_same_adapter(folder / "sharded", folder / "llava")
    assert_same_adapter(folder / "resumed", single)
    assert_same_adapter(folder / "sharded-validated", folder / "validated")
    curves = [read_json(folder / out / "train_result.json")["curve"] for out in ("sharded-validated", "validated")]
    assert [point["step"] for point in curves[0]] == [point["step"] for point in curves[1]] == [4, 8, 10]
    for point, expected_point in zip(*curves, strict=True):
        assert point["validation_loss"] == approx(expected_point["validation_loss"], terms=10 * MODEL_TERMS)
        assert point["metrics"] == expected_point["metrics"]
    # each process rounds to bf16; the norms are fp32 and change as much
    assert_same_adapter(folder / "sharded-half", folder / "half", dtype=torch.bfloat16)
    results = [read_json(folder / out / "train_result.json") for out in ("sharded-half", "half")]
    changed, expected = (result["changed"] for result in results)
    assert changed == approx(expected, dtype=torch.bfloat16, terms=1) and changed > 0.5
    assert all(int((folder / name / "dealt").read_text()) for name in ("sharded", "sharded-half", "resumed"))


def test_evaluation_splits_images_and_one_process_reports_a_failure(base: Path, folder: Path) -> None:
    values = {"model": str(base), "data": DATA, "split": "train", "device": "cpu", "candidates": "yes/no"}
    values |= {"controls": "other"}
    evaluate_config(EvaluateConfig(**values, out=folder / "one"))
    missing = command(values | {"out": folder / "none"})
    status, stderr = work(
        TORCHRUN, folder, ("evaluate", values | {"out": str(folder / "two")}), ("fail", ["evaluate", *missing])
    )
    assert status != 0
    assert [line for line in stderr.splitlines() if "normtune: " in line] == ["normtune: cannot read image 7."]
    assert "exitcode  : 2" in stderr and "Traceback" not in stderr.split("normtune: ")[0]
    for file in ("predictions.jsonl", "predictions-other.jsonl"):
        rows = [(folder / out / file).read_text().splitlines() for out in ("one", "two")]
        expected, joined = ([json.loads(row) for row in each] for each in rows)
        assert [{**row, "score": None} for row in joined] == [{**row, "score": None} for row in expected]
        assert [row["score"] for row in expected] == approx([row["score"] for row in joined])
    first, second = (read_json(folder / out / "metrics.json") for out in ("one", "two"))
    for key in ("metrics", "strata", "reliance"):
        assert first[key] == second[key]
    assert not (folder / "none" / "metrics.json").exists()


@pytest.mark.parametrize("ranks", [1, 2, 4, 9])
def test_each_example_goes_to_one_process_and_images_are_not_divided(ranks: int) -> None:
    examples = open_dataset(DATA).split("train")
    shares = [examples_of_rank(examples, rank, ranks) for rank in range(ranks)]
    assert sorted(e.id for share in shares for e in share) == sorted(e.id for e in examples)
    images = [{e.images for e in share} for share in shares]
    assert sum(len(keys) for keys in images) == len(set().union(*images))


def write_checkpoint(out: Path) -> tuple[TrainConfig, Path]:
    config = TrainConfig(**options(Path("base"), out, batch=8))
    position = {"pairs_seen": 32, "pairs_a_step": 16, "steps_an_epoch": 5, "unlogged_loss": 0.0, "logged_at": 0}
    folder = out / "checkpoints" / "checkpoint-2"
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps(option_identity(config) | position))
    (folder / "whole").touch()
    return config, folder


@pytest.mark.parametrize(("ranks", "batch", "resumed_with"), [(1, 8, 16), (2, 8, 8), (4, 8, 4), (1, 16, 16)])
def test_step_keeps_its_pairs_with_another_number_of_processes(
    ranks: int, batch: int, resumed_with: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, folder = write_checkpoint(tmp_path)
    monkeypatch.setattr("normtune.runtime.distributed.world_size", lambda: ranks)
    config = config.model_copy(update={"batch": batch})
    assert check_identity(config, option_identity(config)) == "unfinished"
    assert Checkpoint.read(folder).batch_size() == resumed_with


def test_steps_that_cannot_stay_equal_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, folder = write_checkpoint(tmp_path)
    monkeypatch.setattr("normtune.runtime.distributed.world_size", lambda: 3)
    with pytest.raises(InputError, match="16 pairs per step, which 3 processes"):
        Checkpoint.read(folder).batch_size()
    monkeypatch.setattr("normtune.runtime.distributed.world_size", lambda: 2)
    config = config.model_copy(update={"batch": 9})
    with pytest.raises(InputError, match="differs in batch"):
        check_identity(config, option_identity(config))
