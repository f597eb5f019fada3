"""Several processes come to what one comes to: DDP and FSDP2 over gloo, kills, other numbers of processes."""

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

from normtune.data.registry import open_dataset
from normtune.errors import InputError
from normtune.evaluation.config import EvaluateConfig
from normtune.evaluation.evaluate import _share, evaluate_config
from normtune.runtime.files import read_json
from normtune.training.checkpoints import resumed_batch, run_identity
from normtune.training.config import TrainConfig
from normtune.training.train import last_checkpoint, train
from tests.support.tiny_models import make_tiny

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
    given = [(f"--{name.replace('_', '-')}", str(value)) for name, value in values.items() if name != "model"]
    return [values["model"], *(word for pair in given for word in pair)]


def start(launcher: Sequence[str], *words: str) -> subprocess.Popen[str]:
    line = [sys.executable, "-m", *launcher, "-m", *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        line, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def work(launcher: Sequence[str], folder: Path, *jobs: tuple[str, Any]) -> tuple[int, str]:
    """The exit status of the jobs' launcher, and what it wrote to stderr."""
    (folder / "jobs.json").write_text(json.dumps(jobs))
    process = start(launcher, "tests.support.distributed_worker", str(folder / "jobs.json"))
    _, told = process.communicate(timeout=200)
    return process.returncode, told


def same_curve_and_delta(out: Path, other: Path, tolerance: float = 1e-5) -> None:
    """Step by step the same loss, and the same trained values."""
    first, second = (
        dict(read_json(one / "adapter.json")["metrics"]["training"]["loss"]) for one in (out, other)
    )
    assert first.keys() == second.keys() and len(first) == 10
    assert first == pytest.approx(second, rel=0, abs=tolerance)
    tensors, others = (load_file(one / "adapter.safetensors") for one in (out, other))
    assert tensors.keys() == others.keys()
    for name, tensor in tensors.items():
        torch.testing.assert_close(tensor, others[name], rtol=0, atol=tolerance)
    pairs = {read_json(one / "train_result.json")["pairs"] for one in (out, other)}
    assert pairs == {2 * len(open_dataset(DATA).split("train"))}


class Stop(Exception):
    """What ends a run just after its first checkpoint."""


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
def alone(base: Path, folder: Path) -> Path:
    """The run of one process; several processes are compared with it."""
    train(TrainConfig(**options(base, folder / "alone")))
    return folder / "alone"


@pytest.fixture(scope="module")
def killed(base: Path, folder: Path) -> tuple[Path, str]:
    """A run of two processes, one of which was killed after a checkpoint; and what was said of it."""
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
    _, told = process.communicate(timeout=120)
    assert process.returncode != 0 and last_checkpoint(out) is not None
    assert not (out / "adapter.json").exists()
    shutil.copytree(out / "checkpoints", folder / "fewer" / "checkpoints")
    return out, told


def test_a_killed_process_ends_the_run_in_one_sentence(killed: tuple[Path, str]) -> None:
    said = [line for line in killed[1].splitlines() if line.startswith(("normtune:", "[rank"))]
    assert all("another process of the run was ended" in line for line in said) and len(said) <= 1


def test_a_run_with_a_killed_process_goes_on_to_what_one_process_comes_to(
    base: Path, alone: Path, killed: tuple[Path, str]
) -> None:
    out = killed[0]
    process = start(TORCHRUN, "normtune", "train", *command(options(base, out, batch=8)), "--json")
    printed, told = process.communicate(timeout=200)
    assert process.returncode == 0, told
    assert json.loads(printed)["steps"] == 10, "one process prints"
    same_curve_and_delta(out, alone)
    assert not (out / "checkpoints").exists()


def test_one_process_goes_on_where_two_were_killed(
    base: Path, alone: Path, folder: Path, killed: tuple[Path, str]
) -> None:
    """The same command: a step holds what it held, 8 pairs of each of two."""
    train(TrainConfig(**options(base, folder / "fewer", batch=8)))
    same_curve_and_delta(folder / "fewer", alone)


def test_fsdp2_comes_to_what_one_process_comes_to(base: Path, llava: Path, alone: Path, folder: Path) -> None:
    half = {"dtype": "bfloat16", "memory": "balanced"}
    train(TrainConfig(**options(llava, folder / "llava", tune="language=ln+lora(r=2),vision=ln")))
    train(TrainConfig(**options(llava, folder / "half", **half)))
    with pytest.raises(Stop):
        train(TrainConfig(**options(base, folder / "gone-on")), progress=Stopping())
    assert last_checkpoint(folder / "gone-on") is not None
    status, told = work(
        FSDP2,
        folder,
        ("train", options(llava, folder / "dealt", batch=8, tune="language=ln+lora(r=2),vision=ln")),
        ("train", options(llava, folder / "dealt-half", batch=8, **half)),
        ("train", options(base, folder / "gone-on", batch=8)),
    )
    assert status == 0, told
    same_curve_and_delta(folder / "dealt", folder / "llava")
    same_curve_and_delta(folder / "gone-on", alone)
    # bf16 rounds what each process computes; the norms are fp32 and move as far
    same_curve_and_delta(folder / "dealt-half", folder / "half", tolerance=2e-2)
    results = [read_json(folder / out / "train_result.json") for out in ("dealt-half", "half")]
    moved, alike = (result["changed"] for result in results)
    assert moved == pytest.approx(alike, abs=0.01) and moved > 0.5
    assert all(int((folder / name / "dealt").read_text()) for name in ("dealt", "dealt-half", "gone-on"))


def test_evaluation_deals_images_out_and_one_process_tells_of_a_failure(base: Path, folder: Path) -> None:
    asked = {"model": str(base), "data": DATA, "split": "train", "device": "cpu", "candidates": "yes/no"}
    asked |= {"controls": "other"}
    evaluate_config(EvaluateConfig(**asked, out=folder / "one"))
    missing = command(asked | {"out": folder / "none"})
    status, told = work(
        TORCHRUN, folder, ("evaluate", asked | {"out": str(folder / "two")}), ("fail", ["evaluate", *missing])
    )
    assert status != 0
    assert [line for line in told.splitlines() if "normtune: " in line] == ["normtune: cannot read image 7."]
    assert "exitcode  : 2" in told and "Traceback" not in told.split("normtune: ")[0]
    for file in ("predictions.jsonl", "predictions-other.jsonl"):
        rows = [(folder / out / file).read_text().splitlines() for out in ("one", "two")]
        one, two = ([json.loads(row) for row in each] for each in rows)
        assert [{**row, "score": None} for row in one] == [{**row, "score": None} for row in two]
        assert [row["score"] for row in one] == pytest.approx([row["score"] for row in two], abs=1e-5)
    first, second = (read_json(folder / out / "metrics.json") for out in ("one", "two"))
    for found in ("metrics", "strata", "reliance"):
        assert first[found] == second[found]
    assert not (folder / "none" / "metrics.json").exists()


@pytest.mark.parametrize("ranks", [1, 2, 4, 9])
def test_every_example_has_one_process_and_an_image_is_not_divided(ranks: int) -> None:
    examples = open_dataset(DATA).split("train")
    shares = [_share(examples, rank, ranks) for rank in range(ranks)]
    assert sorted(e.id for share in shares for e in share) == sorted(e.id for e in examples)
    images = [{e.images for e in share} for share in shares]
    assert sum(len(one) for one in images) == len(set().union(*images))


def stored(folder: Path, **values: Any) -> tuple[TrainConfig, Path]:
    config = TrainConfig(**options(Path("base"), folder, batch=8))
    run = run_identity(config) | {"pairs_seen": 32, "pairs_a_step": 16, "steps_an_epoch": 5} | values
    (folder / "run.json").write_text(json.dumps(run))
    return config, folder


@pytest.mark.parametrize(("ranks", "batch", "goes_on_with"), [(1, 8, 16), (2, 8, 8), (4, 8, 4), (1, 16, 16)])
def test_a_step_holds_what_it_held_whatever_the_number_of_processes(
    ranks: int, batch: int, goes_on_with: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, checkpoint = stored(tmp_path)
    monkeypatch.setattr("normtune.runtime.distributed.count", lambda: ranks)
    assert resumed_batch(config.model_copy(update={"batch": batch}), checkpoint) == goes_on_with


@pytest.mark.parametrize(
    ("ranks", "batch", "said"),
    [(3, 8, "16 pairs a step, which 3 processes"), (2, 9, r"other options \(batch\)")],
)
def test_steps_that_cannot_be_as_they_were_are_refused(
    ranks: int, batch: int, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, checkpoint = stored(tmp_path)
    monkeypatch.setattr("normtune.runtime.distributed.count", lambda: ranks)
    with pytest.raises(InputError, match=said):
        resumed_batch(config.model_copy(update={"batch": batch}), checkpoint)
