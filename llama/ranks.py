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
import hashlib
import io
import ipaddress
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from fairscale.nn.model_parallel import initialize as fs

from .errors import DeviceError, InputError, LlamaError, NumberError, kind

T = TypeVar("T")

# oneDNN makes code for each shape of a product and keeps that of 1,024; PyTorch keeps another 1,024, with what they compute
# in: after prompts of many lengths a gigabyte. A step has five shapes, a prompt as many and those of its attention. Both
# read this at their first product.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "128")
os.environ.setdefault("LRU_CACHE_CAPACITY", "64")

# Large tensors in pages of 2 MB, where Linux grants them: the CPU's prefetching ends where a page does, and a step reads every
# weight. PyTorch reads this at its first tensor, so it comes too late, and does no harm, where the caller has made one.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

REASON = "llama/reason"  # a key of the group's store: which rank failed first, and why
A_YEAR = timedelta(days=365)
PATIENCE = 30  # seconds, after which a rank that waits for the others says so

_everyone: tuple[Any, dist.ProcessGroup] | None = None  # the world's group, and one of ours for what ranks tell each other
_ended: str | None = None  # why there are no groups any more


def under_torchrun() -> bool:
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def global_rank() -> int:
    return dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", 0))


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else int(os.environ["WORLD_SIZE"]) if under_torchrun() else 1


def here() -> tuple[int | None, int | None]:
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


# --- groups ----------------------------------------------------------------------------------------------------------


def model_parallel_size(wanted: int | None) -> int:
    """How many ranks share one model: those wanted, else those of existing groups, else all."""
    existing = fs.get_model_parallel_world_size() if fs.model_parallel_is_initialized() else None
    world = _world()
    if wanted is None:
        return existing or world
    if isinstance(wanted, bool) or not isinstance(wanted, int) or not 1 <= wanted < 2**31:
        raise DeviceError(f"model_parallel_size is {kind(wanted)}; it must be a number of ranks, from 1 to 2,147,483,647")
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


def join(backend: str) -> None:
    """Under torchrun, make the world's group stand, if the caller has made none."""
    global _ended
    if not dist.is_initialized() and under_torchrun():
        if _ended:
            raise DeviceError(f"{_ended}; start all of them again")
        check_reachable()
        try:
            dist.init_process_group(backend)
        except ValueError as e:
            raise DeviceError(f"{e}; start ranks with torchrun, or unset RANK and WORLD_SIZE to run one process") from e
    if dist.is_initialized():
        _ended = None
        atexit.unregister(_stop)
        atexit.register(_stop)


def divide_world(size: int) -> None:
    """In a world, make the groups of `size` ranks that share a model."""
    if not dist.is_initialized():
        return
    if not fs.model_parallel_is_initialized():
        with linked(), contextlib.redirect_stdout(io.StringIO()):  # fairscale prints its sizes
            fs.initialize_model_parallel(size)
    if dist.get_rank() > 0 and getattr(sys.stdout, "name", None) != os.devnull:
        sys.stdout = open(os.devnull, "w")  # one rank prints what the caller prints


def check_reachable() -> None:
    """Raise DeviceError where ranks on other machines would look for this one in vain: half a minute, and no word why."""
    on_one_machine = world_size() == (here()[1] or world_size())
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


def _stop() -> None:
    """End the groups, also the caller's: left to the interpreter, gloo's threads abort the process now and then."""
    global _everyone
    if dist.is_initialized():
        # A gloo thread that still lets go of its last tensor needs the GIL, which its destructor holds (torch 2.6).
        time.sleep(0.1)
        _everyone = None
        fs.destroy_model_parallel()
        dist.destroy_process_group()


def _world() -> int:
    """How many ranks there are to speak with."""
    if dist.is_initialized():
        return dist.get_world_size()
    if _ended:
        raise LlamaError(f"{_ended}; start all of them again")
    return 1


def _all_ranks() -> dist.ProcessGroup:
    """All ranks, over gloo, whatever tensors travel by. Some wait here for a person, or for a slower replica: a year."""
    global _everyone
    if _everyone is None or _everyone[0] is not dist.group.WORLD:
        _everyone = dist.group.WORLD, dist.new_group(backend="gloo", timeout=A_YEAR)
    return _everyone[1]


# --- of one mind -----------------------------------------------------------------------------------------------------


def together(work: Callable[[], T], alike: Callable[[T], object] | None = None) -> T:
    """Run `work`, which must hold no collective, on every rank; one rank's failure fails them all with its cause.

    alike: what of its result must have the same repr on all ranks. Without all this a rank that raises, or goes another
    way, would leave the others waiting in their next collective.
    """
    if _world() == 1:
        return work()

    def marked() -> tuple[T, str]:
        result = work()
        return result, repr(alike(result)) if alike else ""

    outcome, failure = _outcome(marked)
    result, mark = outcome or (None, "")
    with _patience():
        said = _exchange((_told(failure), hashlib.sha256(mark.encode("utf-8", "backslashreplace")).hexdigest()))
    _raise_first(failure, [cause for cause, _ in said])
    others = [str(rank) for rank, (_, theirs) in enumerate(said) if theirs != said[0][1]]
    if others:
        raise InputError(
            f"rank(s) {', '.join(others)} were given other input than rank 0, or made another call: make the same "
            "calls with the same input on every rank, and change the model alike; replicas divide the prompts among themselves"
        )
    return result  # type: ignore[return-value]


def on_rank0(work: Callable[[], T]) -> T:
    """Run some work on rank 0 alone, and give its result, or its failure, to every rank. It may wait for a person."""
    if _world() == 1:
        return work()
    result, failure = _outcome(work) if global_rank() == 0 else (None, None)
    box: list[Any] = [result, _told(failure)]
    with linked(), unbroken():
        dist.broadcast_object_list(box, 0, group=_all_ranks())
    _raise_first(failure, [box[1]])
    return box[0]


def on_every_replica(work: Callable[[], T]) -> list[T]:
    """Run `work`, each replica for itself, and give the results of all to every rank, in the replicas' order."""
    index, count = replica()
    with linked():
        if count == 1:
            return [work()]
        result: T | None = None
        failure: LlamaError | None = None
        try:
            result = work()
        except (NumberError, InputError) as e:  # on all ranks of this replica, but perhaps on no other
            failure = e
    said: list[Any] = _exchange((_told(failure), None if model_parallel()[0] else (index, result)))
    _raise_first(failure, [cause for cause, _ in said])
    by_replica = dict(theirs for _, theirs in said if theirs)
    return [by_replica[i] for i in range(count)]


def from_rank0(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor of the model-parallel group's first rank, on all its ranks (in place)."""
    if model_parallel()[1] > 1:
        dist.broadcast(tensor, fs.get_model_parallel_src_rank(), group=fs.get_model_parallel_group())
    return tensor


def _exchange(mine: T) -> list[T]:
    said: list[Any] = [None] * _world()
    with linked(), unbroken():
        dist.all_gather_object(said, mine, group=_all_ranks())
    return said


def _outcome(work: Callable[[], T]) -> tuple[T | None, BaseException | None]:
    try:
        return work(), None
    except BaseException as e:  # Ctrl-C, too: the others wait to be told
        return None, e


def _told(failure: BaseException | None) -> str | None:
    return None if failure is None else f"{type(failure).__name__}: {failure}"


def _raise_first(own: BaseException | None, causes: list[str | None]) -> None:
    """This rank's failure, or else that of the first rank that has one."""
    if own is not None:
        raise own
    for rank, cause in enumerate(causes):
        if cause is not None:
            error = NumberError if cause.startswith(f"{NumberError.__name__}: ") else LlamaError
            raise error(f"rank {rank} failed, so every rank stops: {cause}")


@contextlib.contextmanager
def _patience() -> Iterator[None]:
    """Say so, once, where the other ranks take long to come: perhaps they never will."""
    text = (
        f"rank {global_rank()} has waited {PATIENCE} s for the others and waits on: they are slow, or do something else "
        "(every rank must make the same calls, and end a stream at the same piece)"
    )
    timer = threading.Timer(PATIENCE, lambda: print(text, file=sys.stderr, flush=True))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


# --- one's failure ends all ------------------------------------------------------------------------------------------


@contextlib.contextmanager
def linked() -> Iterator[None]:
    """Around what holds collectives. NumberError and InputError pass: all ranks raise them alike. Any other failure ends the
    groups, and with them the work of all other ranks, which raise a LlamaError with its reason."""
    _world()
    try:
        yield
    except (NumberError, InputError, GeneratorExit):
        raise
    except BaseException as e:
        if not dist.is_initialized() or dist.get_world_size() == 1:
            raise
        traceback.clear_frames(e.__traceback__)  # which may hold groups: these end when nothing holds them
        if _of_another(e):
            unknown = "another rank has gone without a word (it was killed, or did not make this call), so every rank stops"
            reason = why_ended(wait=2) or unknown
            _end_groups(reason)
            raise LlamaError(reason) from e
        reason = f"rank {global_rank()} failed, so every rank stops: {_told(e)}"
        with contextlib.suppress(Exception):  # whatever befalls the store, the groups are to end
            _store().set(REASON, reason)
        _end_groups(reason)
        raise


@contextlib.contextmanager
def unbroken() -> Iterator[None]:
    """Have what Python does at a signal, which may raise, come after this, where there are other ranks: collectives that
    are left halfway can neither go on nor be ended."""
    if not dist.is_initialized() or dist.get_world_size() == 1 or threading.current_thread() is not threading.main_thread():
        yield
        return
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    came: list[int] = []
    for number, handler in handlers.items():
        if callable(handler):
            signal.signal(number, lambda number, _: came.append(number))
    try:
        yield
    finally:
        for number, handler in handlers.items():
            if callable(handler):
                signal.signal(number, handler)
        for late in came:
            handlers[signal.Signals(late)](late, None)  # type: ignore[operator, misc]


class OfAnother(Exception):
    """Work of this rank that cannot end, since another rank has failed."""


def why_ended(wait: float = 0) -> str | None:
    """What a rank that failed has left in the store; after `wait` seconds at most."""
    until = time.monotonic() + wait
    with contextlib.suppress(Exception):  # the store may have gone, too
        store = _store()
        while True:
            if store.check([REASON]):
                return store.get(REASON).decode()
            if time.monotonic() > until:
                break
            time.sleep(0.05)
    return None


def _store() -> Any:
    return dist.distributed_c10d._get_default_store()


def _of_another(e: BaseException) -> bool:
    """Whether something failed because of another rank."""
    return isinstance(e, (OfAnother, dist.DistError)) or (isinstance(e, RuntimeError) and "gloo/" in str(e))


def _end_groups(reason: str) -> None:
    global _ended
    _ended = reason
    with contextlib.suppress(Exception):
        if torch.cuda.is_available():  # kernels that wait for another rank would never end
            dist.distributed_c10d._abort_process_group()
    with contextlib.suppress(Exception):
        _stop()
    fs.destroy_model_parallel()
