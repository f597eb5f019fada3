"""What is in `--out` already: the same run continues, another one is refused or moved, two at once are refused."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from transformers import TrainerCallback

from normtune.adapters.storage import load_adapter
from normtune.data.options import DataOptions
from normtune.models.loading import load
from normtune.runtime.files import read_json, try_lock
from normtune.training.config import TrainConfig
from normtune.training.identity import _NO_VALUES
from normtune.training.train import train
from tests.support.base_models import input_error


class StopAtStep(TrainerCallback):
    """Raises KeyboardInterrupt at the end of a step, as Ctrl-C does."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step >= self.step:
            raise KeyboardInterrupt


def write_rows(root: Path, answers: tuple[str, str] = ("yes", "no"), shade: int = 0) -> Path:
    """A dataset of eight rows about four pictures."""
    root.mkdir(parents=True, exist_ok=True)
    rows = []
    for index in range(8):
        name = f"{index // 2}.png"
        Image.new("RGB", (32, 32), (40 * (index // 2), 10, shade)).save(root / name)
        rows.append({"image": name, "question": f"Is there a mass {index}?", "answer": answers[index % 2]})
    (root / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return root


def config(base: Path, root: Path, out: Path, **options: Any) -> TrainConfig:
    values: dict[str, Any] = {"max_steps": 4, "batch": 4, "save_every": 1, "device": "cpu"} | options
    return TrainConfig(model=str(base), data="jsonl", root=root, out=out, **values)


def stop(run: TrainConfig, step: int = 2) -> None:
    with pytest.raises(KeyboardInterrupt):
        train(run, progress=StopAtStep(step))


def adapter_bytes(out: Path) -> bytes:
    return (out / "adapter.safetensors").read_bytes()


@pytest.mark.parametrize("change", [{"answers": ("no", "yes")}, {"shade": 9}], ids=["answers", "pictures"])
def test_a_run_does_not_resume_on_other_data(change: dict[str, Any], base: Path, tmp_path: Path) -> None:
    root, out = write_rows(tmp_path / "data"), tmp_path / "out"
    stop(config(base, root, out))
    write_rows(root, **change)
    message = input_error(lambda: train(config(base, root, out)))
    assert "checkpoint-2 belongs to a run that differs in the rows or pictures of the training data" in message
    assert not (out / "adapter.json").exists()


def test_a_run_resumes_after_its_data_were_moved(base: Path, tmp_path: Path) -> None:
    root, out = write_rows(tmp_path / "data"), tmp_path / "out"
    train(config(base, root, tmp_path / "whole"))
    stop(config(base, root, out))
    root.rename(tmp_path / "moved")
    assert train(config(base, tmp_path / "moved", out)).resumed_from_step == 2
    assert adapter_bytes(out) == adapter_bytes(tmp_path / "whole")


def test_a_run_does_not_resume_on_another_base_of_the_same_name(base: Path, tmp_path: Path) -> None:
    root, out, model = write_rows(tmp_path / "data"), tmp_path / "out", tmp_path / "base"
    shutil.copytree(base, model)
    stop(config(model, root, out))
    family = load(str(model))
    for parameter in family.model.parameters():
        parameter.data += 0.1
    family.save(model)
    assert "differs in the values of the base" in input_error(lambda: train(config(model, root, out)))


# another value for every option that decides the adapter
OTHER_VALUES: dict[str, Any] = {
    "tune": "ln-vision", "limit": 7, "share": 0.5, "lr": 0.5, "epochs": 3.0, "max_steps": 5, "batch": 3,
    "accumulate": 2, "group": False, "cap": 1, "balance": "tokens", "dtype": "bfloat16", "quantize": "int8",
    "compile": True, "weight_decay": 0.1, "warmup": 0.5, "schedule": "linear", "label_smoothing": 0.1,
    "part_lr": "vision=0.5",
    "max_grad_norm": 0.1, "seed": 1, "split": "test", "device": "cuda", "model": "nano",
    "validate_every": "epoch", "validation_split": "test", "validation_limit": 3, "metric_for_best": "loss",
    "patience": 2, "keep": "last", "sample": "balanced", "max_pixels": 4096,
    "dp_epsilon": math.inf, "dp_delta": 0.01, "dp_clip": 2.0,
    "choice_prompt": "mmmu", "choice_target": "text",
    "optimizer": "sgd",
}  # fmt: skip


def test_every_option_that_decides_the_adapter_is_part_of_the_identity(base: Path, tmp_path: Path) -> None:
    options = set(TrainConfig.model_fields) - set(DataOptions.model_fields)
    assert options - _NO_VALUES == set(OTHER_VALUES), "give a new option another value here, or add it to _NO_VALUES"
    out = tmp_path / "out"
    run = config(base, write_rows(tmp_path / "data"), out)
    stop(run)
    for name, value in OTHER_VALUES.items():
        if name == "device":
            continue
        changed = run.model_copy(update={name: value})
        assert f"differs in {name}. Repeat" in input_error(lambda changed=changed: train(changed)), name
    assert train(run.model_copy(update={"memory": "tight", "save_every": 3})).resumed_from_step == 2


def test_a_finished_adapter_is_kept(base: Path, tmp_path: Path) -> None:
    root, out = write_rows(tmp_path / "data"), tmp_path / "out"
    run = config(base, root, out)
    first = train(run)
    before = {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in out.iterdir()}
    again = train(run)
    assert again.already_finished and not first.already_finished and again.steps == first.steps
    assert str(again).startswith(f"finished already: {out} holds the adapter of the same run.")
    for changed in ({"tune": "lora-4"}, {"seed": 1}, {"resume": False}):
        message = input_error(lambda changed=changed: train(run.model_copy(update=changed)))
        assert "--overwrite" in message and ("differs in" in message) == ("resume" not in changed)
    write_rows(root, shade=5)
    assert "rows or pictures" in input_error(lambda: train(run))
    after = {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in out.iterdir()}
    assert after == before


def test_overwrite_moves_the_earlier_run(base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root, out = write_rows(tmp_path / "data"), tmp_path / "out"
    train(config(base, root, out))
    old, fresh = adapter_bytes(out), tmp_path / "fresh"
    train(config(base, root, fresh, seed=1))
    replaced = train(config(base, root, out, seed=1, overwrite=True))
    destination = tmp_path / "out.old-1"
    assert (
        replaced.earlier_run == str(destination)
        and f"to {destination}" in str(replaced)
        and f"to {destination}" in caplog.text
    )
    assert adapter_bytes(destination) == old and adapter_bytes(out) == adapter_bytes(fresh)
    load_adapter(load(str(base)).model, destination)
    # a stopped run of other options is moved with its checkpoints; the same command then resumes
    other = config(base, root, out, seed=2, overwrite=True)
    stop(other)
    assert (tmp_path / "out.old-2" / "adapter.json").is_file()
    stop(config(base, root, out, seed=3, overwrite=True), step=1)
    assert (tmp_path / "out.old-3" / "checkpoints" / "checkpoint-2" / "whole").is_file()
    assert train(config(base, root, out, seed=3, overwrite=True)).resumed_from_step == 1
    assert not (tmp_path / "out.old-4").exists()


def test_an_adapter_of_an_earlier_version_is_not_overwritten(base: Path, tmp_path: Path) -> None:
    """It records its options, but not its rows."""
    run = config(base, write_rows(tmp_path / "data"), tmp_path / "out")
    train(run)
    (run.out / "run.json").unlink()
    message = input_error(lambda: train(run))
    assert "differs in the rows or pictures of the training data. Repeat" in message


def test_two_runs_in_one_folder_are_refused(base: Path, tmp_path: Path) -> None:
    root, out = write_rows(tmp_path / "data"), tmp_path / "out"
    with try_lock(out / "checkpoints" / "lock") as acquired:
        assert acquired
        assert "another run is writing to" in input_error(lambda: train(config(base, root, out)))
    train(config(base, root, out))
    assert not (out / "checkpoints").exists()


def test_a_refused_run_leaves_nothing(base: Path, tmp_path: Path) -> None:
    root = write_rows(tmp_path / "data")
    input_error(lambda: train(config(base, root, tmp_path / "new" / "out", tune="encoder=full+lora(r=0)")))
    input_error(lambda: train(config(tmp_path / "no model", root, tmp_path / "out")))
    assert not (tmp_path / "out").exists()


def test_a_lock_file_that_was_deleted_is_no_lock(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with try_lock(path, remove=True) as first, try_lock(path) as second:
        assert (first, second) == (True, False)
    assert not path.exists()


def test_the_adapter_records_its_run(base: Path, tmp_path: Path) -> None:
    run = config(base, write_rows(tmp_path / "data"), tmp_path / "out")
    train(run)
    stored = read_json(run.out / "run.json")
    assert stored["rows_digest"] == read_json(run.out / "adapter.json")["data"]["rows_digest"]
    assert stored["base_fingerprint"] == read_json(run.out / "adapter.json")["base"]["fingerprint"]
