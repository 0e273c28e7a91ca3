"""Calls that rank 0 makes alone, while the other ranks follow (`Llama.lead`).

Callers see `LeadingScheduler`. It keeps the queue of all requests, gives them to the replicas, and hands what the schedulers of
the replicas report over to the callers after each step. So these schedulers work on copies of the calls, which change only
between steps. `following` has the picture.
"""

import collections
import contextlib
import itertools
import pickle
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from ..distributed import groups
from ..distributed.agreement import decides_alone, run_on_all_ranks
from ..distributed.control import Sender
from ..distributed.failures import error_text
from ..distributed.groups import replica
from ..errors import InputError
from ..sampling import Sampler, sample_top_p
from .backend import Backend
from .events import RunningCall, RunningCalls
from .following import End, Mirror, MirroredScheduler, Report, ScoreBatch, StatesBatch, StepNews, follow, score_with_replicas
from .logits_processors import on_rank0
from .requests import FinishReason, GenerationCall, ScoringRequest, TokenScore
from .scheduler import Scheduler
from .shared_state import CacheOwner

if TYPE_CHECKING:
    from .engine import Engine

T = TypeVar("T")

WAY_OUT = "end `lead`, change the model on all ranks alike, and make the call on all ranks"


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
    """A call of rank 0's program, whose copies run in the schedulers of the replicas."""

    number: int = 0
    packed: bytes = b""  # what the other ranks need of it; empty once they have it
    guard: GuardedSampler | None = None
    needs_rank0: bool = False  # True if code of rank 0's program chooses its tokens, so that only rank 0's replica can run it
    is_mirrored: bool = False  # True once the replicas have it
    n_queued: int = 0  # requests that no replica has started
    n_started: list[int] = field(default_factory=list)  # requests that wait or run in each replica


class LeadingScheduler(RunningCalls):
    """Run the calls of rank 0's program: tell the other ranks before each step what is new, and run it with them."""

    def __init__(self, leader: "Leader", name: str) -> None:
        super().__init__()
        self.leader, self.name = leader, name
        self.mirrored: MirroredScheduler | None = None  # None before the first step
        self.queue: collections.deque[tuple[LedCall, int]] = collections.deque()  # calls and indices of their requests
        self.started: dict[tuple[LedCall, int], None] = {}  # requests in replicas, until the caller's copy has ended

    def submit(self, call: GenerationCall) -> LedCall:
        requests = [replace(each, logits_processor=each.logits_processor and on_rank0) for each in call.requests]
        contents = {field.name: getattr(call, field.name) for field in fields(call) if field.name != "sampler"}
        packed = pickle.dumps(contents | {"requests": requests})
        guard = None if call.sampler is sample_top_p else GuardedSampler(call.sampler)
        n, number = len(call.requests), next(self.leader.numbers)
        needs_rank0 = guard is not None or any(request.logits_processor for request in call.requests)
        led_call = LedCall(
            call, n, number=number, packed=packed, guard=guard, needs_rank0=needs_rank0, n_queued=n,
            n_started=[0] * replica()[1],
        )  # fmt: skip
        self.calls.append(led_call)
        self.queue += ((led_call, index) for index in range(n))
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
        self.leader.sender.send(b"" if news == StepNews() else pickle.dumps(news))
        mirror = self.leader.mirror
        reports = mirror.step(news, lambda number, call: with_parts_of_rank0(calls[number], call))
        self.mirrored = mirror.scheduler
        for call in calls.values():
            call.is_mirrored, call.packed = True, b""
        for which, each in enumerate(reports):
            for report in each:
                self._hand_over(calls[report.number], which, report)

    def _take_news(self) -> tuple[StepNews, dict[int, LedCall]]:
        """Return the news since the last step, and the calls that have not ended, by number."""
        calls: list[LedCall] = [call for call in self.calls if isinstance(call, LedCall)]
        ended = {call for call in calls if call.ended}  # looked up once: a caller may end a call at any time
        running = {call.number: call for call in calls if call not in ended}
        self.calls = [*running.values()]
        if ended:
            self.queue = collections.deque(each for each in self.queue if each[0] not in ended)
            self.started = {each: None for each in self.started if each[0] not in ended}
        news = StepNews(
            self.name if self.mirrored is None else None,
            tuple((call.number, call.packed) for call in running.values() if not call.is_mirrored),
            tuple(self._start_requests([*running.values()])),
            tuple(call.number for call in calls if call in ended and call.is_mirrored),
            tuple(self._finished()),
        )
        return news, running

    def _start_requests(self, running: list[LedCall]) -> Iterator[tuple[int, int, list[int]]]:
        """Give requests of the queue to replicas. Yield, for each replica and call, the indices of those that it is to start.

        Each request goes to the replica that has the fewest. A replica gets at most two requests for each of its rows, so that
        its scheduler knows which come next. The others stay in the queue, for the replica that is free first.
        """
        n_started = [sum(counts) for counts in zip(*(call.n_started for call in running), strict=True)]
        new: dict[tuple[int, int], list[int]] = {}
        limit, held = 2 * self.leader.max_batch_size, list[tuple[LedCall, int]]()
        while self.queue and min(n_started) < limit:
            call, index = self.queue.popleft()
            which = 0 if call.needs_rank0 else n_started.index(min(n_started))
            if n_started[which] >= limit:
                held.append((call, index))  # until the replica of rank 0 is free; the others go on
                continue
            self.started[call, index] = None
            n_started[which] += 1
            call.n_started[which] += 1
            call.n_queued -= 1
            new.setdefault((which, call.number), []).append(index)
        self.queue.extendleft(reversed(held))
        return ((*key, indices) for key, indices in new.items())

    def _finished(self) -> Iterator[tuple[int, int, FinishReason]]:
        """Yield the started requests whose answers have ended for their callers since the last step, as by a stop string."""
        for call, index in [*self.started]:
            if reason := call.call.requests[index].finish_reason:
                del self.started[call, index]
                yield call.number, index, reason

    def _hand_over(self, call: LedCall, which: int, report: Report) -> None:
        """Hand over to a call what it has got in a step of a replica."""
        if call.guard and call.guard.failure:
            call.error = call.guard.failure
            return
        for index, counts in report.counts.items():
            call.call.requests[index].counts = counts
        call.events += report.events  # before the end: callers look for the end first
        call.error = call.error or report.error
        if which and self.mirrored:  # the scheduler of rank 0 counts its own
            for _ in range(call.n_started[which] - report.n_unfinished):
                next(self.mirrored.bar, None)
        call.n_started[which] = report.n_unfinished
        call.n_unfinished = call.n_queued + sum(call.n_started)


def with_parts_of_rank0(led_call: LedCall, copy: GenerationCall) -> GenerationCall:
    """Return the copy of a call with what only rank 0 has: the sampler and the logits processors of its program."""
    for request, original in zip(copy.requests, led_call.call.requests, strict=True):
        request.logits_processor = original.logits_processor
    return replace(copy, sampler=led_call.guard or sample_top_p)


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

    def score(self, requests: list[ScoringRequest], n_top: int) -> list[list[TokenScore]]:
        """Score sequences side by side, on all ranks."""
        self._announce(ScoreBatch(requests, n_top))
        return score_with_replicas(self.engine, requests, n_top)

    def announce_states(self, sequences: list[list[int]]) -> None:
        """Tell the other ranks of this replica to compute hidden states, as this rank does next."""
        self._announce(StatesBatch(sequences))

    def _announce(self, message: ScoreBatch | StatesBatch) -> None:
        if self.ended:
            raise InputError("`lead` has ended; make this call on all ranks")
        self.engine.shared.turn.refuse_within_step()  # the other ranks are in that step
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
        follow(engine)
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
