"""The turn to run steps: one thread at a time runs the model for all calls, and the others wait for the end of its step.

A thread whose call runs alone takes the turn for each step of its call. As soon as a second thread waits, or for async calls, a
background thread takes it for each step (`step_thread`), and gives the steps back when a single thread is left. If the threads
took turns instead, each would have OpenMP threads of its own, which are slower while there are more of them than CPU cores.

A thread that has the turn takes the lock of the model (`SharedState.lock`) to run a step. So a thread that holds that lock must
not wait for the turn.
"""

import contextlib
import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

from ..errors import InputError

LINGER_SECONDS = 0.02  # how long the background thread waits for another call after the last one
ALONE_STEPS = 8  # steps for a single waiting thread, after which that thread runs the steps itself


class Waiting(Protocol):
    """What the turn needs to know of a call: the events that its caller has not taken yet, and whether more will come."""

    events: list

    @property
    def ended(self) -> bool: ...


class Steps(NamedTuple):
    """Steps to run: an engine and a scheduler. call: run them until this call has events or has ended; None for one step."""

    engine: Any
    scheduler: Any
    call: Waiting | None = None

    @property
    def done(self) -> bool:
        return self.call is not None and (bool(self.call.events) or self.call.ended)


class StepTurn:
    """Give the turn to one thread at a time, and wake the threads that wait for the end of a step."""

    def __init__(self) -> None:
        # Reentrant: the garbage collector may close a stream, which takes the mutex, in a thread that holds it.
        self.mutex = threading.RLock()
        self.holder: int | None = None  # the thread that has the turn
        self.waiters: dict[threading.Condition, Steps] = {}
        self.thread: threading.Thread | None = None  # the background thread
        self.changed = threading.Condition(self.mutex)  # wakes the background thread
        self.async_calls: list[Any] = []  # those that have not ended
        self.n_alone = 0  # steps of the background thread for which a single thread has waited

    @property
    def has_thread(self) -> bool:
        """Return True if a background thread runs the steps. It does not exist in a process that has forked."""
        return self.thread is not None and self.thread.is_alive()

    def refuse_within_step(self) -> None:
        """Raise InputError if this thread is running a step, which a call would wait for."""
        if self.holder == threading.get_ident():
            raise InputError("a sampler has called its own model during a step; call the model after the step")

    def claim(self, steps: Steps, start_thread: Callable[[], None]) -> bool:
        """Take the turn and return True; or return False, at once if the steps are done, else after a wait.

        While another thread has the turn, wait until the steps are done, or until this thread is to run the next one.
        start_thread: starts the background thread, which is needed when a second thread waits.
        """
        with self.mutex:
            if steps.done:
                return False
            if self.holder is None and not self.has_thread:
                self.holder = threading.get_ident()
                return True
            if not self.has_thread:
                with contextlib.suppress(RuntimeError):  # the system allows no more threads: the callers take turns
                    start_thread()
            waiter = threading.Condition(self.mutex)
            self.waiters[waiter] = steps
            self.changed.notify()
            try:
                waiter.wait()
            except BaseException:  # Ctrl-C
                del self.waiters[waiter]
                self.wake()  # this thread may have been woken to run the next step
                raise
            del self.waiters[waiter]
            return False

    def release(self) -> None:
        """Give the turn back, if this thread has it."""
        if self.holder == threading.get_ident():
            self.holder = None  # before the mutex is taken, which Ctrl-C may interrupt
            self.wake()

    def wake(self) -> None:
        """Wake the threads that waited for this step, and whoever runs the next: the background thread, else one that waits."""
        with self.mutex:
            needs_one = not self.has_thread
            for waiter, steps in self.waiters.items():
                if steps.call is None or steps.done or needs_one:
                    waiter.notify()
                    needs_one = needs_one and steps.done
            self.changed.notify()

    def next_steps(self, async_steps: Sequence[Steps]) -> list[Steps] | None:
        """Wait until there is something for the background thread to do. Take the turn, and return the steps to run.

        async_steps: those of the submitted async calls. Return [] if others are to be submitted first.
        Return None if the thread is to end, since no thread waits any more, or only one has waited for ALONE_STEPS.
        """
        with self.mutex:
            while True:
                waiting = [steps for steps in self.waiters.values() if not steps.done]
                if len(self.async_calls) > len(async_steps):
                    return []
                if not waiting and not async_steps:
                    if not self.changed.wait(LINGER_SECONDS) and not self.waiters and not self.async_calls:
                        self.end_thread()
                        return None
                elif self.holder is not None:
                    self.changed.wait(1)  # and look again, since Ctrl-C may have interrupted `release`
                else:
                    self.n_alone = self.n_alone + 1 if len(waiting) == 1 and not async_steps else 0
                    if self.n_alone > ALONE_STEPS:
                        self.end_thread()
                        return None
                    self.holder = threading.get_ident()
                    return [*async_steps, *waiting]

    def end_thread(self) -> None:
        """Note the end of the background thread, in which this is called. A thread that waits runs the next step.

        Whoever holds the mutex meanwhile can be sure that a thread that exists looks for work once more.
        """
        with self.mutex:
            if self.thread is not threading.current_thread():
                return
            self.thread, self.n_alone = None, 0
            self.holder = None if self.holder == threading.get_ident() else self.holder
            self.wake()
