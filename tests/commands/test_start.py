"""Commands start quickly: each runs in a process of its own, and only the heavy packages listed here are imported."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

# Packages and modules that take long to import. The last two of torch are its compiler and its sharded tensors.
HEAVY = {
    *("accelerate", "datasets", "fastapi", "matplotlib", "nltk", "pandas", "peft", "pyarrow", "pydicom", "sacrebleu"),
    *("scipy", "sklearn", "sympy", "torchvision", "transformers", "transformers.models.llava", "transformers.trainer"),
    *("torch", "torch._dynamo.convert_frame", "torch.distributed.tensor"),
}
MODEL = {"torch", "transformers", "accelerate"}
PRINT_MODULES = """
import json, sys
from normtune import cli
try:
    cli.main()
except SystemExit as end:
    assert end.code in (0, None), end.code
print("\\n" + json.dumps(sorted(sys.modules)))
"""


def imported(code: str, *arguments: object) -> set[str]:
    """The heavy modules that are imported at the end of a program."""
    run = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        env={**os.environ, "TOKENIZERS_PARALLELISM": "false"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    return HEAVY & set(json.loads(run.stdout.splitlines()[-1]))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("start")
    Image.new("L", (32, 32)).save(folder / "image.png")
    return folder


def test_importing_the_package_imports_nothing_heavy() -> None:
    assert not imported("import json, sys, normtune; print(json.dumps(sorted(sys.modules)))")


@pytest.mark.parametrize("command", ["--help", "--version", "train --help", "doctor --help", "data phantom-b:8"])
def test_commands_without_a_model_do_not_import_torch(command: str) -> None:
    assert not imported(PRINT_MODULES, *command.split())


def test_commands_on_nano_import_what_they_use(folder: Path) -> None:
    """The compiler and PEFT are not needed to answer with tuned norms; training imports both."""
    data = ("--data", "phantom-b:8", "--limit", "2")
    train = ("train", "nano", *data, "--tune", "ln", "--epochs", "1", "--out", folder / "ln")
    assert imported(PRINT_MODULES, *train) == MODEL | {
        # torch's optimisers import the compiler, accelerate the sharded tensors, transformers' Trainer PEFT
        *("torch._dynamo.convert_frame", "sympy", "torch.distributed.tensor", "transformers.trainer", "peft")
    }
    adapter = ("--adapter", folder / "ln")
    ask = ("ask", "nano", *adapter, "--image", folder / "image.png", "--question", "Is there a fracture?")
    assert imported(PRINT_MODULES, *ask) == MODEL
    assert imported(PRINT_MODULES, "evaluate", "nano", *adapter, *data, "--out", folder / "scores") == MODEL


def test_the_compiler_works_afterwards() -> None:
    imported(
        """
import json, sys
from normtune.runtime.transformers_import import import_transformers
import_transformers()
assert "torch._dynamo" not in sys.modules, "only a substitute was imported"
import torch
assert torch.distributed.is_available(), "restored"
compiled = torch.compile(torch.nn.Linear(2, 2), backend="eager")
compiled(torch.ones(1, 2)).sum().backward()
assert isinstance(compiled, torch._dynamo.eval_frame.OptimizedModule)
print(json.dumps([]))
"""
    )
