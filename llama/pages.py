"""Memory in large pages, for weights."""

import contextlib
import math
import mmap
import sys
import threading

import torch


class HugePages:
    """Memory in pages of 2 MB, where Linux gives them. In pages of 4 kB, which small tensors get, it is read at as little as
    half of its rate."""

    size = 1 << 26  # bytes that are asked for at once

    def __init__(self) -> None:
        self.memory, self.used, self.lock = mmap.mmap(-1, 1), 1, threading.Lock()

    def room(self, *shape: int, dtype: torch.dtype) -> torch.Tensor:
        """For a tensor that is yet to be filled, beside what was asked for before."""
        if sys.platform != "linux":
            return torch.empty(shape, dtype=dtype, device="cpu")
        nbytes = math.prod(shape) * dtype.itemsize
        with self.lock:
            if len(self.memory) - self.used < nbytes:
                self.memory, self.used = mmap.mmap(-1, max(self.size, nbytes), mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), 0
                with contextlib.suppress(OSError):  # a kernel that has none
                    self.memory.madvise(mmap.MADV_HUGEPAGE)
            memory, start = self.memory, self.used
            self.used += -(-nbytes // 64) * 64
        return torch.frombuffer(memory, dtype=dtype, count=math.prod(shape), offset=start).view(shape)


HUGE_PAGES = HugePages()
