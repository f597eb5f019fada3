"""The short version of `scripts/kill_and_resume.py`: one random moment, and three changes of a killed run."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "scripts" / "kill_and_resume.py"


def test_a_killed_run_ends_in_the_same_adapter_or_is_refused() -> None:
    changes = ("--lr 0.01", "--root ROOT/other-pictures", "--memory tight")
    command = [sys.executable, str(SCRIPT), "--moments", "1", "--seed", "7", "--changes", *changes]
    process = subprocess.run(command, capture_output=True, text=True)
    assert process.returncode == 0, process.stdout + process.stderr
    lines = process.stdout.splitlines()
    verdicts = [line for line in lines if line.startswith("--")]
    assert ["refused" in verdict for verdict in verdicts] == [True, True, False]
    assert "1 moments, 3 changes: 0 failures" in lines
