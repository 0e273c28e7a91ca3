"""The one loop: prompts of ids in, new ids out, one by one.

Rows of the cache are slots. Each prompt waits for a slot, goes through the model once, then steps together with the rest;
when it ends, the next one takes its slot between two steps. An idle slot steps on, since the rows of a batch share their
draws, where its row ended, or on the CPU at position 0. Of text the loop knows nothing.

    slot 0   a a a a A A A A A | d d D D D      lower case: the prompt's ids, packed with those of others into one forward
    slot 1   b b B B B B B B B   B B B B B      upper case: new ids, one a step; a's last step is followed by d's prefill
"""

import collections
import itertools
import math
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import nn

from . import ranks, runtime
from .attention import BLOCK
from .backends import Backend, changed, choose
from .cache import Batch, KVCache, chunked
from .errors import InputError, NumberError
from .forward import Forward
from .memory import LOGPROB_CHUNK, PREFILL_CHUNK
from .model import Attention, Transformer
from .sampling import Sampling, logprobs_of, next_ids, penalize, sample_top_p, seeded_noise


class State:
    """What all engines of a model share: a lock, the KV cache once there is one, and the call that has it."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.cache: KVCache | None = None
        self.call: object = None


_STATES: weakref.WeakKeyDictionary[nn.Module, State] = weakref.WeakKeyDictionary()

FinishReason = Literal["stop", "length"]
Sampler = Callable[[torch.Tensor, float], torch.Tensor]  # as sample_top_p


class Token(NamedTuple):
    """One id of one prompt, and its log probability where asked for."""

    row: int
    id: int
    logprob: float | None


@dataclass
class Request:
    """One prompt: what is asked of it, and what has come of it so far."""

    prompt: list[int]
    most: int  # new ids at most
    seed: int | None = None
    name: str = "the prompt"  # in errors
    made: int = 0  # new ids, without EOS
    finish_reason: FinishReason | None = None  # set by the loop; or by its consumer, who thereby ends the row


class Rows:
    """What the device holds of the rows 0..B: their next logits, where the ids to come will stand, what draws need."""

    def __init__(
        self, n: int, vocab: int, device: torch.device, sampling: Sampling, seeded: bool, sampler: Sampler = sample_top_p
    ) -> None:
        self.sampling, self.sampler = sampling, sampler
        self.logits = torch.zeros(n, vocab, dtype=torch.float32, device=device)
        self.positions = self.last = torch.zeros(n, dtype=torch.int64, device=device)
        self.seeds = torch.zeros_like(self.positions) if seeded and not sampling.greedy else None
        self.seen = torch.zeros(n, vocab, dtype=torch.bool, device=device) if sampling.repetition_penalty != 1 else None

    def admit(self, slots: list[int], requests: list[Request], logits: torch.Tensor) -> None:
        """Put prompts that have gone through the model into slots, by the logits after each, (len(slots), vocab)."""
        index = torch.tensor(slots, device=logits.device)

        def put(rows: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
            return rows.index_copy(0, index, values.to(rows.device))

        lengths, most = torch.tensor([(len(r.prompt), r.most) for r in requests], device="cpu").unbind(1)
        last = lengths + most - 1
        self.logits = put(self.logits, logits)
        self.last = put(self.last, last)
        self.positions = put(self.positions, torch.minimum(lengths, last))
        if self.seeds is not None:
            self.seeds = put(self.seeds, torch.tensor([r.seed for r in requests], dtype=torch.int64, device="cpu"))
        if self.seen is not None:
            seen = torch.zeros(len(requests), self.seen.shape[1], dtype=torch.bool, device="cpu")
            for row, request in zip(seen, requests, strict=True):
                row[request.prompt] = True
            self.seen = put(self.seen, seen)

    def choose(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The next ids (B,), and the largest logit of each row (B,), which is finite unless one is NaN or infinite, or all are
        masked; rank 0's, on all ranks."""
        logits, noise = self.logits, None
        if self.seen is not None:
            logits = penalize(logits, self.seen, self.sampling.repetition_penalty)
        if self.seeds is not None:
            noise = seeded_noise(self.seeds, self.positions, logits.shape[1])
        ids, total = next_ids(logits, self.sampling, noise, self.sampler), self.logits.amax(-1)
        if ranks.model_parallel()[1] > 1:
            drawn, total = ranks.from_rank0(torch.stack([ids.double(), total.double()])).unbind()
            ids = drawn.long()
        if self.seen is not None:
            self.seen.scatter_(1, ids.unsqueeze(1), True)
        return ids, total

    def advance(self) -> None:
        self.positions = torch.minimum(self.positions + 1, self.last)


class Run:
    """One call on its way: who waits, who steps in which slot, and what to do next."""

    def __init__(
        self,
        engine: "Engine",
        requests: list[Request],
        sampling: Sampling,
        eos_id: int,
        logprobs: bool,
        scored: bool,
        reuse: bool,
        sampler: Sampler,
        watched: bool,
    ) -> None:
        self.engine, self.requests, self.eos_id, self.watched = engine, requests, eos_id, watched
        self.logprobs, self.scored, self.reuse = logprobs, scored, reuse
        self.model = self.engine.forward()
        self.cache = self.model.cache
        self.made_of = self.model.marks()
        self.hooks = [hooks for m in engine.model.modules() for hooks in (m._forward_hooks, m._forward_pre_hooks)]
        engine.state.call = self
        self.follow()
        beyond, self.cache.logits = self.cache.logits, None
        if beyond is not None and not ranks.from_rank0(beyond.amax(-1).sum()).isfinite():
            self.clear()  # the last step, launched ahead, may have left NaN in the cache
        kept = self.cache.turn or [] if reuse and self.cache.untouched() and self.cache.made_by == self.made_of else []
        self.cache.made_by = self.made_of
        # A new list marks the cache as this call's. The prompt's last token is always computed, for its logits.
        self.cache.turn = self.turn = kept[: common_prefix(kept, requests[0].prompt[:-1])]
        self.cache.seen()
        self.n_slots = min(len(requests), engine.model.params.max_batch_size)
        self.take = engine.backend.begin(self.model, self.n_slots)
        vocab = engine.model.vocab_size
        self.rows = Rows(self.n_slots, vocab, self.model.device, sampling, any(r.seed is not None for r in requests), sampler)
        self.waiting = collections.deque(range(len(requests)))
        self.live: dict[int, int] = {}  # slot: row
        self.drawn: list[list[Any]] = []  # by the last step: ids of the slots, largest logits, log probabilities
        self.step: tuple[torch.Tensor, torch.Tensor, list[int]] | None = None  # that brings these into the cache
        self.many = len(requests) > self.n_slots
        self.bar = runtime.progress(requests if self.many else [], lambda _: 1, "answering", "prompts")
        next(self.bar, None)

    def follow(self) -> None:
        """Make the current CUDA stream wait for the previous call's: a decode step launched ahead may still be running."""
        if self.model.device.type == "cuda":
            before, self.cache.stream = self.cache.stream, torch.cuda.current_stream(self.model.device)
            if before is not None and before != self.cache.stream:
                self.cache.stream.wait_stream(before)

    def check(self) -> None:
        """Raise InputError if another call, or the caller, has used the cache since, or if the caller has changed the model."""
        if self.engine.state.call is not self or self.cache.turn is not self.turn or not self.cache.untouched():
            raise InputError(ANOTHER_CALL)
        if self.watched and (any(self.hooks) or not self.cache.is_of(self.engine.model) or self.model.marks() != self.made_of):
            raise InputError("the model has been changed under a stream or a loop over tokens: begin it anew")

    def next(self) -> list[Token]:
        """Prefill waiting prompts into free slots, and sample each row's next token into `drawn`. Returns the new prompts'
        tokens, with log probabilities, if these are asked for."""
        self.check()
        self.follow()
        try:
            if self.live:
                self.forward()
                if self.reuse:
                    self.turn.append(self.drawn[0][0])
            self.drawn, self.step, own = [], None, []
            if self.waiting and len(self.live) < self.n_slots:
                own = self.admit()
            if self.live:
                self.choose()
        finally:
            self.cache.seen()
        return own

    def admit(self) -> list[Token]:
        """Give free slots to those who wait, all of them through the model in one pass."""
        free = [slot for slot in range(self.n_slots) if slot not in self.live]
        newcomers = [(slot, self.waiting.popleft()) for slot in free[: len(self.waiting)]]
        entering = [(slot, row) for slot, row in newcomers if self.scored or not self.requests[row].finish_reason]
        own: list[Token] = []
        if entering:
            slots, requests = [slot for slot, _ in entering], [self.requests[row] for _, row in entering]
            self.scrub(slots, self.rows.logits[slots].amax(-1).tolist())
            hidden, scores = self.engine.prefill(self.model, slots, requests, len(self.turn), self.scored, quiet=self.many)
            self.rows.admit(slots, requests, self.model.logits(hidden))
            if self.reuse:
                self.turn[:] = requests[0].prompt
            for (_, row), values in zip(entering, scores, strict=True):
                if not all(map(sound, values)):
                    self.clear()
                self.engine.check_finite(values, self.requests[row].name)
                own += [Token(row, id_, value) for id_, value in zip(self.requests[row].prompt, values, strict=False)]
        for slot, row in newcomers:
            self.live[slot] = row
            self.ended(slot)
        return own

    def choose(self) -> None:
        """Sample a token for each row. If the device can run ahead, the next decode step is launched before the host reads
        them, so that a row's end is known one step late."""
        rows, live = self.rows, {slot: self.requests[row] for slot, row in self.live.items()}
        at = [len(live[slot].prompt) + live[slot].made if slot in live else 0 for slot in range(self.n_slots)]
        ids, total = rows.choose()
        fetched = runtime.fetch(ids, total, *([logprobs_of(rows.logits, ids)] if self.logprobs else []))
        self.step = ids, rows.positions, at
        if runtime.runs_ahead(ids.device) and any(r.made + 1 < r.most for r in live.values()):
            self.forward()
        rows.advance()
        self.drawn = fetched()
        idle = [slot for slot in range(self.n_slots) if slot not in self.live]
        self.scrub(idle, [self.drawn[1][slot] for slot in idle])
        for slot, row in sorted(self.live.items()):
            if not math.isfinite(self.drawn[1][slot]):
                request = self.requests[row]
                step = f"new token {request.made + 1}, at position {len(request.prompt) + request.made}"
                self.clear()
                raise self.engine.not_finite(request.name, f"the logits of {step}, are")

    def forward(self) -> None:
        """Run the decode step of the sampled tokens, unless already launched: it gives the next logits."""
        if self.step is not None:
            self.cache.logits = self.rows.logits = self.take(*self.step)
            self.step = None

    def hand_out(self) -> Iterator[Token]:
        """What was drawn, row by row; the consumer may end the row by what it gets."""
        ids, _, *values = self.drawn or ([], [])
        for slot, row in sorted(self.live.items()):
            request = self.requests[row]
            if ids[slot] == self.eos_id:
                request.finish_reason = "stop"
            else:
                request.made += 1
                yield Token(row, ids[slot], values[0][slot] if values else None)
                if request.made == request.most and not request.finish_reason:
                    request.finish_reason = "length"
            self.ended(slot)

    def scrub(self, slots: list[int], totals: list[float]) -> None:
        """Zero the cache of these slots where logits were not finite: with a mask (on a GPU), a weight of 0 times NaN that an
        ended row has left there would be NaN for the next sequence."""
        for slot, total in zip(slots, totals, strict=True):
            if not math.isfinite(total):
                self.cache.data[:, :, slot].zero_()

    def clear(self) -> None:
        """After an error, for the next call, all of it."""
        self.cache.data.zero_()
        self.cache.turn = None

    def ended(self, slot: int) -> None:
        """Free the slot if its row has come to an end."""
        if self.requests[self.live[slot]].finish_reason:
            del self.live[slot]
            next(self.bar, None)


class EagerRun:
    """One call through the model's own `forward(tokens, start_pos)`, as in the reference: prefill a batch up to the end of its
    shortest prompt, then go position by position; longer prompts keep their own tokens. It has the interface of `Run`. More
    prompts than max_batch_size go batch by batch."""

    def __init__(
        self,
        engine: "Engine",
        requests: list[Request],
        sampling: Sampling,
        eos_id: int,
        logprobs: bool,
        scored: bool,
        sampler: Sampler,
    ) -> None:
        self.engine, self.model, self.requests, self.eos_id = engine, engine.model, requests, eos_id
        self.sampling, self.logprobs, self.scored, self.sampler = sampling, logprobs, scored, sampler
        self.waiting, self.live = collections.deque(range(len(requests))), dict[int, int]()  # row of the batch: request
        self.out: list[Token] = []
        self.start, self.end, self.batch = 0, 0, list[int]()
        self.tokens = torch.zeros(0, 0, dtype=torch.int64, device="cpu")
        self.rows = Rows(0, 0, device_of(engine.model), sampling, False, sampler)
        engine.state.call = self
        settle(engine.model)

    def next(self) -> list[Token]:
        """The next position of the batch. Returns the tokens of the prompts that it passes, with their log probabilities, if
        these are asked for."""
        if self.engine.state.call is not self:
            raise InputError(ANOTHER_CALL)
        own = [] if self.live else self.begin()
        requests, end = [self.requests[row] for row in self.batch], self.end
        logits = self.model.forward(self.tokens[:, self.start : end], self.start).float()
        self.rows.logits, self.rows.positions = logits[:, -1], torch.full_like(self.rows.positions, end)
        if self.scored:
            following = self.tokens[:, self.start + 1 : end + 1]
            given = (
                logprobs_of(logits[:, : following.shape[1]].flatten(0, 1), following.flatten()).view(following.shape).tolist()
            )
            for i, (row, request) in enumerate(zip(self.batch, requests, strict=True)):
                values = given[i][: max(0, len(request.prompt) - self.start - 1)]
                self.engine.check_finite(values, request.name)
                own += [Token(row, request.prompt[self.start + 1 + n], value) for n, value in enumerate(values)]
        self.start, self.end = end, end + 1
        self.out = []
        if end < self.tokens.shape[1]:
            self.choose(requests, end)
        for i in [i for i, row in self.live.items() if self.ended(i, row)]:
            del self.live[i]
        return own

    def begin(self) -> list[Token]:
        """Take the next batch of requests. Returns their first tokens, if the prompts are to be scored."""
        self.batch = [self.waiting.popleft() for _ in range(min(len(self.waiting), self.model.params.max_batch_size))]
        self.live = dict(enumerate(self.batch))
        requests, device = [self.requests[row] for row in self.batch], device_of(self.model)
        ends = [len(r.prompt) + (0 if r.finish_reason else r.most) for r in requests]
        self.tokens = torch.zeros(len(requests), max(ends), dtype=torch.int64, device="cpu")
        for tokens, request in zip(self.tokens, requests, strict=True):
            tokens[: len(request.prompt)] = torch.tensor(request.prompt)
        self.tokens = self.tokens.to(device)
        self.start, self.end = 0, min(len(r.prompt) for r in requests)
        seeded = any(r.seed is not None for r in requests)
        self.rows = Rows(len(requests), 0, device, self.sampling, seeded, self.sampler)
        if self.rows.seeds is not None:
            self.rows.seeds = torch.tensor([r.seed for r in requests], dtype=torch.int64, device=device)
        return [Token(row, self.requests[row].prompt[0], 0.0) for row in self.batch] if self.scored else []

    def choose(self, requests: list[Request], end: int) -> None:
        """Choose a token for each row, and keep it where the prompt has none."""
        if self.sampling.repetition_penalty != 1:
            logits = self.rows.logits
            self.rows.seen = torch.zeros(logits.shape, dtype=torch.bool, device=logits.device)
            for i, request in enumerate(requests):
                self.rows.seen[i, self.tokens[i, :end]] = True
                self.rows.seen[i, request.prompt] = True
        tokens, largest = self.rows.choose()
        values = logprobs_of(self.rows.logits, tokens).tolist() if self.logprobs else [None] * len(tokens)
        finite, chosen = largest.tolist(), tokens.tolist()
        for i, (row, request) in enumerate(zip(self.batch, requests, strict=True)):
            if i not in self.live or len(request.prompt) > end or request.finish_reason:
                if len(request.prompt) <= end:
                    self.tokens[i, end] = chosen[i]
                continue
            if not math.isfinite(finite[i]):
                step = f"new token {request.made + 1}, at position {end}"
                raise self.engine.not_finite(request.name, f"the logits of {step}, are")
            self.tokens[i, end] = chosen[i]
            if chosen[i] == self.eos_id:
                request.finish_reason = "stop"
            else:
                self.out.append(Token(row, chosen[i], values[i]))

    def ended(self, i: int, row: int) -> bool:
        """Tell whether a row of the batch needs no further position."""
        request = self.requests[row]
        return bool(request.finish_reason) and self.start >= (len(request.prompt) if self.scored else 0)

    def hand_out(self) -> Iterator[Token]:
        """Yield what was chosen; the consumer may end the row by what it gets."""
        for token in self.out:
            request = self.requests[token.row]
            request.made += 1
            yield token
            if request.made == request.most and not request.finish_reason:
                request.finish_reason = "length"
        self.out = []
        for i in [i for i, row in self.live.items() if self.ended(i, row)]:
            del self.live[i]


ANOTHER_CALL = "another call has used this model's cache since: end a stream before the next call"


def settle(model: nn.Module) -> None:
    """Move caches and rotations to where the model's `forward` would move them: made there, in inference mode, they could not
    be used outside of it."""
    with torch.inference_mode(False), torch.no_grad():
        for module in model.modules() if isinstance(model, nn.Module) else []:
            if isinstance(module, Attention) and not module.cache_k.is_meta:
                like = next(module.parameters())
                module.cache_k, module.cache_v = module.cache_k.to(like), module.cache_v.to(like)
            if isinstance(module, Transformer):
                module.freqs_cis = module.freqs_cis.to(device_of(module))


def sound(logprob: float) -> bool:
    """Tell whether a log probability is valid: not NaN, nor above 0 but for rounding. A masked token's is -inf."""
    return logprob <= 0.1  # NaN is not


class Engine:
    """A model and its decode steps. One call at a time has the cache, and one thread at a time the model."""

    def __init__(self, model: Transformer, backend: Backend | None = None) -> None:
        self.model = model
        self.backend = backend or choose("auto", device_of(model))()
        self.told: str | None = None
        state = _STATES.setdefault(model, State())
        self.lock = state.lock
        self.state = state
        if changed(model) is None:
            self.forward()  # its cache is made now, not when the first call waits for it
        runtime.keep_freed()

    def __reduce__(self) -> tuple[Any, ...]:
        """Copied and pickled without the lock, and without steps, which are this process's."""
        return _restored, (self.model, self.backend.name)

    def check_sizes(self) -> None:
        """Raise InputError if a caller has set params beyond the cache that the model was built with."""
        for layer in getattr(self.model, "layers", ()):
            held = getattr(getattr(layer, "attention", None), "cache_k", None)
            if held is None or held.ndim != 4:
                return
            for name, have in zip(("max_batch_size", "max_seq_len"), held.shape, strict=False):
                if (asked := getattr(self.model.params, name)) > have:
                    raise InputError(
                        f"params.{name} is {asked}, but the model was built with a cache for {have}: build it anew"
                    )
            return

    def why_eager(self) -> str | None:
        """Return why a call goes through the model's own `forward`; None if the engine takes it."""
        if self.backend.name == "eager":
            return "the backend is eager"
        return changed(self.model)

    def tell(self, why: str) -> None:
        """Say once for each change that answers take longer now, on stderr."""
        if self.backend.name != "eager" and why != self.told and ranks.global_rank() == 0:
            print(f"llama: {why}: generating through the model's own forward, which is slower", file=sys.stderr)
        self.told = why

    def forward(self) -> Forward:
        """Return the model's weights as they are now, with its cache, which is made where there is none that fits."""
        if self.state.cache is None or not self.state.cache.is_of(self.model):
            self.state.cache = KVCache.adopt(self.model)
        return Forward(self.model, self.state.cache)

    def as_built(self) -> torch.autocast:
        """In the dtype that the model was built with, whatever a caller's autocast says."""
        return torch.autocast(device_of(self.model).type, enabled=False)

    @torch.inference_mode()
    def run(
        self,
        requests: list[Request],
        sampling: Sampling,
        eos_id: int,
        logprobs: bool = False,
        echo: bool = False,
        reuse: bool = False,
        sampler: Sampler = sample_top_p,
        watched: bool = False,
    ) -> Iterator[Token]:
        """Yield each prompt's new ids as they are made; with echo its own ids first. EOS is not yielded.

        All requests have a seed, or none. reuse: of a single request, those first ids are not computed again whose keys
        and values the run before left, if that had `reuse` too. sampler: chooses by probabilities (B, vocab) and top_p.
        watched: the caller's code runs between two tokens, and may change the model.
        """
        for request in requests:
            if request.most == 0 and not request.finish_reason:
                request.finish_reason = "length"
        scored = echo and logprobs  # the prompts' own ids have log probabilities to be computed
        if echo and not scored:
            yield from (Token(row, id_, None) for row, request in enumerate(requests) for id_ in request.prompt)
        if not requests or (not scored and all(r.finish_reason for r in requests)):
            return
        self.check_sizes()
        run: Run | EagerRun
        with self.lock, ranks.linked():
            if why := self.why_eager():
                self.tell(why)
                run = EagerRun(self, requests, sampling, eos_id, logprobs, scored, sampler)
            else:
                run = Run(self, requests, sampling, eos_id, logprobs, scored, reuse, sampler, watched)
        while run.waiting or run.live:
            with self.lock, ranks.linked(), ranks.unbroken(), self.as_built():
                own = run.next()
            yield from own
            yield from run.hand_out()

    def prefill(
        self, forward: Forward, slots: list[int], requests: list[Request], start: int, scored: bool, quiet: bool
    ) -> tuple[torch.Tensor, list[list[float]]]:
        """Each prompt, from its id `start` on, through the model once: the hidden state of each one's last id, (B, dim),
        and, if asked for, the log probabilities of each one's ids, each read off the position before it; 0.0 for the first."""
        prompts, device = [request.prompt[start:] for request in requests], forward.device
        lengths = [len(p) for p in prompts]
        packed = torch.tensor([id_ for p in prompts for id_ in p] + [0], device=device)
        last_hidden, scores, first = [], [0.0], 0
        chunks = list(chunked(lengths, PREFILL_CHUNK, BLOCK))
        bar = runtime.progress(chunks, lambda chunk: sum(n for _, _, n in chunk), "reading prompts", "ids")
        for pieces in chunks if quiet else bar:
            ends = list(itertools.accumulate(n for _, _, n in pieces))
            batch = Batch.of([(slots[i], start + done, n) for i, done, n in pieces], device)
            final = [end - 1 for end, (i, done, n) in zip(ends, pieces, strict=True) if done + n == lengths[i]]
            at = torch.tensor(final, dtype=torch.int64, device=device)
            hidden = forward.hidden(packed[first : first + ends[-1]], batch, wanted=None if scored else at)
            if scored:
                scores += score(forward.logits, hidden, packed[first + 1 :])
                hidden = hidden[at]
            last_hidden.append(hidden)
            first += ends[-1]
        starts = itertools.accumulate(lengths, initial=0)
        each = [[0.0, *scores[i + 1 : i + n]] if scored else [] for i, n in zip(starts, lengths, strict=False)]
        return torch.cat(last_hidden), each

    @torch.inference_mode()
    def score(self, sequences: list[list[int]], starts: list[int], names: list[str]) -> list[list[float]]:
        """The log probabilities of each sequence's ids from its start, 1 or more, on. The engine packs whole sequences side by
        side, PREFILL_CHUNK ids or one sequence at a time, and neither needs nor touches the cache."""
        self.check_sizes()
        if why := self.why_eager():
            self.tell(why)
            settle(self.model)
            self.state.call = None  # it writes into the cache
        forward = None if why else self.forward()
        packs: list[list[int]] = []
        room = 0
        for i, sequence in enumerate(sequences):
            if why or len(sequence) > room:
                packs, room = [*packs, []], PREFILL_CHUNK
            packs[-1].append(i)
            room -= len(sequence)
        values: list[list[float]] = []
        device = device_of(self.model)
        for pack in runtime.progress(packs, lambda pack: sum(len(sequences[i]) for i in pack), "scoring", "ids"):
            ids = torch.tensor([id_ for i in pack for id_ in sequences[i]], device=device)
            offsets = itertools.accumulate((len(sequences[i]) for i in pack), initial=0)
            wanted = [[first + n for n in range(starts[i], len(sequences[i]))] for i, first in zip(pack, offsets, strict=False)]
            at = torch.tensor([n for places in wanted for n in places], dtype=torch.int64, device=device)
            with ranks.unbroken(), self.as_built():
                if forward is None:
                    scores = iter(logprobs_of(self.model.forward(ids[None], 0)[0].float()[at - 1], ids[at]).tolist())
                else:
                    batch = Batch.of([(row, 0, len(sequences[i])) for row, i in enumerate(pack)], device)
                    hidden = forward.hidden(ids, batch, keep=False, wanted=at - 1)
                    scores = iter(score(forward.logits, hidden, ids[at]))
            for i, places in zip(pack, wanted, strict=True):
                values.append(list(itertools.islice(scores, len(places))))
                self.check_finite(values[-1], names[i])
        return values

    def check_finite(self, values: list[float], name: str) -> None:
        if not all(map(sound, values)):
            raise self.not_finite(name, "a token's log probability is")

    def not_finite(self, name: str, what: str) -> NumberError:
        dtype = str(next(self.model.parameters()).dtype).removeprefix("torch.")
        wider = {"float16": "'bfloat16' or 'float32'", "bfloat16": "'float32'"}.get(dtype)
        or_dtype = f", or build with dtype={wider}: {dtype} may not hold what they compute" if wider else ""
        return NumberError(f"{name}: {what} not finite; the weights are damaged: compare with checklist.chk{or_dtype}")


def score(logits: Callable[[torch.Tensor], torch.Tensor], hidden: torch.Tensor, following: torch.Tensor) -> list[float]:
    """Return the log probabilities, at positions whose hidden states (N, dim) are given, of the ids that follow."""
    values: list[float] = []
    for i in range(0, len(hidden), LOGPROB_CHUNK):
        some = logits(hidden[i : i + LOGPROB_CHUNK])
        values += logprobs_of(some, following[i : i + len(some)]).tolist()
    return values


def device_of(model: nn.Module) -> torch.device:
    """Where a model's tokens go: a caller may have put in any object with a `forward`."""
    return next((p.device for p in getattr(model, "parameters", list)()), torch.device("cpu"))


def _restored(model: Transformer, backend: str) -> "Engine":
    return Engine(model, choose(backend, device_of(model))())


def common_prefix(a: list[int], b: list[int]) -> int:
    """How many ids both begin with."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
