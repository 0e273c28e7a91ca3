"""Memory-map files. Where a file system has no memory-mapping, read the files into memory instead."""

import errno
import functools
import mmap
import sys
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import torch

from ..distributed.groups import global_rank
from ..errors import system_error_number

ReadBytes = Callable[[int, int], torch.UntypedStorage]  # (offset, size) -> these bytes of a file

# mmap fails with one of these errors where it is not supported, or not allowed, although the file can be read.
_CANNOT_MAP = {errno.ENODEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EPERM, errno.EACCES}


def map_file(path: Path, f: BinaryIO) -> ReadBytes:
    """Map a file privately, and return a function that returns parts of it. f: the same file, opened for reading.

    If the file cannot be mapped, print so on stderr; the function then reads each part once, keeps it in memory, and works only
    while `f` is open. Raises RuntimeError if there is no address space for the file.
    """
    try:
        mapped = torch.UntypedStorage.from_file(str(path), False, f.seek(0, 2))
    except RuntimeError as e:
        if not str(e).startswith("unable to mmap") or system_error_number(e) not in _CANNOT_MAP:
            raise
        if global_rank() == 0:
            print(f"llama: {path} cannot be memory-mapped, so it is read into memory: {e}", file=sys.stderr)
        return functools.cache(functools.partial(_read, f))
    return lambda offset, size: mapped[offset : offset + size]


def _read(f: BinaryIO, offset: int, size: int) -> torch.UntypedStorage:
    """Read bytes of a file into memory that, like a mapped file, keeps its contents after `madvise` with DONTNEED."""
    if not size:
        return torch.UntypedStorage(0, device="cpu")
    memory = mmap.mmap(-1, size)  # shared memory; DONTNEED would zero private memory
    f.seek(offset)
    if f.readinto(memory) != size:  # type: ignore[attr-defined]
        raise ValueError(f"cut off before byte {offset + size:,}")
    return torch.frombuffer(memory, dtype=torch.uint8).untyped_storage()
