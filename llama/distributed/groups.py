"""Ranks and process groups: which rank a process is, which ranks share a model, and how groups start and end.

    world     all WORLD_SIZE ranks
    replica   `model_parallel_size` adjacent ranks that share one whole model; a world may contain several replicas

Every rank makes the same calls with the same input. At the start of a call, the ranks exchange fingerprints of their input. If
the fingerprints differ, all ranks raise an error (`run_on_all_ranks`). If a rank fails later, it writes the reason to the store
of the process group and ends its groups (`propagate_failure`). The collectives of the other ranks then fail at once, and the
other ranks read the reason from the store. While rank 0 leads (`Llama.lead`), it alone makes calls, and tells the other ranks
before each step what is new (`control.py`).
"""

import atexit
import contextlib
import ipaddress
import os
import socket
import time
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from fairscale.nn.model_parallel import initialize as fs

from ..errors import DeviceError, LlamaError, describe

INTERACTIVE_TIMEOUT = timedelta(days=365)  # timeout of collectives in which ranks wait for a user or for a slower replica
_gloo_group: tuple[Any, dist.ProcessGroup] | None = None  # the default process group, and a gloo group of the same ranks
ended_reason: str | None = None  # why the process groups have ended; None if they have not
rank0_leads = False  # True while rank 0 makes all calls, and the other ranks follow them (`Llama.lead`)


def under_torchrun() -> bool:
    """Return True if torchrun, or a launcher that sets the same environment variables, has started this process."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def global_rank() -> int:
    """Return the number of this rank in the world; 0 for a single process."""
    return dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", 0))


def world_size() -> int:
    """Return the number of ranks; 1 for a single process."""
    return dist.get_world_size() if dist.is_initialized() else int(os.environ["WORLD_SIZE"]) if under_torchrun() else 1


def calls_are_exclusive() -> bool:
    """Return True if all ranks must make the same calls in the same order: on several ranks, unless rank 0 leads them."""
    return world_size() > 1 and not rank0_leads


def local_rank_and_size() -> tuple[int | None, int | None]:
    """Return this rank's number on its machine, and the number of ranks there. Each is None if torchrun has not set it."""
    local = [os.environ.get(name) for name in ("LOCAL_RANK", "LOCAL_WORLD_SIZE")]
    rank, size = (None if value is None else int(value) for value in local)
    return rank, size


def model_parallel() -> tuple[int, int]:
    """Return this rank's number in its model-parallel group, and the size of the group; (0, 1) without groups."""
    if not fs.model_parallel_is_initialized():
        return 0, 1
    return fs.get_model_parallel_rank(), fs.get_model_parallel_world_size()


def replica() -> tuple[int, int]:
    """Return the number of this rank's replica, and the number of replicas; (0, 1) without groups."""
    if not fs.model_parallel_is_initialized():
        return 0, 1
    return fs.get_data_parallel_rank(), fs.get_data_parallel_world_size()


def part_of_calls() -> tuple[int, int]:
    """Return which part of the prompts of each call this replica runs, counted from 0, and into how many they are divided.

    While rank 0 leads, calls are not divided: replicas take single requests of one queue.
    """
    return (0, 1) if rank0_leads else replica()


def choose_model_parallel_size(requested: int | None) -> int:
    """Return how many ranks share one model: the requested number, else the size of existing groups, else all ranks.

    Raises DeviceError if the requested number is not the size of existing groups, or does not divide the number of ranks.
    """
    existing = fs.get_model_parallel_world_size() if fs.model_parallel_is_initialized() else None
    world = reachable_world_size()
    if requested is None:
        return existing or world
    if isinstance(requested, bool) or not isinstance(requested, int) or not 1 <= requested < 2**31:
        raise DeviceError(
            f"model_parallel_size is {describe(requested)}; it must be a number of ranks, from 1 to 2,147,483,647"
        )
    if existing is not None and existing != requested:
        raise DeviceError(
            f"model_parallel_size={requested}, but this process already has model-parallel groups of {existing}; "
            f"leave it out, or call fairscale's destroy_model_parallel() first"
        )
    if world % requested:
        raise DeviceError(
            f"model_parallel_size={requested} does not divide the {world} running process(es); leave it out, or start a "
            f"multiple of {requested}: torchrun --nproc_per_node {requested} ..."
        )
    return requested


def init_process_group(backend: str) -> None:
    """Under torchrun, create the default process group, unless the caller has created one. Raise DeviceError if that fails."""
    global ended_reason
    if not dist.is_initialized() and under_torchrun():
        if ended_reason:
            raise DeviceError(f"{ended_reason}; start all ranks again")
        check_reachable()
        try:
            dist.init_process_group(backend)
        except ValueError as e:
            raise DeviceError(f"{e}; start ranks with torchrun, or unset RANK and WORLD_SIZE to run one process") from e
    if dist.is_initialized():
        ended_reason = None
        atexit.unregister(destroy_groups)
        atexit.register(destroy_groups)


def check_reachable() -> None:
    """Raise DeviceError if ranks on other machines cannot connect to this rank.

    Without this check, gloo would wait half a minute and then fail without a reason.
    """
    on_one_machine = world_size() == (local_rank_and_size()[1] or world_size())
    over_loopback = os.environ.get("MASTER_ADDR", "").startswith(("127.", "::1", "localhost"))
    if on_one_machine or over_loopback or "GLOO_SOCKET_IFNAME" in os.environ:
        return
    name, addresses = socket.gethostname(), set()
    with contextlib.suppress(OSError):
        addresses = {str(address[0]).partition("%")[0] for *_, address in socket.getaddrinfo(name, None)}
    if all(ipaddress.ip_address(address).is_loopback for address in addresses):
        problem = f"resolves to {', '.join(sorted(addresses))}" if addresses else "does not resolve"
        raise DeviceError(
            f"this machine's name, {name!r}, {problem}, so ranks on other machines cannot connect to it: set "
            "GLOO_SOCKET_IFNAME (with GPUs also NCCL_SOCKET_IFNAME) to the network interface the machines share, such as eth0"
        )


def destroy_groups() -> None:
    """End all process groups, also those that the caller has created.

    If a process exits before its groups end, the threads of gloo sometimes abort the process.
    """
    global _gloo_group
    if dist.is_initialized():
        # A gloo thread needs the GIL to free its last tensor, but in torch 2.6 the destructor of a group holds the GIL. So give
        # the thread time before the group is destroyed.
        time.sleep(0.1)
        _gloo_group = None
        fs.destroy_model_parallel()
        dist.destroy_process_group()


def reachable_world_size() -> int:
    """Return the number of ranks in the default process group, or 1 if there is no group.

    Raises LlamaError if a failure has ended the group.
    """
    if dist.is_initialized():
        return dist.get_world_size()
    if ended_reason:
        raise LlamaError(f"{ended_reason}; start all ranks again")
    return 1


def all_ranks_group() -> dist.ProcessGroup:
    """Return a gloo group of all ranks, for the exchange of Python objects. The group waits for up to a year."""
    global _gloo_group
    if _gloo_group is None or _gloo_group[0] is not dist.group.WORLD:
        _gloo_group = dist.group.WORLD, dist.new_group(backend="gloo", timeout=INTERACTIVE_TIMEOUT)
    return _gloo_group[1]
