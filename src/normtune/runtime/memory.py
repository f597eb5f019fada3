"""Memory of this process and machine: peak, resident and available bytes, of the GPU or of the host."""

from __future__ import annotations

import ctypes
import platform
import resource
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

_MMAP_THRESHOLD = -3  # M_MMAP_THRESHOLD, an option of glibc's mallopt
LARGEST_HEAP_BLOCK = 32 << 20  # glibc maps larger blocks separately, and returns them when they are freed
_MIN_MMAP_BYTES = 1 << 18  # blocks from this size on are returned to the system when they are freed


def reset_peak(device: torch.device | None = None) -> None:
    """Reset the peak of a device and of the host, where the platform can (CUDA; Linux for the resident set)."""
    if device is not None and device.type == "cuda":
        sys.modules["torch"].cuda.reset_peak_memory_stats(device)
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # Linux: sets VmHWM to the current resident set


def peak_memory_bytes(device: torch.device | None = None) -> int:
    """Peak bytes since `reset_peak`: allocated on a CUDA device, resident on the host for any other and for None."""
    if device is not None and device.type == "cuda":
        return int(sys.modules["torch"].cuda.max_memory_allocated(device))
    if (high_water_mark := read_status_bytes("VmHWM")) is not None:
        return high_water_mark
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS, KiB elsewhere
    return peak if sys.platform == "darwin" else peak * 1024


def release_freed_memory() -> None:
    """Make the C library return the memory of freed tensors to the system at once (glibc; else no effect).

    By default glibc keeps freed blocks of up to 32 MiB in its heap, in fragments that the next tensors may
    not fit into: training a 7B model in 8 bits then had 3 GiB more resident than its tensors need. Blocks
    that are mapped separately (`mmap`) are returned when they are freed. Training steps of small models
    become slower.
    """
    with suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).mallopt(_MMAP_THRESHOLD, _MIN_MMAP_BYTES)


def keeps_freed_memory() -> bool:
    """Whether the C library keeps freed blocks in a heap that grows with them: glibc on Linux."""
    return platform.libc_ver()[0] == "glibc"


def resident_bytes() -> int:
    """Bytes of this process that are resident now; 0 if the system does not report them."""
    return read_status_bytes("VmRSS") or 0


def available_bytes(device: Any) -> int | None:
    """Bytes that a new program could allocate on a `torch.device`.

    On a GPU these are the free bytes. On the host these are the bytes that Linux reports as available, within
    the limit of the control group (of a container); None on other systems.
    """
    torch = sys.modules["torch"]
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    on_host = _read_kib(Path("/proc/meminfo"), "MemAvailable")
    in_group = _available_in_group(Path("/sys/fs/cgroup"))
    return in_group if on_host is None else min(on_host, in_group or on_host)


def _available_in_group(group: Path) -> int | None:
    """Bytes that a control group (version 2) may still use, file caches counted as free; None: no limit."""
    try:
        limit, used = ((group / name).read_text().strip() for name in ("memory.max", "memory.current"))
        caches = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        return max(0, int(limit) - int(used) + int(caches.get("inactive_file", 0)))
    except (OSError, ValueError):  # no such group, or the limit is the word "max"
        return None


def read_status_bytes(field: str, process: int | str = "self") -> int | None:
    """A memory field (VmRSS, VmHWM, RssAnon, ...) of /proc/PROCESS/status in bytes; None if there is none."""
    return _read_kib(Path(f"/proc/{process}/status"), field)


def _read_kib(path: Path, field: str) -> int | None:
    """A field of a file in /proc, where sizes are in KiB, in bytes; None if there is none."""
    with suppress(OSError):
        for line in path.read_text().splitlines():
            if line.startswith(f"{field}:"):
                return int(line.split()[1]) * 1024
    return None
