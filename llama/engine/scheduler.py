"""Continuous batching: run the requests of one call through the engine's forward.

Each request waits for a free row of the KV cache, is prefilled once, and then decodes together with the other rows. When a
request ends, the next waiting request gets its row, and is prefilled before the next decode step. Free rows are decoded too,
and their results ignored, so that every step uses the same number of random numbers from torch's default generator.

    row 0   a a a a A A A A A | c c C C C      lower case: prompt tokens; requests that start together share a prefill
    row 1   b b B B B B B B B   B B B B B      upper case: new tokens, one per decode step; c begins when a has ended
"""

import collections
import math
from collections.abc import Iterator
from typing import Any

import torch

from .. import compat
from ..distributed.agreement import broadcast_from_rank0
from ..distributed.progress import progress
from ..model import Transformer
from ..sampling import token_logprobs
from . import async_copy
from .backend import Backend
from .checks import check_logprobs, common_prefix_length, is_valid_logprob, nonfinite_logits_error
from .decode_state import DecodeState
from .forward import EngineForward
from .prefill import prefill
from .requests import GeneratedToken, GenerationCall
from .shared_state import CacheOwner, SharedState, ended_early


class Scheduler:
    """Run one call: admit waiting requests to free rows, decode all rows together, and free the rows of ended requests."""

    def __init__(
        self, model: Transformer, forward: EngineForward, backend: Backend, shared: SharedState, call: GenerationCall
    ) -> None:
        self.model, self.forward, self.shared, self.call, self.requests = model, forward, shared, call, call.requests
        self.cache = forward.cache
        self.weights_version = forward.weights_version()
        self.hooks = [hooks for module in model.modules() for hooks in compat.forward_hooks(module)]
        shared.owner = self.owner = CacheOwner(call.name)
        self.sync_streams()
        overrun_logits, self.cache.logits = self.cache.logits, None
        if overrun_logits is not None and not broadcast_from_rank0(overrun_logits.amax(-1).sum()).isfinite():
            self.reset_cache()  # a step that the previous call launched ahead may have written NaN into the cache
        kept: list[int] = []
        if call.reuse and self.cache.is_unchanged() and self.cache.weights_version == self.weights_version:
            kept = self.cache.prefix_tokens or []
        self.cache.weights_version = self.weights_version
        # Create a new list, since this list object identifies the call that owns the cache. Leave out the last prompt token:
        # the prefill must compute the logits of this token.
        self.prefix_tokens = kept[: common_prefix_length(kept, self.requests[0].prompt[:-1])]
        self.cache.prefix_tokens = self.prefix_tokens
        self.requests[0].num_reused_tokens = len(self.prefix_tokens)
        self.cache.record_version()
        self.n_rows = min(len(self.requests), model.params.max_batch_size)
        self.decode = backend.begin(self.forward, self.n_rows)
        seeded = any(r.seed is not None for r in self.requests)
        self.state = DecodeState(self.n_rows, forward.n_words, self.forward.device, call.sampling, seeded, call.sampler)
        self.waiting = collections.deque(range(len(self.requests)))
        self.running: dict[int, int] = {}  # maps a row to the index of its request
        # Lists with an entry for each row: sampled tokens, largest logits, and, if the call asks for them, log probabilities.
        self.sampled: list[list[Any]] = []
        # None, or the arguments of the next decode step: tokens, positions, and positions on the host.
        self.pending_step: tuple[torch.Tensor, torch.Tensor, list[int]] | None = None
        self.shows_progress = len(self.requests) > self.n_rows
        self.bar = progress(self.requests if self.shows_progress else [], lambda _: 1, "answering", "prompts")
        next(self.bar, None)

    @property
    def finished(self) -> bool:
        return not self.waiting and not self.running

    def sync_streams(self) -> None:
        """Make the current CUDA stream wait for the stream used before, on which a step launched ahead may still be running."""
        if self.forward.device.type == "cuda":
            before, self.cache.stream = self.cache.stream, torch.cuda.current_stream(self.forward.device)
            if before is not None and before != self.cache.stream:
                self.cache.stream.wait_stream(before)

    def check_cache_ownership(self) -> None:
        """Raise InputError if anyone else has used the cache since this call began, or if the caller has changed the model."""
        self.shared.check_owner(self.owner)
        if self.cache.prefix_tokens is not self.prefix_tokens or not self.cache.is_unchanged():
            raise ended_early(self.call.name, "the model's forward, or code of yours, has written into its KV cache since")
        if self.call.watched and (
            any(self.hooks) or not self.cache.belongs_to(self.model) or self.forward.weights_version() != self.weights_version
        ):
            raise ended_early(self.call.name, "the model has been changed since")

    def step(self) -> list[GeneratedToken]:
        """Prefill waiting requests into free rows, and sample the next token of each row, which `emit_tokens` then yields.

        Return the tokens of the prefilled prompts with their log probabilities, if the call scores prompts.
        """
        self.check_cache_ownership()
        self.sync_streams()
        try:
            if self.running:
                self.run_pending_step()
                if self.call.reuse:
                    self.prefix_tokens.append(self.sampled[0][0])
            self.sampled, self.pending_step, prompt_tokens = [], None, []
            if self.waiting and len(self.running) < self.n_rows:
                prompt_tokens = self.admit()
            if self.running:
                self.sample()
        finally:
            self.cache.record_version()
        return prompt_tokens

    def admit(self) -> list[GeneratedToken]:
        """Prefill waiting requests into the free rows. Return the tokens of their prompts, if the call scores prompts."""
        free = [row for row in range(self.n_rows) if row not in self.running]
        admitted = [(row, self.waiting.popleft()) for row in free[: len(self.waiting)]]
        scored = self.call.scores_prompts
        prefilled = [(row, index) for row, index in admitted if scored or not self.requests[index].finish_reason]
        prompt_tokens: list[GeneratedToken] = []
        if prefilled:
            rows, requests = [row for row, _ in prefilled], [self.requests[index] for _, index in prefilled]
            self.zero_nonfinite_rows(rows, self.state.logits[rows].amax(-1).tolist())
            hidden, logprobs = prefill(self.forward, rows, requests, len(self.prefix_tokens), scored, quiet=self.shows_progress)
            self.state.admit(rows, requests, self.forward.logits(hidden))
            if self.call.reuse:
                self.prefix_tokens[:] = requests[0].prompt
            for (_, index), values in zip(prefilled, logprobs, strict=True):
                if not all(map(is_valid_logprob, values)):
                    self.reset_cache()
                request = self.requests[index]
                check_logprobs(self.model, values, request.label)
                prompt_tokens += [GeneratedToken(index, *pair) for pair in zip(request.prompt, values, strict=False)]
        for row, index in admitted:
            self.running[row] = index
            self.release_if_finished(row)
        return prompt_tokens

    def sample(self) -> None:
        """Sample a token for each row.

        On CUDA, launch the next decode step before the host reads the sampled tokens. When the host reads that an answer has
        ended, its row is therefore already in the next step.
        """
        state, running = self.state, {row: self.requests[index] for row, index in self.running.items()}
        positions_host = [
            len(running[row].prompt) + running[row].num_new_tokens if row in running else 0 for row in range(self.n_rows)
        ]
        tokens, largest = state.sample()
        logprobs = [token_logprobs(state.logits, tokens)] if self.call.logprobs else []
        to_host = async_copy.async_to_host(tokens, largest, *logprobs)
        self.pending_step = tokens, state.positions, positions_host
        goes_on = any(r.num_new_tokens + 1 < r.max_new_tokens for r in running.values())
        if async_copy.supports_async(tokens.device) and goes_on:
            self.run_pending_step()
        state.advance()
        self.sampled = to_host()
        free = [row for row in range(self.n_rows) if row not in self.running]
        self.zero_nonfinite_rows(free, [self.sampled[1][row] for row in free])
        for row, index in sorted(self.running.items()):
            if not math.isfinite(self.sampled[1][row]):
                request = self.requests[index]
                self.reset_cache()
                raise nonfinite_logits_error(self.model, request, len(request.prompt) + request.num_new_tokens)

    def run_pending_step(self) -> None:
        """Decode the sampled tokens to get the next logits, unless this decode step has already been launched."""
        if self.pending_step is not None:
            self.cache.logits = self.state.logits = self.decode(*self.pending_step)
            self.pending_step = None

    def emit_tokens(self) -> Iterator[GeneratedToken]:
        """Yield the sampled tokens, row by row. A consumer sets the `finish_reason` of a request to end its answer."""
        tokens, _, *logprobs = self.sampled or ([], [])
        for row, index in sorted(self.running.items()):
            request = self.requests[index]
            if tokens[row] == self.call.stop_token:
                request.finish_reason = "stop"
            else:
                request.num_new_tokens += 1
                yield GeneratedToken(index, tokens[row], logprobs[0][row] if logprobs else None)
                if request.num_new_tokens == request.max_new_tokens and not request.finish_reason:
                    request.finish_reason = "length"
            self.release_if_finished(row)

    def zero_nonfinite_rows(self, rows: list[int], largest: list[float]) -> None:
        """Zero the cache of rows whose largest logit is not finite.

        Attention with a mask, as used on GPUs, multiplies masked values by 0. If an ended request has left NaN in a row, the
        product is NaN for the next request in this row.
        """
        for row, logit in zip(rows, largest, strict=True):
            if not math.isfinite(logit):
                self.cache.data[:, :, row].zero_()

    def reset_cache(self) -> None:
        """Zero the whole cache, since NaN in the cache would make results of the next call NaN."""
        self.cache.data.zero_()
        self.cache.prefix_tokens = None

    def release_if_finished(self, row: int) -> None:
        """Free a row if its request has ended."""
        if self.requests[self.running[row]].finish_reason:
            del self.running[row]
            next(self.bar, None)
