"""What a result was made with and on."""

from __future__ import annotations

import os
import platform
import subprocess
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = ("normtune", "torch", "transformers", "peft", "accelerate", "numpy")


@cache
def environment() -> dict[str, Any]:
    """`versions`, `commit` (of a source checkout; "+" where files differ from it) and `hardware`."""
    return {"versions": versions(), "commit": _commit(), "hardware": hardware()}


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that a result depends on."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def _commit() -> str | None:
    package = Path(__file__).parents[1]  # src/normtune: only changes there make the commit dirty
    try:
        commit, changed = (
            subprocess.run(
                ["git", *words], cwd=package, capture_output=True, text=True, timeout=20, check=True
            ).stdout
            for words in (["rev-parse", "HEAD"], ["status", "--porcelain", "--", "."])
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return commit.strip() + ("+" if changed.strip() else "")


def hardware() -> dict[str, Any]:
    """Processor, cores, threads, accelerator and operating system of this machine."""
    import torch

    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "system": platform.platform(terse=True),
    }


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
