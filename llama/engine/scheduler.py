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
from dataclasses import dataclass

import torch

from .. import compat, tuning
from ..distributed.agreement import broadcast_from_rank0
from ..distributed.progress import progress
from ..errors import LlamaError
from ..model import Transformer
from ..sampling import token_logprobs
from . import async_copy
from .backend import Backend, DecodeFn
from .checks import check_logprobs, common_prefix_length, nonfinite_logits_error
from .decode_state import DecodeState, SamplingOptions
from .events import Event, RunningCall, RunningCalls
from .forward import EngineForward
from .prefill import Prefill
from .requests import GeneratedToken, GenerationCall, Request
from .shared_state import CacheOwner, SharedState

MAX_DECODERS = 8  # decode functions of different numbers of rows that are kept, because each allocates memory


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


class Scheduler(RunningCalls):
    """Run calls: admit waiting requests to free rows, decode all rows together, and free the rows of ended requests.

    A scheduler exists while calls run. The next call after that creates a new one.
    """

    def __init__(self, model: Transformer, forward: EngineForward, backend: Backend, shared: SharedState, name: str) -> None:
        super().__init__()
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
        self.n_submitted = 0  # number of calls so far
        self.waiting: collections.deque[tuple[RunningCall, int]] = collections.deque()  # calls and indices of their requests
        self.running: dict[int, RunningRequest] = {}  # maps a row to the request in it
        self.prefills: list[Prefill] = []  # unfinished; their rows are in `running`, but do not decode yet
        self.decoders: dict[int, DecodeFn] = {}  # maps a number of rows to its decode function
        self.n_rows = 0  # rows that a decode step computes
        self.state = DecodeState(0, forward.n_words, forward.device)
        self.tokens: list[int] = []  # the token that was sampled last for each row
        # None, or the arguments of the next decode step: tokens, positions, and positions on the host.
        self.pending_step: tuple[torch.Tensor, torch.Tensor, list[int]] | None = None
        self.bar: Iterator[Request] = progress([], lambda _: 1, "answering", "prompts")
        self.shows_progress = False

    def submit(self, call: GenerationCall) -> RunningCall:
        seeded = any(request.seed is not None for request in call.requests)
        options = SamplingOptions(call.sampling, call.sampler, seeded)
        running_call = RunningCall(call, len(call.requests), options)
        max_rows = self.model.params.max_batch_size
        if not self.calls and len(call.requests) > max_rows:
            self.shows_progress = True
            self.bar = progress(call.requests, lambda _: 1, "answering", "prompts")
            next(self.bar, None)
        self.calls.append(running_call)
        self.n_submitted += 1
        self.waiting += ((running_call, index) for index in range(len(call.requests)))
        return running_call

    def suits(self, backend: Backend, n_words: int | None) -> bool:
        return backend.name == self.backend.name and (n_words or self.model.vocab_size) == self.forward.n_words

    def sync_streams(self) -> None:
        """Make the current CUDA stream wait for the stream used before, on which a step launched ahead may still be running."""
        if self.forward.device.type == "cuda":
            before, self.cache.stream = self.cache.stream, torch.cuda.current_stream(self.forward.device)
            if before is not None and before != self.cache.stream:
                self.cache.stream.wait_stream(before)

    def why_broken(self) -> str | None:
        """Return the reason why the calls cannot continue; None if they can.

        They cannot if other code has used the KV cache, or if the model has been changed between two steps.
        """
        if why := self.shared.why_not_owner(self.owner):
            return why
        if self.cache.prefix_tokens is not self.prefix_tokens or not self.cache.is_unchanged():
            return "the model's forward, or code of yours, has written into its KV cache since the call began"
        if (len(self.calls) > 1 or any(each.call.watched for each in self.calls)) and (
            any(self.hooks) or not self.cache.belongs_to(self.model) or self.forward.weights_version() != self.weights_version
        ):
            return "the model has been changed since the call began"
        return None

    def step(self) -> None:
        """Prefill waiting requests into free rows, and sample the next token of each row. Add events to the calls.

        A failure of one call is stored in its `error`, and the other calls go on. Any other failure raises.
        """
        self.release_ended()
        if not self.running and not self.waiting:
            return
        if why := self.why_broken():
            self.end_early(why)
            return
        self.sync_streams()
        try:
            if decoding := self.decoding:
                self.run_pending_step()
                if 0 in decoding and decoding[0].running_call.call.reuse:
                    self.prefix_tokens.append(self.tokens[0])
            self.pending_step = None
            self.resize()
            if self.waiting:
                self.admit()
            while self.prefills:
                self.run_prefill_chunk()
                if self.decoding and not self.is_alone:  # let no row of another call wait for more than a chunk
                    break
            if self.decoding:
                self.sample()
        finally:
            self.cache.record_version()

    @property
    def decoding(self) -> dict[int, RunningRequest]:
        """Return the running requests whose prompts have been prefilled, by row."""
        if not self.prefills:
            return self.running
        return {row: each for row, each in self.running.items() if row in self.state.options}

    def release_ended(self) -> None:
        """Free the rows of requests that their callers have ended, and forget calls that have ended."""
        prefilling: set[int] = set()
        if self.prefills:  # a prefill that has begun goes on, unless all of its requests have ended
            self.prefills = [prefill for prefill in self.prefills if not all(map(self.is_ended, prefill.rows))]
            prefilling = {row for prefill in self.prefills for row in prefill.rows}
        for row in [row for row in self.running if self.is_ended(row) and row not in prefilling]:
            self.release(row)
        if any(call.ended for call in self.calls):
            self.calls = [call for call in self.calls if not call.ended]
            self.waiting = collections.deque(waiting for waiting in self.waiting if not waiting[0].ended)

    def is_ended(self, row: int) -> bool:
        """Return True if the request in a row needs no more tokens."""
        running = self.running[row]
        wants_prompt = running.running_call.call.scores_prompts and row not in self.state.options
        return running.running_call.ended or bool(running.request.finish_reason and not wants_prompt)

    def release(self, row: int) -> None:
        """Free a row, because its request has ended."""
        self.running.pop(row).running_call.n_unfinished -= 1
        if row in self.state.options:
            self.state.release(row)
        next(self.bar, None)

    @property
    def is_alone(self) -> bool:
        """Return True if no second call has ever joined. The call then uses the same random numbers as in static batches."""
        return self.n_submitted == 1

    def resize(self) -> None:
        """Set the number of rows to what the running and waiting requests need.

        As long as a single call runs, the number stays the same, so that each step uses the same number of random numbers from
        torch's default generator.
        """
        max_rows = self.model.params.max_batch_size
        wanted = min(len(self.running) + len(self.waiting), max_rows)
        wanted = max(wanted, *(row + 1 for row in self.running), self.n_rows if self.is_alone else 0)
        if not self.is_alone and self.forward.device.type == "cuda":
            wanted = min(1 << (wanted - 1).bit_length(), max_rows)  # each number of rows is captured, or compiled, anew
        if wanted != self.n_rows:
            self.n_rows = wanted
            self.state.resize(wanted)
            if wanted not in self.decoders:
                if len(self.decoders) >= MAX_DECODERS:
                    self.decoders.clear()
                self.decoders[wanted] = self.backend.begin(self.forward, wanted)

    def admit(self) -> None:
        """Put waiting requests into free rows, and prepare their prefills: one for all requests that skip as many tokens."""
        free = [row for row in range(self.n_rows) if row not in self.running]
        is_beside_others = bool(self.decoding) and not self.is_alone  # before the rows below are added to `running`
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
                    start = request.num_reused_tokens = common_prefix_length(self.kept_tokens, request.prompt[:-1])
                self.kept_tokens = []
                self.prefix_tokens[:] = request.prompt[:start]
            groups.setdefault((scored, start), []).append(row)
        max_tokens = tuning.PREFILL_CHUNK_BESIDE_DECODING if is_beside_others else tuning.PREFILL_CHUNK
        for (scored, start), rows in groups.items():
            requests = [self.running[row].request for row in rows]
            self.zero_nonfinite_rows(rows, self.state.logits[rows].amax(-1).tolist())
            quiet = self.shows_progress  # one progress bar at a time
            self.prefills.append(Prefill(self.forward, rows, requests, start, scored, max_tokens, quiet))
        for row in free:
            if (
                row in self.running
                and self.running[row].request.finish_reason
                and not any(row in p.rows for p in self.prefills)
            ):
                self.release(row)

    def run_prefill_chunk(self) -> None:
        """Run a chunk of the first prefill. After its last chunk, its requests begin to decode."""
        prefill = self.prefills[0]
        try:
            prefill.run_chunk()
        except Exception as e:
            if len(self.calls) == 1:
                raise
            del self.prefills[0]
            for row in prefill.rows:
                self.fail_row(row, e)
                self.release(row)
            return
        if not prefill.finished:
            for row in prefill.rows:
                self.state.set_position(row, self.unused_position(row))
            return
        del self.prefills[0]
        admitted = [self.running[row] for row in prefill.rows]
        requests = [each.request for each in admitted]
        options = [each.running_call.options for each in admitted]
        self.state.admit(prefill.rows, requests, options, self.forward.logits(prefill.last_hidden))
        if prefill.rows[0] == 0 and admitted[0].running_call.call.reuse:
            self.prefix_tokens[:] = requests[0].prompt
        for row, each, values in zip(prefill.rows, admitted, prefill.logprobs, strict=True):
            try:
                check_logprobs(self.model, values, each.request.label)
            except LlamaError as e:
                self.fail_row(row, e)
                continue
            tokens = (GeneratedToken(each.index, *pair) for pair in zip(each.request.prompt, values, strict=False))
            each.running_call.events += [Event(token, each.index, in_prompt=True) for token in tokens]
        for row in prefill.rows:
            if self.is_ended(row):
                self.release(row)

    def sample(self) -> None:
        """Sample a token for each row, and report the tokens.

        On CUDA, launch the next decode step before the host reads the sampled tokens. When the host reads that an answer has
        ended, its row is therefore already in the next step.
        """
        state, decoding = self.state, self.decoding
        positions_host = [
            decoding[row].position if row in decoding else self.unused_position(row) for row in range(self.n_rows)
        ]
        tokens, largest = state.sample(keep_failures=len(self.calls) > 1)
        for rows, failure in state.failures:
            for row in rows:
                self.fail_row(row, failure)
        wants_logprobs = any(each.running_call.call.logprobs for each in decoding.values())
        to_host = async_copy.async_to_host(tokens, largest, *([token_logprobs(state.logits, tokens)] if wants_logprobs else []))
        self.pending_step = tokens, state.positions, positions_host
        goes_on = any(each.num_generated + 1 < each.request.max_new_tokens for each in decoding.values())
        if async_copy.supports_async(tokens.device) and goes_on:
            self.run_pending_step()
        state.advance()
        self.tokens, largest_logits, *logprobs = to_host()
        free = [row for row in range(self.n_rows) if row not in self.running]
        self.zero_nonfinite_rows(free, [largest_logits[row] for row in free])
        for row, each in sorted(decoding.items()):
            if not math.isfinite(largest_logits[row]):
                self.fail_row(row, nonfinite_logits_error(self.model, each.request, each.num_generated, each.position))
        for row, each in sorted(decoding.items()):
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

    def unused_position(self, row: int) -> int:
        """Return the position at which a decode step may write keys and values for a row that does not decode.

        A decode step computes all rows. The next chunk of a row's prefill overwrites what is written where the chunk begins. A
        free row 0 may contain a prefix that another call will use.
        """
        last = self.cache.data.shape[4] - 1
        prefill = next((prefill for prefill in self.prefills if row in prefill.n_cached), None)
        if prefill is None and row == 0:
            del self.prefix_tokens[last:]
        return min(prefill.n_cached[row] if prefill else 0 if row else len(self.prefix_tokens), last)

    def run_pending_step(self) -> None:
        """Decode the sampled tokens to get the next logits, unless this decode step has already been launched."""
        if self.pending_step is not None:
            self.cache.logits = self.state.logits = self.decoders[self.n_rows](*self.pending_step)
            self.pending_step = None

    def fail_row(self, row: int, error: BaseException) -> None:
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
