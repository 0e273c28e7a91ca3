"""Choose how many threads PyTorch uses on the CPU: not more than the CPU quota of this process's cgroups allows.

OpenMP, on which PyTorch runs, keeps a pool of threads for each thread that computes. While all pools together have more threads
than there are CPU cores, the threads of a pool sleep between two operations instead of waiting actively. Calls that come from
another thread than the one that built the model would then take 6% longer, with a 1.1B model. So `build` and long calls release
their pools.
"""

import contextlib
import ctypes
import functools
import math
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from . import cgroups, groups


def chosen_by_user() -> bool:
    """Return True if the user has set PyTorch's number of threads, by an environment variable or torch.set_num_threads.

    A call of torch.set_num_threads with the number that PyTorch uses by default cannot be detected.
    """
    if any(os.environ.get(name) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")):
        return True
    cpus = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    # By default PyTorch uses a thread for each core or, if built without MKL, for each hardware thread of a core.
    files = [Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list") for cpu in cpus]
    cores = {file.read_text() for file in files if file.exists()}
    return torch.get_num_threads() not in (len(cpus), len(cores))


def allowed_threads(root: Path = cgroups.ROOT) -> tuple[int, str]:
    """Return the number of threads that this rank should use on the CPU, and why it is lower than now ("" if it is not).

    The number is the CPU quota, divided by the ranks on this machine and rounded up, unless the user has chosen another or
    PyTorch uses fewer threads.
    """
    threads, quota = torch.get_num_threads(), cgroups.cpu_quota(root)
    if quota is None or chosen_by_user():
        return threads, ""
    ranks = groups.local_rank_and_size()[1] or 1
    allowed = max(math.ceil(quota.value / ranks), 1)
    if allowed >= threads:
        return threads, ""
    shared = f" for {ranks} ranks" if ranks > 1 else ""
    return allowed, f"{quota.file} allows {quota.value:g} CPU core(s){shared}"


# A call that takes longer releases the pool of its thread at its end. Starting a thread again takes some 0.05 ms.
LONG_CALL_SECONDS = 0.5


@functools.cache  # the user may choose another number afterwards, which a second model must not change
def limit_threads() -> None:
    """Make PyTorch use no more threads than `allowed_threads`, once in a process, and say so on stderr on rank 0."""
    before, (threads, reason) = torch.get_num_threads(), allowed_threads()
    if reason:
        torch.set_num_threads(threads)
        if groups.global_rank() == 0:
            print(
                f"llama: {threads} thread(s) instead of {before}: {reason}; to use another number, set OMP_NUM_THREADS, or "
                "call torch.set_num_threads after building",
                file=sys.stderr,
            )


@functools.cache
def _openmp() -> ctypes.CDLL | None:
    """Return PyTorch's OpenMP library, or None if it has no function to release threads."""
    try:
        library = ctypes.CDLL(str(Path(torch.__file__).with_name("lib") / "libtorch_cpu.so"))
        return library if library.omp_pause_resource_all else None
    except (OSError, AttributeError):  # not on Linux, or another OpenMP library
        return None


def release_pool() -> None:
    """Release the OpenMP threads that work for this thread. The next operation that needs them starts new ones."""
    if library := _openmp():
        library.omp_pause_resource_all(1)  # omp_pause_soft: keeps all settings


@contextlib.contextmanager
def pool_released_if_long() -> Iterator[None]:
    """Release the OpenMP threads of this thread after a block that takes long."""
    began = time.perf_counter()
    try:
        yield
    finally:
        if time.perf_counter() - began > LONG_CALL_SECONDS:
            release_pool()
