"""Host memory for weights and activations: huge pages, glibc's thresholds, and memory-mapped files."""

import contextlib
import ctypes
import functools
import math
import mmap
import sys
import threading
from typing import Any

import torch

HUGE_PAGE = 1 << 21  # bytes of a huge page


class HugePageAllocator:
    """Allocate tensors in pages of 2 MB if Linux grants them. Reading weights from pages of 4 kB may take twice as long."""

    chunk_bytes = 1 << 26  # bytes requested from the system at a time

    def __init__(self) -> None:
        self.memory: mmap.mmap | None = None
        self.used, self.lock = 0, threading.Lock()

    def empty(self, *shape: int, dtype: torch.dtype) -> torch.Tensor:
        """Return an uninitialized tensor, in memory directly behind the previously allocated tensor if possible."""
        if sys.platform != "linux":
            return torch.empty(shape, dtype=dtype, device="cpu")
        nbytes = math.prod(shape) * dtype.itemsize
        with self.lock:
            if self.memory is None or len(self.memory) - self.used < nbytes:
                size = max(self.chunk_bytes, nbytes, 1)
                self.memory, self.used = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), 0
                with contextlib.suppress(OSError):  # raised by a Linux kernel without huge pages
                    self.memory.madvise(mmap.MADV_HUGEPAGE)
            memory, start = self.memory, self.used
            self.used += -(-nbytes // 64) * 64
        return torch.frombuffer(memory, dtype=dtype, count=math.prod(shape), offset=start).view(shape)


HUGE_PAGES = HugePageAllocator()


def raise_malloc_threshold() -> None:
    """Make glibc keep freed activations for reuse, which makes prefill of 512 tokens with 1.1B weights a tenth faster.

    glibc maps each block larger than one threshold separately, and returns free memory above a second threshold to the system,
    which must clear every page before its next use. Both thresholds rise to the size of the largest block freed so far, up to
    32 MiB, so this function allocates and frees a block of 31 MiB without writing to it. Call this function after loading the
    weights, because weights should be mapped separately, in huge pages.
    """
    torch.empty(31 << 20, dtype=torch.uint8, device="cpu")


@functools.cache
def _libc() -> Any:
    return ctypes.CDLL(None) if sys.platform in ("linux", "darwin") else None


def malloc_trim() -> None:
    """If the C library is glibc, return freed memory to the system; after quantizing, that is a tenth of the weights' size."""
    if hasattr(_libc(), "malloc_trim"):
        _libc().malloc_trim(0)


WILLNEED, DONTNEED = 3, 4  # values of the argument `advice` of `madvise`
_RANDOM, _HUGEPAGE, _POPULATE_READ = 1, 14, 22  # more values, for Linux only


def madvise(view: torch.Tensor, advice: int) -> int:
    """Advise the system to read a memory-mapped tensor's pages ahead (WILLNEED) or to unmap them from this process (DONTNEED).

    Pages of a shard that have been read count as memory of this process until the last tensor of the shard is freed. Without
    DONTNEED, loading would therefore need twice the memory. After DONTNEED, the pages remain only in the system's page cache.
    Returns 0, or another number if the system refuses.
    """
    if _libc() is None or view.numel() == 0:
        return 0
    begin, end = _page_range(view)
    return int(_libc().madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), advice))


def _page_range(view: torch.Tensor) -> tuple[int, int]:
    """Return the addresses of the first page of a tensor and of the end of its memory."""
    strides = zip(view.shape, view.stride(), strict=True)
    end = view.data_ptr() + (1 + sum((size - 1) * stride for size, stride in strides)) * view.element_size()
    return view.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE, end


def read_as_huge_pages(mapped: torch.Tensor) -> None:
    """Make Linux read a memory-mapped file into huge pages, as far as the file is not in the page cache already."""
    if sys.platform == "linux":
        for advice in (_HUGEPAGE, _RANDOM):  # _RANDOM: without readahead beyond the huge page, which reads into smaller pages
            if madvise(mapped, advice):
                break


class _ScanArgs(ctypes.Structure):
    """The arguments of the request PAGEMAP_SCAN (struct pm_scan_arg in linux/fs.h)."""

    _fields_ = [
        (name, ctypes.c_uint64)
        for name in "size flags start end walk_end vec vec_len max_pages inverted mask any_mask return_mask".split()
    ]


_PAGEMAP_SCAN, _PAGE_IS_HUGE, _MAX_RANGES = 0xC0606610, 1 << 6, 256


def map_huge_pages(view: torch.Tensor) -> bool:
    """Map all pages of a memory-mapped tensor into this process; return True if at least half of it is in huge pages.

    Linux maps a file in huge pages if its page cache holds the file in such pages: since 6.16 on ext4, earlier on XFS. On other
    systems and file systems, the result is False. Pages that are not in the page cache are read from the disk.
    """
    if sys.platform != "linux" or view.numel() == 0:
        return False
    madvise(view, _POPULATE_READ)
    begin, end = _page_range(view)
    ranges = (ctypes.c_uint64 * 3 * _MAX_RANGES)()  # (start, end, categories) of ranges of huge pages
    args = _ScanArgs(ctypes.sizeof(_ScanArgs), 0, begin, -(-end // mmap.PAGESIZE) * mmap.PAGESIZE)
    args.vec, args.vec_len, args.mask, args.return_mask = ctypes.addressof(ranges), _MAX_RANGES, _PAGE_IS_HUGE, _PAGE_IS_HUGE
    with open("/proc/self/pagemap", "rb") as pagemap:  # ioctl returns -1 on Linux before 6.7
        count = _libc().ioctl(pagemap.fileno(), ctypes.c_ulong(_PAGEMAP_SCAN), ctypes.byref(args))
    return sum(last - first for first, last, _ in ranges[: max(count, 0)]) >= (end - begin) / 2
