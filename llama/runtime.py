"""Where we run: device, free memory, huge pages, what may run ahead of what, progress.

Three ways in, decided once by `start`:

    a group that the caller made       joined as it is
    torchrun (RANK and WORLD_SIZE set) a group started from the environment
    plain python, a notebook           no group at all: one rank needs no collective, so no port is opened and
                                       nothing process-wide is left behind but how memory is paged (ranks.py) and kept (below)

Nothing here knows about models or text.
"""

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from . import ranks
from .errors import DeviceError, shown

T = TypeVar("T")


def start(device: str | torch.device | None = None, model_parallel_size: int | None = None) -> torch.device:
    """Choose this rank's device and make the model-parallel groups stand; returns the device.

    `model_parallel_size` defaults to that of existing groups, then to the world's size. Raises DeviceError for a
    device that is not there, for more ranks than devices, and for a size that the world does not hold.
    """
    on_cpu = isinstance(device, (str, torch.device)) and str(device).startswith("cpu")
    gpus = torch.cuda.is_available() and not on_cpu
    ranks.join("cpu:gloo,cuda:nccl" if gpus else "gloo")

    def choose() -> tuple[int, torch.device]:
        return ranks.model_parallel_size(model_parallel_size), choose_device(device, ranks.world_size())

    size, chosen = ranks.together(choose, alike=lambda choice: (choice[0], choice[1].type))
    if chosen.type == "cuda" and dist.is_initialized():
        torch.cuda.set_device(chosen)  # NCCL speaks for each rank through its current device
    ranks.divide_world(size)
    return chosen


def choose_device(device: str | torch.device | None, world: int = 1) -> torch.device:
    """This rank's device: the one named, else CUDA, else MPS, else the CPU. Ranks take GPUs by local rank."""
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        chosen = torch.device(device)
    except Exception as e:  # torch raises many
        raise DeviceError(f"device={shown(device)} is not a device; use 'cpu', 'cuda', 'cuda:0' or 'mps'") from e
    if chosen.type == "cpu":
        return torch.device("cpu")
    if chosen.type == "mps":
        if not torch.backends.mps.is_available():
            raise DeviceError("device='mps', but this PyTorch sees no Apple GPU; use device='cpu'")
        if world > 1:
            raise DeviceError(f"{world} ranks, but there is one MPS device; run one process, or use device='cpu'")
        return torch.device("mps")
    if chosen.type != "cuda":
        raise DeviceError(f"device={shown(device)} is not supported; use 'cpu', 'cuda' or 'mps'")

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    local_rank, ranks_here = ranks.here()
    ranks_here = ranks_here or min(world, max(count, 1))
    if count == 0:
        raise DeviceError(f"device={str(device)!r}, but this PyTorch sees no CUDA GPU; use device='cpu'")
    if ranks_here > count:
        raise DeviceError(
            f"{ranks_here} ranks on this machine, but {count} GPU(s): start at most {count} "
            f"(torchrun --nproc_per_node {count}), or use device='cpu'"
        )
    if chosen.index is None:
        own = ranks.global_rank() % count if local_rank is None else local_rank
        return torch.device("cuda", own if world > 1 else torch.cuda.current_device())
    if ranks_here > 1:
        raise DeviceError(f"device='{chosen}' would put {ranks_here} ranks on one GPU; use device='cuda'")
    if chosen.index >= count:
        raise DeviceError(f"device='{chosen}', but the GPUs here are cuda:0 to cuda:{count - 1}")
    return chosen


def free_memory(device: torch.device) -> int | None:
    """Bytes this rank may still allocate on its device; None where the system does not tell."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    limits = [n for n in (_linux_available(), _cgroup_available()) if n is not None]
    if not limits and hasattr(os, "sysconf"):  # macOS: what is installed is the only bound to be had
        limits = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    return min(limits) // (ranks.here()[1] or 1) if limits else None


def keep_freed() -> None:
    """Have Linux's allocator keep what the layers of a prompt take and free, which is a tenth of the time of 512 ids at 1.1B.

    glibc maps large blocks one by one, and gives back to Linux, which clears each page anew, what lies free beyond twice that
    size. Both sizes follow the largest block freed so far, up to 32 MiB: this one, never written to. To be called when the
    weights are there: those are better off mapped, in large pages.
    """
    torch.empty(31 << 20, dtype=torch.uint8, device="cpu")


def _linux_available() -> int | None:
    with contextlib.suppress(OSError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return None


def _cgroup_available() -> int | None:
    """What a container (cgroup v2) leaves: its limit less what is used, page cache not counted."""
    root = Path("/sys/fs/cgroup")
    with contextlib.suppress(OSError, ValueError):
        limit = int((root / "memory.max").read_text())  # "max" is no number: no limit
        stat = dict(line.split() for line in (root / "memory.stat").read_text().splitlines())
        return limit - int((root / "memory.current").read_text()) + int(stat.get("inactive_file", 0))
    return None


def runs_ahead(device: torch.device) -> bool:
    """Whether the host may launch the next step while the device still computes this one."""
    return device.type == "cuda"


def fetch(*tensors: torch.Tensor) -> Callable[[], list[list[Any]]]:
    """Send tensors to the host; the call returned waits for them, and for nothing launched since, and gives lists."""
    if not all(tensor.is_cuda for tensor in tensors):
        return lambda: [tensor.tolist() for tensor in tensors]
    room = (torch.empty(t.shape, dtype=t.dtype, device="cpu", pin_memory=True) for t in tensors)
    copies = [here.copy_(t, non_blocking=True) for here, t in zip(room, tensors, strict=True)]
    arrived = torch.cuda.Event()
    arrived.record(torch.cuda.current_stream(tensors[0].device))

    def wait() -> list[list[Any]]:
        begun = asked = time.monotonic()
        while ranks.world_size() > 1 and not arrived.query():  # a collective with a rank that failed would never end
            now = time.monotonic()
            if now - begun > 0.002:
                time.sleep(0.0001)
            if now - asked > 1:
                asked = now
                if reason := ranks.why_ended():
                    raise ranks.OfAnother(reason)
        arrived.synchronize()
        return [copy.tolist() for copy in copies]

    return wait


def progress(items: list[T], weigh: Callable[[T], int], label: str, unit: str = "GB") -> Iterator[T]:
    """Yield the items, with a bar of their summed weight on stderr once it has taken a second: in bytes, or in units.

    Rank 0 alone shows it, and only on a terminal.
    """
    weights = [weigh(item) for item in items]
    total, done, begun, shown = sum(weights), 0, time.monotonic(), 0.0
    visible = sys.stderr.isatty() and ranks.global_rank() == 0
    for item, weight in zip(items, weights, strict=True):
        yield item
        done += weight
        now = time.monotonic()
        if visible and now - begun > 1 and (now - shown > 0.1 or done == total):
            shown = now
            bar = "#" * (30 * done // max(total, 1))
            scale, digits = (1e9, 1) if unit == "GB" else (1, 0)
            amounts = [f"{n / scale:,.{digits}f}" for n in (done, total, done / (now - begun))]
            text = "{} of {} {unit}, {} {unit}/s".format(*amounts, unit=unit)
            print(f"\r{label} [{bar:<30}] {text}", end="", file=sys.stderr)
    if shown:
        print(file=sys.stderr)
