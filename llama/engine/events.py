"""Running calls and requests, what a scheduler reports about them, and how callers take it."""

import abc
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from .backend import Backend
from .requests import FinishReason, GeneratedToken, GenerationCall, Request
from .shared_state import ended_early


class Event(NamedTuple):
    """What the scheduler reports about a request: a token of the prompt, a new token, or the end of the answer by EOS."""

    token: GeneratedToken | None  # at the end of the answer: EOS, if the call includes it
    prompt_index: int  # the index of the request in its call
    in_prompt: bool = False
    finish_reason: FinishReason | None = None  # "stop" if EOS has ended the answer; None for other tokens


@dataclass(eq=False)
class RunningCall:
    """A call in the scheduler, and the events that its caller has not taken yet."""

    call: GenerationCall
    n_unfinished: int  # number of requests that wait or run
    events: list[Event] = field(default_factory=list)
    error: BaseException | None = None
    cancelled: bool = False  # True if the caller takes no more events
    first_open: int = 0  # index of the first request whose end the caller has not seen

    def take_events(self) -> list[Event]:
        """Remove and return the events so far. The list stays the same object, to which a step may be adding events now."""
        taken = self.events[:]
        del self.events[: len(taken)]
        return taken

    @property
    def ended(self) -> bool:
        """Return True if no more events will come."""
        return self.cancelled or self.error is not None or not self.n_unfinished

    @property
    def ended_by_caller(self) -> bool:
        """Return True if the caller has ended the answers to all requests, so that only prompts may still be scored."""
        requests = self.call.requests
        while self.first_open < len(requests) and requests[self.first_open].finish_reason:
            self.first_open += 1
        return self.first_open == len(requests) and not self.call.scores_prompts


@dataclass(eq=False)
class RunningRequest:
    """A request in a row of the KV cache."""

    running_call: RunningCall
    index: int
    request: Request
    num_generated: int = 0  # tokens generated so far; the caller may not have taken all of them

    @property
    def position(self) -> int:
        """Return the position of the next token to decode."""
        return len(self.request.prompt) + self.num_generated


class RunningCalls(abc.ABC):
    """The calls that run together, step by step."""

    def __init__(self) -> None:
        self.calls: list[RunningCall] = []

    @abc.abstractmethod
    def submit(self, call: GenerationCall) -> RunningCall:
        """Add a call. Its requests wait for free rows."""

    @abc.abstractmethod
    def suits(self, backend: Backend, n_words: int | None) -> bool:
        """Return True if calls of a `Llama` with this backend, and with a tokenizer of n_words tokens, can join the batch."""

    @abc.abstractmethod
    def why_broken(self) -> str | None:
        """Return the reason why the calls cannot continue; None if they can."""

    @abc.abstractmethod
    def step(self) -> None:
        """Run a step for all calls, and add events to them."""

    @property
    def idle(self) -> bool:
        """Return True if no call waits for events that a step would produce."""
        return all(call.ended for call in self.calls)

    @property
    def has_whole_calls(self) -> bool:
        """Return True if a call runs that returns its answers at its end, unlike a stream."""
        return any(not call.ended and not call.call.watched for call in self.calls)

    def end_early(self, why: str) -> None:
        """End all calls with an error that says why."""
        for call in self.calls:
            call.error = call.error or ended_early(call.call.name, why)

    def fail(self, failure: BaseException) -> None:
        """End all calls after a failed step. In the thread that ran the step, the failure itself is raised."""
        for call in self.calls:
            if not call.ended:
                why = f"a step of the batch has failed ({type(failure).__name__}: {failure})"
                call.error = ended_early(call.call.name, why)
                call.error.__cause__ = failure


def take_event(request: Request, event: Event) -> Iterator[GeneratedToken]:
    """Yield the token of an event, and set the request's progress and finish reason as its caller sees them.

    The caller may set `finish_reason`, after which further tokens of the request are dropped.
    """
    if event.in_prompt and event.token:
        yield event.token
    elif not request.finish_reason:
        if event.finish_reason or event.token is None:
            request.finish_reason = event.finish_reason
            if event.token:
                yield event.token
            return
        request.num_new_tokens += 1
        yield event.token
        if request.num_new_tokens == request.max_new_tokens and not request.finish_reason:
            request.finish_reason = "length"
