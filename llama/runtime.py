"""Where we run: device, ranks, fairscale's model-parallel groups, free memory, who may print.

Three ways in, decided once by `start`:

    a group that the caller made       joined as it is
    torchrun (RANK and WORLD_SIZE set) a group started from the environment
    plain python, a notebook           no group at all: one rank needs no collective, so no port is opened and
                                       nothing process-wide is left behind

Nothing here knows about models or text.
"""

import atexit
import contextlib
import io
import os
import sys
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from fairscale.nn.model_parallel import initialize as fs

from .errors import DeviceError, LlamaError

T = TypeVar("T")


def model_parallel() -> tuple[int, int]:
    """(rank, size) in the model-parallel group; (0, 1) where there is none."""
    if not fs.model_parallel_is_initialized():
        return 0, 1
    return fs.get_model_parallel_rank(), fs.get_model_parallel_world_size()


def global_rank() -> int:
    return dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", 0))


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", 1))


def start(device: str | torch.device | None = None, model_parallel_size: int | None = None) -> torch.device:
    """Choose this rank's device and make the model-parallel groups stand; returns the device.

    `model_parallel_size` defaults to that of existing groups, then to the world's size. Raises DeviceError for a
    device that is not there, for more ranks than devices, and for a size that the world does not hold.
    """
    under_torchrun = "RANK" in os.environ and "WORLD_SIZE" in os.environ
    if dist.is_initialized():
        world = dist.get_world_size()
    else:
        world = int(os.environ["WORLD_SIZE"]) if under_torchrun else 1
    size = _model_parallel_size(model_parallel_size, world)
    chosen = choose_device(device, world)

    if chosen.type == "cuda" and (dist.is_initialized() or under_torchrun):
        torch.cuda.set_device(chosen)  # NCCL speaks for each rank through its current device
    if not dist.is_initialized() and under_torchrun:
        try:
            dist.init_process_group("cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo")
        except ValueError as e:
            raise DeviceError(f"{e}; start ranks with torchrun, or unset RANK and WORLD_SIZE to run one process") from e
    if dist.is_initialized():
        atexit.unregister(_stop)
        atexit.register(_stop)
        if not fs.model_parallel_is_initialized():
            with contextlib.redirect_stdout(io.StringIO()):  # fairscale prints its sizes
                fs.initialize_model_parallel(size)
        if dist.get_rank() > 0 and getattr(sys.stdout, "name", None) != os.devnull:
            sys.stdout = open(os.devnull, "w")  # one rank prints what the caller prints
    return chosen


def _stop() -> None:
    """End the groups, also the caller's: left to the interpreter, gloo's threads abort the process now and then."""
    if dist.is_initialized():
        # A gloo thread that still lets go of its last tensor needs the GIL, which its destructor holds (torch 2.6).
        time.sleep(0.1)
        fs.destroy_model_parallel()
        dist.destroy_process_group()


def _model_parallel_size(wanted: int | None, world: int) -> int:
    existing = fs.get_model_parallel_world_size() if fs.model_parallel_is_initialized() else None
    if wanted is None:
        return existing or world
    if isinstance(wanted, bool) or not isinstance(wanted, int) or wanted < 1:
        raise DeviceError(f"model_parallel_size is {wanted!r}; it must be a whole number of ranks, 1 or more")
    if existing is not None and existing != wanted:
        raise DeviceError(
            f"model_parallel_size={wanted}, but this process already has model-parallel groups of {existing}; "
            f"leave it out, or call fairscale's destroy_model_parallel() first"
        )
    if world % wanted:
        raise DeviceError(
            f"model_parallel_size={wanted} does not divide the {world} running process(es); "
            f"start them with: torchrun --nproc_per_node {wanted} ..."
        )
    return wanted


def choose_device(device: str | torch.device | None, world: int = 1) -> torch.device:
    """This rank's device: the one named, else CUDA, else MPS, else the CPU. Ranks take GPUs by local rank."""
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        chosen = torch.device(device)
    except (RuntimeError, TypeError, ValueError) as e:
        raise DeviceError(f"device={device!r:.60} is not a device; use 'cpu', 'cuda', 'cuda:0' or 'mps'") from e
    if chosen.type == "cpu":
        return torch.device("cpu")
    if chosen.type == "mps":
        if not torch.backends.mps.is_available():
            raise DeviceError("device='mps', but this PyTorch sees no Apple GPU; use device='cpu'")
        if world > 1:
            raise DeviceError(f"{world} ranks, but there is one MPS device; run one process, or use device='cpu'")
        return torch.device("mps")
    if chosen.type != "cuda":
        raise DeviceError(f"device={device!r} is not supported; use 'cpu', 'cuda' or 'mps'")

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", min(world, max(count, 1))))
    if count == 0:
        raise DeviceError(f"device={str(device)!r}, but this PyTorch sees no CUDA GPU; use device='cpu'")
    if ranks_here > count:
        raise DeviceError(
            f"{ranks_here} ranks on this machine, but {count} GPU(s): start at most {count} "
            f"(torchrun --nproc_per_node {count}), or use device='cpu'"
        )
    if chosen.index is None:
        local_rank = int(os.environ.get("LOCAL_RANK", global_rank() % count))
        return torch.device("cuda", local_rank if world > 1 else torch.cuda.current_device())
    if ranks_here > 1:
        raise DeviceError(f"device='{chosen}' would put {ranks_here} ranks on one GPU; use device='cuda'")
    if chosen.index >= count:
        raise DeviceError(f"device='{chosen}', but the GPUs here are cuda:0 to cuda:{count - 1}")
    return chosen


def together(work: Callable[[], T]) -> T:
    """Run `work`, which must hold no collective, on every rank; one rank's failure fails them all with its cause.

    Without this a rank that raises leaves the others waiting in their next collective.
    """
    result: T | None = None
    failure: Exception | None = None
    try:
        result = work()
    except Exception as e:
        failure = e
    if dist.is_initialized() and dist.get_world_size() > 1:
        causes: list[str | None] = [None] * dist.get_world_size()
        dist.all_gather_object(causes, None if failure is None else f"{type(failure).__name__}: {failure}")
        if failure is None:
            for rank, cause in enumerate(causes):
                if cause is not None:
                    raise LlamaError(f"rank {rank} failed, so every rank stops: {cause}")
    if failure is not None:
        raise failure
    return result  # type: ignore[return-value]


def from_rank0(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor of the model-parallel group's first rank, on all its ranks (in place)."""
    if model_parallel()[1] > 1:
        dist.broadcast(tensor, fs.get_model_parallel_src_rank(), group=fs.get_model_parallel_group())
    return tensor


def largest_of_all(tensor: torch.Tensor) -> torch.Tensor:
    """Number by number, the largest of the model-parallel group's tensors."""
    largest = tensor.float()  # which every backend reduces
    dist.all_reduce(largest, dist.ReduceOp.MAX, group=fs.get_model_parallel_group())
    return largest.to(tensor.dtype)


def sharing() -> Callable[[Callable[[], T]], T]:
    """A function that runs some work on rank 0 alone and gives its result, or its failure, to every rank.

    The work may wait for a person: the ranks wait in a group of their own, which no time-out of the others ends. Every
    rank must call `sharing`, and then what it returns, equally often.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return lambda work: work()
    group = dist.new_group(backend="gloo", timeout=timedelta(days=365))

    def share(work: Callable[[], T]) -> T:
        result: T | None = None
        failure: Exception | None = None
        if global_rank() == 0:
            try:
                result = work()
            except Exception as e:
                failure = e
        box = [result, None if failure is None else f"{type(failure).__name__}: {failure}"]
        dist.broadcast_object_list(box, 0, group=group)
        if failure is not None:
            raise failure
        if box[1] is not None:
            raise LlamaError(f"rank 0 failed, so every rank stops: {box[1]}")
        return box[0]  # type: ignore[return-value]

    return share


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
    return min(limits) // int(os.environ.get("LOCAL_WORLD_SIZE", 1)) if limits else None


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
    copies = [torch.empty(t.shape, dtype=t.dtype, pin_memory=True).copy_(t, non_blocking=True) for t in tensors]
    arrived = torch.cuda.Event()
    arrived.record(torch.cuda.current_stream(tensors[0].device))

    def wait() -> list[list[Any]]:
        arrived.synchronize()
        return [copy.tolist() for copy in copies]

    return wait


def progress(items: list[T], weigh: Callable[[T], int], label: str, unit: str = "GB") -> Iterator[T]:
    """Yield the items, with a bar of their summed weight on stderr once it has taken a second: in bytes, or in units.

    Rank 0 alone shows it, and only on a terminal.
    """
    weights = [weigh(item) for item in items]
    total, done, begun, shown = sum(weights), 0, time.monotonic(), 0.0
    visible = sys.stderr.isatty() and global_rank() == 0
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
