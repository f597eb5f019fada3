"""The GPU benchmark at a tiny width on the CPU: its parts, its record, failures, limits and the budget."""

from __future__ import annotations

import importlib
import json
import os
import runpy
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from normtune.commands.bench import benchmark_record, find_benchmarks, run_benchmark
from normtune.errors import InputError
from tests.support.tolerance import approx

ROOT = Path(__file__).parent.parent
BENCHMARKS = ROOT / "benchmarks"
CHEAP = (
    "environment",
    "norm-precision",
    "gradients",
    "answering",
    "adapters",
)  # parts that need few seconds on one core

# packages that a bare GPU machine lacks cannot be imported here, and no connection can be opened
BARE_MACHINE = """
import runpy, socket, sys

def refuse(*_):
    raise OSError("the benchmark opens no connection")

absent = ["pydantic", "typer", "rich", "fastapi", "uvicorn", "pydicom", "nltk", "rouge_score", "matplotlib",
          "bitsandbytes", "torchao"]
sys.modules.update(dict.fromkeys(absent))  # an import of a name that is None raises ModuleNotFoundError
socket.socket.connect = refuse
sys.argv = sys.argv[1:]
sys.path.insert(0, sys.argv[0].rpartition("/")[0])
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture
def parts(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The module with the parts, which the benchmark imports too."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module("gpu_parts")


def by_part(record: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {row["part"]: row for row in record["rows"]}


def test_it_is_the_only_benchmark_of_its_modules(parts: ModuleType) -> None:
    """The helper modules are not listed, and each part has a summary and a limit."""
    names = [name for name in find_benchmarks() if name.startswith("gpu")]
    assert names == ["gpu"]
    assert list(parts.PARTS)[:2] == ["environment", "llava-step"] and set(CHEAP) < set(parts.PARTS)
    for part in parts.PARTS.values():
        assert part.summary.endswith(".") and part.limit_s > 0


def test_every_measurement_of_a_part_has_its_figures(tmp_path: Path, parts: ModuleType) -> None:
    out = tmp_path / "gpu.json"
    record = benchmark_record("gpu", ["--tiny", "--parts", *CHEAP, "--out", str(out)])
    assert (record["benchmark"], record["tiny"], record["device"]) == ("gpu", True, "cpu")
    assert record["versions"]["normtune"] and record["machine"]["cores"]
    rows = by_part(record)
    assert tuple(rows) == CHEAP
    assert {row["status"] for row in rows.values()} == {"measured"}
    assert {name: row["about"] for name, row in rows.items()} == {name: parts.PARTS[name].summary for name in CHEAP}
    environment = rows["environment"]["figures"]
    assert set(environment["matmul_tflops"]) == {"bf16", "fp32", "fp32 as TF32"}
    precision = list(rows["norm-precision"]["figures"].values())
    assert len(precision) == 8, "four learning rates"
    for fp32, bf16 in zip(precision[::2], precision[1::2], strict=True):
        assert fp32["first_loss"] == precision[0]["first_loss"], "each rate starts from the same norms"
        assert bf16["first_loss"] == precision[1]["first_loss"]
        assert fp32["first_loss"] == approx(bf16["first_loss"], dtype=torch.bfloat16, terms=1), "the same pairs"
        assert (fp32["dtype"], bf16["dtype"]) == ("float32", "bfloat16")
        assert fp32["gains"]["moved_percent"] > 0 == bf16["gains"]["moved_percent"]
    gradients = {name: row["relative_difference"] for name, row in rows["gradients"]["figures"].items()}
    assert next(iter(gradients)) == "grouped fp32 against separate fp32" and len(gradients) == 4
    assert gradients.pop("grouped fp32 against separate fp32") < torch.finfo(torch.bfloat16).eps / 2**8
    assert min(gradients.values()) > 0
    answers = rows["answering"]["figures"]
    assert answers.pop("new_tokens") == 3 and len(answers) == 4
    assert set(rows["adapters"]["figures"]) == {"answers, 1 adapter", "answers, 4 adapters"}
    for figures in (*answers.values(), *rows["adapters"]["figures"].values()):
        assert figures["pairs"] > 0 and figures["steps"] > 0 and "pairs_per_s" in figures
        assert "peak_mib" not in figures, "memory is counted only on a GPU"
    table = out.with_suffix(".md").read_text(encoding="utf-8")
    assert table.startswith("Tiny models on the CPU"), "its ratios are no results"
    assert "| answering | grouped, 2 images | 6 |" in table and "0.0% of the gains" in table


def test_a_measurement_that_fails_leaves_the_others(parts: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(importlib.import_module("gpu_training"), "peft_model", fail)
    row = by_part(benchmark_record("gpu", ["--tiny", "--parts", "norm-precision"]))["norm-precision"]
    assert row["status"] == "incomplete"
    fp32, bf16, *_ = row["figures"].values()
    assert bf16["error"] == "out of memory: CUDA out of memory." and bf16["at"].startswith(Path(__file__).name)
    assert fp32["gains"]["values"] > 0


def test_the_page_has_the_committed_measurements() -> None:
    """`python scripts/write_docs.py` changes nothing: the page and the table are those of the record."""
    docs = runpy.run_path(str(ROOT / "scripts" / "write_docs.py"))
    record = json.loads((BENCHMARKS / "gpu.json").read_text(encoding="utf-8"))
    page = (ROOT / "docs" / "speed.md").read_text(encoding="utf-8")
    assert docs["speed"](page) == page
    assert (BENCHMARKS / "gpu.md").read_text(encoding="utf-8") == docs["table"](record["rows"], record["tiny"])
    assert record["machine"]["accelerator"] in page
    text = docs["table"](record["rows"][:1], record["tiny"])
    assert text.count("not yet measured") == len(docs["table"].__globals__["PARTS"]) - 1


def test_the_largest_batch_goes_down_until_a_step_fits(parts: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """With 1000 MiB, 100 MiB of weights and 90 MiB a unit, 10 units seem to fit; fragments leave room for 8."""
    training = importlib.import_module("gpu_training")
    tried = []

    def step_of(size: int) -> dict[str, Any]:
        tried.append(size)
        if size > 8:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return {"peak_mib": 100 + 90 * size, "pairs": size}

    assert training._largest(step_of)["pairs"] == 2, "no GPU, no limit"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (0, 1000 * training.MIB))
    monkeypatch.setattr(training, "free_memory", lambda: None)
    assert training._largest(step_of)["pairs"] == 8
    assert tried[2:] == [1, 2, 9, 8]


def test_answers_that_end_early_are_not_compared(parts: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "answer_groups", lambda *_: 1)
    row = by_part(benchmark_record("gpu", ["--tiny", "--parts", "answering"]))["answering"]
    assert row["status"] == "incomplete"
    assert "1 tokens in all instead of 9" in row["figures"]["grouped, 1 image"]["error"]
    assert "pairs_per_s" in row["figures"]["generate(), one question"]


def test_a_part_that_fails_or_takes_too_long_does_not_end_the_run(
    parts: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    out = tmp_path / "gpu.json"

    def fail(bench: Any, figures: dict[str, Any]) -> None:
        """Fail after one figure."""
        figures["first"] = {"pairs": 1}
        raise RuntimeError("no such kernel\nsecond line")

    def wait(bench: Any, figures: dict[str, Any]) -> None:
        """Wait after one figure."""
        figures["first"] = {"pairs": 2}
        assert list(by_part(json.loads(out.read_text(encoding="utf-8")))) == ["compile"], "written already"
        time.sleep(60)

    monkeypatch.setitem(parts.PARTS, "compile", parts.Part(fail, 30))
    monkeypatch.setitem(parts.PARTS, "attention", parts.Part(wait, 0.1))
    names = ["compile", "attention", "environment"]
    rows = by_part(benchmark_record("gpu", ["--tiny", "--parts", *names, "--out", str(out)]))
    failed, stopped, after = (rows[name] for name in names)
    assert (failed["status"], failed["reason"]) == ("failed", "RuntimeError: no such kernel")
    assert failed["at"].startswith(Path(__file__).name) and failed["figures"] == {"first": {"pairs": 1}}
    assert stopped["status"] == "stopped" and stopped["figures"] == {"first": {"pairs": 2}}
    assert after["status"] == "measured"
    assert "| compile | | | | | | | failed: RuntimeError" in out.with_suffix(".md").read_text(encoding="utf-8")


def test_parts_without_time_left_are_skipped_by_name(parts: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    run_benchmark("gpu", ["--tiny", "--budget-s", "3"])
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    rows = [json.loads(line) for line in lines]
    assert [row["part"] for row in rows] == list(parts.PARTS)
    assert all(row["status"] == "skipped" and "budget" in row["reason"] for row in rows)


def test_the_time_limit_restores_the_callers_alarm(parts: ModuleType) -> None:
    """Such as that of pytest's timeout."""
    import signal

    timing = importlib.import_module("gpu_timing")
    before, left = signal.getsignal(signal.SIGALRM), signal.getitimer(signal.ITIMER_REAL)[0]
    with pytest.raises(timing.TimeLimitReached), timing.time_limit(0.05):
        time.sleep(60)
    assert signal.getsignal(signal.SIGALRM) == before
    assert (signal.getitimer(signal.ITIMER_REAL)[0] > 0) == (left > 0)


def test_an_unknown_part_is_refused() -> None:
    with pytest.raises(InputError, match="invalid choice: 'speed'"):
        run_benchmark("gpu", ["--tiny", "--parts", "speed"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="it measures where there is a GPU")
def test_without_a_gpu_it_names_the_option_for_the_cpu() -> None:
    with pytest.raises(InputError, match=r"no CUDA GPU here\. Add --tiny"):
        run_benchmark("gpu", [])


def test_it_runs_on_a_bare_machine_without_network() -> None:
    """As a script with src on the path, without pydantic and the packages of the command line."""
    script = [str(BENCHMARKS / "gpu.py"), "--tiny", "--parts", "environment", "norm-precision"]
    run = subprocess.run(
        [sys.executable, "-c", BARE_MACHINE, *script],
        env={**os.environ, "PYTHONPATH": str(ROOT / "src")},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    rows = [json.loads(line) for line in run.stdout.splitlines() if line.startswith("{")]
    assert [row["status"] for row in rows] == ["measured", "measured"]
