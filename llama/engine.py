"""The one loop: prompts of ids in, new ids out, one by one.

Rows of the cache are slots. Each prompt waits for a slot, goes through the model once, then steps together with the rest;
when it ends, the next one takes its slot between two steps. An idle slot steps on, since the rows of a batch share their
draws, where its row ended, or on the CPU at position 0. Of text the loop knows nothing.

    slot 0   a a a a A A A A A | d d D D D      lower case: the prompt's ids, packed with those of others into one forward
    slot 1   b b B B B B B B B   B B B B B      upper case: new ids, one a step; a's last step is followed by d's prefill
"""

import collections
import contextlib
import itertools
import math
import threading
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch

from . import ranks, runtime
from .attention import BLOCK
from .cache import Batch, chunked
from .decode import Decoder
from .errors import InputError, NumberError
from .memory import LOGPROB_CHUNK, PREFILL_CHUNK
from .model import Transformer
from .sampling import Sampling, logprobs_of, next_ids, penalize, seeded_noise

_LOCKS: weakref.WeakKeyDictionary[Transformer, threading.RLock] = weakref.WeakKeyDictionary()  # of models: each has one cache
SMALL = 1 << 19  # weights of the largest matrix, below which one thread multiplies a few rows the fastest

FinishReason = Literal["stop", "length"]


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

    def __init__(self, n: int, model: Transformer, sampling: Sampling, seeded: bool) -> None:
        vocab, device = model.vocab_size, model.device
        self.sampling = sampling
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
        """The next ids (B,), and a sum (B,) that is finite only if all logits of the row are; rank 0's, on all ranks."""
        logits, noise = self.logits, None
        if self.seen is not None:
            logits = penalize(logits, self.seen, self.sampling.repetition_penalty)
        if self.seeds is not None:
            noise = seeded_noise(self.seeds, self.positions, logits.shape[1])
        ids, total = next_ids(logits, self.sampling, noise), self.logits.sum(-1)
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
    ) -> None:
        self.engine, self.model, self.requests, self.eos_id = engine, engine.model, requests, eos_id
        self.logprobs, self.scored, self.reuse = logprobs, scored, reuse
        self.cache = self.model.ready_cache()
        self.follow()
        beyond, self.cache.logits = self.cache.logits, None
        if beyond is not None and not ranks.from_rank0(beyond.sum()).isfinite():
            self.clear()  # a step was taken before all rows were known to have ended
        kept = self.cache.turn or [] if reuse else []
        # A list of this call's own, which says that the cache is. A prompt's last id is computed anew: it has the logits.
        self.cache.turn = self.turn = kept[: common_prefix(kept, requests[0].prompt[:-1])]
        self.n_slots = min(len(requests), self.model.params.max_batch_size)
        self.take = engine.decoder.begin(self.n_slots)
        self.rows = Rows(self.n_slots, self.model, sampling, any(r.seed is not None for r in requests))
        self.waiting = collections.deque(range(len(requests)))
        self.live: dict[int, int] = {}  # slot: row
        self.drawn: list[list[Any]] = []  # by the last step: ids of the slots, sums, log probabilities
        self.step: tuple[torch.Tensor, torch.Tensor, list[int]] | None = None  # that brings these into the cache
        self.many = len(requests) > self.n_slots
        self.bar = runtime.progress(requests if self.many else [], lambda _: 1, "answering", "prompts")
        next(self.bar, None)

    def follow(self) -> None:
        """Have the caller's stream wait for what was launched on another: after a row's end a step may still be on its way."""
        if self.model.device.type == "cuda":
            before, self.cache.stream = self.cache.stream, torch.cuda.current_stream(self.model.device)
            if before is not None and before != self.cache.stream:
                self.cache.stream.wait_stream(before)

    def check(self) -> None:
        """Before the cache is used: another call may have used it since."""
        if self.model.cache is not self.cache or self.cache.turn is not self.turn:
            raise InputError("another call has used this model's cache since: end a stream before the next call")

    def next(self) -> list[Token]:
        """One more id for each row, into `drawn`; those who wait take the slots that have become free. Returns the ids of
        their prompts, with log probabilities, if these are asked for."""
        self.check()
        self.follow()
        if self.live:
            self.forward()
            if self.reuse:
                self.turn.append(self.drawn[0][0])
        self.drawn, self.step, own = [], None, []
        if self.waiting and len(self.live) < self.n_slots:
            own = self.admit()
        if self.live:
            self.choose()
        return own

    def admit(self) -> list[Token]:
        """Give free slots to those who wait, all of them through the model in one pass."""
        free = [slot for slot in range(self.n_slots) if slot not in self.live]
        newcomers = [(slot, self.waiting.popleft()) for slot in free[: len(self.waiting)]]
        entering = [(slot, row) for slot, row in newcomers if self.scored or not self.requests[row].finish_reason]
        own: list[Token] = []
        if entering:
            slots, requests = [slot for slot, _ in entering], [self.requests[row] for _, row in entering]
            self.scrub(slots, self.rows.logits[slots].sum(-1).tolist())
            hidden, scores = self.engine.prefill(slots, requests, len(self.turn), self.scored, quiet=self.many)
            self.rows.admit(slots, requests, self.model.logits(hidden))
            if self.reuse:
                self.turn[:] = requests[0].prompt
            for (_, row), values in zip(entering, scores, strict=True):
                if not all(map(math.isfinite, values)):
                    self.clear()
                self.engine.check_finite(values, self.requests[row].name)
                own += [Token(row, id_, value) for id_, value in zip(self.requests[row].prompt, values, strict=False)]
        for slot, row in newcomers:
            self.live[slot] = row
            self.ended(slot)
        return own

    def choose(self) -> None:
        """Draw an id for each row. Where the device can, it goes on while the host reads them: which rows have ended is
        then known a step late."""
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
                step = f"new id {request.made + 1}, at position {len(request.prompt) + request.made}"
                self.clear()
                raise self.engine.not_finite(request.name, f"the logits of {step}, are")

    def forward(self) -> None:
        """The drawn ids through the model, if that has not been done: keys and values, and the logits for the next."""
        if self.step is not None:
            with self.engine.by_one_thread():
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
        """Take out of the cache what the rows that ended in these slots have left, if it is not finite: a row steps on after
        its end, and a masked zero times NaN would be NaN for the next one there (where there are masks: on a GPU)."""
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


class Engine:
    """A model and its decode steps. One call at a time has the cache, and one thread at a time the model."""

    def __init__(self, model: Transformer) -> None:
        self.model = model
        self.decoder = Decoder(model)
        self.lock = _LOCKS.setdefault(model, threading.RLock())
        args = model.params
        self.small = model.device.type == "cpu" and args.dim * max(2 * args.ffn_width, args.vocab_size) < SMALL
        runtime.keep_freed()

    def __reduce__(self) -> tuple[Any, ...]:
        """Copied and pickled without the lock, and without steps, which are this process's."""
        return Engine, (self.model,)

    def as_built(self) -> torch.autocast:
        """In the dtype that the model was built with, whatever a caller's autocast says."""
        return torch.autocast(self.model.device.type, enabled=False)

    @contextlib.contextmanager
    def by_one_thread(self) -> Iterator[None]:
        """A step of a model so small that threads take as long to meet as to multiply, and on a busy machine 30 times as long.
        In the main thread alone, since PyTorch gives the number that it sets to threads yet to come as well."""
        if not self.small or threading.current_thread() is not threading.main_thread():
            yield
            return
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            yield
        finally:
            torch.set_num_threads(threads)

    @torch.inference_mode()
    def run(
        self,
        requests: list[Request],
        sampling: Sampling,
        eos_id: int,
        logprobs: bool = False,
        echo: bool = False,
        reuse: bool = False,
    ) -> Iterator[Token]:
        """Yield each prompt's new ids as they are made; with echo its own ids first. EOS is not yielded.

        All requests have a seed, or none. reuse: of a single request, those first ids are not computed again whose keys
        and values the run before left, if that had `reuse` too.
        """
        for request in requests:
            if request.most == 0 and not request.finish_reason:
                request.finish_reason = "length"
        scored = echo and logprobs  # the prompts' own ids have log probabilities to be computed
        if echo and not scored:
            yield from (Token(row, id_, None) for row, request in enumerate(requests) for id_ in request.prompt)
        if not requests or (not scored and all(r.finish_reason for r in requests)):
            return
        with self.lock, ranks.linked():
            run = Run(self, requests, sampling, eos_id, logprobs, scored, reuse)
        while run.waiting or run.live:
            with self.lock, ranks.linked(), ranks.unbroken(), self.as_built():
                own = run.next()
            yield from own
            yield from run.hand_out()

    def prefill(
        self, slots: list[int], requests: list[Request], start: int, scored: bool, quiet: bool
    ) -> tuple[torch.Tensor, list[list[float]]]:
        """Each prompt, from its id `start` on, through the model once: the hidden state of each one's last id, (B, dim),
        and, if asked for, the log probabilities of each one's ids, each read off the position before it; 0.0 for the first."""
        prompts, device = [request.prompt[start:] for request in requests], self.model.device
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
            hidden = self.model.hidden(packed[first : first + ends[-1]], batch, wanted=None if scored else at)
            if scored:
                scores += self._score(hidden, packed[first + 1 :])
                hidden = hidden[at]
            last_hidden.append(hidden)
            first += ends[-1]
        starts = itertools.accumulate(lengths, initial=0)
        each = [[0.0, *scores[i + 1 : i + n]] if scored else [] for i, n in zip(starts, lengths, strict=False)]
        return torch.cat(last_hidden), each

    @torch.inference_mode()
    def score(self, sequences: list[list[int]], starts: list[int], names: list[str]) -> list[list[float]]:
        """The log probabilities of each sequence's ids from its start, 1 or more, on. The cache is neither needed nor
        touched: whole sequences are packed side by side, PREFILL_CHUNK ids or one sequence at a time."""
        packs: list[list[int]] = []
        room = 0
        for i, sequence in enumerate(sequences):
            if len(sequence) > room:
                packs, room = [*packs, []], PREFILL_CHUNK
            packs[-1].append(i)
            room -= len(sequence)
        values: list[list[float]] = []
        device = self.model.device
        for pack in runtime.progress(packs, lambda pack: sum(len(sequences[i]) for i in pack), "scoring", "ids"):
            ids = torch.tensor([id_ for i in pack for id_ in sequences[i]], device=device)
            batch = Batch.of([(row, 0, len(sequences[i])) for row, i in enumerate(pack)], device)
            offsets = itertools.accumulate((len(sequences[i]) for i in pack), initial=0)
            wanted = [[first + n for n in range(starts[i], len(sequences[i]))] for i, first in zip(pack, offsets, strict=False)]
            at = torch.tensor([n for places in wanted for n in places], dtype=torch.int64, device=device)
            with ranks.unbroken(), self.as_built():
                scores = iter(self._score(self.model.hidden(ids, batch, keep=False, wanted=at - 1), ids[at]))
            for i, places in zip(pack, wanted, strict=True):
                values.append(list(itertools.islice(scores, len(places))))
                self.check_finite(values[-1], names[i])
        return values

    def _score(self, hidden: torch.Tensor, following: torch.Tensor) -> list[float]:
        """Log probabilities, at positions whose hidden states (N, dim) are given, of the ids that follow."""
        values: list[float] = []
        for i in range(0, len(hidden), LOGPROB_CHUNK):
            logits = self.model.logits(hidden[i : i + LOGPROB_CHUNK])
            values += logprobs_of(logits, following[i : i + len(logits)]).tolist()
        return values

    def check_finite(self, values: list[float], name: str) -> None:
        if not all(map(math.isfinite, values)):
            raise self.not_finite(name, f"the log probability of id {[*map(math.isfinite, values)].index(False)} is")

    def not_finite(self, name: str, what: str) -> NumberError:
        dtype = str(self.model.dtype).removeprefix("torch.")
        wider = {"float16": "'bfloat16' or 'float32'", "bfloat16": "'float32'"}.get(dtype)
        or_dtype = f", or build with dtype={wider}: {dtype} may not hold what they compute" if wider else ""
        return NumberError(f"{name}: {what} not finite; the weights are damaged: compare with checklist.chk{or_dtype}")


def common_prefix(a: list[int], b: list[int]) -> int:
    """How many ids both begin with."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
