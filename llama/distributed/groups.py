"""Ranks: the processes of one job, their groups, and how they stay of one mind.

    world     all ranks: WORLD_SIZE of them
    replica   a whole model, on `model_parallel_size` ranks side by side; a world may hold several

Every rank makes the same calls with the same input. What they make of it, and that it is the same, they tell each other
once a call (`together`), before anything is computed. From then on they go in step; and where one falls, none is left
waiting (`linked`): it leaves its reason in the group's store and ends its groups, whereupon the collectives of the others
fail at once, and they find the reason there.
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

INTERACTIVE_TIMEOUT = timedelta(days=365)
_everyone: tuple[Any, dist.ProcessGroup] | None = None  # the world's group, and one of ours for what ranks tell each other
ended: str | None = None  # why there are no groups any more


def under_torchrun() -> bool:
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def global_rank() -> int:
    return dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", 0))


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else int(os.environ["WORLD_SIZE"]) if under_torchrun() else 1


def local_rank_and_size() -> tuple[int | None, int | None]:
    """(rank on this machine, number of ranks on it), as torchrun tells them."""
    local = [os.environ.get(name) for name in ("LOCAL_RANK", "LOCAL_WORLD_SIZE")]
    rank, size = (None if value is None else int(value) for value in local)
    return rank, size


def model_parallel() -> tuple[int, int]:
    """(rank, size) in the model-parallel group; (0, 1) where there is none."""
    if not fs.model_parallel_is_initialized():
        return 0, 1
    return fs.get_model_parallel_rank(), fs.get_model_parallel_world_size()


def replica() -> tuple[int, int]:
    """(number of this rank's replica, how many there are)."""
    if not fs.model_parallel_is_initialized():
        return 0, 1
    return fs.get_data_parallel_rank(), fs.get_data_parallel_world_size()


def choose_model_parallel_size(wanted: int | None) -> int:
    """How many ranks share one model: those wanted, else those of existing groups, else all."""
    existing = fs.get_model_parallel_world_size() if fs.model_parallel_is_initialized() else None
    world = reachable_world_size()
    if wanted is None:
        return existing or world
    if isinstance(wanted, bool) or not isinstance(wanted, int) or not 1 <= wanted < 2**31:
        raise DeviceError(f"model_parallel_size is {describe(wanted)}; it must be a number of ranks, from 1 to 2,147,483,647")
    if existing is not None and existing != wanted:
        raise DeviceError(
            f"model_parallel_size={wanted}, but this process already has model-parallel groups of {existing}; "
            f"leave it out, or call fairscale's destroy_model_parallel() first"
        )
    if world % wanted:
        raise DeviceError(
            f"model_parallel_size={wanted} does not divide the {world} running process(es); leave it out, or start a multiple "
            f"of {wanted}: torchrun --nproc_per_node {wanted} ..."
        )
    return wanted


def init_process_group(backend: str) -> None:
    """Under torchrun, make the world's group stand, if the caller has made none."""
    global ended
    if not dist.is_initialized() and under_torchrun():
        if ended:
            raise DeviceError(f"{ended}; start all of them again")
        check_reachable()
        try:
            dist.init_process_group(backend)
        except ValueError as e:
            raise DeviceError(f"{e}; start ranks with torchrun, or unset RANK and WORLD_SIZE to run one process") from e
    if dist.is_initialized():
        ended = None
        atexit.unregister(destroy_groups)
        atexit.register(destroy_groups)


def check_reachable() -> None:
    """Raise DeviceError where ranks on other machines would look for this one in vain: half a minute, and no word why."""
    on_one_machine = world_size() == (local_rank_and_size()[1] or world_size())
    over_loopback = os.environ.get("MASTER_ADDR", "").startswith(("127.", "::1", "localhost"))
    if on_one_machine or over_loopback or "GLOO_SOCKET_IFNAME" in os.environ:
        return
    name, addresses = socket.gethostname(), set()
    with contextlib.suppress(OSError):
        addresses = {str(address[0]).partition("%")[0] for *_, address in socket.getaddrinfo(name, None)}
    if all(ipaddress.ip_address(address).is_loopback for address in addresses):
        where = f"leads to {', '.join(sorted(addresses))}" if addresses else "leads nowhere"
        raise DeviceError(
            f"this machine's name, {name!r}, {where}, where ranks on other machines cannot find it: set GLOO_SOCKET_IFNAME "
            "(with GPUs NCCL_SOCKET_IFNAME, too) to the network interface that the machines share, such as eth0"
        )


def destroy_groups() -> None:
    """End the groups, also the caller's: left to the interpreter, gloo's threads abort the process now and then."""
    global _everyone
    if dist.is_initialized():
        # A gloo thread that still lets go of its last tensor needs the GIL, which its destructor holds (torch 2.6).
        time.sleep(0.1)
        _everyone = None
        fs.destroy_model_parallel()
        dist.destroy_process_group()


def reachable_world_size() -> int:
    """How many ranks there are to speak with."""
    if dist.is_initialized():
        return dist.get_world_size()
    if ended:
        raise LlamaError(f"{ended}; start all of them again")
    return 1


def all_ranks_group() -> dist.ProcessGroup:
    """All ranks, over gloo, whatever tensors travel by. Some wait here for a person, or for a slower replica: a year."""
    global _everyone
    if _everyone is None or _everyone[0] is not dist.group.WORLD:
        _everyone = dist.group.WORLD, dist.new_group(backend="gloo", timeout=INTERACTIVE_TIMEOUT)
    return _everyone[1]
