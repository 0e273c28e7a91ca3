"""The background thread of a model, which runs the steps of calls that several threads make, and of async calls.

It submits async calls to the scheduler, steps it, and hands the events of each to its event loop. Text, stop strings and finish
reasons are decided there, by the same code as for sync calls. The thread starts with the first call that needs it, and ends
soon after the last.
"""

import asyncio
import atexit
import contextlib
import threading
import weakref
from typing import TYPE_CHECKING, NamedTuple

import torch

from ..distributed.groups import calls_are_exclusive, world_size
from ..errors import InputError
from .events import Event, RunningCall, RunningCalls
from .leading import check_led
from .requests import GenerationCall
from .step_turn import Steps, StepTurn

if TYPE_CHECKING:
    from .engine import Engine

EXIT_SECONDS = 10  # how long the interpreter waits at its exit for the step that a background thread is running


class AsyncCall:
    """A call of an event loop. The background thread submits it, and hands its events over; the loop takes them or cancels."""

    def __init__(self, engine: "Engine", call: GenerationCall) -> None:
        self.engine, self.call = engine, call
        self.loop = asyncio.get_running_loop()
        self.scheduler: RunningCalls | None = None  # None until the background thread has submitted the call
        self.running_call: RunningCall | None = None
        self.cancelled = False
        self.failure: BaseException | None = None  # why the call could not be submitted
        self.done = False  # True once the background thread has taken the last events
        # The attributes below belong to the event loop.
        self.arrived = asyncio.Event()
        self.events: list[Event] = []
        self.error: BaseException | None = None
        self.ended = False

    def submit(self) -> None:
        """Submit the call, unless another `Llama` of the same model uses it with another backend or tokenizer."""
        try:
            check_sharable(self.engine, self.call.name)  # the model may have been changed since the call was made
            self.scheduler, self.running_call = self.engine.try_submit(self.call)
        except BaseException as e:
            self.failure = e
        if self.running_call and self.cancelled:  # the loop has cancelled the call before it could see `running_call`
            self.running_call.cancelled = True

    def take_news(self) -> "News | None":
        """Return what the event loop does not know yet; None if there is nothing new."""
        if self.running_call is None:
            self.done = self.failure is not None
            return News(self, [], self.failure, True) if self.done else None
        self.done = self.running_call.ended  # looked up first: a step adds the last events before it ends the call
        events = self.running_call.take_events()
        return News(self, events, self.running_call.error, self.done) if events or self.done else None

    async def next_events(self) -> list[Event]:
        """Return the events since the last time, and wait for some if there are none. Return an empty list after the end."""
        while not self.events:
            if self.error:
                raise self.error
            if self.ended or (self.running_call and self.running_call.ended_by_caller):
                return []
            self.arrived.clear()
            await self.arrived.wait()
        events, self.events = self.events, []
        return events

    def cancel(self) -> None:
        """Take no more events. The next step frees the rows of the call."""
        self.cancelled = True
        if self.running_call:
            self.running_call.cancelled = True


class News(NamedTuple):
    """What the background thread tells an event loop about a call."""

    call: AsyncCall
    events: list[Event]
    error: BaseException | None
    ended: bool


def tell(loop: asyncio.AbstractEventLoop, news: list[News]) -> None:
    """Tell an event loop about its calls. If the loop has been closed, nobody reads them any more: cancel them."""

    def receive() -> None:
        for call, events, error, ended in news:
            call.events += events
            call.error, call.ended = error, ended
            call.arrived.set()

    try:
        loop.call_soon_threadsafe(receive)
    except RuntimeError:
        for each in news:
            each.call.cancel()


_TURNS: weakref.WeakSet[StepTurn] = weakref.WeakSet()  # those that have had a background thread
_is_exiting = False


def start_thread(turn: StepTurn, async_call: AsyncCall | None = None) -> None:
    """Start the background thread of a model, unless it runs, and give it a call. Raise RuntimeError if that is impossible."""
    turn.refuse_within_step()
    with turn.mutex:
        if not turn.has_thread:
            turn.async_calls = []  # in a process that has forked, there may be calls of its parent
            _TURNS.add(turn)
            thread = turn.thread = threading.Thread(target=_run_steps, args=(turn,), name="llama-steps", daemon=True)
            try:
                thread.start()
            except BaseException:
                if thread.ident is None:  # the system allows no more threads; otherwise, it is Ctrl-C
                    turn.thread = None
                raise
        if async_call:
            turn.async_calls.append(async_call)
            turn.changed.notify()


def _run_steps(turn: StepTurn) -> None:
    """Submit the async calls of a model, and run the steps of all its calls, until none is left or a single thread waits."""
    try:
        while not _is_exiting and _run_step(turn):
            pass
    except BaseException as e:  # not of a call or a step: out of memory, maybe
        with turn.mutex:
            turn.end_thread()
            for call in turn.async_calls:
                tell(call.loop, [News(call, [], e, True)])
            turn.async_calls = []
        raise
    finally:
        turn.end_thread()


@torch.inference_mode()
def _run_step(turn: StepTurn) -> bool:
    """Run the next step. Return False if there is none for the background thread."""
    with turn.mutex:
        turn.async_calls = [call for call in turn.async_calls if not (call.done or call.cancelled)]
        calls: list[AsyncCall] = [*turn.async_calls]
    for call in calls:
        if call.running_call is None:
            call.submit()
    steps = turn.next_steps([Steps(call.engine, call.scheduler) for call in calls])
    if steps is None:
        return False
    try:
        for engine, scheduler in {id(each.scheduler): each[:2] for each in steps if each.scheduler}.values():
            with contextlib.suppress(BaseException):  # a failure of a step becomes the error of each call
                engine.step(scheduler)
    finally:
        turn.release()
    by_loop: dict[asyncio.AbstractEventLoop, list[News]] = {}
    for news in filter(None, (call.take_news() for call in calls)):
        by_loop.setdefault(news.call.loop, []).append(news)
    for loop, told in by_loop.items():
        tell(loop, told)
    return True


@atexit.register
def _end_threads() -> None:
    """Cancel all async calls at the exit of the interpreter: a thread must not run the model while Python ends."""
    global _is_exiting
    _is_exiting = True
    for turn in [*_TURNS]:
        with turn.mutex:
            thread = turn.thread
            for call in turn.async_calls:
                call.cancel()
            turn.changed.notify()
        if thread is not None:
            thread.join(EXIT_SECONDS)


def check_sharable(engine: "Engine", name: str) -> None:
    """Raise InputError if an async call is impossible: on several ranks without `lead`, or if the model's own
    `forward` must run.
    """
    sync_name = name.removeprefix("a")
    if calls_are_exclusive():
        raise InputError(
            f"{name} is for one process, and this job has {world_size()} ranks, which must make the same calls in the same "
            f"order: use {sync_name} on all ranks, or let rank 0 alone make calls, with `lead`"
        )
    check_led(engine)
    if why := engine.why_reference_loop():
        raise InputError(
            f"{name} is for a model that several calls can share, but {why}: use {sync_name}, which runs one call at a time; "
            "in an event loop, in a thread of yours"
        )
