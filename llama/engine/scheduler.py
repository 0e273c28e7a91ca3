"""Continuous batching: run the requests of all calls together through the engine's forward.

Each request waits for a free row of the KV cache, is prefilled once, and then decodes together with the other rows. When a
request ends, the next waiting request gets its row, and is prefilled before the next decode step. Requests of a call that
begins while others run join the batch. Free rows between others are decoded too, and their results ignored.

    row 0   a a a a A A A A A | c c C C C      lower case: prompt tokens; requests that start together share a prefill
    row 1   b b B B B B B B B   B B B B B      upper case: new tokens, one per decode step; c begins when a has ended
"""

import collections
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from .. import compat
from ..distributed.agreement import broadcast_from_rank0
from ..distributed.progress import progress
from ..errors import LlamaError
from ..model import Transformer
from ..sampling import token_logprobs
from . import async_copy
from .backend import Backend
from .checks import check_logprobs, common_prefix_length, nonfinite_logits_error
from .decode_state import DecodeState, SamplingOptions
from .forward import EngineForward
from .prefill import prefill
from .requests import FinishReason, GeneratedToken, GenerationCall, Request
from .shared_state import CacheOwner, SharedState, ended_early


class Event(NamedTuple):
    """What the scheduler reports about a request: a token of the prompt, a new token, or the end of the answer."""

    token: GeneratedToken | None
    prompt_index: int  # the index of the request in its call
    in_prompt: bool = False
    finish_reason: FinishReason | None = None  # set at the end of an answer by EOS


@dataclass(eq=False)
class RunningCall:
    """A call in the scheduler, and the events that its caller has not taken yet."""

    call: GenerationCall
    n_unfinished: int  # number of requests that wait or run
    options: SamplingOptions
    events: list[Event] = field(default_factory=list)
    error: BaseException | None = None
    cancelled: bool = False  # True if the caller takes no more events
    first_open: int = 0  # the index of the first request whose caller has not seen its end

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


class Scheduler:
    """Run calls: admit waiting requests to free rows, decode all rows together, and free the rows of ended requests.

    A scheduler exists while calls run. The next call after that creates a new one.
    """

    def __init__(self, model: Transformer, forward: EngineForward, backend: Backend, shared: SharedState, name: str) -> None:
        self.model, self.forward, self.backend, self.shared = model, forward, backend, shared
        self.cache = forward.cache
        self.weights_version = forward.weights_version()
        self.hooks = [hooks for module in model.modules() for hooks in compat.forward_hooks(module)]
        shared.owner = self.owner = CacheOwner(name)
        self.sync_streams()
        overrun_logits, self.cache.logits = self.cache.logits, None
        if overrun_logits is not None and not broadcast_from_rank0(overrun_logits.amax(-1).sum()).isfinite():
            self.cache.data.zero_()  # a step that the previous call launched ahead may have written NaN into the cache
            self.cache.prefix_tokens = None
        self.kept_tokens: list[int] = []  # tokens whose keys and values earlier calls have left in row 0
        if self.cache.is_unchanged() and self.cache.weights_version == self.weights_version:
            self.kept_tokens = self.cache.prefix_tokens or []
        self.cache.weights_version = self.weights_version
        # Create a new list, since this list object identifies the scheduler that owns the cache.
        self.prefix_tokens: list[int] = []
        self.cache.prefix_tokens = self.prefix_tokens
        self.cache.record_version()
        self.calls: list[RunningCall] = []
        self.waiting: collections.deque[tuple[RunningCall, int]] = collections.deque()  # calls and indices of their requests
        self.running: dict[int, RunningRequest] = {}  # maps a row to the request in it
        self.n_rows = 0  # rows that a decode step computes
        self.state = DecodeState(0, forward.n_words, forward.device)
        self.tokens: list[int] = []  # the token that was sampled last for each row
        # None, or the arguments of the next decode step: tokens, positions, and positions on the host.
        self.pending_step: tuple[torch.Tensor, torch.Tensor, list[int]] | None = None
        self.bar: Iterator[Request] = progress([], lambda _: 1, "answering", "prompts")
        self.shows_progress = False

    def submit(self, call: GenerationCall) -> RunningCall:
        """Add a call. Its requests wait for free rows."""
        seeded = any(request.seed is not None for request in call.requests)
        options = SamplingOptions(call.sampling, call.sampler, seeded)
        running_call = RunningCall(call, len(call.requests), options)
        max_rows = self.model.params.max_batch_size
        if not self.calls and len(call.requests) > max_rows:
            self.shows_progress = True
            self.bar = progress(call.requests, lambda _: 1, "answering", "prompts")
            next(self.bar, None)
        self.calls.append(running_call)
        self.waiting += ((running_call, index) for index in range(len(call.requests)))
        return running_call

    def suits(self, backend: Backend, n_words: int | None) -> bool:
        """Return True if calls of a `Llama` with this backend, and with a tokenizer of n_words tokens, can join the batch."""
        return backend.name == self.backend.name and n_words in (None, self.forward.n_words)

    @property
    def idle(self) -> bool:
        """Return True if no call waits for events that a step would produce."""
        return all(call.ended for call in self.calls)

    def sync_streams(self) -> None:
        """Make the current CUDA stream wait for the stream used before, on which a step launched ahead may still be running."""
        if self.forward.device.type == "cuda":
            before, self.cache.stream = self.cache.stream, torch.cuda.current_stream(self.forward.device)
            if before is not None and before != self.cache.stream:
                self.cache.stream.wait_stream(before)

    def why_broken(self) -> str | None:
        """Return the reason why the calls cannot continue; None if they can.

        They cannot if anyone else has used the KV cache, or if the model has been changed where code of callers has run.
        """
        if why := self.shared.why_not_owner(self.owner):
            return why
        if self.cache.prefix_tokens is not self.prefix_tokens or not self.cache.is_unchanged():
            return "the model's forward, or code of yours, has written into its KV cache since"
        if (len(self.calls) > 1 or self.calls[0].call.watched) and (
            any(self.hooks) or not self.cache.belongs_to(self.model) or self.forward.weights_version() != self.weights_version
        ):
            return "the model has been changed since"
        return None

    def step(self) -> None:
        """Prefill waiting requests into free rows, and sample the next token of each row. Add events to the calls.

        A failure that concerns one call ends that call only, and its `error` is the failure.
        """
        self.release_ended()
        if not self.running and not self.waiting:
            return
        if why := self.why_broken():
            for call in self.calls:
                call.error = call.error or ended_early(call.call.name, why)
            return
        self.sync_streams()
        try:
            if self.running:
                self.run_pending_step()
                if 0 in self.running and self.running[0].running_call.call.reuse:
                    self.prefix_tokens.append(self.tokens[0])
            self.pending_step = None
            if self.waiting:
                self.admit()
            if self.running:
                self.sample()
        finally:
            self.cache.record_version()

    def fail(self, failure: BaseException) -> None:
        """End all calls after a failure of a step. The caller of the step raises the failure itself."""
        for call in self.calls:
            if not call.ended:
                why = f"a step of the batch that it shared with other calls has failed ({type(failure).__name__}: {failure})"
                call.error = ended_early(call.call.name, why)
                call.error.__cause__ = failure

    def release_ended(self) -> None:
        """Free the rows of requests that their callers have ended, and forget calls that have ended."""
        for row, running in list(self.running.items()):
            if running.request.finish_reason or running.running_call.ended:
                self.release(row)
        if any(call.ended for call in self.calls):
            self.calls = [call for call in self.calls if not call.ended]
            self.waiting = collections.deque(waiting for waiting in self.waiting if not waiting[0].ended)

    def release(self, row: int) -> None:
        """Free a row, because its request has ended."""
        self.running.pop(row).running_call.n_unfinished -= 1
        if row in self.state.options:
            self.state.release(row)
        next(self.bar, None)

    def resize(self) -> None:
        """Set the number of rows to what the running and waiting requests need.

        As long as a single call runs, the number stays the same, so that each step uses the same number of random numbers from
        torch's default generator.
        """
        wanted = min(len(self.running) + len(self.waiting), self.model.params.max_batch_size)
        wanted = max(wanted, *(row + 1 for row in self.running), self.n_rows if len(self.calls) == 1 else 0)
        if wanted != self.n_rows:
            self.n_rows = wanted
            self.state.resize(wanted)
            self.decode = self.backend.begin(self.forward, wanted)

    def admit(self) -> None:
        """Prefill waiting requests into the free rows. Requests that are prefilled in the same way are prefilled together."""
        self.resize()
        free = [row for row in range(self.n_rows) if row not in self.running]
        groups: dict[tuple[bool, int], list[int]] = {}  # (scored, number of leading tokens to skip) -> rows
        for row in free[: len(self.waiting)]:
            running_call, index = self.waiting.popleft()
            request = running_call.call.requests[index]
            self.running[row] = RunningRequest(running_call, index, request)
            scored = running_call.call.scores_prompts
            if not scored and request.finish_reason:
                continue
            start = 0
            if row == 0:
                # Leave out the last prompt token: the prefill must compute the logits of this token.
                if running_call.call.reuse:
                    start = common_prefix_length(self.kept_tokens, request.prompt[:-1])
                self.kept_tokens = []
                self.prefix_tokens[:] = request.prompt[:start]
            groups.setdefault((scored, start), []).append(row)
        for (scored, start), rows in groups.items():
            self.prefill(rows, scored, start)
        for row in [row for row in free if row in self.running]:
            if self.running[row].request.finish_reason:
                self.release(row)

    def prefill(self, rows: list[int], scored: bool, start: int) -> None:
        """Prefill rows with the prompts of their requests. If `scored`, report the prompts' tokens. start: see `prefill`."""
        admitted = [self.running[row] for row in rows]
        requests = [each.request for each in admitted]
        self.zero_nonfinite_rows(rows, self.state.logits[rows].amax(-1).tolist())
        hidden, logprobs = prefill(self.forward, rows, requests, start, scored, quiet=self.shows_progress)
        self.state.admit(rows, requests, [each.running_call.options for each in admitted], self.forward.logits(hidden))
        if rows[0] == 0 and admitted[0].running_call.call.reuse:
            self.prefix_tokens[:] = requests[0].prompt
        for row, each, values in zip(rows, admitted, logprobs, strict=True):
            try:
                check_logprobs(self.model, values, each.request.label)
            except LlamaError as e:
                self.fail_row(row, e)
                continue
            tokens = (GeneratedToken(each.index, *pair) for pair in zip(each.request.prompt, values, strict=False))
            each.running_call.events += [Event(token, each.index, in_prompt=True) for token in tokens]

    def sample(self) -> None:
        """Sample a token for each row, and report the tokens.

        On CUDA, launch the next decode step before the host reads the sampled tokens. When the host reads that an answer has
        ended, its row is therefore already in the next step.
        """
        state, running = self.state, self.running
        positions_host = [running[row].position if row in running else 0 for row in range(self.n_rows)]
        tokens, largest = state.sample()
        wants_logprobs = any(each.running_call.call.logprobs for each in running.values())
        to_host = async_copy.async_to_host(tokens, largest, *([token_logprobs(state.logits, tokens)] if wants_logprobs else []))
        self.pending_step = tokens, state.positions, positions_host
        goes_on = any(each.num_generated + 1 < each.request.max_new_tokens for each in running.values())
        if async_copy.supports_async(tokens.device) and goes_on:
            self.run_pending_step()
        state.advance()
        self.tokens, largest_logits, *logprobs = to_host()
        free = [row for row in range(self.n_rows) if row not in running]
        self.zero_nonfinite_rows(free, [largest_logits[row] for row in free])
        for row, each in sorted(running.items()):
            if not math.isfinite(largest_logits[row]):
                self.fail_row(row, nonfinite_logits_error(self.model, each.request, each.num_generated, each.position))
        for row, each in sorted(running.items()):
            if each.running_call.ended:
                continue
            call, events = each.running_call.call, each.running_call.events
            if self.tokens[row] == call.stop_token:
                events.append(Event(None, each.index, finish_reason="stop"))
                self.release(row)
                continue
            each.num_generated += 1
            logprob = logprobs[0][row] if call.logprobs else None
            events.append(Event(GeneratedToken(each.index, self.tokens[row], logprob), each.index))
            if each.num_generated == each.request.max_new_tokens:
                self.release(row)

    def run_pending_step(self) -> None:
        """Decode the sampled tokens to get the next logits, unless this decode step has already been launched."""
        if self.pending_step is not None:
            self.cache.logits = self.state.logits = self.decode(*self.pending_step)
            self.pending_step = None

    def fail_row(self, row: int, error: LlamaError) -> None:
        """End the call whose request is in a row, and zero the row, since NaN there would make later results NaN."""
        call = self.running[row].running_call
        call.error = call.error or error
        self.cache.data[:, :, row].zero_()
        if row == 0:
            self.prefix_tokens.clear()

    def zero_nonfinite_rows(self, rows: list[int], largest: list[float]) -> None:
        """Zero the cache of rows whose largest logit is not finite.

        Attention with a mask, as used on GPUs, multiplies masked values by 0. If an ended request has left NaN in a row, the
        product is NaN for the next request in this row.
        """
        for row, logit in zip(rows, largest, strict=True):
            if not math.isfinite(logit):
                self.cache.data[:, :, row].zero_()


def take_event(request: Request, event: Event) -> Iterator[GeneratedToken]:
    """Yield the token of an event, and set the request's progress and finish reason as its caller sees them.

    The caller may set `finish_reason`, after which further tokens of the request are dropped.
    """
    if event.in_prompt and event.token:
        yield event.token
    elif not request.finish_reason:
        if event.token is None:
            request.finish_reason = event.finish_reason
            return
        request.num_new_tokens += 1
        yield event.token
        if request.num_new_tokens == request.max_new_tokens and not request.finish_reason:
            request.finish_reason = "length"
