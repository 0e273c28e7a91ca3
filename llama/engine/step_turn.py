"""The turn to run steps: one thread at a time runs the model for all calls, and the others wait for the end of its step.

A thread that has the turn takes the lock of the model (`SharedState.lock`) to run a step. So a thread that holds that lock must
not wait for the turn.
"""

import threading
from typing import Protocol

from ..errors import InputError


class Waiting(Protocol):
    """What the turn needs to know of a call: the events that its caller has not taken yet, and whether more will come."""

    events: list

    @property
    def ended(self) -> bool: ...


class StepTurn:
    """Give the turn to one thread at a time, and wake the threads that wait for the end of a step."""

    def __init__(self) -> None:
        # Reentrant: the garbage collector may close a stream, which takes the mutex, in a thread that holds it.
        self.mutex = threading.RLock()
        self.holder: int | None = None  # the thread that has the turn
        self.waiters: dict[threading.Condition, Waiting | None] = {}  # with its call; None: any step will do

    def refuse_within_step(self) -> None:
        """Raise InputError if this thread is running a step, which a call would wait for."""
        if self.holder == threading.get_ident():
            raise InputError("a sampler has called its own model during a step; call the model after the step")

    def claim(self, call: Waiting | None) -> bool:
        """Take the turn and return True; or return False, at once if `call` has events or has ended, else after a wait.

        While another thread has the turn, wait until `call` has events, or until this thread is to run the next step.
        """
        with self.mutex:
            if call and (call.events or call.ended):
                return False
            if self.holder is None:
                self.holder = threading.get_ident()
                return True
            waiter = threading.Condition(self.mutex)
            self.waiters[waiter] = call
            try:
                waiter.wait()
            finally:  # also after Ctrl-C
                del self.waiters[waiter]
            return False

    def release(self) -> None:
        """Give the turn back, if this thread has it."""
        if self.holder == threading.get_ident():
            self.holder = None  # before the mutex is taken, which Ctrl-C may interrupt
            self.wake()

    def wake(self) -> None:
        """Wake the threads whose calls have events or have ended, and one more, which runs the next step if nobody does."""
        with self.mutex:
            if not self.waiters:
                return
            ready = [waiter for waiter, call in self.waiters.items() if call and (call.events or call.ended)]
            others = [waiter for waiter in self.waiters if waiter not in ready]
            for waiter in [*ready, *others[:1]]:
                waiter.notify()
