"""Calls that rank 0 makes alone, while the other ranks follow (`Llama.lead`).

Every rank has the same scheduler with the same calls, and so runs the same steps. Before each step, rank 0 sends what its
callers have changed since the last one: new calls, calls that have ended, and answers that a stop string has ended. The
scheduler of rank 0 therefore works on copies, which change only then, and hands its events to the callers after each step.

    rank 0   calls of any thread -> LeadingScheduler --+--> MirroredScheduler -> events -> callers
                                                       | StepNews, before each step
    rank 1                                follow  <----+--> MirroredScheduler, whose events nobody reads
"""

import contextlib
import itertools
import pickle
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch

from ..distributed import groups
from ..distributed.agreement import decides_alone, run_on_all_ranks
from ..distributed.control import Sender, check_one_replica, receive, signals_ignored
from ..distributed.failures import error_text, propagate_failure
from ..errors import InputError, LlamaError, NonFiniteError
from ..sampling import Sampler, sample_top_p
from .backend import Backend
from .events import RunningCall, RunningCalls
from .logits_processors import on_rank0
from .prefill import score_sequences, states_of_layers
from .requests import FinishReason, GenerationCall, ScoringRequest
from .scheduler import Scheduler
from .shared_state import CacheOwner

if TYPE_CHECKING:
    from .engine import Engine

T = TypeVar("T")

WAY_OUT = "end `lead`, change the model on all ranks alike, and make the call on all ranks"


class StepNews(NamedTuple):
    """What rank 0 sends before a step, unless all of it is empty."""

    begins: str | None = None  # None, or the name of the call that begins a new scheduler
    calls: tuple[tuple[int, bytes], ...] = ()  # new calls: their numbers, and their contents without the sampler
    ended: tuple[int, ...] = ()  # numbers of calls that have ended
    finished: tuple[tuple[int, int, FinishReason], ...] = ()  # answers that callers have ended: call, index, reason


class ScoreBatch(NamedTuple):
    """What rank 0 sends before it scores sequences side by side. See `scoring.score`."""

    requests: list[ScoringRequest]
    n_top: int


class StatesBatch(NamedTuple):
    """What rank 0 sends before it computes hidden states of sequences side by side."""

    sequences: list[list[int]]


class End(NamedTuple):
    """What rank 0 sends at its end. error: its failure; None after success, and if its program exits."""

    error: str | None
    exits: bool = False


class MirroredScheduler(Scheduler):
    """A scheduler that every rank has, and that does the same on every rank."""

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
    """The scheduler of a rank, and its calls by their numbers."""

    def __init__(self, engine: "Engine") -> None:
        self.engine = engine
        self.scheduler: MirroredScheduler | None = None
        self.calls: dict[int, RunningCall] = {}

    def step(self, news: StepNews, led: Mapping[int, "LedCall"]) -> MirroredScheduler:
        """Apply the news and run a step, as all ranks do. Return the scheduler. led: on rank 0, its calls by their numbers."""
        engine = self.engine
        if news.begins is not None or self.scheduler is None:
            self.calls = {}
            self.scheduler = MirroredScheduler(
                engine.model, engine.forward(), engine.backend, engine.shared, news.begins or "call"
            )
        for number in news.ended:
            self.calls.pop(number).cancelled = True
        for number, packed in news.calls:
            sampler = led[number].guard if number in led else None
            call = GenerationCall(**pickle.loads(packed), sampler=sampler or sample_top_p)
            for request, original in zip(call.requests, led[number].call.requests if number in led else (), strict=False):
                request.logits_processor = original.logits_processor
            self.calls[number] = self.scheduler.submit(call)
        for number, index, reason in news.finished:
            self.calls[number].call.requests[index].finish_reason = reason
        self.scheduler.step()
        return self.scheduler


class GuardedSampler:
    """A sampler that rank 0's program has put in the place of `sample_top_p`.

    If it fails, its call ends after the step. It returns the likeliest tokens until then, so that all ranks run the same steps.
    """

    def __init__(self, sampler: Sampler) -> None:
        self.sampler, self.failure = sampler, None  # type: tuple[Sampler, Exception | None]

    def __call__(self, probs: torch.Tensor, top_p: float) -> torch.Tensor:
        if self.failure is None:
            try:
                tokens = self.sampler(probs, top_p).reshape(len(probs)).long()
                if bool(((tokens >= 0) & (tokens < probs.shape[1])).all()):
                    return tokens
                raise InputError(f"sample_top_p has returned tokens that are not from 0 to {probs.shape[1] - 1}")
            except Exception as e:
                self.failure = e
        return probs.argmax(dim=-1)


@dataclass(eq=False)
class LedCall(RunningCall):
    """A call of rank 0's program. `mirrored` is its copy in the scheduler, None before its first step."""

    number: int = 0
    packed: bytes = b""
    guard: GuardedSampler | None = None
    mirrored: RunningCall | None = None


class LeadingScheduler(RunningCalls):
    """Run the calls of rank 0's program: tell the other ranks before each step what is new, and run it with them."""

    def __init__(self, leader: "Leader", name: str) -> None:
        super().__init__()
        self.leader, self.name = leader, name
        self.mirrored: MirroredScheduler | None = None  # None before the first step

    def submit(self, call: GenerationCall) -> LedCall:
        requests = [replace(each, logits_processor=each.logits_processor and on_rank0) for each in call.requests]
        contents = {field.name: getattr(call, field.name) for field in fields(call) if field.name != "sampler"}
        packed = pickle.dumps(contents | {"requests": requests})
        guard = None if call.sampler is sample_top_p else GuardedSampler(call.sampler)
        led_call = LedCall(call, len(call.requests), number=next(self.leader.numbers), packed=packed, guard=guard)
        self.calls.append(led_call)
        return led_call

    def suits(self, backend: Backend, n_words: int | None) -> bool:
        return True  # `check_led` has refused calls of another backend or tokenizer

    def why_broken(self) -> str | None:
        if self.leader.ended:
            return "`lead`, in which it ran, has ended"
        if self.mirrored is None:
            return self.leader.why_not(self.leader.engine)
        # Asked here, and not by MirroredScheduler: the other ranks do not see what changes on rank 0.
        return Scheduler.why_broken(self.mirrored) or self.leader.why_other_sizes()

    def step(self) -> None:
        if why := self.why_broken():
            self.end_early(why)
        if self.idle:
            return
        news, calls = self._take_news()
        new = {call.number: call for call in calls if call.mirrored is None}
        self.leader.sender.send(b"" if news == StepNews() else pickle.dumps(news))
        self.mirrored = self.leader.mirror.step(news, new)
        for call in calls:
            self._hand_over(call)

    def _take_news(self) -> tuple[StepNews, list[LedCall]]:
        """Return the news since the last step, and the calls that have not ended."""
        calls: list[LedCall] = [call for call in self.calls if isinstance(call, LedCall)]
        ended = {call for call in calls if call.ended}  # looked up once: a caller may end a call at any time
        running = [call for call in calls if call not in ended]
        self.calls = [*running]
        news = StepNews(
            self.name if self.mirrored is None else None,
            tuple((call.number, call.packed) for call in running if call.mirrored is None),
            tuple(call.number for call in calls if call in ended and call.mirrored),
            tuple(self._finished({call.mirrored: call for call in running if call.mirrored})),
        )
        return news, running

    def _finished(self, by_mirrored: Mapping[RunningCall, LedCall]) -> list[tuple[int, int, FinishReason]]:
        """Return the answers that callers have ended since the last step, of those that run or may run in this step."""
        if self.mirrored is None:
            return []
        unfinished = [(each.running_call, each.index) for each in self.mirrored.running.values()]
        unfinished += itertools.islice(self.mirrored.waiting, self.leader.max_batch_size)
        finished = []
        for mirrored, index in unfinished:
            call = by_mirrored.get(mirrored)
            reason = call.call.requests[index].finish_reason if call else None
            if call and reason and not mirrored.call.requests[index].finish_reason:
                finished.append((call.number, index, reason))
        return finished

    def _hand_over(self, call: LedCall) -> None:
        """Hand over to a call what its copy in the scheduler has got in a step."""
        call.packed = b""
        mirrored = call.mirrored = self.leader.mirror.calls[call.number]
        events = mirrored.take_events()
        if call.guard and call.guard.failure:
            call.error = call.guard.failure
            return
        for index in {event.prompt_index for event in events}:
            call.call.requests[index].take_counts(mirrored.call.requests[index])
        call.events += events  # before the end: callers look for the end first
        call.error = call.error or mirrored.error
        call.n_unfinished = mirrored.n_unfinished


class Leader:
    """What leads on rank 0: it sends the messages that the other ranks follow."""

    def __init__(self, engine: "Engine") -> None:
        self.engine, self.mirror, self.sender = engine, Mirror(engine), Sender(engine.lock)
        self.numbers = itertools.count()
        self.ended = False
        self.n_words, self.max_batch_size = engine.n_words, engine.model.params.max_batch_size
        forward = engine.forward()
        self.cache, self.weights_version = forward.cache, forward.weights_version()

    def new_scheduler(self, name: str) -> LeadingScheduler:
        return LeadingScheduler(self, name)

    def announce_scores(self, requests: list[ScoringRequest], n_top: int) -> None:
        """Tell the other ranks to score sequences, as this rank does next."""
        self._announce(ScoreBatch(requests, n_top))

    def announce_states(self, sequences: list[list[int]]) -> None:
        """Tell the other ranks to compute hidden states, as this rank does next."""
        self._announce(StatesBatch(sequences))

    def _announce(self, message: ScoreBatch | StatesBatch) -> None:
        if self.ended:
            raise InputError("`lead` has ended; make this call on all ranks")
        self.sender.send(pickle.dumps(message))

    def why_not(self, engine: "Engine") -> str | None:
        """Return the reason why the other ranks cannot follow a call; None if they can. They have the model as it was."""
        if why := engine.why_reference_loop():
            return why
        if engine.shared.cache is not self.cache or not self.cache.belongs_to(engine.model):
            return "the KV cache has been replaced on rank 0 since `lead` began"
        if engine.forward().weights_version() != self.weights_version:
            return "the weights have been changed on rank 0 since `lead` began"
        if engine.backend.name != self.engine.backend.name or engine.n_words != self.n_words:
            return "it is for another backend, or a tokenizer of another size"
        return self.why_other_sizes()

    def why_other_sizes(self) -> str | None:
        changed = self.engine.model.params.max_batch_size != self.max_batch_size
        return "params.max_batch_size has been changed on rank 0 since `lead` began" if changed else None

    def end(self, failure: BaseException | None) -> None:
        """End the calls that still run, and let the other ranks go on. Raise LlamaError if another rank has failed meanwhile.

        failure: that of rank 0's program, which is raised anyway, and on the other ranks with its cause.
        """
        self.ended = True
        exits = failure is not None and not isinstance(failure, Exception)  # Ctrl-C or sys.exit
        message = End(None if exits else error_text(failure), exits)
        with contextlib.suppress(BaseException) if failure else contextlib.nullcontext():
            self.sender.end(pickle.dumps(message))


def check_led(engine: "Engine") -> None:
    """Raise InputError if rank 0 leads, but the other ranks cannot follow a call of this engine."""
    if not groups.rank0_leads:
        return
    decides_alone()  # raises InputError on a rank that follows
    leader: Leader | None = engine.shared.leader
    why = leader.why_not(engine) if leader else "they follow the calls of another model"
    if why:
        raise InputError(f"the other ranks cannot follow this call: {why}; {WAY_OUT}")


def lead(engine: "Engine", work: Callable[[], T]) -> T | None:
    """Do what `Llama.lead` does."""
    if groups.reachable_world_size() == 1:
        return work()

    def check() -> tuple[Any, ...]:
        if groups.rank0_leads:
            raise InputError("`lead` is running already; make calls in it, from any thread of rank 0")
        check_one_replica()
        if why := engine.why_reference_loop():
            raise InputError(f"`lead` is for a model that several calls can share, but {why}: make calls on all ranks instead")
        return engine.n_words, engine.backend.name, engine.model.params

    run_on_all_ranks(check, must_match=lambda checked: checked)
    with engine.lock:
        engine.shared.owner = CacheOwner("lead")  # open streams, which run on all ranks, cannot continue
    groups.rank0_leads = True
    try:
        if groups.global_rank() == 0:
            return _lead(engine, work)
        _follow(engine)
        return None
    finally:
        groups.rank0_leads, engine.shared.leader = False, None


def _lead(engine: "Engine", work: Callable[[], T]) -> T:
    leader = engine.shared.leader = Leader(engine)
    failure: BaseException | None = None
    try:
        return work()
    except BaseException as e:
        failure = e
        raise
    finally:
        leader.end(failure)


def _follow(engine: "Engine") -> None:
    """Do what rank 0 says, until its end. Raise LlamaError with the cause if rank 0, or another rank, fails."""
    mirror = Mirror(engine)
    with signals_ignored(), torch.inference_mode(), propagate_failure():
        while not isinstance(message := _receive(), End):
            with engine.computing():
                if isinstance(message, ScoreBatch):
                    score_sequences(engine.forward(), *message)
                    continue
                if isinstance(message, StatesBatch):
                    states_of_layers(engine.forward(), message.sequences, [])
                    continue
                mirror.step(message, {})
                for call in mirror.calls.values():
                    call.events.clear()
    if message.exits:
        raise SystemExit(0)
    if message.error:
        raise LlamaError(f"rank 0 failed, so every rank stops: {message.error}")


def _receive() -> StepNews | ScoreBatch | StatesBatch | End:
    message = receive()
    return pickle.loads(message) if message else StepNews()
