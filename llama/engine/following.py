"""What the ranks that follow rank 0 do (`Llama.lead`), and what rank 0 tells them.

Every rank of a replica has the same scheduler with the same requests, and so runs the same steps. Rank 0 keeps the queue of all
requests, and gives a replica requests as its rows become free. Before each step, which all replicas run at the same time, it
sends what has changed since the last one: new calls, requests that a replica is to start, calls that have ended, and answers
that a stop string has ended. After the step, it gets what each call has got in it. On rank 0, `leading` hands this over to the
callers.

    rank 0   calls of any thread -> LeadingScheduler --+--> MirroredScheduler -> Report --+-> events -> callers
                                                       | StepNews, before each step       |
    rank 1   of the same replica            follow  <--+--> MirroredScheduler             |
    rank 2   the first of another replica   follow  <--+--> MirroredScheduler -> Report --+
"""

import pickle
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch

from ..distributed.control import gather_on_rank0, receive, signals_ignored
from ..distributed.failures import error_text, propagate_failure
from ..distributed.groups import replica
from ..errors import InputError, LlamaError, NonFiniteError
from .events import Event, RunningCall
from .prefill import score_sequences, states_of_layers
from .requests import FinishReason, GenerationCall, ScoringRequest, TokenScore
from .scheduler import Scheduler

if TYPE_CHECKING:
    from .engine import Engine


class StepNews(NamedTuple):
    """What rank 0 sends before a step, unless all of it is empty. Calls have numbers."""

    begins: str | None = None  # None, or the name of the call that begins a new scheduler
    calls: tuple[tuple[int, bytes], ...] = ()  # new calls: their numbers, and their contents without the sampler
    started: tuple[tuple[int, int, list[int]], ...] = ()  # requests to run: replica, call, and indices in the call
    ended: tuple[int, ...] = ()  # calls that have ended
    finished: tuple[tuple[int, int, FinishReason], ...] = ()  # answers that callers have ended: call, index, reason


class ScoreBatch(NamedTuple):
    """What rank 0 sends before it scores sequences side by side. See `scoring.score`."""

    requests: list[ScoringRequest]
    n_top: int


class StatesBatch(NamedTuple):
    """What rank 0 sends before its replica computes hidden states of sequences side by side."""

    sequences: list[list[int]]


class End(NamedTuple):
    """What rank 0 sends at its end. error: its failure; None after success, and if its program exits."""

    error: str | None
    exits: bool = False


class Report(NamedTuple):
    """What a call has got in a step of a replica."""

    number: int
    n_unfinished: int  # requests of the call that wait or run in this replica
    events: list[Event]
    counts: dict[int, tuple[int, int, int]]  # by index in the call, of requests with events: see `Request.counts`
    error: BaseException | None


class MirroredScheduler(Scheduler):
    """A scheduler that every rank of a replica has, and that does the same on every rank."""

    def why_broken(self) -> str | None:
        return None  # rank 0 decides, before it sends anything

    def fail_row(self, row: int, error: BaseException) -> None:
        """End a call whose logits are not finite, or whose logits processor has failed. Both are so on all ranks.

        Raise any other error, which may be of this rank alone.
        """
        if not isinstance(error, (NonFiniteError, InputError)):
            raise error
        super().fail_row(row, error)


class Mirror:
    """The scheduler of a rank, and the calls of rank 0 by their numbers."""

    def __init__(self, engine: "Engine") -> None:
        self.engine = engine
        self.scheduler: MirroredScheduler | None = None
        self.calls: dict[int, RunningCall] = {}

    def step(
        self, news: StepNews, complete: Callable[[int, GenerationCall], GenerationCall] = lambda number, call: call
    ) -> list[list[Report]]:
        """Apply the news and run a step, as all ranks do. Return the reports of each replica on rank 0, and [] on others.

        complete: adds to a new call, given its number, what only rank 0 has.
        """
        engine = self.engine
        if news.begins is not None or self.scheduler is None:
            self.calls = {}
            self.scheduler = MirroredScheduler(
                engine.model, engine.forward(), engine.backend, engine.shared, news.begins or "call"
            )
        for number in news.ended:
            self.calls.pop(number).cancelled = True
        for number, packed in news.calls:
            call = complete(number, GenerationCall(**pickle.loads(packed)))
            self.calls[number] = self.scheduler.begin(call)
        for which, number, indices in news.started:
            if which == replica()[0]:
                self.scheduler.enqueue(self.calls[number], indices)
        for number, index, reason in news.finished:
            self.calls[number].call.requests[index].finish_reason = reason
        try:
            self.scheduler.step()
        except (InputError, NonFiniteError) as e:  # which `propagate_failure` takes for errors of all ranks, unlike this one
            raise RuntimeError(error_text(e)) from e
        return gather_on_rank0([self._report(number, call) for number, call in self.calls.items()])

    def _report(self, number: int, running_call: RunningCall) -> Report:
        events, requests = running_call.take_events(), running_call.call.requests
        counts = {index: requests[index].counts for index in {event.prompt_index for event in events}}
        return Report(number, running_call.n_unfinished, events, counts, running_call.error)


def score_with_replicas(engine: "Engine", requests: Sequence[ScoringRequest], n_top: int) -> list[list[TokenScore]]:
    """Score the share of this replica of some sequences. Return the scores of all sequences on rank 0, and [] on others."""
    index, count = replica()
    first, end = (len(requests) * i // count for i in (index, index + 1))
    scores = score_sequences(engine.forward(), [*requests[first:end]], n_top) if first < end else []
    return [each for scores in gather_on_rank0(scores) for each in scores]


def follow(engine: "Engine") -> None:
    """Do what rank 0 says, until its end. Raise LlamaError with the cause if rank 0, or another rank, fails."""
    mirror = Mirror(engine)
    with signals_ignored(), torch.inference_mode(), propagate_failure():
        while not isinstance(message := _receive(), End):
            with engine.computing():
                if isinstance(message, ScoreBatch):
                    score_with_replicas(engine, *message)
                elif not isinstance(message, StatesBatch):
                    mirror.step(message)
                elif replica()[0] == 0:
                    states_of_layers(engine.forward(), message.sequences, [])
    if message.exits:
        raise SystemExit(0)
    if message.error:
        raise LlamaError(f"rank 0 failed, so every rank stops: {message.error}")


def _receive() -> StepNews | ScoreBatch | StatesBatch | End:
    message = receive()
    return pickle.loads(message) if message else StepNews()
