"""Run files: read with the line of each error, written so that they give the same options again."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from normtune.data.run_file import commented_run_file, read_run_file, run_file_text
from normtune.evaluation.config import EvaluateConfig
from normtune.training.config import TrainConfig
from tests.support.base_models import input_error

CONFIG = TrainConfig(
    model="nano", data="phantom-b:4", out=Path("runs/a"), tune="ln", lr=1e-3, cache=Path("cache"), overwrite=True
)


def write(folder: Path, text: str) -> Path:
    path = folder / "run.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_the_file_of_a_run_gives_its_options_again(tmp_path: Path) -> None:
    values = read_run_file(write(tmp_path, run_file_text("train", CONFIG)), TrainConfig)
    assert TrainConfig(**values) == CONFIG.model_copy(update={"overwrite": False})  # it is about the folder alone


def test_resolved_values_replace_those_of_the_options(tmp_path: Path) -> None:
    path = write(tmp_path, run_file_text("train", CONFIG, resolved={"device": "cpu"}))
    assert read_run_file(path, TrainConfig)["device"] == "cpu"


def test_a_commented_file_sets_what_was_chosen_and_describes_every_option(tmp_path: Path) -> None:
    text = commented_run_file("train", CONFIG, ["model", "lr"])
    assert read_run_file(write(tmp_path, text), TrainConfig) == {"model": "nano", "lr": 1e-3}
    unquoted = text.replace("\n# ", "\n")
    assert all(f"\n{name}: " in unquoted for name in TrainConfig.model_fields)
    # without the marks in front of options, they are the defaults
    options = "\n".join(line.removeprefix("# ") for line in text.splitlines() if ": " in line.split("  ")[0])
    fields = {line.partition(":")[0]: yaml.safe_load(line) for line in options.splitlines() if line[0].islower()}
    assert fields["batch"] == {"batch": CONFIG.batch}


def test_required_options_may_be_missing(tmp_path: Path) -> None:
    assert read_run_file(write(tmp_path, "split: val\n"), EvaluateConfig) == {"split": "val"}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("model: nano\nepoch: 3\n", "line 2: epoch: unknown, did you mean 'epochs'?"),
        ("model: nano\n\nbatch: many\n", "line 3: batch: input should be a valid integer"),
        ("model: nano\nmodel: miss\n", "line 2: 'model' appears twice"),
        ("- nano\n", "a run's file must have the fields model and data"),
        ("model: [nano\n", "not valid YAML"),
    ],
)
def test_errors_name_the_line(text: str, expected: str, tmp_path: Path) -> None:
    path = write(tmp_path, text)
    message = input_error(lambda: read_run_file(path, TrainConfig))
    assert str(path) in message and expected in message


def test_a_file_that_does_not_exist_is_an_input_error(tmp_path: Path) -> None:
    assert "cannot read the run" in input_error(lambda: read_run_file(tmp_path / "run.yaml", TrainConfig))
