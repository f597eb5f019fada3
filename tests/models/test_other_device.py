"""Runs the tests of `other_device.py` in a process of their own; that file says why."""

import os
import subprocess
import sys
from pathlib import Path

CASES = Path(__file__).with_name("other_device.py")


def test_every_family_and_method_stays_on_its_device() -> None:
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", str(CASES)]
    run = subprocess.run(command, cwd=CASES.parents[2], env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-1000:]
    assert " passed" in run.stdout, run.stdout[-1000:]
