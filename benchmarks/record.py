"""The JSON of a benchmark: its rows, what they were measured with and on."""

from __future__ import annotations

import os
import platform
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from normtune.files import write_json

PACKAGES = ("normtune", "torch", "transformers", "peft", "accelerate", "numpy")


def record(path: Path, name: str, rows: list[dict[str, Any]], **about: Any) -> None:
    """Write `rows` with date, versions and machine to `path`, and say so."""
    machine = {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "system": platform.platform(terse=True),
    }
    versions = {"python": platform.python_version(), **{package: version(package) for package in PACKAGES}}
    write_json(
        path,
        {
            "benchmark": name,
            "date": date.today().isoformat(),
            **about,
            "rows": rows,
            "versions": versions,
            "machine": machine,
        },
    )
    print(f"Written: {path}")


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
