"""Peak memory of a stretch of work: the accelerator's where there is one, else the process's resident set."""

from __future__ import annotations

import ctypes
import resource
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any


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
    if (known := status_bytes("VmHWM")) is not None:
        return known
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


_MMAP_THRESHOLD, _LARGE = -3, 1 << 18  # glibc's name of the option; bytes


def release_freed_memory() -> None:
    """From now on a freed tensor's memory goes back to the system at once (glibc only; nothing elsewhere).

    The C library keeps blocks of up to 32 MiB for itself, in pieces that the next tensors may not fit into:
    training a 7B in 8 bits then held 3 GiB more than its tensors. Small models' steps become slower by it.
    """
    with suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).mallopt(_MMAP_THRESHOLD, _LARGE)


def resident_bytes() -> int:
    """Bytes of this process that are resident now; 0 where the system does not say."""
    return status_bytes("VmRSS") or 0


def available_bytes(device: Any) -> int | None:
    """Bytes that a new program could take on a `torch.device`: the accelerator's free ones, or the host's.

    The host's are what Linux calls available, within the limit of the control group; None elsewhere.
    """
    torch = sys.modules["torch"]
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    found = next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)
    limited = _left_in_group(Path("/sys/fs/cgroup"))
    return limited if found is None else min(found, limited or found)


def _left_in_group(group: Path) -> int | None:
    """What a control group (version 2) may still take, caches of files counted as free; None: no limit."""
    try:
        limit, used = ((group / name).read_text().strip() for name in ("memory.max", "memory.current"))
        caches = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        return max(0, int(limit) - int(used) + int(caches.get("inactive_file", 0)))
    except (OSError, ValueError):  # no such group, or the word "max"
        return None


def status_bytes(field: str, process: int | str = "self") -> int | None:
    """What Linux says of a process's memory (VmRSS, VmHWM, RssAnon, ...); None where it does not."""
    try:
        for line in Path(f"/proc/{process}/status").read_text().splitlines():
            if line.startswith(f"{field}:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return None
