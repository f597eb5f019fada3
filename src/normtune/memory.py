"""Peak memory of a stretch of work: the accelerator's where there is one, else the process's resident set."""

from __future__ import annotations

import resource
import sys
from contextlib import suppress
from pathlib import Path


def reset_peak() -> None:
    """Forget the peak so far, where the platform allows it (CUDA; Linux for the resident set)."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # Linux: sets VmHWM to the present resident set


def peak_memory_bytes() -> int:
    """Peak bytes since `reset_peak`: allocated on the CUDA device in use, else resident on the host."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    return host_peak_bytes()


def host_peak_bytes() -> int:
    """Peak resident bytes of this process since `reset_peak` (since its start where that can't be reset)."""
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
