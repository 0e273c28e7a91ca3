"""Choose this rank's device, and set up the process groups."""

import contextlib
import functools
import io
import os
import sys

import torch
import torch.distributed as dist
from fairscale.nn.model_parallel import initialize as fs

from ..errors import DeviceError, InputError, short_repr
from . import agreement, groups, threads
from .failures import propagate_failure


def set_environment() -> None:
    """Set environment variables that PyTorch and oneDNN read at their first use, unless the caller has set them.

    THP_MEM_ALLOC_ENABLE puts large tensors into pages of 2 MB if Linux grants them. Large pages make reading weights faster,
    because a CPU does not prefetch beyond the end of a page. PyTorch reads the variable when it creates its first tensor, so
    setting the variable has no effect if the caller created a tensor before `build`.

    ONEDNN_PRIMITIVE_CACHE_CAPACITY and LRU_CACHE_CAPACITY limit two caches, of oneDNN and PyTorch, which have an entry for each
    shape of a matrix product. With their default of 1,024 entries, the caches grow to a gigabyte after prompts of many lengths,
    although a decode step needs 5 entries and a prompt about 10.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "128")
    os.environ.setdefault("LRU_CACHE_CAPACITY", "64")


def initialize(device: str | torch.device | None = None, model_parallel_size: int | None = None) -> torch.device:
    """Choose this rank's device, create the model-parallel groups, and return the device.

    model_parallel_size: number of ranks that share a model; default: the size of existing groups, or all ranks if none exist.
    Raises DeviceError for a device that does not exist, for more ranks than devices, and for a model_parallel_size that is not
    the size of existing groups or does not divide the number of ranks.
    """
    if groups.rank0_leads:
        raise InputError("a model on several ranks is built by all of them: build it before `lead`, which runs on rank 0 alone")
    set_environment()
    on_cpu = isinstance(device, (str, torch.device)) and str(device).startswith("cpu")
    gpus = torch.cuda.is_available() and not on_cpu
    groups.init_process_group("cpu:gloo,cuda:nccl" if gpus else "gloo")

    def choose() -> tuple[int, torch.device]:
        return groups.choose_model_parallel_size(model_parallel_size), choose_device(device, groups.world_size())

    size, chosen = agreement.run_on_all_ranks(choose, must_match=lambda choice: (choice[0], choice[1].type))
    if chosen.type == "cuda" and dist.is_initialized():
        torch.cuda.set_device(chosen)  # NCCL uses each rank's current device
    if chosen.type == "cpu":
        threads.limit_threads()
    init_model_parallel(size)
    return chosen


def init_model_parallel(size: int) -> None:
    """Create the groups of `size` ranks that share a model, if there is a process group. Silence stdout on ranks above 0."""
    if not dist.is_initialized():
        return
    if not fs.model_parallel_is_initialized():
        with propagate_failure(), contextlib.redirect_stdout(io.StringIO()):  # hide what fairscale prints
            fs.initialize_model_parallel(size)
    if dist.get_rank() > 0 and getattr(sys.stdout, "name", None) != os.devnull:
        sys.stdout = open(os.devnull, "w")  # the caller's prints then appear once, not once per rank


def choose_device(device: str | torch.device | None, world: int = 1) -> torch.device:
    """Return this rank's device: the requested device, or without a request CUDA if available, else the CPU.

    With several GPUs on a machine, each rank uses the GPU with the number of its local rank.

    Raises DeviceError for a device that does not exist or is not supported, and for more ranks than devices.
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        chosen = torch.device(device)
    except Exception as e:  # for invalid devices, torch raises several types of exceptions
        raise DeviceError(f"device={short_repr(device)} is not a device; use 'cpu', 'cuda', 'cuda:0' or 'mps'") from e
    if chosen.type == "cpu":
        return torch.device("cpu")
    if chosen.type == "mps":
        if not torch.backends.mps.is_available():
            raise DeviceError("device='mps', but this PyTorch sees no Apple GPU; use device='cpu'")
        if world > 1:
            raise DeviceError(f"{world} ranks, but there is one MPS device; run one process, or use device='cpu'")
        _warn_about_mps()
        return torch.device("mps")
    if chosen.type != "cuda":
        raise DeviceError(f"device={short_repr(device)} is not supported; use 'cpu', 'cuda' or 'mps'")

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    local_rank, ranks_here = groups.local_rank_and_size()
    ranks_here = ranks_here or min(world, max(count, 1))
    if count == 0:
        raise DeviceError(f"device={str(device)!r}, but this PyTorch sees no CUDA GPU; use device='cpu'")
    if ranks_here > count:
        raise DeviceError(
            f"{ranks_here} ranks on this machine, but {count} GPU(s): start at most {count} "
            f"(torchrun --nproc_per_node {count}), or use device='cpu'"
        )
    if chosen.index is None:
        index = groups.global_rank() % count if local_rank is None else local_rank
        return torch.device("cuda", index if world > 1 else torch.cuda.current_device())
    if ranks_here > 1:
        raise DeviceError(f"device='{chosen}' would put {ranks_here} ranks on one GPU; use device='cuda'")
    if chosen.index >= count:
        raise DeviceError(f"device='{chosen}', but the GPUs here are cuda:0 to cuda:{count - 1}")
    return chosen


@functools.cache  # warn once
def _warn_about_mps() -> None:
    print("llama: device='mps' is untested: compare its answers with those of device='cpu'", file=sys.stderr)
