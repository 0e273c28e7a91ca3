"""How the CPU's memory is allocated for weights and activations: huge pages, glibc's thresholds, memory-mapped files."""

import contextlib
import ctypes
import functools
import math
import mmap
import os
import sys
import threading
from typing import Any

import torch


def set_environment() -> None:
    """Set environment variables that PyTorch and oneDNN read at their first use, unless the caller has set them.

    THP_MEM_ALLOC_ENABLE puts large tensors into pages of 2 MB where Linux grants them: the CPU's prefetching ends at the end
    of a page. PyTorch reads it at its first tensor, so it has no effect if the caller has made one before `build`.
    The others limit caches of compiled products and their buffers, one entry for each shape. By default oneDNN and PyTorch keep
    1,024 each, a gigabyte after prompts of many lengths; a decode step needs 5, a prompt some 10.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "128")
    os.environ.setdefault("LRU_CACHE_CAPACITY", "64")


class HugePageAllocator:
    """Allocate tensors in pages of 2 MB where Linux grants them. In pages of 4 kB, reading may be half as fast."""

    chunk_bytes = 1 << 26  # requested from the system at a time

    def __init__(self) -> None:
        self.memory: mmap.mmap | None = None
        self.used, self.lock = 0, threading.Lock()

    def empty(self, *shape: int, dtype: torch.dtype) -> torch.Tensor:
        """Return a tensor to be filled, next to the one allocated before."""
        if sys.platform != "linux":
            return torch.empty(shape, dtype=dtype, device="cpu")
        nbytes = math.prod(shape) * dtype.itemsize
        with self.lock:
            if self.memory is None or len(self.memory) - self.used < nbytes:
                size = max(self.chunk_bytes, nbytes, 1)
                self.memory, self.used = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), 0
                with contextlib.suppress(OSError):  # a kernel without huge pages
                    self.memory.madvise(mmap.MADV_HUGEPAGE)
            memory, start = self.memory, self.used
            self.used += -(-nbytes // 64) * 64
        return torch.frombuffer(memory, dtype=dtype, count=math.prod(shape), offset=start).view(shape)


HUGE_PAGES = HugePageAllocator()


def raise_malloc_threshold() -> None:
    """Make glibc keep freed activations for reuse, which saves a tenth of the time of a prompt of 512 tokens at 1.1B.

    glibc maps large blocks one by one and returns free memory to the system, which clears each page anew. Both thresholds
    follow the largest block freed so far, up to 32 MiB: this one, which is never written. Call it once weights are loaded,
    since they are better mapped, in huge pages.
    """
    torch.empty(31 << 20, dtype=torch.uint8, device="cpu")


@functools.cache
def _libc() -> Any:
    return ctypes.CDLL(None) if sys.platform in ("linux", "darwin") else None


def malloc_trim() -> None:
    """Return freed memory to the system, if glibc can: quantizing leaves holes of a tenth of the weights' size."""
    if hasattr(_libc(), "malloc_trim"):
        _libc().malloc_trim(0)


WILLNEED, DONTNEED = 3, 4  # advice for `madvise`


def madvise(view: torch.Tensor, advice: int) -> None:
    """Advise the system about the mapped pages under a view: to read them ahead, or that this process no longer needs them.

    The pages stay in the page cache, but would count as this process's memory until the shard's last tensor is gone, and double
    its peak.
    """
    if _libc() is None or view.numel() == 0:
        return
    begin = view.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
    strides = zip(view.shape, view.stride(), strict=True)
    end = view.data_ptr() + (1 + sum((size - 1) * stride for size, stride in strides)) * view.element_size()
    _libc().madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), advice)
