"""TODO."""

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

FAILURE_KEY = "llama/reason"  # a key of the group's store: which rank failed first, and why


def error_text(failure: BaseException | None) -> str | None:
    return None if failure is None else f"{type(failure).__name__}: {failure}"


@contextlib.contextmanager
def propagate_failure() -> Iterator[None]:
    """Around what holds collectives. NumberError and InputError pass: all ranks raise them alike. Any other failure ends the
    groups, and with them the work of all other ranks, which raise a LlamaError with its reason."""
    reachable_world_size()
    try:
        yield
    except (NonFiniteError, InputError, GeneratorExit):
        raise
    except BaseException as e:
        if not dist.is_initialized() or dist.get_world_size() == 1:
            raise
        traceback.clear_frames(e.__traceback__)  # which may hold groups: these end when nothing holds them
        if _caused_by_peer(e):
            unknown = "another rank has gone without a word (it was killed, or did not make this call), so every rank stops"
            reason = peer_failure_reason(wait=2) or unknown
            _end_groups(reason)
            raise LlamaError(reason) from e
        reason = f"rank {global_rank()} failed, so every rank stops: {error_text(e)}"
        with contextlib.suppress(Exception):  # whatever befalls the store, the groups are to end
            _store().set(FAILURE_KEY, reason)
        _end_groups(reason)
        raise


@contextlib.contextmanager
def defer_signals() -> Iterator[None]:
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


class PeerFailed(Exception):
    """Work of this rank that cannot end, since another rank has failed."""


def peer_failure_reason(wait: float = 0) -> str | None:
    """What a rank that failed has left in the store; after `wait` seconds at most."""
    until = time.monotonic() + wait
    with contextlib.suppress(Exception):  # the store may have gone, too
        store = _store()
        while True:
            if store.check([FAILURE_KEY]):
                return store.get(FAILURE_KEY).decode()
            if time.monotonic() > until:
                break
            time.sleep(0.05)
    return None


def _store() -> Any:
    return compat.default_store()


def _caused_by_peer(e: BaseException) -> bool:
    """Whether something failed because of another rank."""
    return isinstance(e, (PeerFailed, dist.DistError)) or (isinstance(e, RuntimeError) and "gloo/" in str(e))


def _end_groups(reason: str) -> None:
    groups.ended = reason
    with contextlib.suppress(Exception):
        if torch.cuda.is_available():  # kernels that wait for another rank would never end
            compat.abort_process_groups()
    with contextlib.suppress(Exception):
        destroy_groups()
    fs.destroy_model_parallel()
