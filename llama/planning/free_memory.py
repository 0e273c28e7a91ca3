"""Measure how much memory a rank may still allocate: on a GPU, or on the host within its cgroups' limits and ulimit's."""

import os
from pathlib import Path
from typing import NamedTuple

import torch

from ..distributed import cgroups, groups

try:
    import resource
except ImportError:  # Windows has no such limits
    resource = None  # type: ignore[assignment]

# Limits of one process: the name in `resource`, the current value in /proc/self/status, how a user sets the limit, and the
# bytes that each thread takes, for its stack and the heap that glibc reserves for it. Private mappings of files count, too.
PROCESS_LIMITS = (("RLIMIT_AS", "VmSize", "ulimit -v", 72 << 20), ("RLIMIT_DATA", "VmData", "ulimit -d", 16 << 20))
PROCESS_OVERHEAD = 160 << 20  # bytes that PyTorch and glibc map besides a model and threads, as buffers and parts of chunks


class FreeMemory(NamedTuple):
    """The memory that a rank may still allocate.

    bytes: the free memory, if the weights that can stay in the memory-mapped checkpoint do so.
    if_copied: the free memory if all weights are copied; None if it is the same.
    limit: what sets the limit, for errors; "" for the memory of the machine or of the device.
    """

    bytes: int
    if_copied: int | None = None
    limit: str = ""


def free_memory(device: torch.device, mapped: int = 0) -> FreeMemory | None:
    """Return the memory that this rank may still allocate on its device; None if the system does not report it.

    mapped: the bytes of the weights that stay in the memory-mapped checkpoint, which this process has mapped already. They
    need memory of the machine, but no more of the process's address space.
    """
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return FreeMemory(torch.cuda.mem_get_info(device)[0] + unused)
    if device.type == "mps":
        return FreeMemory(torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory())
    ranks = groups.local_rank_and_size()[1] or 1
    limits = []
    if (available := _available_on_machine()) is not None:
        limits.append(FreeMemory(available // ranks))
    if cgroup := cgroups.free_memory():
        limits.append(FreeMemory(int(cgroup.value) // ranks, limit=f"the cgroup's limit in {cgroup.file}"))
    limits += [FreeMemory(left + mapped, left, limit) for left, limit in _free_in_process()]
    if not limits:
        return None
    if_copied = min(free.bytes if free.if_copied is None else free.if_copied for free in limits)
    return min(limits, key=lambda free: free.bytes)._replace(if_copied=if_copied)


def _available_on_machine() -> int | None:
    """Return the memory that the system reports as available, in bytes; None if it reports none."""
    if available := _proc_number("/proc/meminfo", "MemAvailable"):
        return available * 1024
    # macOS reports its installed memory, but not its free memory
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else None


def _free_in_process() -> list[tuple[int, str]]:
    """Return the bytes that each limit of this process leaves to a model, and how a user sets the limit; Linux only."""
    limits = []
    for name, used, command, thread_bytes in PROCESS_LIMITS:
        limit = resource.getrlimit(getattr(resource, name))[0] if resource else -1
        kilobytes = _proc_number("/proc/self/status", used)
        if limit >= 0 and kilobytes is not None:  # RLIM_INFINITY is -1
            threads_to_start = max(torch.get_num_threads() - (_proc_number("/proc/self/status", "Threads") or 1), 0)
            overhead = PROCESS_OVERHEAD + thread_bytes * threads_to_start
            limits.append((max(limit - kilobytes * 1024 - overhead, 0), command))
    return limits


def _proc_number(file: str, name: str) -> int | None:
    """Return the number in the line "name: number" of a file in /proc, which is in kB for memory; None without such a line."""
    path = Path(file)
    for line in path.read_text(errors="replace").splitlines() if path.exists() else []:
        if line.startswith(f"{name}:"):
            return int(line.split()[1])
    return None
