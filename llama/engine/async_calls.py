"""Async calls: answer the calls of event loops. The background thread of the model (`step_thread`) runs their steps.

All calls share the batch, sync ones, too.
"""

import contextlib
from collections.abc import AsyncGenerator, Callable, Coroutine, Sequence
from types import TracebackType
from typing import Any, TypeVar

from ..chat import UNSAFE_ERROR
from ..tokenizer import Tokenizer
from .calls import Calls, MakeCall
from .collect import ResultCollector
from .engine import Engine
from .events import take_event
from .incremental_text import IncrementalText
from .requests import GeneratedToken, GenerationCall, Request
from .results import GenerationResult
from .step_thread import AsyncCall, check_sharable, start_thread
from .stream import AnswerProgress, StopStrings, end_text, push_token

T = TypeVar("T")


async def run_async(engine: Engine, call: GenerationCall) -> AsyncGenerator[GeneratedToken, None]:
    """Yield what `Engine.run` yields. Closing the generator, or cancelling the task that reads it, ends the call."""
    for token in engine.begin(call):
        yield token
    if not engine.needs_model(call):
        return
    engine.check_sizes()
    async_call = AsyncCall(engine, call)
    start_thread(engine.shared.turn, async_call)
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
