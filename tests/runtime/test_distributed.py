"""The launcher's environment; training/test_distributed.py runs several processes."""

from __future__ import annotations

import os

import pytest

from normtune.errors import InputError
from normtune.runtime import distributed
from normtune.runtime.worker_pool import run_in_processes


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """The environment of the second of two processes that torchrun started."""
    for name, value in {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    return monkeypatch


def test_without_a_launcher_there_is_one_process_and_it_is_the_main_process() -> None:
    distributed.init_processes(None)
    assert (distributed.launched_count(), distributed.rank(), distributed.world_size()) == (1, 0, 1)
    assert distributed.is_main_process() and distributed.should_report_failure()
    assert not distributed.is_sharded() and not distributed.has_another_failed()
    assert distributed.all_gather("a") == ["a"] and distributed.broadcast_from_first(lambda: 7) == 7


@pytest.mark.parametrize(
    ("environment", "device", "message"),
    [
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "cpu", "DeepSpeed is not supported"),
        ({"ACCELERATE_USE_FSDP": "true"}, "cpu", "only version 2 of FSDP is supported"),
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"}, "cpu", "--use_fsdp --fsdp_version 2"),
        ({}, "cuda:1", "the launcher gives each process its GPU"),
    ],
)
def test_unsupported_options_of_a_launcher_are_refused(
    launched: pytest.MonkeyPatch, environment: dict[str, str], device: str, message: str
) -> None:
    for name, value in environment.items():
        launched.setenv(name, value)
    with pytest.raises(InputError, match=message):
        distributed.init_processes(device)


def test_the_main_process_reports_an_error_of_the_command_line(launched: pytest.MonkeyPatch) -> None:
    waited: list[float] = []
    launched.setattr("normtune.runtime.distributed.time.sleep", waited.append)
    assert not distributed.should_report_failure() and waited == [distributed.REPORT_DELAY.total_seconds()]
    launched.setenv("RANK", "0")
    assert distributed.should_report_failure() and len(waited) == 1


def test_the_end_of_another_process_is_reported_and_other_errors_are_raised(launched: pytest.MonkeyPatch) -> None:
    launched.setattr("normtune.runtime.distributed.world_size", lambda: 2)
    with pytest.raises(InputError, match="another process of the run has ended"), distributed.lost_process_as_error():
        raise RuntimeError("[gloo/transport/tcp/pair.cc] Connection closed by peer")
    with pytest.raises(RuntimeError, match="shapes"), distributed.lost_process_as_error():
        raise RuntimeError("shapes differ")


def test_a_process_that_starts_others_clears_the_launchers_environment(launched: pytest.MonkeyPatch) -> None:
    for name in ("ACCELERATE_MIXED_PRECISION", "FSDP_VERSION", "TORCHELASTIC_RUN_ID", "MASTER_PORT"):
        launched.setenv(name, "1")
    launched.setenv("RANKING", "mine")
    with pytest.raises(InputError, match="Run it without torchrun"):
        next(run_in_processes(print, [], 1))
    distributed.clear_launcher_env()
    assert distributed.launched_count() == 1 and distributed.is_main_process() and os.environ["RANKING"] == "mine"
    assert not any(name.startswith(("ACCELERATE_", "FSDP_", "TORCHELASTIC_")) for name in os.environ)
