"""Propagate failures: if one rank fails, the other ranks raise an error with its reason instead of waiting for ever."""

import contextlib
import signal
import threading
import time
import traceback
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from fairscale.nn.model_parallel import initialize as fs

from .. import compat
from ..errors import InputError, LlamaError, NonFiniteError
from . import groups
from .groups import destroy_groups, global_rank, reachable_world_size

FAILURE_KEY = "llama/reason"  # key in the store of the process group; the value says which rank failed, and why


def error_text(failure: BaseException | None) -> str | None:
    """Return the type and message of an exception, as in "ValueError: message"; None if there is no exception."""
    return None if failure is None else f"{type(failure).__name__}: {failure}"


@contextlib.contextmanager
def propagate_failure() -> Iterator[None]:
    """Guard a block that contains collectives: a failure in the block makes all ranks raise.

    NonFiniteError and InputError are raised on all ranks anyway, and have no further effect. Any other failure ends the process
    groups. The collectives of the other ranks then fail, and these ranks raise LlamaError with the reason of the failed rank.
    """
    reachable_world_size()
    try:
        yield
    except (NonFiniteError, InputError, GeneratorExit):
        raise
    except BaseException as e:
        if not dist.is_initialized() or dist.get_world_size() == 1:
            raise
        # A process group ends only when nothing refers to it. So clear the local variables that the traceback keeps alive.
        traceback.clear_frames(e.__traceback__)
        if _caused_by_peer(e):
            unknown = "another rank ended without a reason (it was killed, or did not make this call), so every rank stops"
            reason = peer_failure_reason(wait=2) or unknown
            _end_groups(reason)
            raise LlamaError(reason) from e
        reason = f"rank {global_rank()} failed, so every rank stops: {error_text(e)}"
        with contextlib.suppress(Exception):  # the groups must end even if the store is unreachable
            _store().set(FAILURE_KEY, reason)
        _end_groups(reason)
        raise


@contextlib.contextmanager
def defer_signals(for_others: bool = False) -> Iterator[None]:
    """Defer the handlers of SIGINT and SIGTERM until the block ends, if there are other ranks, or with `for_others`.

    A signal handler may raise an exception. During a collective, this would leave the other ranks waiting in the collective.
    for_others: True if an exception in the block would end calls of other threads.
    """
    has_other_ranks = dist.is_initialized() and dist.get_world_size() > 1
    if not (has_other_ranks or for_others) or threading.current_thread() is not threading.main_thread():
        yield
        return
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    deferred: list[int] = []
    for number, handler in handlers.items():
        if callable(handler):
            signal.signal(number, lambda number, _: deferred.append(number))
    try:
        yield
    finally:
        for number, handler in handlers.items():
            if callable(handler):
                signal.signal(number, handler)
        for signal_number in deferred:
            handlers[signal.Signals(signal_number)](signal_number, None)  # type: ignore[operator, misc]


class PeerFailed(Exception):
    """Raised when this rank waits for a rank that has failed."""


def peer_failure_reason(wait: float = 0) -> str | None:
    """Return the reason that a failed rank has written to the store, or None. Wait up to `wait` seconds for a reason."""
    deadline = time.monotonic() + wait
    with contextlib.suppress(Exception):  # the store is gone if the rank that hosts it has ended
        store = _store()
        while True:
            if store.check([FAILURE_KEY]):
                return store.get(FAILURE_KEY).decode()
            if time.monotonic() > deadline:
                break
            time.sleep(0.05)
    return None


def _store() -> Any:
    return compat.default_store()


def _caused_by_peer(e: BaseException) -> bool:
    """Return True if an exception was raised because another rank has failed."""
    return isinstance(e, (PeerFailed, dist.DistError)) or (isinstance(e, RuntimeError) and "gloo/" in str(e))


def _end_groups(reason: str) -> None:
    """End all process groups, so that later calls raise an error with the given reason."""
    groups.ended_reason = reason
    with contextlib.suppress(Exception):
        if torch.cuda.is_available():  # without an abort, NCCL kernels would wait for a failed rank for ever
            compat.abort_process_groups()
    with contextlib.suppress(Exception):
        destroy_groups()
    fs.destroy_model_parallel()
