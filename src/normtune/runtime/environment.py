"""The environment of a result: package versions, source commit and hardware."""

from __future__ import annotations

import os
import platform
import subprocess
from contextlib import suppress
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

# packages that can change a result
PACKAGES = ("normtune", "torch", "transformers", "peft", "accelerate", "numpy")


@cache
def environment() -> dict[str, Any]:
    """Describe the environment; it is stored with every result.

    Returns:
        `versions`, `commit` (of a source checkout, with "+" if its files were changed; None without one) and
        `hardware`.
    """
    return {"versions": versions(), "commit": _commit(), "hardware": hardware()}


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that a result depends on."""
    return {"python": platform.python_version(), **{name: package_version(name) for name in PACKAGES}}


def package_version(name: str) -> str:
    """The installed version of a package, or "not installed"."""
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def _commit() -> str | None:
    """The git commit of the source checkout, or None if there is none."""
    package = Path(__file__).parents[1]  # src/normtune: only changes there make the commit dirty
    try:
        commit, changed = (
            subprocess.run(
                ["git", *arguments], cwd=package, capture_output=True, text=True, timeout=20, check=True
            ).stdout
            for arguments in (["rev-parse", "HEAD"], ["status", "--porcelain", "--", "."])
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return commit.strip() + ("+" if changed.strip() else "")


def hardware() -> dict[str, Any]:
    """Processor, cores, torch's threads, accelerator and operating system of this machine."""
    import torch

    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "system": platform.platform(terse=True),
    }


def _processor() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
