from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

from normtune import cli
from tests.support.tiny_miss import save_tiny_miss

settings.register_profile("normtune", deadline=None)  # a busy machine is no failure
settings.load_profile("normtune")

# fields of TrainConfig that do not change the planned memory
_NO_MEMORY = {
    *("out", "lr", "part_lr", "epochs", "max_steps", "seed", "warmup", "schedule", "weight_decay", "max_grad_norm"),
    *("validate_every", "validation_split", "validation_limit", "metric_for_best", "patience", "keep"),
    *("save_every", "resume", "overwrite", "tracker"),
}


@pytest.fixture(scope="module", autouse=True)
def exempt_objects_from_garbage_collection() -> None:
    """Collections skip what is imported and made already: every training run starts one, which else takes 0.5 s."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def plan_memory_once() -> Iterator[None]:
    """Runs that differ in no option that changes their memory share a plan, which takes longer than a tiny training.

    A test of the plan in a run replaces `estimate_memory` by the original.
    """
    training = sys.modules.get("normtune.training.train")
    if training is None:  # no test of this session trains in this process
        yield
        return
    estimate = training.estimate_memory
    plans: dict[Any, dict[str, Any]] = {}

    def estimate_once(config: Any, dataset: Any, examples: Any, family: Any = None) -> dict[str, Any]:
        key = (str(config.model_dump(exclude=_NO_MEMORY)), dataset.name, len(examples), family is None)
        if key not in plans:
            plans[key] = estimate(config, dataset, examples, family)
        return dict(plans[key])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "estimate_memory", estimate_once)
        yield


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny MISS with random weights, on disk; tests must not write there."""
    return save_tiny_miss(tmp_path_factory.mktemp("base"))


@pytest.fixture
def run_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """A function that runs a command in this process and returns (exit status, stdout, stderr)."""

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["normtune", *map(str, arguments)])
        capsys.readouterr()  # discard what was printed before the command
        with pytest.raises(SystemExit) as ended:
            cli.main()
        printed = capsys.readouterr()
        assert isinstance(ended.value.code, int)
        return ended.value.code, printed.out, printed.err

    return call
