"""The engine: generate tokens for requests. It works on tokens, not on text."""

import contextlib
import sys
import weakref
from collections.abc import Iterator
from typing import Any

import torch

from ..distributed.failures import defer_signals, propagate_failure
from ..distributed.groups import calls_are_exclusive, global_rank, world_size
from ..distributed.threads import pool_released_if_long, release_pool
from ..errors import DeviceError, InputError
from ..kernels.host_memory import raise_malloc_threshold
from ..model import Transformer
from .backend import Backend
from .checks import device_of
from .draft import NO_DRAFT, NO_EAGER
from .events import Event, RunningCall, RunningCalls, take_event
from .forward import EngineForward
from .kv_cache import KVCache
from .leading import check_led
from .reference_loop import ReferenceLoop
from .requests import GeneratedToken, GenerationCall
from .scheduler import Scheduler
from .shared_state import shared_state_of
from .step_thread import start_thread
from .step_turn import Steps
from .unmodified import observe_edits, why_modified


class Engine:
    """Run calls on a model with a backend. Calls of several threads share a batch, and one thread at a time runs the model."""

    def __init__(self, model: Transformer, backend: Backend) -> None:
        self.model, self.backend = model, backend
        self.n_words: int | None = None  # number of tokens that may be generated, the first in the vocabulary; None for all
        self.announced: tuple[str, bool] | None = (
            None  # the last printed reason why generation is slower, and does not speculate
        )
        self.speculate = ""  # what guesses tokens in calls that do not say it: "prompt", "draft", or "" for nothing
        self.shared = shared_state_of(model)
        self.lock = self.shared.lock
        if why_modified(model) is None:
            with self.lock:
                self.forward()  # allocate the KV cache now, so that the first call is not slower than others
        raise_malloc_threshold()

    def __reduce__(self) -> tuple[Any, ...]:
        """Copy or pickle the engine without its lock, which cannot be copied or pickled."""
        return _restore_engine, (self.model, self.backend, self.speculate, self.shared.draft)

    def check_sizes(self) -> None:
        """Raise InputError if a caller has set max_batch_size or max_seq_len of `model.params` larger than the KV cache."""
        for layer in getattr(self.model, "layers", ()):
            cache_k = getattr(getattr(layer, "attention", None), "cache_k", None)
            if cache_k is None or cache_k.ndim != 4:
                return
            for name, size in zip(("max_batch_size", "max_seq_len"), cache_k.shape, strict=False):
                if (asked := getattr(self.model.params, name)) > size:
                    raise InputError(
                        f"params.{name} is {asked}, but the model was built with a cache for {size}: build it anew"
                    )
            return

    def why_reference_loop(self) -> str | None:
        """Return the reason, as a text, why calls must run the model's own `forward`; None if they can run `EngineForward`."""
        if self.backend.name == "eager":
            return "the backend is eager"
        return why_modified(self.model)

    def announce(self, why: str, speculates: bool = False) -> None:
        """Print on stderr why generation is slower, unless the same reason was printed last or the backend is eager."""
        if self.backend.name != "eager" and (why, speculates) != self.announced and global_rank() == 0:
            slower = "slower and does not speculate" if speculates else "slower"
            print(f"llama: {why}: generating through the model's own forward, which is {slower}", file=sys.stderr)
        self.announced = why, speculates

    def what_guesses(self, speculate: str | None) -> str:
        """Return what guesses tokens in a call: "prompt", "draft", or "" for nothing. Raise InputError if that is impossible.

        speculate: what the call asks for; None for the default.
        """
        speculate = self.speculate if speculate is None else speculate
        if not speculate:
            return ""
        if self.backend.name == "eager":
            raise InputError(NO_EAGER)
        if speculate == "draft":
            if self.shared.draft is None:
                raise InputError(NO_DRAFT)
            if why := self.shared.draft.engine.why_reference_loop():
                raise InputError(f"the draft cannot guess: {why}; undo that, or give speculate=False")
        return speculate

    def forward(self) -> EngineForward:
        """Return an `EngineForward` with the current weights of the model. Allocate a KV cache if none fits the model."""
        if self.shared.cache is None or not self.shared.cache.belongs_to(self.model):
            self.shared.cache = KVCache.adopt(self.model)
        return EngineForward(self.model, self.shared.cache, self.n_words)

    def clear_prefix_cache(self) -> None:
        """Do what `Llama.clear_prefix_cache` does."""
        with self.lock:
            if (cache := self.shared.cache) is not None:
                cache.weights_version = None  # when no call runs, the next one clears the prefixes of all ranks
                if world_size() == 1:
                    cache.prefixes.clear()

    def without_autocast(self) -> torch.autocast:
        """Return a context that disables a caller's autocast, so that the model computes in its own dtype."""
        return torch.autocast(device_of(self.model).type, enabled=False)

    @torch.inference_mode()
    def run(self, call: GenerationCall) -> Iterator[GeneratedToken]:
        """Yield the new tokens of all requests as they are generated, without EOS. With `call.echo`, prompt tokens come first.

        Either all requests have a seed or none has.
        """
        yield from self.begin(call)
        if not self.needs_model(call):
            return
        self.check_sizes()
        check_led(self)
        if why := self.why_reference_loop():
            with self.whole_calls_ended(), propagate_failure():
                self.announce(why, speculates=bool(call.speculate))
                loop = ReferenceLoop(self.model, self.shared, call, self.n_words)
            while not loop.finished:
                with self.computing():
                    prompt_tokens = loop.step()
                yield from prompt_tokens
                yield from loop.emit_tokens()
            return
        running_call = None
        with pool_released_if_long():
            try:
                scheduler, running_call = self.submit(call)
                while events := self.wait_for_events(scheduler, running_call):
                    for event in events:
                        yield from take_event(call.requests[event.prompt_index], event)
            finally:
                if running_call:
                    running_call.cancelled = True
                self.shared.turn.wake()  # this thread may have been the one that would have run the next step

    def begin(self, call: GenerationCall) -> Iterator[GeneratedToken]:
        """End the answers that may have no tokens. Yield the tokens of the prompts if the call echoes them without scores."""
        for request in call.requests:
            if request.max_new_tokens == 0 and not request.finish_reason:
                request.finish_reason = "length"
        if call.echo and not call.logprobs:
            for index, request in enumerate(call.requests):
                yield from (GeneratedToken(index, token, None) for token in request.prompt)

    def needs_model(self, call: GenerationCall) -> bool:
        """Return True if anything of a call remains to be computed."""
        return bool(call.requests) and (call.scores_prompts or not all(r.finish_reason for r in call.requests))

    def exclusive(self) -> contextlib.AbstractContextManager[Any]:
        """Return a context that keeps other threads' calls out, if calls cannot share a batch; else one without effect.

        They cannot on several ranks, which must run their calls in the same order unless rank 0 leads, nor if the model's own
        `forward` runs.
        """
        if calls_are_exclusive():
            return self.lock
        return self.whole_calls_ended() if self.why_reference_loop() else contextlib.nullcontext()

    @contextlib.contextmanager
    def whole_calls_ended(self) -> Iterator[None]:
        """Hold the lock of the model while no call in the scheduler is a whole one, which returns its answers at its end.

        What follows takes the KV cache. A stream, whose caller reads on, is told so; a whole call must not fail.
        """
        while True:
            scheduler = self.shared.scheduler()
            if scheduler is not None and not calls_are_exclusive() and scheduler.has_whole_calls:
                self.step_or_wait(scheduler)
                continue
            with self.lock:
                scheduler = self.shared.scheduler()  # a call may have come meanwhile
                if scheduler is None or calls_are_exclusive() or not scheduler.has_whole_calls:
                    yield
                    return

    @contextlib.contextmanager
    def computing(self, is_shared: bool = False) -> Iterator[None]:
        """Guard a computation with the model, which only one thread at a time runs.

        is_shared: True if it is a step for several calls, in which Ctrl-C would end the calls of others.
        """
        with self.lock, propagate_failure(), defer_signals(is_shared), self.without_autocast():
            yield

    def submit(self, call: GenerationCall) -> tuple[RunningCalls, RunningCall]:
        """Add a call to the running scheduler, or to a new one if none runs. Return the scheduler and the running call.

        If the running scheduler does not suit the call, run its calls to their end first.
        """
        while True:
            scheduler, running_call = self.try_submit(call)
            if running_call:
                return scheduler, running_call
            self.step_or_wait(scheduler)

    def try_submit(self, call: GenerationCall) -> tuple[RunningCalls, RunningCall | None]:
        """Add a call to the running scheduler, or to a new one if none runs.

        Return the scheduler, and None if it does not suit the call, because another `Llama` uses the same model differently.
        On several ranks, unless rank 0 leads, a call gets a scheduler of its own, and calls that still run end with an error.
        """
        self.shared.turn.refuse_within_step()
        with self.lock, propagate_failure():
            scheduler: RunningCalls | None = self.shared.scheduler()
            if scheduler is None or scheduler.idle or calls_are_exclusive() or scheduler.why_broken():
                if leader := self.shared.leader:
                    scheduler = leader.new_scheduler(call.name)
                else:
                    scheduler = Scheduler(self.model, self.forward(), self.backend, self.shared, call.name)
                self.shared.scheduler = weakref.ref(scheduler)  # a strong reference would keep the model alive
            suits = scheduler.suits(self.backend, self.n_words)
            return scheduler, scheduler.submit(call) if suits else None

    def wait_for_events(self, scheduler: RunningCalls, running_call: RunningCall) -> list[Event]:
        """Return the events of a call since the last time; an empty list after its end. Raise its error.

        If there are none, run steps of the scheduler, unless another thread does. Nobody holds a lock while events are read.
        """
        while True:
            ended = running_call.ended  # looked up first: a step adds the last events before it ends the call
            if events := running_call.take_events():
                return events
            if running_call.error:
                raise running_call.error
            if ended or running_call.ended_by_caller:
                return []
            self.step_or_wait(scheduler, running_call)

    def step_or_wait(self, scheduler: RunningCalls, running_call: RunningCall | None = None) -> None:
        """Run a step of the scheduler; if another thread runs one, or the background thread runs all, wait for its end instead.

        running_call: return at once if this call has events or has ended; wait until it has.
        """
        turn = self.shared.turn
        turn.refuse_within_step()
        if calls_are_exclusive():  # a call has its own scheduler, and a thread in a whole call holds the lock already
            with self.computing():
                scheduler.step()
            return
        try:
            if turn.claim(Steps(self, scheduler, running_call), lambda: start_thread(turn)):
                self.step(scheduler)
                if turn.has_thread:
                    release_pool()  # which would slow down that of the thread
        finally:
            turn.release()

    def step(self, scheduler: RunningCalls) -> None:
        """Run a step of the scheduler, in the thread that has the turn. If it fails, end all calls, and raise the failure."""
        try:
            with self.computing(is_shared=len(scheduler.calls) > 1):
                scheduler.step()
        except BaseException as e:
            scheduler.fail(e)
            raise


def _restore_engine(model: Transformer, backend: Backend, speculate: str, draft: Any) -> Engine:
    """Return the engine of a copied or unpickled model. Raise DeviceError if this machine lacks what its backend needs."""
    if why := backend.unsupported(device_of(model)):
        raise DeviceError(f"backend={backend.name!r}: {why}")
    observe_edits(model, backend.name)
    engine = Engine(model, backend)
    engine.speculate, engine.shared.draft = speculate, draft
    if draft is not None:
        draft.engine.shared.targets.add(model)
    return engine
