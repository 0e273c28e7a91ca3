"""The rows of a batch and their decode steps: decode and sample the next token of each row, with guesses or without."""

import math
import time
from collections.abc import Iterator

import torch

from ..distributed.progress import progress
from ..model import Transformer
from ..sampling import ranked_logprobs
from . import async_copy
from .backend import Backend, DecodeFn, Run
from .checks import nonfinite_logits_error
from .decode_state import DecodeState
from .events import Event, RunningCalls, RunningRequest
from .forward import EngineForward
from .prefill import Prefill, PrefillRow
from .requests import GeneratedToken, Request, TokenScore, token_score
from .shared_state import SharedState
from .speculation import BegunStep, Speculation


class Batch(RunningCalls):
    """The rows of the KV cache that run requests, and their decode steps. `Scheduler` decides which requests they run."""

    def __init__(self, model: Transformer, forward: EngineForward, backend: Backend, shared: SharedState) -> None:
        super().__init__()
        self.model, self.forward, self.backend, self.shared = model, forward, backend, shared
        self.cache = forward.cache
        self.prefixes = forward.cache.prefixes
        self.n_submitted = 0  # number of calls so far
        self.running: dict[int, RunningRequest] = {}  # maps a row to the request in it
        self.prefills: list[Prefill] = []  # unfinished; their rows are in `running`, but do not decode yet
        self.decoders: dict[int, DecodeFn] = {}  # maps a number of rows to its decode function
        self.n_rows = 0  # rows that a decode step computes
        self.state = DecodeState(0, forward.n_words, forward.device)
        self.tokens: list[int] = []  # the token that was sampled last for each row
        # None, or the arguments of the next decode step: tokens, positions, and positions on the host.
        self.pending_step: tuple[torch.Tensor, torch.Tensor, list[int]] | None = None
        self.speculation: Speculation | None = None  # None until a request speculates
        self.step_began: BegunStep | None = None  # a step whose time is to be recorded, or None
        self.bar: Iterator[Request] = progress([], lambda _: 1, "answering", "prompts")

    @property
    def decoding(self) -> dict[int, RunningRequest]:
        """Return the running requests whose prompts have been prefilled, by row."""
        if not self.prefills:
            return self.running
        return {row: each for row, each in self.running.items() if row in self.state.options}

    @property
    def prefilling(self) -> dict[int, PrefillRow]:
        """Return the rows of unfinished prefills, by row."""
        return {place.row: place for prefill in self.prefills for place in prefill.rows}

    @property
    def is_alone(self) -> bool:
        """Return True if no second call has ever joined. The call then uses the same random numbers as in static batches."""
        return self.n_submitted == 1

    def run_pending_step(self) -> None:
        """Decode the sampled tokens to get the next logits, unless this decode step has already been launched.

        The step also decodes the guesses of rows that speculate.
        """
        if self.pending_step is None:
            return
        if not (self.speculates and self.decode_guesses(self.pending_step[2])):
            self.cache.logits = self.state.logits = self.decoders[self.n_rows](*self.pending_step)
        self.pending_step = None

    @property
    def speculates(self) -> bool:
        """Return True if a row speculates."""
        return self.speculation is not None and bool(self.speculation.rows)

    def decode_guesses(self, positions: list[int]) -> bool:
        """Decode the sampled tokens of all rows and the guesses after them. Return False without a guess."""
        decoding = self.decoding
        limits = {row: each.request.max_new_tokens - each.num_generated - 1 for row, each in decoding.items()}
        assert self.speculation is not None
        before = time.perf_counter()
        limits = {row: limits.get(row, 0) for row in range(self.n_rows)}
        guesses = self.speculation.guess(limits, len(decoding), self.forward.device)
        runs = [Run(row, positions[row], [self.tokens[row], *guesses.get(row, ())]) for row in range(self.n_rows)]
        longest = max(len(run.tokens) for run in runs) - 1
        n_guesses = sum(len(run.tokens) - 1 for run in runs)
        n_computed, began = self.backend.n_computed(len(runs), n_guesses, longest), time.perf_counter()
        self.step_began = BegunStep(len(runs), len(decoding), n_guesses, n_computed, began - before, began)
        if guesses:
            self.cache.logits = self.state.logits = self.speculation.decode(runs)
        return bool(guesses)

    def record_step_time(self) -> None:
        if self.step_began:
            assert self.speculation is not None
            self.speculation.record(self.step_began, time.perf_counter() - self.step_began.began)
            self.step_began = None

    def sample(self, rows: list[int] | None = None) -> None:
        """Sample a token for each row, or for these rows, and report the tokens.

        On CUDA, launch the next decode step before the host reads the sampled tokens, unless a row speculates. When the host
        reads that an answer has ended, its row is therefore already in the next step.
        """
        state = self.state
        decoding = {row: each for row, each in self.decoding.items() if rows is None or row in rows}
        self.cache.record_version()
        tokens, largest = state.sample(keep_failures=len(self.calls) > 1, rows=rows)
        if not self.cache.is_unchanged():
            self.prefixes.clear()
            self.end_early("a sampler or logits processor has run the model's forward, which has overwritten the KV cache")
            return
        for failed, failure in state.failures:
            for row in failed:
                self.fail_row(row, failure)
        calls = [each.running_call.call for each in decoding.values()]
        n_top = max((call.top_logprobs or 0 for call in calls), default=0)
        scored = ranked_logprobs(state.logits, tokens, n_top) if any(call.logprobs for call in calls) else []
        to_host = async_copy.async_to_host(tokens, largest, *scored)
        decoded_at = [decoding[row].position if row in decoding else self.unused_position(row) for row in range(self.n_rows)]
        self.pending_step = tokens, state.positions, decoded_at
        goes_on = any(each.num_generated + 1 < each.request.max_new_tokens for each in decoding.values())
        if async_copy.supports_async(tokens.device) and goes_on and not self.speculates:
            self.run_pending_step()
        state.advance(rows)
        sampled, largest_logits, *values = to_host()
        self.tokens = sampled if rows is None else [sampled[i] if i in rows else old for i, old in enumerate(self.tokens)]
        state.record(self.tokens, rows)
        free = [row for row in range(self.n_rows) if row not in self.running]
        self.zero_nonfinite_rows(free, [largest_logits[row] for row in free])
        for row, each in sorted(decoding.items()):
            if not math.isfinite(largest_logits[row]):
                self.fail_row(row, nonfinite_logits_error(self.model, each.request, each.num_generated, each.position))
        for row, each in sorted(decoding.items()):
            if each.running_call.ended:
                continue
            call, events = each.running_call.call, each.running_call.events
            score = token_score(values, row, call.top_logprobs or 0) if call.logprobs else TokenScore()
            token = GeneratedToken(each.index, self.tokens[row], *score)
            if token.token in call.end_tokens:
                events.append(Event(token if call.include_eos else None, each.index, finish_reason="stop"))
                self.release(row)
                continue
            each.num_generated += 1
            events.append(Event(token, each.index))
            if each.num_generated == each.request.max_new_tokens:
                self.release(row)
            elif self.speculation:
                self.speculation.append(row, token.token)

    def sample_accepted(self) -> None:
        """Sample tokens after those that were guessed right, whose logits the last decode step has computed."""
        assert self.speculation is not None
        while accepted := self.speculation.accept(self.tokens):
            self.state.continue_with(accepted)
            self.sample([*accepted])
        # Rows may have sampled different numbers of tokens. The last one of each is decoded next.
        decoding, device = self.decoding, self.forward.device
        positions = [decoding[row].position - 1 if row in decoding else self.unused_position(row) for row in range(self.n_rows)]
        self.pending_step = torch.tensor(self.tokens, device=device), torch.tensor(positions, device=device), positions

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
        if self.speculation:
            self.speculation.release(row)
        next(self.bar, None)

    def fail_row(self, row: int, error: BaseException) -> None:
        """End the call whose request is in a row, and zero the row, since NaN there would make later results NaN."""
        call = self.running[row].running_call
        call.error = call.error or error
        self.zero_row(row)

    def zero_nonfinite_rows(self, rows: list[int], largest: list[float]) -> None:
        """Zero the cache of rows whose largest logit is not finite.

        Attention with a mask, as used on GPUs, multiplies masked values by 0. If an ended request has left NaN in a row, the
        product is NaN for the next request in this row.
        """
        for row, logit in zip(rows, largest, strict=True):
            if not math.isfinite(logit):
                self.zero_row(row)

    def zero_row(self, row: int) -> None:
        """Forget the tokens of a row, and zero its cache."""
        is_unchanged = self.cache.is_unchanged()
        self.prefixes.tokens[row] = []  # first, since Ctrl-C may interrupt
        self.cache.data[:, :, row].zero_()
        if is_unchanged:
            self.cache.record_version()

    def unused_position(self, row: int) -> int:
        """Return the position at which a decode step may write keys and values for a row that does not decode.

        A decode step computes all rows, and so writes into rows that do not decode. In a row that is being prefilled, it writes
        where the next chunk begins, which overwrites it. In a free row, it writes after the tokens that the row holds, since
        later prompts may share them. A free row that is full forgets its last token.
        """
        last = self.cache.data.shape[4] - 1
        place = self.prefilling.get(row) if self.prefills else None
        if place is None:
            self.prefixes.tokens[row] = self.prefixes.tokens[row][:last]
        return min(place.n_cached if place else len(self.prefixes.tokens[row]), last)

    def park(self, rows: list[int]) -> None:
        """Let decode steps compute rows that do not decode at positions where this harms nothing."""
        self.state.set_positions(rows, [self.unused_position(row) for row in rows])
