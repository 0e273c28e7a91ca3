"""Measure how much memory a rank may still allocate: on a GPU, or on the host within its container's limit."""

import contextlib
import os
from pathlib import Path

import torch

from ..distributed import groups


def free_memory(device: torch.device) -> int | None:
    """Return the bytes that this rank may still allocate on its device; None if the system does not report them."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    limits = [n for n in (_linux_available(), _cgroup_available()) if n is not None]
    if not limits and hasattr(os, "sysconf"):  # macOS reports its installed memory, but not its free memory
        limits = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    return min(limits) // (groups.local_rank_and_size()[1] or 1) if limits else None


def _linux_available() -> int | None:
    """Return the memory that Linux reports as available, in bytes; None on other systems."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return None


def _cgroup_available() -> int | None:
    """Return the bytes that a container (cgroup v2) may still allocate; None if it has no limit.

    Inactive page cache counts as free memory.
    """
    root = Path("/sys/fs/cgroup")
    with contextlib.suppress(OSError, ValueError):
        limit = int((root / "memory.max").read_text())  # without a limit, the file contains "max", and `int` raises ValueError
        stat = dict(line.split() for line in (root / "memory.stat").read_text().splitlines())
        return limit - int((root / "memory.current").read_text()) + int(stat.get("inactive_file", 0))
    return None
