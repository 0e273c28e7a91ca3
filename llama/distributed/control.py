"""Messages of rank 0 to the other ranks, which say what to do next, and what the replicas report to it.

A message travels over gloo, before the collectives of the work that it asks for. The other ranks wait for it without using
their CPU, for as long as it takes. While nothing else is sent, rank 0 sends an empty beat now and then: so it notices within
seconds that another rank has ended, and no connection is idle for long.
"""

import contextlib
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from .failures import defer_signals, propagate_failure
from .groups import all_ranks_group, global_rank, model_parallel, replica

T = TypeVar("T")

BEAT_SECONDS = 3.0  # between two beats
_BEAT = -1  # in place of the length of a message


class Sender:
    """Send the messages of rank 0, and beats between them.

    lock: held by whoever sends a message; a beat is sent only while nobody else holds it.
    """

    def __init__(self, lock: threading.RLock) -> None:  # type: ignore[valid-type]
        self.lock, self.ended, self.last_sent = lock, threading.Event(), time.monotonic()
        self.thread = threading.Thread(target=self._beat, name="llama-beat", daemon=True)
        self.thread.start()

    def send(self, message: bytes) -> None:
        """Send a message, while holding the lock. A failure must end the process groups: see `propagate_failure`."""
        self.last_sent = time.monotonic()
        _broadcast(torch.tensor([len(message)], dtype=torch.int64, device="cpu"))
        if message:
            _broadcast(torch.frombuffer(bytearray(message), dtype=torch.uint8))

    def end(self, message: bytes) -> None:
        """Send the last message."""
        self.ended.set()
        with self.lock, propagate_failure(), defer_signals():
            self.send(message)

    def _beat(self) -> None:
        with contextlib.suppress(Exception):  # if a rank has ended, the next message raises the reason
            while not self.ended.wait(self.last_sent + BEAT_SECONDS - time.monotonic()):
                with self.lock, propagate_failure():
                    if not self.ended.is_set() and time.monotonic() >= self.last_sent + BEAT_SECONDS:
                        self.last_sent = time.monotonic()
                        _broadcast(torch.tensor([_BEAT], dtype=torch.int64, device="cpu"))


def receive() -> bytes:
    """Wait for the next message of rank 0, and return it."""
    length = torch.tensor([_BEAT], dtype=torch.int64, device="cpu")
    while length == _BEAT:
        _broadcast(length)
    message = torch.empty(int(length), dtype=torch.uint8, device="cpu")
    if len(message):
        _broadcast(message)
    return message.numpy().tobytes()


def gather_on_rank0(value: T) -> list[T]:
    """Return, on rank 0, the values of all replicas, each from its first rank. Return an empty list on the other ranks."""
    is_first, count = model_parallel()[0] == 0, replica()[1]
    if count == 1:
        return [value] if is_first else []
    values: list[Any] | None = [None] * dist.get_world_size() if global_rank() == 0 else None
    dist.gather_object(value if is_first else None, values, 0, group=all_ranks_group())
    return values[:: model_parallel()[1]] if values else []


@contextlib.contextmanager
def signals_ignored() -> Iterator[None]:
    """Ignore SIGINT and SIGTERM, since rank 0, which gets them too, decides when this rank ends. Only in the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handlers = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _broadcast(tensor: torch.Tensor) -> None:
    dist.broadcast(tensor, 0, group=all_ranks_group())
