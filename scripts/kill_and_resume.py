"""Kills training runs at random moments and resumes them.

    python scripts/kill_and_resume.py --moments 20 --seed 0

1. A run is killed at a random moment (sometimes again while it resumes) and resumed with the same options: its
   adapter has the bytes of an uninterrupted run. With --validate the same holds for its curve and best step.
2. A killed run is resumed with one option, its data or its base changed. Either the command is refused (exit status
   2, no adapter), or its adapter has the bytes of a fresh run with these options; never a mixture of both.

Every run is the command line in a forked process, so that torch is imported once. Exit status 1 if a check fails.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image

import normtune.training.train  # noqa: F401  # imported before the first fork
from normtune import cli
from normtune.training.checkpoints import last_checkpoint

EPOCHS = 20  # of 2 steps each
# one change of each kind; ROOT is replaced by the run's temporary folder
CHANGES = (
    "--tune lora-4", "--tune ln-vision", "--limit 9", "--share 0.5", "--lr 0.01", "--epochs 21", "--max-steps 35",
    "--batch 5", "--accumulate 2", "--no-group", "--cap 1", "--balance tokens", "--dtype bfloat16", "--compile",
    "--weight-decay 0.1", "--warmup 0.5", "--schedule linear", "--label-smoothing 0.1", "--max-grad-norm 0.1",
    "--seed 1", "--split test", "--image-disjoint", "--language all", "--text-only", "--memory balanced",
    "--memory tight", "--save-every 7", "--cache ROOT/cache", "--root ROOT/moved", "--root ROOT/other-answers",
    "--root ROOT/other-pictures", "--root ROOT/other-order", "--no-resume",
)  # fmt: skip


def write_data(root: Path, *, flipped: bool = False, shade: int = 0, reverse: bool = False) -> None:
    """Write sixteen rows about eight pictures."""
    root.mkdir(parents=True)
    rows = []
    for index in range(16):
        name = f"{index // 2}.png"
        Image.new("RGB", (32, 32), (20 * (index // 2), 90, shade)).save(root / name)
        answer = ("yes", "no")[(index + flipped) % 2]
        rows.append({"image": name, "question": f"Is there a mass in slice {index}?", "answer": answer})
    for split in ("train", "validate", "test"):
        (root / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows[::-1] if reverse else rows)))


def command(root: Path, out: Path, change: str = "", *, validate: bool = False) -> list[str]:
    """The command line of a run; a changed option replaces the one before it.

    With `validate` the run validates every second step and stops early, at a rate so high that the loss rises again.
    """
    data = ["--data", "jsonl", "--root", str(root / "data"), "--save-every", "3"]
    options = ["train", "nano", *data, "--tune", "ln", "--epochs", str(EPOCHS), "--batch", "8", "--device", "cpu"]
    score = ["--metric-for-best", "loss", "--patience", "5", "--lr", "0.3", "--schedule", "constant"]
    options += ["--validate-every", "2", *score] if validate else []
    return [*options, "--out", str(out), *change.replace("ROOT", str(root)).split()]


def start(arguments: Sequence[str], log: Path) -> multiprocessing.process.BaseProcess:
    """Start the command line in a forked process."""

    def run() -> None:
        with log.open("w") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        torch.set_num_threads(1)
        sys.argv = ["normtune", *arguments]
        cli.main()

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    return process


def finish(arguments: Sequence[str], log: Path) -> int:
    """Run the command line to its end; returns its exit status."""
    process = start(arguments, log)
    process.join()
    assert process.exitcode is not None
    return process.exitcode


def kill_after(seconds: float, arguments: Sequence[str], log: Path) -> bool:
    """Kill the run after some time; returns whether it was still running."""
    process = start(arguments, log)
    process.join(seconds)
    running = process.is_alive()
    process.kill()
    process.join()
    return running


def adapter_bytes(out: Path) -> bytes:
    """The bytes of a run's adapter."""
    return (out / "adapter.safetensors").read_bytes()


def curve(out: Path) -> tuple[list[object], int, int, bool]:
    """The steps and scores of a run's validations, the best step and the last one."""
    result = json.loads((out / "train_result.json").read_text())
    points = [
        (point["step"], point["train_loss"], point["validation_loss"], point["metrics"]) for point in result["curve"]
    ]
    return points, result["best_step"], result["steps"], result["stopped_early"]


def check_moments(root: Path, moments: int, chance: random.Random, *, validate: bool) -> list[str]:
    """Kill runs at random moments and resume them; returns the failures."""
    log, whole = root / "log", root / "whole"
    started = time.perf_counter()
    assert finish(command(root, whole, validate=validate), log) == 0, log.read_text()
    duration = time.perf_counter() - started
    points, best, steps, stopped = curve(whole)
    print(f"uninterrupted: {duration:.1f} s, {steps} of {2 * EPOCHS} steps")
    if validate:
        print(f"validations: {len(points)}, best step {best}, {'stopped early' if stopped else 'not stopped early'}")
    failures = []
    for moment in range(moments):
        out = root / f"moment-{moment}"
        kills = []
        for _ in range(chance.choice((1, 1, 2, 3))):
            after = chance.uniform(0, duration)
            if kill_after(after, command(root, out, validate=validate), log):
                step = last_checkpoint(out)
                kills.append(f"{after:.2f} s ({'no checkpoint' if step is None else step.name})")
        status = finish(command(root, out, validate=validate), log)
        equal = status == 0 and adapter_bytes(out) == adapter_bytes(whole) and curve(out) == curve(whole)
        print(f"killed at {', '.join(kills) or 'no time: it had ended'}: {'equal' if equal else 'DIFFERENT'}")
        if not equal:
            failures.append(f"moment {moment}: {log.read_text()[-300:]}")
    return failures


def check_changes(root: Path, changes: Sequence[str]) -> list[str]:
    """Resume a killed run with one change each; returns the failures."""
    log, killed = root / "log", root / "killed"
    process = start(command(root, killed), log)
    while (checkpoint := last_checkpoint(killed)) is None or int(checkpoint.name.split("-")[1]) < 15:
        time.sleep(0.005)
        assert process.is_alive(), log.read_text()
    process.kill()
    process.join()
    write_data(root / "other-answers", flipped=True)
    write_data(root / "other-pictures", shade=9)
    write_data(root / "other-order", reverse=True)
    shutil.copytree(root / "data", root / "moved")
    failures = []
    for number, change in enumerate(changes):
        out, fresh = root / f"change-{number}", root / f"fresh-{number}"
        shutil.copytree(killed, out)
        status = finish(command(root, out, change), log)
        message = log.read_text().strip().splitlines()
        if status == 2 and not (out / "adapter.json").exists():
            verdict = f"refused: {message[-1][:150] if message else ''}"
        elif (
            status == 0
            and finish(command(root, fresh, change), log) == 0
            and adapter_bytes(out) == adapter_bytes(fresh)
        ):
            verdict = "equal to the fresh run"
        else:
            verdict = f"FAILED, status {status}: {message[-1:]}"
            failures.append(f"{change}: {verdict}")
        print(f"{change:<28} {verdict.replace(str(root) + '/', '')}")
    return failures


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the checks; returns the number of failures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--moments", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--validate", action="store_true", help="the killed runs validate and stop early")
    parser.add_argument("--changes", nargs="*", default=CHANGES)
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder).resolve()
        write_data(root / "data")
        failures = check_moments(root, options.moments, random.Random(options.seed), validate=options.validate)
        failures += check_changes(root, options.changes)
    print(f"{options.moments} moments, {len(options.changes)} changes: {len(failures)} failures")
    print("\n".join(failures))
    return len(failures)


if __name__ == "__main__":
    sys.exit(min(1, main()))
