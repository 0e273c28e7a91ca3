"""Async calls: answer the calls of event loops, with one background thread for each model.

While a model has async calls, its background thread submits them to the scheduler, steps it, and hands the events of each call
to its event loop. Text, stop strings and finish reasons are decided there, by the same code as for sync calls. The thread
starts with the first call and ends with the last. Sync calls still run the steps themselves, and all calls share the batch.
"""

import asyncio
import atexit
import contextlib
import threading
import weakref
from collections.abc import AsyncGenerator, Callable, Coroutine, Sequence
from types import TracebackType
from typing import Any, NamedTuple, TypeVar

import torch

from ..chat import UNSAFE_ERROR
from ..distributed.groups import calls_are_exclusive, world_size
from ..errors import InputError
from ..tokenizer import Tokenizer
from .calls import Calls, MakeCall
from .collect import ResultCollector
from .engine import Engine
from .events import Event, RunningCall, RunningCalls, take_event
from .incremental_text import IncrementalText
from .leading import check_led
from .requests import GeneratedToken, GenerationCall, Request
from .results import GenerationResult
from .shared_state import SharedState
from .stream import AnswerProgress, StopStrings, end_text, push_token

T = TypeVar("T")

EXIT_SECONDS = 10  # how long the interpreter waits at its exit for the step that a background thread is running


class AsyncCall:
    """A call of an event loop. The background thread submits it, and hands its events over; the loop takes them or cancels."""

    def __init__(self, engine: Engine, call: GenerationCall) -> None:
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


_STATES: weakref.WeakSet[SharedState] = weakref.WeakSet()  # those that have had a background thread


def start(async_call: AsyncCall) -> None:
    """Give a call to the background thread of its model. Start the thread if there is none."""
    shared = async_call.engine.shared
    shared.turn.refuse_within_step()
    with shared.async_lock:
        if shared.async_thread is not None and not shared.async_thread.is_alive():  # in a process that has forked
            shared.async_thread, shared.async_calls = None, []
        shared.async_calls.append(async_call)
        if shared.async_thread is None:
            _STATES.add(shared)
            shared.async_thread = threading.Thread(target=_run_calls, args=(shared,), name="llama-async", daemon=True)
            try:
                shared.async_thread.start()
            except BaseException:  # the system allows no more threads
                shared.async_thread, shared.async_calls = None, []
                raise


@torch.inference_mode()
def _run_calls(shared: SharedState) -> None:
    """Run the background thread: submit the async calls of a model, and step their schedulers, until all calls have ended."""
    while True:
        with shared.async_lock:
            shared.async_calls = [call for call in shared.async_calls if not (call.done or call.cancelled)]
            if not shared.async_calls:
                shared.async_thread = None
                return
            calls: list[AsyncCall] = list(shared.async_calls)
        for call in calls:
            if call.running_call is None:
                call.submit()
        for scheduler in {id(call.scheduler): call.scheduler for call in calls if call.scheduler}.values():
            with contextlib.suppress(BaseException):  # a failure of a step becomes the error of each call
                calls[0].engine.step_or_wait(scheduler)
        by_loop: dict[asyncio.AbstractEventLoop, list[News]] = {}
        for news in filter(None, (call.take_news() for call in calls)):
            by_loop.setdefault(news.call.loop, []).append(news)
        for loop, told in by_loop.items():
            tell(loop, told)


@atexit.register
def _end_threads() -> None:
    """Cancel all async calls at the exit of the interpreter: a thread must not run the model while Python ends."""
    for shared in [*_STATES]:
        with shared.async_lock:
            thread = shared.async_thread
            for call in shared.async_calls:
                call.cancel()
        if thread is not None:
            thread.join(EXIT_SECONDS)


def check_sharable(engine: Engine, name: str) -> None:
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


async def run_async(engine: Engine, call: GenerationCall) -> AsyncGenerator[GeneratedToken, None]:
    """Yield what `Engine.run` yields. Closing the generator, or cancelling the task that reads it, ends the call."""
    for token in engine.begin(call):
        yield token
    if not engine.needs_model(call):
        return
    engine.check_sizes()
    async_call = AsyncCall(engine, call)
    start(async_call)
    try:
        while events := await async_call.next_events():
            for event in events:
                for token in take_event(call.requests[event.prompt_index], event):
                    yield token
    finally:
        async_call.cancel()


class AsyncTokens(AsyncGenerator[GeneratedToken, None]):
    """The tokens of a call, for `async for`. Closing it ends the call."""

    def __init__(self, requests: Sequence[Request], tokens: AsyncGenerator[GeneratedToken, None]) -> None:
        self._requests, self._tokens = requests, tokens

    @property
    def cached_tokens(self) -> list[int]:
        """Return how many tokens of each prompt were in the KV cache already; 0 before the prompt's first token."""
        return [request.num_cached_tokens for request in self._requests]

    @property
    def guessed_tokens(self) -> list[int]:
        """Return how many guesses of each answer's tokens have been computed so far; 0 without `speculate`."""
        return [request.num_guessed_tokens for request in self._requests]

    @property
    def accepted_tokens(self) -> list[int]:
        """Return how many of the guesses of each answer were right."""
        return [request.num_accepted_tokens for request in self._requests]

    def asend(self, value: None) -> Coroutine[Any, Any, GeneratedToken]:
        return self._tokens.asend(value)

    def athrow(self, *error: Any) -> Coroutine[Any, Any, GeneratedToken]:
        return self._tokens.athrow(*error)

    def aclose(self) -> Coroutine[Any, Any, None]:
        return self._tokens.aclose()


async def collect_results_async(
    call: GenerationCall, tokens: AsyncGenerator[GeneratedToken, None], tokenizer: Tokenizer
) -> list[GenerationResult]:
    """Read the tokens of a call to its end, and return one result for each request."""
    collector = ResultCollector(call, tokenizer)
    async with contextlib.aclosing(tokens):
        async for token in tokens:
            collector.push(token)
    return collector.finish()


async def tokens_until_stop_async(
    call: GenerationCall, tokens: AsyncGenerator[GeneratedToken, None], tokenizer: Tokenizer
) -> AsyncGenerator[GeneratedToken, None]:
    """Yield the tokens of a call, as `tokens_until_stop` does."""
    stops = StopStrings(call, tokenizer)
    async with contextlib.aclosing(tokens):
        async for token in tokens:
            yield stops.check(token)


class AsyncStream(AnswerProgress):
    """Iterate over the text of an answer in chunks, while it is generated, with `async for`. The async twin of `Stream`.

    It begins when it is first read, in the event loop of the reader. A stream may be left early: `aclose`, the end of an
    `async with` block or the cancellation of the task that reads it frees its row of the batch at the next step.
    """

    def __init__(self, request: Request, chunks: AsyncGenerator[str, None]) -> None:
        self._request, self._chunks, self._text, self._closed = request, chunks, "", False

    def __aiter__(self) -> "AsyncStream":
        return self

    async def __anext__(self) -> str:
        try:
            chunk = await anext(self._chunks)
        except BaseException:
            self._closed = True
            raise
        self._text += chunk
        return chunk

    def __repr__(self) -> str:
        state = self.finish_reason or ("ended early" if self._closed else "running")
        return f"<AsyncStream {state}: {self.prompt_tokens} prompt tokens, {self.new_tokens} new tokens>"

    async def aclose(self) -> None:
        """End the stream, and free its resources."""
        self._closed = True
        await self._chunks.aclose()

    async def __aenter__(self) -> "AsyncStream":
        return self

    async def __aexit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self.aclose()


async def text_chunks_async(
    request: Request, tokens: AsyncGenerator[GeneratedToken, None], text: IncrementalText, refusal: str = ""
) -> AsyncGenerator[str, None]:
    """Yield the text of an answer in chunks, as `text_chunks` does, after `refusal`."""
    if refusal:
        yield refusal
    async with contextlib.aclosing(tokens):
        async for token in tokens:
            if chunk := push_token(request, text, token):
                yield chunk
    if chunk := end_text(request, text):
        yield chunk


class AsyncCalls:
    """The async calls of a `Llama`. Each method returns the async twin of what the same method of `Calls` returns."""

    def __init__(self, calls: Calls) -> None:
        self.calls, self.llama = calls, calls.llama

    def results(
        self, name: str, make_call: MakeCall, make_result: Callable[[GenerationResult], T]
    ) -> Coroutine[Any, Any, list[T]]:
        self.calls.refuse_replaced_generate("async calls")
        call = self._validate(name, make_call)

        async def results() -> list[T]:
            return [*map(make_result, await collect_results_async(call, self._run(call), self.llama.tokenizer))]

        return results()

    def tokens(self, name: str, make_call: MakeCall) -> AsyncTokens:
        call = self._validate(name, make_call)
        tokens = self._run(call)
        return AsyncTokens(
            call.requests, tokens_until_stop_async(call, tokens, self.llama.tokenizer) if call.has_stops else tokens
        )

    def stream(self, name: str, make_call: MakeCall) -> AsyncStream:
        self.calls.refuse_replaced_generate("streams")
        call = self._validate(name, make_call)
        (request,) = call.requests
        text = IncrementalText.of_answer(call, request, self.llama.tokenizer)
        refusal = "" if request.prompt else UNSAFE_ERROR
        return AsyncStream(request, text_chunks_async(request, self._run(call), text, refusal))

    def _validate(self, name: str, make_call: MakeCall) -> GenerationCall:
        check_sharable(self.llama.engine, f"a{name}")
        return self.calls.validate(f"a{name}", make_call)

    def _run(self, call: GenerationCall) -> AsyncGenerator[GeneratedToken, None]:
        return run_async(self.llama.engine, self.calls.resolve(call, watched=True))
